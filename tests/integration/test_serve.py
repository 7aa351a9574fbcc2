"""The same with real processes and real signals: `weft serve` and `weft join`, killed and stopped."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.running import (
    Hand,
    Program,
    Site,
    eventually,
    main,
    operator_home,
    shorten_leases,
    working,
    write_run,
)

from weft.client.home import Home
from weft.common.protocol import Stage
from weft.server.engine_process import Jobs


@pytest.fixture
def programs() -> Iterator[ExitStack]:
    """Ends what a test started."""
    with ExitStack() as stack:
        yield stack


def test_a_killed_coordinator_goes_on_where_it_was(
    tiny_base: Path,
    text: Path,
    tmp_path: Path,
    programs: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_file = write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=2)
    state, home = ["--state", str(tmp_path / "state")], Home(tmp_path / "home")
    monkeypatch.setenv("WEFT_HOME", str(home.root))

    def serve(name: str, *words: str) -> Program:
        return programs.enter_context(
            Program("serve", *words, *state, home=home.root, directory=tmp_path, name=name)
        )

    first = serve("first", str(run_file), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
    address, token = first.says("weft join").split()[2:4]
    _check_pages(first.says("metrics").split()[1])
    quick = Hand(address, token, text, home, "quick", base=tiny_base)
    slow = Hand(address, token, text, home, "slow", base=tiny_base, holds=True)
    with working(quick, slow):
        eventually(lambda: quick.worker.life.num_accepted == 1 and slow.view.training.is_set())
        first.kill()
        eventually(lambda: quick.view.has("; waits"))
        assert not slow.gone
        slow.view.may_train.set()
        second = serve("second", "--listen", address, "--http", "off", "--no-token")
        assert "1 module(s), 0 of 1 rounds done" in second.says("run one")
        assert second.says("weft join").split()[2:4] == [address, "TOKEN"]
        assert [hand.ended().num_accepted for hand in (quick, slow)] == [1, 1]
    assert main(["watch", "--until-finished"]) == 0
    assert main(["verify", "one@1", *state, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.partition("[")[2].join(["[", ""]))
    assert (found["version"], found["num_updates"]) == (1, 2)
    second.signal(signal.SIGINT)
    assert second.code() == 0
    assert "weft serve with the same --state resumes" in second.shown()


def _check_pages(metrics: str) -> None:
    host, _, path = metrics.removeprefix("http://").partition("/")
    with contextlib.closing(http.client.HTTPConnection(host)) as pages:
        pages.request("GET", f"/{path}")
        assert 'weft_module_version{module="0.0",run="one"} 0.0' in pages.getresponse().read().decode()
        pages.request("GET", "/healthz")
        assert pages.getresponse().status == 200


def test_a_killed_workers_task_is_done_by_another_and_it_comes_back_as_itself(
    tiny_base: Path,
    text: Path,
    jobs: Jobs,
    tmp_path: Path,
    programs: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_leases(monkeypatch, 4.0)
    with Site(tmp_path, jobs) as site:
        operator_home(site, monkeypatch)
        site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1, steps=400))
        where = ["--state", str(tmp_path / "worker")]

        def join(name: str, *words: str) -> Program:
            program = Program("join", *words, *where, home=site.home.root, directory=tmp_path, name=name)
            return programs.enter_context(program)

        killed = join("killed", *site.join_line[2:4], "--data", str(text), "--threads", "1")
        worker_id = killed.says("registered as").split()[-1]
        eventually(
            lambda: [lease for lease in site.coordinator.leases.values() if lease.stage is Stage.TRAINING],
            site.picture,
        )
        killed.kill()
        other = Hand(site.address, site.token, text, site.home, "other", base=tiny_base)
        with working(other):
            eventually(lambda: site.version("one") == 1, site.picture)
        assert [event for event in site.events() if f"of {worker_id} ended: silent for" in event]
        again = join("again")
        assert worker_id in again.says("resuming as")
        again.says("waiting for work")
        again.signal(signal.SIGINT)
        assert again.code() == 0
