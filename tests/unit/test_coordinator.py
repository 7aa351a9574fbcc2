"""The coordinator under virtual time, with workers that really sign, encode and upload."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness import (
    SCHEMA,
    DeferredEngine,
    JobRunner,
    Site,
    Worker,
    bare,
    base_pin,
    chunks_of,
    deltas,
    fake_job,
    memory_directory,
    prepare,
    run_file,
    write_update,
)

from weft.common.blobs import manifest_of
from weft.common.codec import encode_update
from weft.common.errors import (
    ConflictingUpdate,
    CorruptState,
    DiskFull,
    EngineFailed,
    ForgedUpdate,
    IdentityMismatch,
    LeaseLost,
    NotFound,
    PermissionRefused,
    RoundClosed,
    RunFileError,
    SessionExpired,
    StateLocked,
    StorageError,
    SubmissionRefused,
    UpdateRejected,
)
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, RunId
from weft.common.manifest import GateOutcome, Signed, open_version
from weft.common.protocol import RoundState, Stage, Unable
from weft.common.statements import UPDATE_TYPE
from weft.server.live import LEASE_S, REJECTIONS_MAX, UPLOADS_PER_MODULE
from weft.server.rounds import GateResult
from weft.server.runfile import RunFile

MODULE = ModuleKey(0, 0)


@pytest.fixture
def open_site() -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []
    directory = memory_directory()

    def make(wanted: RunFile | None = None, **more: Any) -> Site:
        site = Site(directory / f"site{len(sites)}", **more)
        site.add_run(wanted or run_file())
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.crash()
    shutil.rmtree(directory)


def state_of(site: Site) -> tuple[Any, ...]:
    """What a refused call must leave as it is."""
    coordinator = site.coordinator
    return (
        site.accepted(),
        [(run.record, [rounds[-1] for rounds in run.rounds.values()]) for run in coordinator.runs.values()],
        {
            token: dataclasses.replace(lease, expires_s=0, progress_s=0)
            for token, lease in coordinator.leases.items()
        },
        sorted(site.ledger.documents("update")),
    )


def load(site: Site, module: ModuleKey = MODULE, version: int = -1) -> dict[str, Any]:
    from weft.common.tensors import open_module

    record = site.run.versions[module][version]
    with open_module(site.blobs.path(record.digest), SCHEMA) as file:
        return {spec.name: np.array(file.array(spec.name)) for spec in SCHEMA.tensors}


# ---- the way that is meant -------------------------------------------------------------------------------------------


def test_workers_bring_a_run_to_its_last_round(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    for number in range(1, 4):
        tasks = [a.task(), b.task()]
        assert {start.version for task in tasks for start in task.modules} == {number - 1}
        for worker, task in zip((a, b), tasks, strict=True):
            worker.work(task)
        assert site.run.newest(MODULE).version == number
    answer = a.poll()
    assert answer.task is None
    assert answer.finished
    assert answer.wait_reason == "all runs are finished"
    assert [record.num_steps for record in site.run.versions[MODULE]] == [0, 4, 8, 12]


def test_the_manifest_names_parents_contributors_and_gate(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    for worker in (a, b):
        worker.work()
    resolved = site.coordinator.resolve_module(a.caller, ref="alpha/0.0")
    manifest = open_version(resolved.manifests[0], resolved.coordinator_public_key)
    start = site.run.at(MODULE, 0)
    assert manifest.version == 1
    assert [parent.manifest_digest for parent in manifest.parents] == [start.manifest_digest]
    assert {item.worker_id for item in manifest.contributors} == {a.worker_id, b.worker_id}
    assert manifest.gate.outcome is GateOutcome.SKIPPED
    assert manifest.content_digest == site.run.newest(MODULE).digest
    with pytest.raises(IdentityMismatch):
        open_version(resolved.manifests[0], SigningKey.generate().public)


def test_a_published_module_can_be_fetched_and_an_update_cannot(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    base_digest = Digest(site.run.recipe.base.files[0].digest)
    task = a.task()
    update = a.upload(task, a.encode(task)["0.0"])
    for worker in (a, b):
        worker.work()
    record = site.run.newest(MODULE)
    manifest = bare(site.coordinator.get_blob(a.caller, blake3=record.digest))
    assert manifest.size_bytes == record.size_bytes
    chunk = bare(site.coordinator.get_chunk(a.caller, blake3=record.digest, index=0))
    assert chunk == site.blobs.path(record.digest).read_bytes()
    assert bare(site.coordinator.get_chunk(a.caller, blake3=base_digest, index=0)) == b"{}"
    with pytest.raises(NotFound):
        site.coordinator.get_blob(a.caller, blake3=update.blake3)
    assert bare(site.coordinator.get_blob(site.operator, blake3=update.blake3)) == update


def test_a_reference_names_a_module_a_path_or_the_whole(open_site: Callable[..., Site]) -> None:
    site = open_site(
        run_file("[topology]\nexperts = [1, 1]", rounds="count = 2\nquorum = 1\ntarget = 1"),
        make_engine=DeferredEngine,
    )
    (a,) = site.workers("a")
    a.work()
    site.engine.step()  # type: ignore[attr-defined]

    def versions(ref: str) -> list[tuple[int, int]]:
        resolved = site.coordinator.resolve_module(a.caller, ref=ref)
        manifests = [open_version(item, resolved.coordinator_public_key) for item in resolved.manifests]
        return [(manifest.module.level, manifest.version) for manifest in manifests]

    assert versions("alpha") == [(0, 1), (1, 0)]
    assert versions("alpha/path:0.0") == [(0, 1), (1, 0)]
    assert versions("alpha@0") == [(0, 0), (1, 0)]
    assert versions("alpha/1.0") == [(1, 0)]
    for ref in ("beta", "alpha/1.0@1", "alpha@7", "alpha/3.0", "alpha/path:0.1", "alpha/path:0"):
        with pytest.raises(NotFound):
            versions(ref)
    assert len(bare(site.coordinator.list_versions(a.caller, run_id="alpha", module=""))) == 3


def test_a_base_that_changed_on_disk_is_not_served(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    digest = Digest(site.run.recipe.base.files[0].digest)
    path = site.directory / "base" / "config.json"
    path.write_bytes(b"[]")
    with pytest.raises(StorageError, match="changed"):
        site.coordinator.get_blob(a.caller, blake3=digest)
    site.restart()
    a.open_session()
    path.unlink()
    with pytest.raises(StorageError):
        site.coordinator.get_chunk(a.caller, blake3=digest, index=0)


def test_the_same_updates_give_the_same_bytes_whatever_their_order(open_site: Callable[..., Site]) -> None:
    digests = set()
    for order in (("a", "b", "c"), ("c", "a", "b")):
        site = open_site(run_file(rounds="count = 1\nquorum = 3\ntarget = 3"))
        workers = {worker.name: worker for worker in site.workers("a", "b", "c")}
        tasks = {name: workers[name].task() for name in order}
        for name in order:
            workers[name].work(tasks[name])
        digests.add(site.run.newest(MODULE).digest)
    assert len(digests) == 1


# ---- repeats ---------------------------------------------------------------------------------------------------------


def test_every_call_may_be_repeated(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    token = site.token()
    assert a.join(token).worker_id == a.worker_id
    task = a.task()
    assert a.task() == task
    path = a.encode(task)["0.0"]
    assert a.upload(task, path) == a.upload(task, path)
    statement = a.ready(task)
    first = a.submit(task, statement)
    once = state_of(site)
    assert a.submit(task, statement) == first
    assert state_of(site) == once
    b.work()
    assert site.current().number == 2
    assert a.submit(task, statement) == first
    site.restart()
    a.open_session()
    assert a.submit(task, statement) == first
    a.site.coordinator.release_task(a.caller, lease_token=task.lease_token, reason="late")


def test_a_repeated_join_takes_no_second_use_of_the_token(open_site: Callable[..., Site]) -> None:
    site = open_site()
    token = site.token(num_uses=1)
    worker = Worker(site, "w")
    worker.join(token)
    assert [entry.num_uses_left for entry in bare(site.coordinator.list_tokens(site.operator))] == [0]
    assert worker.join(token).worker_id == worker.worker_id


def test_another_payload_for_the_same_task_is_refused(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, _ = site.workers("a", "b")
    task = a.task()
    first, other = a.ready(task), a.ready(task, salt="x")
    a.submit(task, first)
    before = state_of(site)
    with pytest.raises(ConflictingUpdate):
        a.submit(task, other)
    assert state_of(site) == before


def test_two_threads_with_one_statement_get_one_receipt(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, _ = site.workers("a", "b")
    task = a.task()
    statement = a.ready(task)
    receipts: list[Any] = []
    threads = [threading.Thread(target=lambda: receipts.append(a.submit(task, statement))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receipts) == 8
    assert len({receipt.receipt_blake3 for receipt in receipts}) == 1
    assert len(site.accepted()) == 1


class ThreadedEngine:
    """Jobs run in a thread of their own, as with the real process."""

    def __init__(self, run: JobRunner) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1)

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        return self._pool.submit(self._run, job)

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def test_workers_in_threads_tear_nothing(open_site: Callable[..., Site]) -> None:
    site = open_site(
        run_file(rounds="count = 6\nquorum = 2\ntarget = 3\nstraggler_factor = 0"), make_engine=ThreadedEngine
    )
    members = site.workers("a", "b", "c", "d")
    errors: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            while not (answer := worker.poll()).finished:
                if answer.task is not None:
                    with contextlib.suppress(RoundClosed, LeaseLost):
                        worker.work(answer.task)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    site.engine.close()
    assert errors == []
    assert site.coordinator.state.view(site.run).finished
    digests = [(module, number, worker) for module, number, worker, _ in site.accepted()]
    assert len(digests) == len(set(digests))
    assert [record.version for record in site.run.versions[MODULE]] == list(range(7))
    before = site.accepted()
    site.restart()
    assert site.accepted() == before


def test_a_coordinator_starts_without_torch_and_without_a_compiler() -> None:
    """It serves in a second, and a crash test costs a fraction of one."""
    code = (
        "import sys, weft.server.app, weft.server.coordinator, weft.server.service; "
        "print({'torch', 'numba', 'llvmlite'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_late_update_meets_a_closed_round(open_site: Callable[..., Site]) -> None:
    site = open_site(run_file(rounds="count = 3\nquorum = 1\ntarget = 2\nstraggler_factor = 0"))
    a, b = site.workers("a", "b")
    late = b.task()
    statement = b.ready(late)
    a.work()
    before = state_of(site)
    with pytest.raises(RoundClosed):
        b.submit(late, statement)
    assert state_of(site) == before
    answer = b.report(late)
    assert answer.stop
    assert "round 1 closed: quorum" in answer.reason
    with pytest.raises(LeaseLost):
        b.submit(late, statement)


def test_an_expired_lease_changes_nothing(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    task = a.task()
    statement = a.ready(task)
    site.clock.advance(LEASE_S + 0.1)
    before = site.accepted()
    for call in (
        lambda: a.submit(task, statement),
        lambda: a.report(task),
        lambda: a.upload(task, a.encode(task)["0.0"]),
    ):
        with pytest.raises(LeaseLost):
            call()
    site.coordinator.tick()
    with pytest.raises(LeaseLost):
        a.submit(task, statement)
    assert site.accepted() == before
    again = a.task()
    assert again.lease_epoch > task.lease_epoch
    with pytest.raises((LeaseLost, ForgedUpdate)):
        a.submit(again, statement)
    assert site.accepted() == before
    b.work()


def test_a_jump_of_the_wall_clock_ends_no_lease(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    for seconds in (3600.0, -7200.0):
        site.clock.jump(seconds)
        site.coordinator.tick()
        assert not a.report(task).stop
    a.work(task)


FORGERIES: dict[str, Callable[[Worker, Any], dict[str, Any]]] = {
    "run": lambda w, t: {"run": "beta"},
    "task": lambda w, t: {"task": "t-99"},
    "worker": lambda w, t: {"worker": "w-other"},
    "epoch": lambda w, t: {"epoch": t.lease_epoch + 1},
    "recipe": lambda w, t: {"recipe": "0" * 64},
    "modules": lambda w, t: {"updates": []},
    "loss": lambda w, t: {"loss_last": 1e300},
    "format": lambda w, t: {"format": 2},
    "unknown": lambda w, t: {"weight": 5.0},
}


@pytest.mark.parametrize("field", FORGERIES)
def test_a_statement_that_is_not_the_lease_is_forged(open_site: Callable[..., Site], field: str) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    blobs = {key: a.upload(task, path) for key, path in a.encode(task).items()}
    before = state_of(site)
    with pytest.raises(ForgedUpdate):
        a.submit(task, a.statement(task, blobs, FORGERIES[field](a, task)))
    assert state_of(site) == before
    a.submit(task, a.statement(task, blobs))


@pytest.mark.parametrize(
    "payload", [b"", b"5", b"[]", b'[["run", 1]]', b"null", b'"run"', b"{", b"\xff", b"[" * 2000]
)
def test_bytes_that_are_no_statement_are_forged(open_site: Callable[..., Site], payload: bytes) -> None:
    site = open_site()
    (a,) = site.workers("a")
    with pytest.raises(ForgedUpdate):
        a.submit(a.task(), Signed.sign(a.key, UPDATE_TYPE, payload))


def test_a_signature_of_another_key_or_purpose_is_forged(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    task = a.task()
    good = a.ready(task)
    flipped = bytes([good.signature[0] ^ 1]) + good.signature[1:]
    for wrong in (
        Signed.sign(b.key, UPDATE_TYPE, good.payload),
        Signed.sign(a.key, "application/x", good.payload),
        dataclasses.replace(good, signature=flipped),
        dataclasses.replace(good, payload=good.payload.replace(b"2.5", b"0.5")),
    ):
        with pytest.raises(ForgedUpdate):
            a.submit(task, wrong)
    assert site.accepted() == []


def test_a_foreign_lease_serves_nobody_else(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    task = a.task()
    statement = a.ready(task)
    path = a.encode(task)["0.0"]
    before = state_of(site)
    for call in (
        lambda: b.submit(task, b.statement(task, {"0.0": manifest_of(path)})),
        lambda: b.report(task),
        lambda: b.upload(task, path),
    ):
        with pytest.raises(PermissionRefused):
            call()
    site.coordinator.release_task(b.caller, lease_token=task.lease_token, reason="not mine")
    assert state_of(site) == before
    a.submit(task, statement)
    with pytest.raises((PermissionRefused, ForgedUpdate)):
        b.submit(task, Signed.sign(b.key, UPDATE_TYPE, statement.payload))


def bad_update(kind: str, to: Path, worker: Worker, task: Any) -> Path:
    nan = {spec.name: np.full(spec.shape, np.nan, np.float32) for spec in SCHEMA.tensors}
    if kind == "text":
        to.write_bytes(b"not a tensor file at all")
    elif kind == "names":
        write_update(to, {"delta/x": np.zeros((2, 2), np.float32)})
    else:
        good = worker.encode(task, salt="good")["0.0"].read_bytes()
        header = int.from_bytes(good[:8], "little") + 8
        body = b"".join(nan[spec.name].tobytes() for spec in SCHEMA.tensors)
        to.write_bytes(good[:header] + body[: len(good) - header])
    return to


@pytest.mark.parametrize("kind", ["nan", "text", "names"])
def test_three_bad_updates_and_a_worker_gets_no_more_tasks(open_site: Callable[..., Site], kind: str) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    for count in range(REJECTIONS_MAX):
        task = a.task()
        path = bad_update(kind, site.directory / "out" / f"bad{count}", a, task)
        blob = a.upload(task, path)
        before = state_of(site)
        with pytest.raises(UpdateRejected, match="module"):
            a.submit(task, a.statement(task, {"0.0": blob}))
        assert state_of(site) == before
    answer = a.poll()
    assert answer.task is None
    assert not answer.finished
    assert answer.wait_reason == "there is no run that this worker may see and can serve"
    assert site.coordinator.leases == {}
    status = site.coordinator.get_status(site.operator, run_id="")
    note = next(worker.note for worker in status.workers if worker.worker_id == a.worker_id)
    assert "3 updates refused" in note
    b.work()


def test_a_mask_must_come_from_the_seed_of_the_round(open_site: Callable[..., Site]) -> None:
    """Chosen positions would let a worker send what it likes of its movement, and skip the rest."""
    site = open_site(run_file('[codec]\nkind = "shared-mask"\ndensity = 0.5'))
    (a,) = site.workers("a")
    task = a.task()
    chosen = site.directory / "out" / "chosen"
    encode_update(chosen, SCHEMA, deltas("a"), site.run.recipe.codec, round_seed=7)
    with pytest.raises(UpdateRejected, match="codec"):
        a.submit(task, a.statement(task, {"0.0": a.upload(task, chosen)}))
    a.work(task)


def test_an_update_that_was_never_uploaded_is_refused(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    path = a.encode(task)["0.0"]
    with pytest.raises(UpdateRejected, match="not uploaded"):
        a.submit(task, a.statement(task, {"0.0": manifest_of(path)}))
    blob = a.upload(task, path)
    lied = dataclasses.replace(blob, size_bytes=blob.size_bytes + 1)
    with pytest.raises(UpdateRejected, match="size"):
        a.submit(task, a.statement(task, {"0.0": lied}))


def test_uploads_have_a_quota_in_bytes_and_in_number(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    large = site.directory / "out" / "large"
    large.write_bytes(b"x" * (task.update_bytes_max + 1))
    with pytest.raises(UpdateRejected, match="at most"):
        a.upload(task, large)
    for count in range(UPLOADS_PER_MODULE):
        a.upload(task, a.encode(task, salt=str(count))["0.0"])
    with pytest.raises(SubmissionRefused, match="uploads"):
        a.upload(task, a.encode(task, salt="more")["0.0"])
    a.submit(task, a.statement(task, {"0.0": a.upload(task, a.encode(task, salt="0")["0.0"])}))
    kept = {digest for *_, digest in site.accepted()} | {site.run.newest(MODULE).digest}
    assert set(site.blobs.digests()) == kept


def test_what_was_uploaded_for_a_lease_goes_with_it(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    a.ready(task)
    path = a.encode(task, salt="half")["0.0"]
    blob = manifest_of(path)
    site.coordinator.find_missing(a.caller, lease_token=task.lease_token, blob=blob)
    site.coordinator.put_chunk(
        a.caller, lease_token=task.lease_token, blake3=blob.blake3, index=0, data=next(chunks_of(path))
    )
    site.coordinator.release_task(a.caller, lease_token=task.lease_token, reason="out of memory")
    assert set(site.blobs.digests()) == {site.run.newest(MODULE).digest}
    assert list((site.directory / "blobs" / "partial").iterdir()) == []


# ---- leases and time -------------------------------------------------------------------------------------------------


def test_the_task_of_a_silent_worker_is_free_within_20_s(open_site: Callable[..., Site]) -> None:
    site = open_site(run_file(rounds="count = 1\nquorum = 1\ntarget = 1"))
    a, b = site.workers("a", "b")
    a.report(a.task())
    silent_s = 0.0
    while (task := b.poll().task) is None:
        site.clock.advance(0.5)
        silent_s += 0.5
    assert silent_s <= 20
    b.work(task)


def test_a_worker_that_reports_without_progress_is_lost_after_the_idle_time(
    open_site: Callable[..., Site],
) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    a.report(task, done=2)
    for _ in range(11):
        site.clock.advance(10)
        assert not a.report(task, done=2).stop
    site.clock.advance(10)
    with pytest.raises(LeaseLost):
        a.report(task, done=2)
    site.coordinator.tick()
    assert site.ledger.events(last=1)[0].text.endswith("no progress within the idle time")


def test_progress_keeps_a_lease_for_ever(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    for done in range(400):
        site.clock.advance(10)
        a.open_session()
        assert not a.report(task, done=done, total=400).stop
    a.work(task)


def test_asking_for_a_task_again_and_again_is_no_progress(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    for _ in range(12):
        site.clock.advance(10)
        again = a.task()
    assert again.lease_epoch > task.lease_epoch


def test_a_worker_that_starts_again_has_its_progress_counted_afresh(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    a.report(task, done=3)
    assert a.task() == task
    for done in range(1, 4):
        site.clock.advance(10)
        a.report(task, stage=Stage.LOADING, done=done)
    assert site.coordinator.leases[task.lease_token].progress_s == site.clock.seconds


def test_a_round_closes_by_patience_when_nobody_else_comes(open_site: Callable[..., Site]) -> None:
    site = open_site(run_file(rounds="count = 1\nquorum = 1\ntarget = 3\nstraggler_factor = 0.5"))
    a, b = site.workers("a", "b")
    task, slow = a.task(), b.task()
    for done in (1, 2, 3):
        site.clock.advance(10)
        a.report(task, done=done)
        b.report(slow, done=0, stage=Stage.FETCHING)
    a.work(task)
    assert site.current().state is RoundState.COLLECTING
    site.clock.advance(14)
    b.report(slow, done=0, stage=Stage.FETCHING)
    site.coordinator.tick()
    assert site.current().state is RoundState.COLLECTING
    site.clock.advance(1.5)
    site.coordinator.tick()
    first = site.run.rounds[MODULE][0]
    assert first.state is RoundState.PUBLISHED
    assert any("none came for 15.0 s" in event.text for event in site.ledger.events())


def test_a_round_closes_early_when_progress_says_that_nobody_will_make_it(
    open_site: Callable[..., Site],
) -> None:
    site = open_site(run_file(rounds="count = 1\nquorum = 1\ntarget = 2\nstraggler_factor = 0.5"))
    a, b = site.workers("a", "b")
    task, slow = a.task(), b.task()
    site.clock.advance(10)
    b.report(slow, done=1, total=100)
    a.work(task)
    assert site.run.newest(MODULE).version == 1
    assert any("the next needs 990.0 s more" in event.text for event in site.ledger.events())


def test_a_drained_coordinator_gives_no_tasks_and_takes_updates(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    task = a.task()
    site.coordinator.drain()
    assert b.poll().wait_reason == "the coordinator is stopping"
    assert a.work(task)
    assert not site.coordinator.busy


def test_a_worker_that_cannot_serve_a_run_gets_none_of_its_tasks(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    answer = a.poll(unable=(Unable(run_id="alpha", reason="too little memory"),))
    assert answer.task is None
    assert task.lease_token not in site.coordinator.leases
    assert a.poll().task is not None


def test_a_revoked_worker_loses_its_lease_and_its_session(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    task = a.task()
    statement = a.ready(task)
    site.coordinator.revoke_worker(site.operator, worker_id=a.worker_id)
    assert site.coordinator.leases == {}
    with pytest.raises(SessionExpired):
        a.submit(task, statement)
    with pytest.raises(PermissionRefused):
        a.open_session()
    assert b.poll().task is not None
    site.restart()
    with pytest.raises(PermissionRefused):
        a.open_session()


# ---- merging and gating ----------------------------------------------------------------------------------------------


def gated(losses: dict[str, float]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def run(job: dict[str, Any]) -> dict[str, Any]:
        return {"losses": losses | {"num_sequences": 8}} if job["job"] == "gate" else fake_job(job)

    return run


def heldout_run(site_parent: Path, rounds: str = "count = 2\nquorum = 1\ntarget = 1") -> RunFile:
    heldout = site_parent / "heldout.txt"
    heldout.write_text("text")
    return run_file(f'[gate]\nheldout = "{heldout}"', rounds=rounds)


def test_a_candidate_that_passes_the_gate_is_published_with_its_numbers(
    open_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = open_site(heldout_run(tmp_path))
    (a,) = site.workers("a")
    a.work()
    assert site.run.newest(MODULE).heldout_loss == 1.9
    document = site.ledger.documents("version")[f"alpha/0.0/{1:08d}"]
    gate = open_version(
        document, site.coordinator.resolve_module(a.caller, ref="alpha").coordinator_public_key
    ).gate
    assert gate.outcome is GateOutcome.PASSED
    assert gate.measurement is not None
    assert gate.measurement.interval == pytest.approx((-0.15, -0.05))


@pytest.mark.parametrize(
    ("losses", "passed"),
    [
        ({"before": 2.0, "after": 2.5, "difference": 0.5, "half_width": 0.1}, False),
        ({"before": 2.0, "after": float("nan"), "difference": float("nan"), "half_width": 0.1}, False),
        (
            {"before": float("nan"), "after": float("inf"), "difference": float("nan"), "half_width": 0.1},
            False,
        ),
        (
            {"before": float("nan"), "after": 2.0, "difference": float("nan"), "half_width": float("nan")},
            True,
        ),
        ({"before": 2.0, "after": 2.05, "difference": 0.05, "half_width": 0.1}, True),
    ],
    ids=["worse", "diverged", "both-diverged", "heals", "within-the-interval"],
)
def test_the_gate_publishes_or_rolls_back(
    open_site: Callable[..., Site], tmp_path: Path, losses: dict[str, float], passed: bool
) -> None:
    site = open_site(heldout_run(tmp_path), job=gated(losses))
    (a,) = site.workers("a")
    a.work()
    first = site.run.rounds[MODULE][0]
    assert first.state is (RoundState.PUBLISHED if passed else RoundState.ROLLED_BACK)
    assert "held-out loss" in first.reason
    assert site.run.newest(MODULE).version == int(passed)
    assert site.current().number == 2
    assert site.current().base_version == int(passed)
    if not passed:
        assert first.candidate is not None
        assert not site.blobs.has(first.candidate.digest)
    site.restart()
    assert site.run.rounds[MODULE][0] == first
    a.open_session()
    a.work()
    assert a.poll().finished


def test_a_merge_that_fails_rolls_back_and_the_run_goes_on(open_site: Callable[..., Site]) -> None:
    calls: list[str] = []

    def fail_once(job: dict[str, Any]) -> dict[str, Any]:
        calls.append(job["job"])
        if len(calls) == 1:
            raise EngineFailed("the merge process died 3 times")
        return fake_job(job)

    site = open_site(run_file(rounds="count = 2\nquorum = 1\ntarget = 1"), job=fail_once)
    (a,) = site.workers("a")
    a.work()
    first = site.run.rounds[MODULE][0]
    assert first.state is RoundState.ROLLED_BACK
    assert first.reason == "merge failed: the merge process died 3 times"
    assert len(first.updates) == 1
    a.work()
    assert site.run.newest(MODULE).version == 1
    assert a.poll().finished


def test_a_merge_without_disk_space_waits_and_loses_nothing(open_site: Callable[..., Site]) -> None:
    space: list[bool] = [False, False]

    def full(job: dict[str, Any]) -> dict[str, Any]:
        if space:
            space.pop()
            raise DiskFull("no space left to write the candidate")
        return fake_job(job)

    site = open_site(run_file(rounds="count = 1\nquorum = 1\ntarget = 1"), job=full)
    (a,) = site.workers("a")
    a.work()
    assert site.current().state is RoundState.MERGING
    for _ in range(2):
        site.coordinator.tick()
    assert site.run.newest(MODULE).version == 1


def test_a_gate_that_cannot_evaluate_rolls_back(open_site: Callable[..., Site], tmp_path: Path) -> None:
    def broken(job: dict[str, Any]) -> dict[str, Any]:
        if job["job"] == "gate":
            raise EngineFailed("no memory")
        return fake_job(job)

    site = open_site(heldout_run(tmp_path), job=broken)
    (a,) = site.workers("a")
    a.work()
    assert site.run.rounds[MODULE][0].reason == "rolled back: the gate could not evaluate: no memory"


def test_rounds_found_merging_and_gating_go_on_after_a_restart(
    open_site: Callable[..., Site], tmp_path: Path
) -> None:
    wanted = heldout_run(tmp_path, "count = 1\nquorum = 1\ntarget = 1")
    reference = open_site(wanted)
    reference.workers("a")[0].work()
    site = open_site(wanted, make_engine=DeferredEngine)
    (a,) = site.workers("a")
    a.work()
    seen = []
    for _ in range(2):
        seen.append(site.current().state)
        site.restart()
        assert site.current().state is seen[-1]
        site.coordinator.tick()
        engine = site.engine
        assert isinstance(engine, DeferredEngine)
        assert len(engine.waiting) == 1
        site.coordinator.tick()
        assert len(engine.waiting) == 1, "a job that is queued is not queued twice"
        engine.step()
    assert seen == [RoundState.MERGING, RoundState.GATING]
    assert site.run.newest(MODULE).digest == reference.run.newest(MODULE).digest


def test_the_outer_state_of_a_candidate_survives_a_restart_at_the_gate(
    open_site: Callable[..., Site], tmp_path: Path
) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("text")
    wanted = run_file(
        f'[gate]\nheldout = "{heldout}"\n[outer]\nname = "nesterov"',
        rounds="count = 2\nquorum = 1\ntarget = 1",
    )
    site = open_site(wanted, make_engine=DeferredEngine)
    (a,) = site.workers("a")
    a.work()
    site.engine.step()  # type: ignore[attr-defined]
    assert site.current().state is RoundState.GATING
    site.restart()
    a.open_session()
    site.coordinator.tick()
    site.engine.step()  # type: ignore[attr-defined]
    state = site.run.newest(MODULE).outer_state
    assert state is not None
    assert site.blobs.has(state)
    a.work()
    site.engine.step()  # type: ignore[attr-defined]
    site.engine.step()  # type: ignore[attr-defined]
    assert site.run.newest(MODULE).version == 2


def test_a_rolled_back_candidate_leaves_no_file(open_site: Callable[..., Site], tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("text")
    wanted = run_file(f'[gate]\nheldout = "{heldout}"\n[outer]\nname = "nesterov"', rounds="count = 1")
    worse = {"before": 2.0, "after": 3.0, "difference": 1.0, "half_width": 0.1}
    site = open_site(wanted, job=gated(worse))
    (a,) = site.workers("a")
    a.work()
    assert set(site.blobs.digests()) == {site.run.at(MODULE, 0).digest, site.accepted()[0][3]}


def test_while_a_round_merges_its_workers_wait(open_site: Callable[..., Site]) -> None:
    site = open_site(run_file(rounds="count = 2\nquorum = 1\ntarget = 1"), make_engine=DeferredEngine)
    (a,) = site.workers("a")
    a.work()
    assert site.coordinator.busy
    assert "0.0 is merging" in a.poll().wait_reason
    site.engine.step()  # type: ignore[attr-defined]
    assert a.poll().task is not None


# ---- restart ---------------------------------------------------------------------------------------------------------


def test_a_restart_at_any_point_keeps_everything_that_was_accepted(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    for _ in range(3):
        for worker in (a, b):
            worker.open_session()
            task = worker.task()
            site.restart()
            worker.open_session()
            assert worker.task() == task
            statement = worker.ready(task)
            site.restart()
            worker.open_session()
            receipt = worker.submit(task, statement)
            accepted = site.accepted()
            site.restart()
            worker.open_session()
            assert site.accepted() == accepted
            assert worker.submit(task, statement) == receipt
    assert [record.version for record in site.run.versions[MODULE]] == [0, 1, 2, 3]


def test_a_lease_is_armed_for_a_full_term_after_a_restart(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    task = a.task()
    site.clock.advance(LEASE_S - 1)
    site.restart()
    site.clock.advance(LEASE_S - 1)
    site.coordinator.tick()
    a.open_session()
    assert not a.report(task).stop


def test_what_was_only_counted_is_written_at_the_end(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    a.work()
    site.coordinator.get_chunk(a.caller, blake3=site.run.newest(MODULE).digest, index=0)
    counted = site.run.traffic
    assert counted.bytes_up > 0
    assert counted.bytes_down > 0
    site.coordinator.close()
    site.lock.release()
    site.open()
    assert site.run.traffic == counted


def test_a_restart_sweeps_what_no_one_names(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    a.work()
    kept = set(site.blobs.digests())
    site.blobs.add_bytes(b"left over")
    site.restart()
    assert set(site.blobs.digests()) == kept


def test_epochs_never_come_twice(open_site: Callable[..., Site]) -> None:
    site = open_site()
    (a,) = site.workers("a")
    epochs = []
    for _ in range(5):
        task = a.task()
        epochs.append(task.lease_epoch)
        site.coordinator.release_task(a.caller, lease_token=task.lease_token, reason="again")
        site.restart()
        a.open_session()
    assert epochs == sorted(set(epochs))


def test_a_second_coordinator_on_the_same_state_is_refused(open_site: Callable[..., Site]) -> None:
    site = open_site()
    with pytest.raises(StateLocked):
        Site(site.directory)


def test_a_ledger_that_lacks_records_is_corrupt(open_site: Callable[..., Site]) -> None:
    for table, kind in (
        ("documents", "recipe"),
        ("records", "run"),
        ("records", "version"),
        ("records", "round"),
    ):
        site = open_site()
        with site.ledger.transaction():
            site.ledger._db.execute(f"DELETE FROM {table} WHERE kind = ?", (kind,))  # noqa: S608
        with pytest.raises(CorruptState):
            site.restart()


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_starting_a_run_again_asks_for_the_same_settings(open_site: Callable[..., Site]) -> None:
    site = open_site()
    assert site.coordinator.check_same(run_file())
    assert not site.coordinator.check_same(run_file(name="beta"))
    assert site.coordinator.check_same(run_file(rounds="count = 3\nquorum = 1\ntarget = 4"))
    assert site.run.run_file.rounds.target == 4
    site.restart()
    assert site.run.run_file.rounds.target == 4
    with pytest.raises(RunFileError, match=r"inner\.steps"):
        site.coordinator.check_same(
            dataclasses.replace(run_file(), inner=dataclasses.replace(run_file().inner, steps=5))
        )
    with pytest.raises(RunFileError, match=r"rounds\.count"):
        site.coordinator.check_same(run_file(rounds="count = 4\nquorum = 2\ntarget = 2"))


def test_a_run_that_could_not_be_made_durable_does_not_exist(open_site: Callable[..., Site]) -> None:
    site = open_site()
    wanted = run_file(name="beta")
    prepared = prepare(wanted, site.directory / "scratch")
    Path(prepared["files"]["0.0"]).unlink()
    with pytest.raises((StorageError, FileNotFoundError)):
        site.coordinator.add_run(wanted, base_pin(site.directory / "base"), site.directory / "base", prepared)
    assert list(site.coordinator.runs) == ["alpha"]
    site.add_run(wanted)
    site.restart()
    assert sorted(site.coordinator.runs) == ["alpha", "beta"]


def test_several_runs_share_the_workers(open_site: Callable[..., Site]) -> None:
    rounds = "count = 4\nquorum = 1\ntarget = 1"
    site = open_site(run_file(rounds=rounds))
    site.add_run(run_file(name="beta", rounds=rounds))
    a, b = site.workers("a", "b")
    order = []
    for _ in range(4):
        tasks = [worker.task() for worker in (a, b)]
        order.append({task.run_id for task in tasks})
        for worker, task in zip((a, b), tasks, strict=True):
            worker.work(task)
    assert order == [{"alpha", "beta"}] * 4
    assert a.poll().finished


def test_a_token_for_one_run_shows_no_other(open_site: Callable[..., Site]) -> None:
    site = open_site()
    site.add_run(run_file(name="beta"))
    for member in site.workers("a", "b"):
        member.work()
    assert site.coordinator.runs[RunId("alpha")].newest(MODULE).version == 1
    worker = Worker(site, "w")
    worker.join(site.token(runs=("beta",)))
    worker.open_session()
    assert worker.task().run_id == "beta"
    with pytest.raises(NotFound):
        site.coordinator.get_recipe(worker.caller, run_id="alpha")
    with pytest.raises(NotFound):
        site.coordinator.get_blob(
            worker.caller, blake3=site.coordinator.runs[RunId("alpha")].newest(MODULE).digest
        )
    status = site.coordinator.get_status(worker.caller, run_id="")
    assert [run.run_id for run in status.runs] == ["beta"]


def test_shards_train_one_module_of_the_path_at_a_time(open_site: Callable[..., Site]) -> None:
    wanted = run_file(
        "[topology]\nexperts = [1, 1]\nlevels_per_task = 1", rounds="count = 2\nquorum = 1\ntarget = 1"
    )
    site = open_site(wanted)
    a, b = site.workers("a", "b")
    for _ in range(2):
        tasks = [a.task(), b.task()]
        trained = [[start.module for start in task.modules if start.train] for task in tasks]
        assert sorted(trained) == [["0.0"], ["1.0"]]
        assert all(len(task.modules) == 2 for task in tasks)
        for worker, task in zip((a, b), tasks, strict=True):
            worker.work(task)
    assert a.poll().finished
    assert [len(site.run.versions[module]) for module in wanted.topology.modules] == [3, 3]


def test_a_task_may_train_all_modules_of_its_path(open_site: Callable[..., Site]) -> None:
    wanted = run_file("[topology]\nexperts = [1, 1]", rounds="count = 1\nquorum = 2\ntarget = 2")
    site = open_site(wanted)
    for worker in site.workers("a", "b"):
        worker.work()
    assert {module.level: len(versions) for module, versions in site.run.versions.items()} == {0: 2, 1: 2}
    assert len(site.accepted()) == 4


def test_gate_result_without_numbers_is_no_measurement() -> None:
    from weft.server.run import _gate

    assert _gate(GateResult(passed=False, reason="x"), 0.0).measurement is None


def test_encoding_is_real(tmp_path: Path) -> None:
    """The harness's updates pass the same gate as any worker's."""
    from weft.common.codec import CodecKind, CodecSettings, screen_update

    path = tmp_path / "u"
    codec = CodecSettings(kind=CodecKind.FP32)
    encode_update(path, SCHEMA, deltas("x"), codec)
    found = screen_update(path, SCHEMA, [codec], wants_fisher=False, size_bytes_max=10**6)
    assert found.norm > 0
