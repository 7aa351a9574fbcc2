"""A run on a real federation: one SuperLink and two SuperNodes with TLS and node authentication, as processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.federation import APP, federation
from tests.running import Site, ThreadEngine, eventually, main
from tests.tiny import TEXT

from weft.common.ids import ModuleRef
from weft.server.engine_process import Jobs
from weft.server.verify import verify

RUN = """
[run]
name = "alpha"
[base]
source = "{base}"
[rounds]
count = 2
quorum = 2
target = 2
[inner]
steps = 3
batch_size = 2
sequence_length = 32
[codec]
kind = "int8"
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_federation_trains_a_run_that_weft_reads(tmp_path: Path, tiny_base: Path, jobs: Jobs) -> None:
    run, state = tmp_path / "run.toml", tmp_path / "state"
    run.write_text(RUN.format(base=tiny_base))
    with federation(tmp_path / "flower") as flower:
        flower.start_superlink()
        for name in ("one", "two"):
            data = tmp_path / f"{name}.txt"
            data.write_text(TEXT)
            flower.start_supernode(
                name,
                data=str(data),
                base=str(tiny_base),
                state=str(tmp_path / name),
                name=name,
                threads=1,
                idle_minutes=10,
            )
        config = f'run="{run}" state="{state}" task-s=120.0'
        started = flower.flwr("run", str(APP), "here", "--run-config", config)
        run_id = str(started["run-id"])

        eventually(
            lambda: re.search(rf"(?!Started)\b[A-Z]\w+ task \d+ of run {run_id}", flower.log("superlink")),
            lambda: flower.log("superlink") + flower.log("one"),
            within_s=240,
        )
        found = flower.flwr("list", "here", "--run-id", run_id)["runs"][0]
        assert found["status"] == "finished:completed", flower.log("superlink")
    for name in ("one", "two"):
        assert (tmp_path / name / "resident.log").read_text().count("stays resident") == 1
    engine = ThreadEngine(jobs)
    verified = verify(state, ModuleRef.parse("alpha@2"), engine)
    engine.close()
    assert [(item.version, item.num_updates) for item in verified] == [(2, 2)]
    with Site(tmp_path, jobs) as site:
        site.start()
        assert main(["pull", "alpha", "--to", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
