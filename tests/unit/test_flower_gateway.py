"""The gateway against the real coordinator under virtual time: hellos, leases, losses, and hostile answers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.harness import Site, Worker, memory_directory, run_file

from weft.client.flower.mailbox import Letter, Mailbox
from weft.common import wire
from weft.common.blobs import digest_of, manifest_of
from weft.common.errors import DiskFull, InputError, NotFound, Unreachable
from weft.common.ids import Digest, ModuleKey
from weft.common.manifest import Signed, canonical_json
from weft.common.parcel import Parcel, error_parcel
from weft.common.protocol import Stage, Task
from weft.common.settings import to_table
from weft.common.statements import JOIN_TYPE, JoinStatement
from weft.server.flower.gateway import ASK_AGAIN_S, Gateway, Lost

TASK_S = 100.0


class HandPost:
    """Messages lie here until a test answers them."""

    def __init__(self) -> None:
        self.online: set[int] = set()
        self.sent: dict[str, tuple[int, Parcel, float]] = {}
        self.answers: dict[str, Parcel | Lost] = {}
        self.takes = True
        self._num_sent = 0

    def nodes(self) -> Collection[int]:
        return self.online

    def send(self, node: int, parcel: Parcel, *, ttl_s: float, is_task: bool) -> str:
        if not self.takes:
            return ""
        self._num_sent += 1
        message = f"m-{self._num_sent}"
        self.sent[message] = (node, parcel, ttl_s)
        return message

    def receive(self, messages: Collection[str]) -> Iterable[tuple[str, Parcel | Lost]]:
        for message in [message for message in messages if message in self.answers]:
            yield message, self.answers.pop(message)


class Federation:
    """A site, a gateway, and nodes that a test plays."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.post = HandPost()
        self.said: list[str] = []
        self.gateway = Gateway(
            site.coordinator,
            site.coordinator.state.identity,
            self.post,
            clock=site.clock.monotonic,
            rng_bytes=site.rng_bytes,
            task_s=TASK_S,
            say=self.said.append,
        )
        self.workers: dict[int, Worker] = {}

    def turn(self, seconds: float = 0.0) -> None:
        self.site.clock.advance(seconds)
        self.gateway.turn()

    def message(self, node: int) -> tuple[str, Parcel]:
        """The message that waits for a node."""
        (found,) = [(name, sent[1]) for name, sent in self.post.sent.items() if sent[0] == node]
        return found

    def has_message(self, node: int) -> bool:
        return any(sent[0] == node for sent in self.post.sent.values())

    def reply(self, node: int, answer: Parcel | Lost) -> None:
        name, _ = self.message(node)
        del self.post.sent[name]
        self.post.answers[name] = answer

    def hello(self, node: int, key: str = "", *, kept: str = "", nonce: str = "") -> None:
        """Let a node say who it is."""
        _, parcel = self.message(node)
        worker = self.workers[node] = Worker(self.site, key or f"w{node}")
        claim = JoinStatement(
            public_key=worker.key.public.hex(),
            nonce=nonce or parcel.text("challenge"),
            display_name=worker.name,
        )
        signed = Signed.sign(worker.key, JOIN_TYPE, canonical_json(to_table(claim)))
        self.reply(node, Parcel(documents={"statement": signed.to_envelope(), "kept": kept.encode()}))
        self.turn()

    def greeted(self, *nodes: int) -> None:
        self.post.online |= set(nodes)
        self.turn()
        for node in nodes:
            self.hello(node)
            caller = self.gateway.nodes[node].caller
            assert caller is not None
            self.workers[node].worker_id = caller.worker_id

    def letter(self, node: int) -> Letter:
        return Letter(self.message(node)[1])

    def update(self, node: int, *, salt: str = "", changes: dict[str, Any] | None = None) -> Parcel:
        """A node's whole answer."""
        worker, task = self.workers[node], self.letter(node).task
        paths = worker.encode(task, salt=salt)
        blobs = {path: path.read_bytes() for path in paths.values()}
        statement = worker.statement(task, {key: manifest_of(path) for key, path in paths.items()}, changes)
        return answer_of(
            SubmitUpdate={"lease_token": task.lease_token, "statement": statement},
            blobs={digest_of(data): data for data in blobs.values()},
        )


def answer_of(*, blobs: dict[Digest, bytes] | None = None, kept: str = "", **requests: Any) -> Parcel:
    """What a mailbox makes of a worker's calls."""
    requests.setdefault("PollTask", {"wait_s": 1.0, "unable": (), "tokens_per_s": 9.0, "limits": ()})
    documents = {
        name: wire.to_message(fields, wire.METHODS[name].request).SerializeToString()
        for name, fields in requests.items()
    }
    return Parcel(documents={**documents, "kept": kept.encode()}, blobs=blobs or {})


@pytest.fixture
def federation() -> Iterator[Federation]:
    directory = memory_directory()
    site = Site(directory)
    site.add_run(run_file())
    yield Federation(site)
    site.crash()
    shutil.rmtree(directory)


def test_nodes_train_a_round_by_messages(federation: Federation) -> None:
    federation.greeted(1, 2)
    for node in (1, 2):
        federation.reply(node, federation.update(node))
    federation.turn()
    federation.turn()
    assert federation.site.run.newest(ModuleKey(0, 0)).version == 1
    assert federation.gateway.num_accepted == 2
    assert len(federation.site.accepted()) == 2


def test_a_task_brings_what_the_node_lacks_and_nothing_else(federation: Federation) -> None:
    federation.post.online.add(1)
    federation.turn()
    federation.hello(1)
    letter = federation.letter(1)
    start = letter.task.modules[0].blake3
    assert set(letter.blobs) == {start}
    assert digest_of(letter.blobs[start]) == start
    federation.reply(
        1, answer_of(ReleaseTask={"lease_token": letter.task.lease_token, "reason": "x"}, kept=start)
    )
    federation.turn()
    federation.turn(31.0)
    assert federation.letter(1).blobs == {}


def test_a_lease_lives_as_long_as_its_message_may(federation: Federation) -> None:
    federation.greeted(1)
    for _ in range(int(TASK_S / 3) - 1):
        federation.turn(3.0)
        assert len(federation.site.coordinator.leases) == 1
    federation.turn(6.0)
    assert not federation.site.coordinator.leases
    assert "no answer within" in federation.said[-1]


def test_a_node_that_is_gone_gives_its_task_back_at_once(federation: Federation) -> None:
    federation.greeted(1)
    federation.post.online.clear()
    federation.turn()
    assert not federation.site.coordinator.leases
    assert federation.gateway.nodes == {}


def test_what_comes_after_the_lease_changes_nothing(federation: Federation) -> None:
    federation.greeted(1)
    answer = federation.update(1)
    (lease,) = federation.site.coordinator.leases.values()
    caller = federation.gateway.nodes[1].caller
    assert caller is not None
    federation.site.coordinator.release_task(caller, lease_token=lease.token, reason="elsewhere")
    federation.reply(1, answer)
    federation.turn()
    assert federation.site.accepted() == []
    assert "LeaseLost" in federation.said[-1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda answer: Lost(reason="Flower says no"), "Flower says no"),
        (lambda answer: error_parcel(NotFound("no base")), "NotFound: no base"),
        (lambda answer: Parcel(documents={}), "InputError"),
        (lambda answer: dataclasses.replace(answer, documents={"PollTask": b"\xff"}), "InputError"),
        (
            lambda answer: dataclasses.replace(
                answer, documents={**answer.documents, "SubmitUpdate": b"\xff"}
            ),
            "InputError",
        ),
        (
            lambda answer: dataclasses.replace(answer, documents={**answer.documents, "kept": b"../x"}),
            "InputError",
        ),
        (lambda answer: dataclasses.replace(answer, blobs={}), "UpdateRejected"),
        (
            lambda answer: dataclasses.replace(answer, blobs={digest_of(b"x" * 4_000_000): b"x" * 4_000_000}),
            "UpdateRejected",
        ),
    ],
    ids=["lost", "error", "empty", "no poll", "no submit", "no digests", "no blob", "too large"],
)
def test_hostile_answers_change_nothing_and_cost_only_the_task(
    federation: Federation, spoil: Callable[[Parcel], Parcel | Lost], said: str
) -> None:
    federation.greeted(1)
    federation.reply(1, spoil(federation.update(1)))
    federation.turn()
    assert federation.site.accepted() == []
    assert not federation.site.coordinator.leases
    assert said in federation.said[-1]
    federation.turn(ASK_AGAIN_S + 31.0)
    assert federation.has_message(1)


def test_somebody_elses_update_is_refused(federation: Federation) -> None:
    federation.greeted(1, 2)
    federation.reply(1, federation.update(1, changes={"worker": federation.workers[2].worker_id}))
    federation.turn()
    assert federation.site.accepted() == []
    assert "ForgedUpdate" in federation.said[-1]


def test_an_update_under_another_lease_counts_for_the_messages_own(federation: Federation) -> None:
    """The lease is the message's: what an answer says of it is not asked."""
    federation.greeted(1, 2)
    other = federation.letter(2).task.lease_token
    answer = federation.update(1)
    wrong = wire.METHODS["SubmitUpdate"].request.FromString(answer.documents["SubmitUpdate"])
    fields = wire.fields(wrong) | {"lease_token": other}
    federation.reply(1, answer_of(SubmitUpdate=fields, blobs=dict(answer.blobs)))
    federation.turn()
    ((_, _, worker, _),) = federation.site.accepted()
    assert worker == federation.workers[1].worker_id


def test_a_statement_for_another_challenge_is_not_believed(federation: Federation) -> None:
    federation.post.online.add(1)
    federation.turn()
    federation.hello(1, nonce="ab" * 16)
    assert federation.gateway.nodes[1].caller is None
    assert "challenge" in federation.said[-1]


def test_two_nodes_cannot_be_one_worker(federation: Federation) -> None:
    federation.post.online |= {1, 2}
    federation.turn()
    federation.hello(1, "same")
    federation.hello(2, "same")
    assert federation.gateway.nodes[2].caller is None
    assert "another node is" in federation.said[-1]


def test_a_worker_that_was_revoked_gets_nothing_more(federation: Federation) -> None:
    federation.greeted(1)
    federation.site.coordinator.revoke_worker(
        federation.site.operator, worker_id=federation.workers[1].worker_id
    )
    federation.reply(1, federation.update(1))
    federation.turn()
    federation.turn(60.0)
    assert not federation.has_message(1)
    assert federation.site.accepted() == []


def test_a_message_that_is_not_taken_gives_the_task_back(federation: Federation) -> None:
    federation.post.online.add(1)
    federation.turn()
    federation.post.takes = False
    federation.hello(1)
    assert not federation.site.coordinator.leases
    assert "not taken" in federation.said[-1]


def test_failures_in_a_row_make_the_gateway_wait_longer(federation: Federation) -> None:
    federation.post.online.add(1)
    waits = []
    for _ in range(10):
        while not federation.has_message(1):
            federation.turn(1.0)
        federation.reply(1, Lost(reason="x"))
        federation.turn()
        waits.append(federation.gateway.nodes[1].not_before_s - federation.site.clock.monotonic())
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (2.0, 300.0)


def test_an_update_waits_for_room_on_the_disk(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.greeted(1)
    federation.reply(1, federation.update(1))
    with monkeypatch.context() as patch:
        patch.setattr(
            federation.site.coordinator, "put_chunk", lambda *_, **__: (_ for _ in ()).throw(DiskFull("full"))
        )
        for _ in range(8):
            federation.turn(3.0)
        assert federation.site.accepted() == []
        assert len(federation.site.coordinator.leases) == 1
    federation.turn(3.0)
    assert len(federation.site.accepted()) == 1


def test_after_a_restart_a_node_gets_the_same_task_again(federation: Federation) -> None:
    federation.greeted(1)
    task = federation.letter(1).task
    federation.site.restart()
    again = Federation(federation.site)
    again.greeted(1)
    found = again.letter(1).task
    assert (found.task_id, found.lease_epoch) == (task.task_id, task.lease_epoch)
    again.reply(1, again.update(1))
    again.turn()
    assert len(again.site.accepted()) == 1


# ---- the mailbox -------------------------------------------------------------------------------------------------


def mailbox(kept: frozenset[Digest] = frozenset()) -> Mailbox:
    return Mailbox(kept=lambda: kept, clock=lambda: 1.0)


def poll(box: Mailbox, wait_s: float = 0.0) -> Task | None:
    return box.poll_task(wait_s=wait_s).task


def test_the_same_message_again_is_the_same_letter(federation: Federation) -> None:
    federation.greeted(1)
    _, parcel = federation.message(1)
    box = mailbox()
    letter = box.deliver(parcel)
    assert box.deliver(parcel) is letter
    assert poll(box) == letter.task
    assert box.deliver(parcel) is letter
    box.release_task(lease_token=letter.task.lease_token, reason="no")
    assert poll(box) is None
    assert box.deliver(parcel) is letter
    assert "ReleaseTask" in letter.answer.result(0).documents


def test_another_message_ends_the_task_in_hand(federation: Federation) -> None:
    federation.greeted(1, 2)
    box = mailbox()
    first = box.deliver(federation.message(1)[1])
    assert poll(box) == first.task
    assert not progress(box, first.task)
    second = box.deliver(federation.message(2)[1])
    assert progress(box, first.task)
    assert poll(box) == second.task


def progress(box: Mailbox, task: Task) -> bool:
    return box.report_progress(
        lease_token=task.lease_token, stage=Stage.TRAINING, num_done=1, num_total=2
    ).stop


def test_a_message_without_a_task_is_refused() -> None:
    nothing = wire.to_message(
        {"task": None, "wait_reason": "no", "finished": False}, wire.METHODS["PollTask"].response
    )
    for document in (nothing.SerializeToString(), b"\xff\xff"):
        with pytest.raises(InputError):
            mailbox().deliver(Parcel(documents={"PollTask": document}))


def test_blobs_come_from_the_message_or_from_before(federation: Federation, tmp_path: Path) -> None:
    federation.greeted(1)
    letter = federation.letter(1)
    start = letter.task.modules[0].blake3
    box = mailbox()
    box.deliver(federation.message(1)[1])
    poll(box)
    path = box.download(start, tmp_path / start, idle_s=1.0)
    assert digest_of(path.read_bytes()) == start
    assert box.download(start, path, idle_s=1.0) == path
    with pytest.raises(NotFound, match="no message"):
        box.download(Digest("0" * 64), tmp_path / "other", idle_s=1.0)


def test_a_closed_mailbox_says_that_it_is_finished() -> None:
    box = mailbox()
    box.close()
    assert box.poll_task(wait_s=30.0).finished


def test_who_waits_is_told_when_the_worker_is_gone(federation: Federation) -> None:
    federation.greeted(1)
    box = mailbox()
    letter = box.deliver(federation.message(1)[1])
    box.fail(NotFound("no base"))
    with pytest.raises(NotFound, match="no base"):
        letter.answer.result(0)


def test_a_message_for_a_worker_that_left_is_not_kept(federation: Federation) -> None:
    federation.greeted(1)
    box = mailbox()
    box.fail(NotFound("no base"))
    with pytest.raises(Unreachable, match="left"):
        box.deliver(federation.message(1)[1])


def test_a_full_disk_stops_nothing(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    federation.post.online.add(1)
    waits = 0

    def wait() -> None:
        nonlocal waits
        waits += 1
        if waits > 2:
            raise KeyboardInterrupt

    def full() -> None:
        raise DiskFull("no space")

    monkeypatch.setattr(federation.site.coordinator, "tick", full)
    with pytest.raises(KeyboardInterrupt):
        federation.gateway.run(wait)
    assert waits == 3
