"""What a worker keeps of its paths: by path, on disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path as FilePath

import numpy as np
import pytest

from weft.client import kept
from weft.client.kept import PATHS_IN_MEMORY, Carried, PathState, PathStates, Sent
from weft.client.trainer.training import TrainResult
from weft.common.codec import CodecKind, CodecSettings, encode_update
from weft.common.ids import Digest, ModuleKey, Path
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import Float32Array

KEY = ModuleKey(0, 0)
SCHEMA = Schema(
    (
        TensorSpec("layer.lora_A.weight", "F32", (4, 6)),
        TensorSpec("layer.lora_B.weight", "F32", (5, 4)),
    )
)
SCHEMAS = {KEY: SCHEMA}
TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.2)
FP32 = CodecSettings(kind=CodecKind.FP32)
VERSION = Digest("a" * 64)


def _tensors(seed: int, schema: Schema = SCHEMA) -> dict[str, Float32Array]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in schema.tensors}


def _result(seed: int, num_steps: int = 4) -> TrainResult:
    moments = {
        f"{part}/{name}": array if part != "step" else np.array([num_steps], np.float32)
        for part in ("exp_avg", "exp_avg_sq", "step")
        for name, array in _tensors(seed).items()
    }
    return TrainResult(
        deltas={KEY: _tensors(seed + 100)},
        optimiser_states={KEY: moments},
        losses=(1.0,) * num_steps,
        num_steps=num_steps,
        num_tokens=10,
        num_examples=8,
    )


def _advance(
    states: PathStates, path: Path, directory: FilePath, *, seed: int, codec: CodecSettings = TERNARY
) -> PathState:
    """As a worker does when an update was accepted."""
    state, result = states.of(path, SCHEMAS), _result(seed)
    residual = state.residuals.get(KEY)
    corrected = residual.apply(result.deltas[KEY]) if residual else result.deltas[KEY]
    update = directory / "update"
    encode_update(update, SCHEMA, corrected, codec)
    sent = Sent(schema=SCHEMA, corrected=corrected, update=update, codec=codec)
    carried = {KEY: Carried(tensors=_tensors(seed + 200), version=VERSION)}
    states.advance(state, result, {KEY: sent}, carried)
    states.save(path, state, changed=[KEY])
    return state


def _same(left: PathState, right: PathState) -> bool:
    if left.num_batches != right.num_batches or left.carried.keys() != right.carried.keys():
        return False
    return all(
        np.array_equal(array, right.optimiser_states[key][name])
        for key, state in left.optimiser_states.items()
        for name, array in state.items()
    ) and all(residual.norm == right.residuals[key].norm for key, residual in left.residuals.items())


def test_a_module_has_a_state_of_its_own_on_each_path(tmp_path: FilePath) -> None:
    states = PathStates(tmp_path / "run")
    one = _advance(states, Path((0, 0)), tmp_path, seed=1)
    other = _advance(states, Path((0, 1)), tmp_path, seed=2)
    assert not _same(one, other)
    assert _same(one, PathStates(tmp_path / "run").of(Path((0, 0)), SCHEMAS))


def test_only_the_paths_used_last_stay_in_memory(tmp_path: FilePath) -> None:
    states = PathStates(tmp_path / "run")
    paths = [Path((0, expert)) for expert in range(PATHS_IN_MEMORY + 1)]
    first = _advance(states, paths[0], tmp_path, seed=1)
    assert states.of(paths[0], SCHEMAS) is first
    for path in paths[1:]:
        states.of(path, SCHEMAS)
    again = states.of(paths[0], SCHEMAS)
    assert again is not first
    assert _same(again, first)
    assert np.array_equal(
        again.carried[KEY].tensors["layer.lora_A.weight"], first.carried[KEY].tensors["layer.lora_A.weight"]
    )
    assert again.carried[KEY].version == VERSION


def test_a_residual_is_sent_with_a_codec_that_leaves_nothing_out(tmp_path: FilePath) -> None:
    states, path = PathStates(tmp_path / "run"), Path((0,))
    state = _advance(states, path, tmp_path, seed=1)
    assert state.residuals[KEY].norm > 0
    _advance(states, path, tmp_path, seed=2, codec=FP32)
    assert state.residuals[KEY].norm == 0
    assert KEY not in _advance(states, Path((1,)), tmp_path, seed=3, codec=FP32).residuals


def test_old_files_go_when_new_ones_count(tmp_path: FilePath) -> None:
    states, path = PathStates(tmp_path / "run"), Path((0,))
    for seed in range(3):
        _advance(states, path, tmp_path, seed=seed)
    assert sorted(file.name for file in (tmp_path / "run" / "0").iterdir()) == [
        "0.0.carried-12",
        "0.0.optimiser-12",
        "0.0.residual-12",
        "state.json",
    ]


def test_a_process_killed_while_it_saves_finds_the_state_before(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> bytes:
        raise Killed

    path = Path((0,))
    before = _advance(PathStates(tmp_path / "run"), path, tmp_path, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "canonical_json", kill)
        with pytest.raises(Killed):
            _advance(PathStates(tmp_path / "run"), path, tmp_path, seed=2)
    found = PathStates(tmp_path / "run").of(path, SCHEMAS)
    assert _same(found, before)
    assert found.num_batches == 4


@pytest.mark.parametrize("name", ["0.0.optimiser-4", "0.0.residual-4", "0.0.carried-4"])
def test_what_is_damaged_starts_afresh(
    tmp_path: FilePath, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    _advance(PathStates(tmp_path / "run"), Path((0,)), tmp_path, seed=1)
    (tmp_path / "run" / "0" / name).write_bytes(b"damaged")
    assert PathStates(tmp_path / "run").of(Path((0,)), SCHEMAS).num_batches == 4
    assert "starts afresh" in caplog.text


def test_a_damaged_index_starts_the_path_afresh(tmp_path: FilePath, caplog: pytest.LogCaptureFixture) -> None:
    _advance(PathStates(tmp_path / "run"), Path((0,)), tmp_path, seed=1)
    (tmp_path / "run" / "0" / "state.json").write_text('{"num_batches": ')
    state = PathStates(tmp_path / "run").of(Path((0,)), SCHEMAS)
    assert (state.num_batches, state.optimiser_states) == (0, {})
    assert "starts afresh" in caplog.text


@pytest.mark.parametrize("anew", [False, True], ids=["in-memory", "on-disk"])
def test_a_state_of_another_rank_starts_afresh(tmp_path: FilePath, *, anew: bool) -> None:
    states = PathStates(tmp_path / "run")
    _advance(states, Path((0,)), tmp_path, seed=1)
    if anew:
        states = PathStates(tmp_path / "run")
    state = states.of(Path((0,)), {KEY: SCHEMA.at_rank(2)})
    assert (state.optimiser_states, state.carried) == ({}, {})
