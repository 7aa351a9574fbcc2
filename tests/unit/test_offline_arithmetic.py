"""Expressions: what is understood, where what is refused stands, and what it does to models and adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.handmade import (
    LAYER,
    adapter_product,
    block_tensors,
    merge_inputs,
    write_adapter,
    write_model,
)

from weft.common.errors import UsageError
from weft.server.offline.arithmetic import parse_expression
from weft.server.offline.recipe import LoraMode


@pytest.mark.parametrize(
    ("text", "coefficients"),
    [
        ("math", {"math": 1}),
        ("2*math - toxic + 0.5*german", {"math": 2, "toxic": -1, "german": 0.5}),
        ("math*2", {"math": 2}),
        ("-(a - b)", {"a": -1, "b": 1}),
        ("0.5*(a + b)/2 - -c", {"a": 0.25, "b": 0.25, "c": 1}),
        ("(1 + 2)*a", {"a": 3}),
        ("a + a", {"a": 2}),
        ("a - 0*b", {"a": 1, "b": 0}),
        ("  +a ", {"a": 1}),
        ("1e-1*a.b.c", {"a.b.c": 0.1}),
        ("2*'my-model' - \"7b\"", {"my-model": 2, "7b": -1}),
        ("größe + 学", {"größe": 1, "学": 1}),
    ],
)
def test_an_expression_becomes_coefficients(text: str, coefficients: dict[str, float]) -> None:
    assert parse_expression(text) == pytest.approx(coefficients)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("math + * toxic", 'column 8: "* toxic"'),
        ("math + (toxic", "column 8"),
        ("  a + b*c", 'column 9: "c" is an input, and so is'),
        ("a / b", 'column 5: "b" is an input: only numbers'),
        ("a / (1 - 1)", 'column 6: "1 - 1)" is 0'),
        ("a ** 2", 'column 6: "2" stands behind'),
        ("a + f(b)", 'column 5: "f(b)" is no number'),
        ("学 + [b]", 'column 5: "[b]" is no number'),
        ("a if b else c", 'column 1: "a if b else c"'),
        ("True*a", 'column 1: "True*a"'),
        ("a.f().b", "column 1"),
        ("''", "column 1"),
        ("a + 1", "adds the number 1"),
        ("2*3", "adds the number 6"),
        ("2 - 2", "names no input"),
        ("a - a", "cancel out"),
        ("", "column 1"),
        ("a; b", "column 2"),
        ("1e308*a*10", "the coefficient of a is inf"),
        ("(" * 500 + "a" + ")" * 500, "expression"),
        ("a" * 5000, "5000 characters"),
        ("-" * 3000 + "a", "expression"),
        ("a\0b", "expression"),
    ],
)
def test_what_is_no_expression_is_refused_where_it_stands(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_expression(text)
    assert said in raised.value.message
    assert raised.value.hint


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(-9, 9).filter(bool), min_size=1))
def test_a_printed_sum_reads_as_itself(coefficients: dict[str, int]) -> None:
    text = " + ".join(f"({each})*{name}/4" for name, each in coefficients.items())
    assert parse_expression(text) == {name: each / 4 for name, each in coefficients.items()}


def test_models_move_from_their_base_by_the_expression(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, one, two = (block_tensors(rng) for _ in range(3))
    paths = [write_model(tmp_path / name, each) for name, each in (("math", one), ("toxic", two))]
    write_model(tmp_path / "base", base)
    merged = merge_inputs(
        tmp_path / "out", *paths, base=str(tmp_path / "base"), expression="2*math - toxic/4"
    )
    for name, start in base.items():
        wanted = start.astype(np.float64) + 2 * (one[name] - start) - (two[name] - start) / 4
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [LoraMode.EXACT, LoraMode.DENSE, LoraMode.STACK])
def test_a_minus_turns_the_product_of_an_adapter_round(tmp_path: Path, mode: LoraMode) -> None:
    rng = np.random.default_rng(1)
    factors = [(rng.standard_normal((2, 8)), rng.standard_normal((6, 2))) for _ in range(2)]
    paths = [write_adapter(tmp_path / name, {"fc": pair}) for name, pair in zip("ab", factors, strict=True)]
    rank = 0 if mode is LoraMode.STACK else 4
    merged = merge_inputs(tmp_path / "out", *paths, expression="0.5*a - 3*b", lora=mode, rank=rank)
    (a_ri, b_or), (other_a, other_b) = factors
    wanted = 0.5 * b_or @ a_ri - 3 * other_b @ other_a
    np.testing.assert_allclose(adapter_product(merged, "fc"), wanted, rtol=1e-5, atol=1e-5)


def test_with_factors_apart_only_b_is_turned_and_multiplied(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    factors = [(rng.standard_normal((2, 8)), rng.standard_normal((6, 2))) for _ in range(2)]
    paths = [write_adapter(tmp_path / name, {"fc": pair}) for name, pair in zip("ab", factors, strict=True)]
    merged = merge_inputs(tmp_path / "out", *paths, expression="2*a - b", lora=LoraMode.FACTORS)
    (a_ri, b_or), (other_a, other_b) = factors
    wanted = (2 * b_or - other_b) @ (2 * a_ri + other_a) / 3
    np.testing.assert_allclose(adapter_product(merged, "fc"), wanted, rtol=1e-5, atol=1e-5)


def test_negating_one_adapter_is_exact_in_every_mode(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a_ri, b_or = rng.standard_normal((2, 8)), rng.standard_normal((6, 2))
    path = write_adapter(tmp_path / "toxic", {"fc": (a_ri, b_or)}, lora_alpha=4)
    base = write_model(tmp_path / "base", {"fc.weight": rng.standard_normal((6, 8)).astype(np.float32)})
    for mode in LoraMode:
        merged = merge_inputs(tmp_path / mode, path, expression="-toxic/2", base=str(base), lora=mode)
        np.testing.assert_allclose(adapter_product(merged, "fc"), -b_or @ a_ri, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("expression", "said"),
    [("a + c", "b is not in the expression"), ("a + b + c", "c is no input"), ("200*a + b", "add up to 201")],
)
def test_names_and_inputs_have_to_agree(tmp_path: Path, expression: str, said: str) -> None:
    rng = np.random.default_rng(4)
    paths = [write_model(tmp_path / name, block_tensors(rng)) for name in "ab"]
    with pytest.raises(UsageError, match=said):
        merge_inputs(tmp_path / "out", *paths, base=str(paths[0]), expression=expression)


def test_a_name_that_needs_quotes_is_told_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    path = write_model(tmp_path / "my-model", block_tensors(rng))
    with pytest.raises(UsageError) as raised:
        merge_inputs(tmp_path / "out", path, base=str(path), expression="2*my-model")
    assert "write 'my-model' in quotes" in str(raised.value.hint)
    merge_inputs(tmp_path / "out", path, base=str(path), expression="2*'my-model'")


def test_a_model_whose_coefficient_is_zero_leaves_the_base_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base, one, two = (block_tensors(rng) for _ in range(3))
    for name, each in (("base", base), ("a", one), ("b", two)):
        write_model(tmp_path / name, each)
    paths = (tmp_path / "a", tmp_path / "b")
    merged = merge_inputs(tmp_path / "out", *paths, base=str(tmp_path / "base"), expression="0*a + b")
    np.testing.assert_allclose(merged[LAYER.format(0)], two[LAYER.format(0)], rtol=1e-5, atol=1e-5)
