"""What bad input gets, through the commands that people type: a one-line cause, the next command, a code, no loss."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from tests.running import (
    OPERATORS,
    Hand,
    Site,
    ThreadEngine,
    eventually,
    main,
    operator_home,
    working,
    write_run,
)
from tests.tiny import write_tiny_base

from weft.client.transport import Transport
from weft.common.blobs import Files
from weft.common.errors import DiskFull
from weft.common.identity.token import JoinToken
from weft.common.tensors import TensorFile, write_tensors
from weft.server.engine_process import Jobs

USAGE, INPUT, ACCESS, STORAGE, NETWORK, COMPUTE, INTERRUPTED = 2, 3, 4, 6, 7, 8, 130


class Refused(Protocol):
    """Runs a command and checks what it says on its way out."""

    def __call__(self, words: list[str], *, code: int, cause: str, hint: str) -> None: ...


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def check(words: list[str], *, code: int, cause: str, hint: str) -> None:
        capsys.readouterr()
        found = main(words)
        said = capsys.readouterr().err
        assert found == code, said
        error, _, following = said[said.index("error: ") :].partition("\n")
        assert cause in error
        assert following.startswith("  next: ")
        assert hint in following

    return check


# ---- one coordinator for all that is refused while it serves -----------------------------------------------------


@pytest.fixture(scope="module")
def broken_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose weights are so large that the loss is not finite."""
    directory = tmp_path_factory.mktemp("broken") / "base"
    shutil.copytree(tiny_base, directory)
    weights = directory / "model.safetensors"
    with TensorFile(weights) as file:
        tensors = {name: file.array(name) * 1e30 for name in file.header.entries}
    write_tensors(weights, tensors, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def site(
    tiny_base: Path, broken_base: Path, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("open")
    wide = "[topology.lora]\nrank = 512\nalpha = 8.0"
    run_files = [
        write_run(directory / "open.toml", tiny_base, count=5, quorum=50),
        write_run(directory / "wide.toml", tiny_base, wide),
        write_run(directory / "broken.toml", broken_base),
    ]
    with pytest.MonkeyPatch.context() as patch, Site(directory, jobs) as site:
        operator_home(site, patch)
        yield site.start(*run_files)


@pytest.fixture
def nothing_lost(site: Site) -> Iterator[None]:
    """Rounds and their updates are the same after a test, nobody holds a task, and the coordinator answers."""

    def seen() -> dict[str, Any]:
        return {run: [round_.updates for round_ in site.rounds(run)] for run in site.coordinator.runs}

    before = seen()
    yield
    assert seen() == before
    assert not site.coordinator.leases
    assert main(["watch", "--once", "--json"]) == 0


def _token(site: Site, **wanted: Any) -> str:
    return site.create_token(**({"runs": ("open",)} | wanted))


Join = Callable[..., list[str]]


@pytest.fixture
def join(site: Site, tiny_base: Path, text: Path, tmp_path: Path) -> Join:
    """Words of a `weft join` that would work if nothing were wrong."""

    def words(token: str = "", *, data: Path = text, base: Path = tiny_base) -> list[str]:
        given = {"--data": data, "--base": base, "--state": tmp_path / "worker", "--threads": 1}
        options = [str(word) for pair in given.items() for word in pair]
        return ["join", site.address, token or _token(site), *options, "--exit-when-finished"]

    return words


# ---- tokens and keys ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_lost")
def test_a_wrong_token_is_refused(site: Site, refused: Refused, join: Join) -> None:
    real = JoinToken.parse(_token(site))
    wrong = dataclasses.replace(real, secret=bytes(16)).text
    refused(join(wrong), code=ACCESS, cause="the join token is wrong", hint="weft")
    refused(join(wrong[:-3]), code=USAGE, cause="token", hint="")


@pytest.mark.usefixtures("nothing_lost")
def test_an_expired_token_is_refused(site: Site, refused: Refused, join: Join) -> None:
    refused(join(_token(site, ttl_s=1e-6)), code=ACCESS, cause="expired at", hint="weft token create")


def test_a_used_up_token_is_refused_and_those_who_joined_stay(
    site: Site, refused: Refused, join: Join, text: Path
) -> None:
    token = _token(site, num_uses=1)
    first = Hand(site.address, token, text, site.home, "first")
    refused(join(token), code=ACCESS, cause="is used up", hint="weft token create")
    assert Hand(site.address, token, text, site.home, "first").worker_id == first.worker_id


@pytest.mark.usefixtures("nothing_lost")
def test_a_revoked_token_is_refused(site: Site, refused: Refused, join: Join) -> None:
    token = _token(site)
    assert main(["token", "revoke", JoinToken.parse(token).token_id]) == 0
    refused(join(token), code=ACCESS, cause="was revoked", hint="weft token create")


@pytest.mark.usefixtures("nothing_lost")
def test_a_coordinator_with_another_key_gets_nothing(site: Site, refused: Refused, join: Join) -> None:
    members = len(site.coordinator.roster.workers)
    other = dataclasses.replace(JoinToken.parse(_token(site)), pin=bytes(32)).text
    refused(join(other), code=ACCESS, cause="is another coordinator", hint="weft serve")
    assert len(site.coordinator.roster.workers) == members


def test_a_worker_leaves_when_the_coordinator_has_become_another(
    tiny_base: Path, text: Path, jobs: Jobs, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run(tmp_path / "one.toml", tiny_base)
    with Site(tmp_path, jobs) as site:
        operator_home(site, monkeypatch)
        hand = Hand(site.start(run_file).address, site.token, text, site.home, "hand")
        site.stop()
        shutil.rmtree(site.state)
        site.start(run_file)
        refused(
            ["join", "--state", str(hand.state)],
            code=ACCESS,
            cause="does not have the key that it had when this machine joined",
            hint="weft join",
        )
        assert (hand.state / "key").exists()


def test_nobody_there_is_said(refused: Refused, join: Join, site: Site) -> None:
    words = join()
    words[1] = "127.0.0.1:9"
    refused(words, code=NETWORK, cause="127.0.0.1:9 cannot be reached", hint="port is open")


# ---- data, base, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "cause", "hint"),
    [
        ("empty.txt", b"", "holds no text", "data with text"),
        ("binary.txt", b"\xff\xfe\x00\x81", "is not UTF-8 text", "iconv"),
        ("short.txt", b"over and under", "one batch needs 65 tokens", "more data"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON", "one JSON object a line"),
        ("columns.jsonl", b'{"body": "a"}', "has the columns body", "text"),
        ("weights.bin", b"abc", "is of no known kind", ".txt"),
        ("table.parquet", b"PAR1", "cannot read", "parquet"),
    ],
    ids=["empty", "binary", "short", "not-json", "columns", "kind", "parquet"],
)
@pytest.mark.usefixtures("nothing_lost")
def test_data_that_cannot_be_used_is_refused(
    refused: Refused, join: Join, tmp_path: Path, name: str, content: bytes, cause: str, hint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(join(data=tmp_path / name), code=INPUT, cause=cause, hint=hint)


@pytest.mark.usefixtures("nothing_lost")
def test_data_that_is_not_there_is_refused_before_joining(
    site: Site, refused: Refused, join: Join, tmp_path: Path
) -> None:
    members = len(site.coordinator.roster.workers)
    refused(join(data=tmp_path / "nowhere"), code=INPUT, cause="there is no", hint="--data")
    (tmp_path / "bare").mkdir()
    refused(join(data=tmp_path / "bare"), code=INPUT, cause="holds none of", hint="data in it")
    assert len(site.coordinator.roster.workers) == members + 1


@pytest.mark.usefixtures("nothing_lost")
def test_a_base_that_differs_is_refused(
    refused: Refused, join: Join, tiny_base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    refused(join(base=other), code=INPUT, cause="differs from the run's base", hint="the coordinator uses")


@pytest.mark.usefixtures("nothing_lost")
def test_a_worker_without_the_memory_says_what_it_lacks(
    refused: Refused, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.client.workshop.available_bytes", lambda _: 1000)
    refused(join(), code=COMPUTE, cause="the run needs about", hint="free memory")


@pytest.mark.usefixtures("nothing_lost")
def test_a_loss_that_is_not_finite_gives_the_task_back(
    site: Site, refused: Refused, join: Join, broken_base: Path
) -> None:
    words = join(_token(site, runs=("broken",)), base=broken_base)
    refused(words, code=COMPUTE, cause="the loss is", hint="inner.learning_rate")
    assert [event for event in site.events() if "given back: the loss is" in event]


def test_a_worker_goes_on_with_other_runs_when_one_diverges(site: Site, text: Path) -> None:
    hand = Hand(site.address, _token(site, runs=("broken", "open")), text, site.home, "patient")
    with working(hand, leave_when_finished=False):
        eventually(lambda: hand.worker.life.num_accepted and hand.worker.life.unable, site.picture)
        found = next(
            worker
            for worker in site.coordinator.get_status(OPERATORS, run_id="").workers
            if worker.worker_id == hand.worker_id
        )
        assert not hand.gone
    assert "the loss is" in hand.worker.life.unable[0].reason
    assert found.worker_id in site.round("open").contributors


# ---- disks -------------------------------------------------------------------------------------------------------


def _full(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[Path]:
    """Let nothing be written below ``directory`` as long as the list that is returned says so."""
    full = [directory]
    write_at = Files.write_at

    def write(files: Files, path: Path, offset: int, data: bytes) -> None:
        if any(path.is_relative_to(item) for item in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(files, path, offset, data)

    monkeypatch.setattr(Files, "write_at", write)
    return full


@pytest.mark.usefixtures("nothing_lost")
def test_a_worker_whose_disk_is_full_says_so(
    refused: Refused, join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full(monkeypatch, tmp_path / "worker")
    refused(join(), code=STORAGE, cause="no space left", hint="free some space")


def test_a_coordinator_whose_disk_is_full_loses_nothing_and_goes_on(
    tiny_base: Path, text: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(tmp_path, jobs) as site:
        site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1))
        full = _full(monkeypatch, site.state)
        site.engine.failing.append(DiskFull("no space left for the candidate"))
        hand = Hand(site.address, site.token, text, site.home, "hand", base=tiny_base)
        with working(hand):
            eventually(lambda: hand.view.has("no space left"), site.picture)
            assert not hand.gone
            full.clear()
            eventually(lambda: site.version("one") == 1, site.picture)
            assert hand.ended().num_accepted == 1
        assert not site.engine.failing
        assert len([event for event in site.events() if "merged 1 update" in event]) == 1


def test_a_ledger_without_space_refuses_cleanly_and_goes_on(
    tiny_base: Path, jobs: Jobs, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def remember(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened.append(connect(*arguments, **options))
        return opened[-1]

    create = ["token", "create", "--label", "x" * 100]
    with Site(tmp_path, jobs) as site:
        operator_home(site, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", remember)
            site.start(write_run(tmp_path / "one.toml", tiny_base))
        (pages,) = opened[0].execute("PRAGMA page_count").fetchone()
        opened[0].execute(f"PRAGMA max_page_count = {pages}")
        eventually(lambda: main(create) == STORAGE, "the space that is left is used up")
        refused(create, code=STORAGE, cause="no space left", hint="free space")
        opened[0].execute("PRAGMA max_page_count = 1073741823")
        assert main(create) == 0
        site.stop()
        assert site.start().version("one") == 0


# ---- pull --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_lost")
def test_what_is_not_there_cannot_be_pulled(refused: Refused, tmp_path: Path) -> None:
    to = ["--to", str(tmp_path / "adapter")]
    refused(
        ["pull", "nothing", *to],
        code=STORAGE,
        cause="there is no run nothing",
        hint="runs here: broken, open",
    )
    refused(["pull", "open@7", *to], code=STORAGE, cause="7", hint="")
    refused(["pull", "open/3.0", *to], code=STORAGE, cause="3.0", hint="")
    refused(["pull", "open@@", *to], code=USAGE, cause="open@@", hint="")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.usefixtures("nothing_lost")
def test_a_directory_with_something_in_it_is_left_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(["pull", "open", "--to", str(tmp_path)], code=USAGE, cause="is not empty", hint="--to")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_pull_leaves_no_half_directory(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weft.common.export._write_around", interrupt)
        assert main(["pull", "open", "--to", str(tmp_path / "adapter")]) == INTERRUPTED
    assert not list(tmp_path.iterdir())
    assert main(["pull", "open", "--to", str(tmp_path / "adapter")]) == 0


def test_a_half_fetched_blob_is_resumed(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    get_chunk = Transport.get_chunk

    def one_chunk(transport: Transport, *, index: int, **options: Any) -> bytes:
        if index > 0:
            raise KeyboardInterrupt
        return get_chunk(transport, index=index, **options)

    def counted(transport: Transport, *, index: int, **options: Any) -> bytes:
        fetched.append(index)
        return get_chunk(transport, index=index, **options)

    monkeypatch.setattr("weft.client.transfer.IN_FLIGHT", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Transport, "get_chunk", one_chunk)
        assert main(["pull", "wide", "--to", str(tmp_path / "adapter")]) == INTERRUPTED
    monkeypatch.setattr(Transport, "get_chunk", counted)
    assert main(["pull", "wide", "--to", str(tmp_path / "adapter")]) == 0
    assert fetched
    assert 0 not in fetched


def test_a_damaged_blob_is_found_before_it_is_used(site: Site, refused: Refused, tmp_path: Path) -> None:
    path = site.file("open")
    whole = path.read_bytes()
    path.write_bytes(_flipped(whole, len(whole) // 2))
    try:
        refused(["pull", "open", "--to", str(tmp_path / "a")], code=STORAGE, cause="damaged", hint="backup")
        words = ["verify", "open", "--state", str(site.state)]
        assert main(words) == STORAGE
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "a").exists()
    assert main(["pull", "open", "--to", str(tmp_path / "a")]) == 0


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


# ---- weft serve --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tiny_base: Path, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a coordinator that was stopped, and its run file beside it."""
    directory = tmp_path_factory.mktemp("kept")
    with Site(directory, jobs) as site:
        site.start(write_run(directory / "one.toml", tiny_base))
    return directory


@pytest.fixture
def serve(
    kept: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Words of a `weft serve` that would resume a copy of the kept state if nothing were wrong."""
    monkeypatch.setattr("weft.server.app.EngineProcess", lambda: ThreadEngine(jobs))
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    shutil.copytree(kept, tmp_path / "kept")

    def words(*run_files: Path, listen: str = "127.0.0.1:0") -> list[str]:
        state = ["--state", str(tmp_path / "kept" / "state"), "--listen", listen, "--http", "off"]
        return ["serve", *map(str, run_files), *state]

    return words


Serve = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "cause", "hint"),
    [
        ("[merge]\nrul = 'mean'", "merge.rul", "rule"),
        ("[gates]\nheldout = 'a'", "gates", "gate"),
        ("[inner]\nsteps = 'many'", "inner.steps must be a whole number", "weft init"),
        ("[merge]\nrule = 'middle'", "merge.rule", "mean"),
        ("[rounds]\nquorum = 3\ntarget = 2", "rounds.target", "set rounds.target to 3"),
        ("[topology]\nexperts = [2]", "which makes 2 paths", "weft route fit"),
        (
            "[topology]\nexperts = [1, 1, 1]",
            "do not divide the base's 4 layers",
            "topology.layers = [1, 1, 2]",
        ),
        ("[routing]\nmode = 'local'\nrouter = 'nowhere'", "routing.router", "weft route fit"),
        ("[statistics]\nfisher_examples = 4", "statistics.fisher_examples", "fisher"),
        ("[gate]\nheldout = 'nowhere.txt'", "gate.heldout", "training formats"),
    ],
    ids=["key", "section", "type", "value", "quorum", "experts", "layers", "router", "statistics", "heldout"],
)
def test_a_run_file_that_cannot_work_is_refused_by_name(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path, more: str, cause: str, hint: str
) -> None:
    refused(
        serve(write_run(tmp_path / "new.toml", tiny_base, more)),
        code=INPUT if "divide" in cause else USAGE,
        cause=cause,
        hint=hint,
    )


def test_a_run_does_not_change_its_settings(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path
) -> None:
    changed = write_run(tmp_path / "one.toml", tiny_base, steps=9)
    refused(serve(changed), code=USAGE, cause="exists with other settings: inner.steps", hint="run.name")


def test_a_base_with_another_digest_is_refused(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path
) -> None:
    pinned = write_run(
        tmp_path / "new.toml", tiny_base, f'[base]\nsource = "{tiny_base}"\ndigest = "{"0" * 64}"'
    )
    refused(serve(pinned), code=INPUT, cause="base.digest says", hint="the run file pins")


def test_target_modules_that_match_nothing_are_refused(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path
) -> None:
    more = '[topology.lora]\ntarget_modules = ["q_prj"]'
    words = serve(write_run(tmp_path / "new.toml", tiny_base, more))
    refused(
        words, code=INPUT, cause="no linear layer of the base is called q_prj", hint="did you mean q_proj"
    )


@pytest.mark.parametrize("kind", ["vit", "nonsense"])
def test_an_unsupported_model_class_is_refused(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    words = serve(write_run(tmp_path / "new.toml", base))
    refused(words, code=INPUT, cause=kind, hint="AutoModelForCausalLM")


def test_held_out_data_that_cannot_be_used_is_refused_at_the_start(
    refused: Refused, serve: Serve, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "heldout.txt").write_text("")
    words = serve(write_run(tmp_path / "new.toml", tiny_base, '[gate]\nheldout = "heldout.txt"'))
    refused(words, code=INPUT, cause="heldout.txt", hint="")


def test_a_port_that_is_taken_is_refused_and_the_state_is_whole(
    site: Site, refused: Refused, serve: Serve, tiny_base: Path, kept: Path, jobs: Jobs, tmp_path: Path
) -> None:
    refused(
        serve(listen=site.address), code=NETWORK, cause=f"{site.address} is in use", hint="choose another --"
    )
    with Site(tmp_path / "kept", jobs) as again:
        assert again.start().version("one") == 0


def test_a_state_in_use_is_refused(site: Site, refused: Refused, serve: Serve) -> None:
    words = ["serve", "--state", str(site.state), "--listen", "127.0.0.1:0"]
    refused(words, code=STORAGE, cause="another coordinator uses", hint="--state")


@pytest.mark.parametrize(
    ("name", "damage", "cause"),
    [
        ("ledger.db", lambda data: _flipped(data, 3), "ledger.db is damaged"),
        ("ledger.db", lambda data: data[: len(data) // 2], "ledger.db is damaged"),
        ("identity/signing.pem", lambda data: data[:20], "signing.pem"),
        ("identity/authority.pem", lambda data: data[:20], "authority.pem"),
        ("operator.key", lambda data: b"", "operator.key"),
    ],
    ids=["ledger-flipped", "ledger-half", "signing-key", "authority", "operator-key"],
)
def test_a_damaged_state_is_refused_and_left_as_it_is(
    refused: Refused, serve: Serve, tmp_path: Path, name: str, damage: Callable[[bytes], bytes], cause: str
) -> None:
    path = tmp_path / "kept" / "state" / name
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    refused(serve(), code=STORAGE, cause=cause, hint="backup")
    assert path.read_bytes() == damage(whole)


def test_a_state_without_runs_needs_a_run_file(refused: Refused, tmp_path: Path) -> None:
    refused(["serve", "--state", str(tmp_path / "new")], code=USAGE, cause="no run file", hint="weft init")
    assert not (tmp_path / "new").exists()


def test_no_tls_is_for_loopback_alone(refused: Refused, serve: Serve) -> None:
    words = [*serve(listen="0.0.0.0:0"), "--insecure"]
    refused(words, code=USAGE, cause="--insecure refuses to listen on 0.0.0.0", hint="127.0.0.1")


# ---- a worker's own directory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["member.json", "key"])
def test_a_damaged_worker_directory_is_refused(
    site: Site, refused: Refused, text: Path, tmp_path: Path, name: str
) -> None:
    hand = Hand(site.address, _token(site), text, site.home, f"damaged-{name.partition('.')[0]}")
    path = hand.state / name
    path.write_bytes(path.read_bytes()[:10])
    refused(["join", "--state", str(hand.state)], code=STORAGE, cause=name, hint="")


def test_one_process_works_in_a_directory(site: Site, refused: Refused, text: Path) -> None:
    from weft.client.join import alone

    hand = Hand(site.address, _token(site), text, site.home, "locked")
    with alone(hand.state):
        words = ["join", "--state", str(hand.state)]
        refused(words, code=STORAGE, cause="another process already works with", hint="--state DIR")


def test_tiny_bases_are_equal(tiny_base: Path, tmp_path: Path) -> None:
    """What the digests above rest on."""
    again = write_tiny_base(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()
