"""``--onto``: what models learned on one version of a base, added to another version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tests.handmade import block_tensors, merge_inputs, write_adapter, write_model

from weft.common.errors import InputError, UsageError
from weft.server.offline.recipe import merge_settings


def write_versions(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    return {
        name: write_model(tmp_path / name, block_tensors(rng), max_position_embeddings=length)
        for name, length in (("old", 64), ("new", 128), ("tuned", 64), ("other", 64))
    }


def tensors_of(seed: int = 0) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    return [dict(block_tensors(rng)) for _ in range(4)]


def test_a_difference_is_added_to_the_new_base(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    merged = merge_inputs(tmp_path / "out", paths["tuned"], base=str(paths["old"]), onto=str(paths["new"]))
    old, new, tuned, _ = tensors_of()
    for name, values in merged.items():
        wanted = tuned[name].astype(np.float64) - old[name] + new[name]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    # What stands beside the weights is the new base's.
    assert '"max_position_embeddings": 128' in (tmp_path / "out" / "config.json").read_text()


def test_differences_are_merged_before_they_are_added(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    options = {"base": str(paths["old"]), "onto": str(paths["new"])}
    inputs = (paths["tuned"], paths["other"])
    old, new, tuned, other = tensors_of()
    merged = merge_inputs(tmp_path / "sum", *inputs, expression="tuned - 0.5*other", **options)
    for name, values in merged.items():
        wanted = new[name] + (tuned[name] - old[name]) - 0.5 * (other[name] - old[name])
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
    settings = merge_settings("sign_majority", {})
    voted = merge_inputs(tmp_path / "vote", *inputs, merge=settings, **options)
    plain = merge_inputs(tmp_path / "plain", *inputs, merge=settings, base=str(paths["old"]))
    for name, values in voted.items():
        np.testing.assert_allclose(values - new[name], plain[name] - old[name], rtol=1e-4, atol=1e-5)


def test_a_version_that_did_not_change_gives_the_tuned_model_back(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    merged = merge_inputs(tmp_path / "out", paths["tuned"], base=str(paths["old"]), onto=str(paths["old"]))
    tuned = tensors_of()[2]
    for name, values in merged.items():
        np.testing.assert_allclose(values, tuned[name], rtol=1e-6, atol=1e-6)


def test_a_vocabulary_that_grew_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    grown = dict(tensors_of()[1])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = np.concatenate([grown[name], grown[name][:2]])
    grown_path = write_model(tmp_path / "grown", grown)
    with pytest.raises(InputError) as raised:
        merge_inputs(tmp_path / "out", paths["tuned"], base=str(paths["old"]), onto=str(grown_path))
    assert "lm_head.weight as [5, 3] and the new base as [7, 3]" in raised.value.message
    assert "vocabularies" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 2}, "the new base has 2"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"tie_word_embeddings": True}, "shares its output layer"),
    ],
)
def test_another_architecture_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    paths = write_versions(tmp_path)
    other = write_model(tmp_path / "another", tensors_of()[1], **change)
    with pytest.raises(InputError, match=said):
        merge_inputs(tmp_path / "out", paths["tuned"], base=str(paths["old"]), onto=str(other))


def test_a_transfer_needs_the_old_base(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    with pytest.raises(UsageError, match="onto needs the base"):
        merge_inputs(tmp_path / "out", paths["tuned"], onto=str(paths["new"]))


def test_adapters_are_movements_already(tmp_path: Path) -> None:
    paths = write_versions(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", {"fc": (np.ones((1, 3)), np.ones((4, 1)))})
    with pytest.raises(UsageError) as raised:
        merge_inputs(tmp_path / "out", adapter, base=str(paths["old"]), onto=str(paths["new"]))
    assert "onto is for models" in raised.value.message
