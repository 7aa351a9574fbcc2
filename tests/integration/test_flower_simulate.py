"""``weft simulate``: clients in processes of Weft's and, in the full campaign, in actors of Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.running import ThreadEngine, main
from tests.tiny import TEXT

from weft.client.flower.simulated import Processes, client_settings
from weft.common.errors import DataError, InputError, UsageError
from weft.common.ids import ModuleRef
from weft.common.parcel import Parcel
from weft.server.engine_process import Jobs
from weft.server.flower.simulate import SimulationOptions, check_options
from weft.server.verify import verify

RUN = """
[run]
name = "alpha"
[base]
source = "{base}"
[rounds]
count = 1
quorum = 2
target = 2
[inner]
steps = 2
batch_size = 2
sequence_length = 32
[codec]
kind = "int8"
"""


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "run.toml").write_text(RUN.format(base=tiny_base))
    (tmp_path / "data.txt").write_text("\n".join(f"{line} {TEXT[:400]}" for line in range(12)))
    return tmp_path / "run.toml"


def simulate(run: Path, tmp_path: Path, engine: str) -> list[str]:
    """The command, without the program."""
    options = ["--clients", "3", "--processes", "1", "--split", "dirichlet:1", "--engine", engine, "--json"]
    data, state = ["--data", str(tmp_path / "data.txt")], ["--state", str(tmp_path / "state")]
    return ["simulate", str(run), *options, *data, *state]


def check(summary: str, state: Path, jobs: Jobs, engine: str) -> None:
    said = json.loads(summary)
    assert (said["engine"], said["rounds"], said["updates"], said["clients"]) == (engine, 1, 2, 3)
    found = ThreadEngine(jobs)
    assert [item.num_updates for item in verify(state, ModuleRef.parse("alpha@1"), found)] == [2]
    found.close()
    dealt = [path.read_text().count("\n") for path in sorted((state / "clients" / "data").iterdir())]
    assert (sum(dealt), len(dealt)) == (12, 3)


def test_a_run_is_simulated_and_verified(
    run: Path, tmp_path: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(simulate(run, tmp_path, "local")) == 0
    check(capsys.readouterr().out, tmp_path / "state", jobs, "local")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_is_simulated_on_flowers_engine(run: Path, tmp_path: Path, jobs: Jobs) -> None:
    # A process of its own: Ray leaves things behind in the one that it was started from.
    command = [sys.executable, "-m", "weft.common.cli", *simulate(run, tmp_path, "flower")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout, tmp_path / "state", jobs, "flower")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--engine", "cluster"],
        ["--data", "nowhere"],
        ["--split", "evenly"],
        ["--engine", "local", "--gpus", "0.5"],
    ],
)
def test_what_cannot_be_simulated_is_said_before_anything_starts(
    run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    assert main(["simulate", str(run), "--state", str(tmp_path / "state"), *arguments]) in (2, 3)
    assert not (tmp_path / "state").exists()


def test_options_are_checked(tmp_path: Path) -> None:
    options = SimulationOptions(state=tmp_path, data=tmp_path / "none", num_clients=1, num_processes=1)
    with pytest.raises(InputError):
        check_options(options, "flower")
    with pytest.raises(UsageError):
        check_options(
            SimulationOptions(state=tmp_path, data=None, num_clients=1, num_processes=1, gpus=1), "local"
        )


@pytest.mark.parametrize("text", [None, "[]", "{", '{"dta": ""}'])
def test_a_client_that_was_not_written_down_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "00003").mkdir()
    if text is not None:
        (tmp_path / "00003" / "node.json").write_text(text)
    with pytest.raises((InputError, UsageError)):
        client_settings(tmp_path, 3)
    with Processes(tmp_path, 1) as processes, pytest.raises((InputError, UsageError)):
        processes.answer(3, Parcel(documents={}))


def test_data_for_too_many_clients_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "simulate",
            str(run),
            "--clients",
            "50",
            "--data",
            str(tmp_path / "data.txt"),
            "--state",
            str(tmp_path / "s"),
        ]
    )
    assert code == DataError.exit_code
    assert "too few" in capsys.readouterr().err
