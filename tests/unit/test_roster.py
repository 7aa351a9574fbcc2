"""Who may talk to the coordinator: tokens admit, keys identify, sessions authenticate."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from tests.harness import Site, Worker, bare, memory_directory, worker_key

from weft.common.errors import (
    AccessError,
    ApprovalPending,
    NotFound,
    PermissionRefused,
    SessionExpired,
    TokenRefused,
    TooManyAttempts,
    UsageError,
    WeftError,
)
from weft.common.identity.session import SESSION_TYPE, session_statement
from weft.common.identity.signing import SigningKey
from weft.common.manifest import Signed
from weft.common.protocol import Role
from weft.common.statements import JOIN_TYPE
from weft.server.roster import (
    NONCE_S,
    NONCES_MAX,
    OPERATOR,
    SESSION_S,
    WRONG_PROOFS_MAX,
    WRONG_PROOFS_WINDOW_S,
)


@pytest.fixture
def site() -> Iterator[Site]:
    directory = memory_directory()
    made = Site(directory / "s")
    yield made
    made.crash()
    shutil.rmtree(directory)


def joined(site: Site, name: str = "w", **wanted: Any) -> Worker:
    worker = Worker(site, name)
    worker.join(site.token(**wanted))
    return worker


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_admits_with_its_role_and_its_runs(site: Site) -> None:
    from tests.harness import run_file

    site.add_run(run_file())
    worker = joined(site, role=Role.VIEWER, runs=("alpha",), label="for w")
    worker.open_session()
    caller = worker.caller
    assert (caller.role, caller.runs) == (Role.VIEWER, ("alpha",))
    assert caller.may_see("alpha")
    assert not caller.may_see("beta")
    (token,) = bare(site.coordinator.list_tokens(site.operator))
    assert (token.num_uses_left, token.label, token.runs) == (15, "for w", ("alpha",))


def test_a_token_is_used_up_by_different_workers(site: Site) -> None:
    token = site.token(num_uses=2)
    for name in ("a", "b"):
        Worker(site, name).join(token)
    with pytest.raises(TokenRefused, match="used up"):
        Worker(site, "c").join(token)
    site.restart()
    with pytest.raises(TokenRefused, match="used up"):
        Worker(site, "c").join(token)
    assert Worker(site, "a").join(token).worker_id in site.coordinator.roster.workers


def test_an_expired_or_revoked_token_admits_nobody_new(site: Site) -> None:
    expired, revoked = site.token(ttl_s=60.0), site.token()
    site.clock.advance(60.0)
    with pytest.raises(TokenRefused, match="expired"):
        Worker(site, "a").join(expired)
    revoked_id = revoked.split(".")[2]
    site.coordinator.revoke_token(site.operator, token_id=revoked_id)
    with pytest.raises(TokenRefused, match="revoked"):
        Worker(site, "a").join(revoked)
    with pytest.raises(NotFound):
        site.coordinator.revoke_token(site.operator, token_id="AAAAAA")
    assert list(site.coordinator.roster.workers) == []


def test_a_repeated_request_makes_one_token(site: Site) -> None:
    assert site.token(request_id="x") == site.token(request_id="x")
    assert site.token(request_id="x") != site.token(request_id="y")
    assert len(bare(site.coordinator.list_tokens(site.operator))) == 2


@pytest.mark.parametrize(
    "wanted",
    [
        {"ttl_s": -1.0},
        {"ttl_s": float("nan")},
        {"ttl_s": 1e12},
        {"num_uses": -1},
        {"num_uses": 10**9},
        {"request_id": ""},
        {"request_id": "x" * 65},
        {"runs": ("no-such-run",)},
    ],
)
def test_a_token_that_cannot_be_is_refused(site: Site, wanted: dict[str, Any]) -> None:
    with pytest.raises((UsageError, NotFound)):
        site.token(**wanted)
    assert bare(site.coordinator.list_tokens(site.operator)) == ()


def test_the_secret_is_not_in_the_state(site: Site) -> None:
    secret = site.token().split(".")[3]
    for path in site.directory.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


# ---- join ------------------------------------------------------------------------------------------------------------


def test_wrong_proofs_are_refused_and_soon_not_even_looked_at(site: Site) -> None:
    worker, token = Worker(site, "w"), site.token()
    request = worker.join_request(token)
    for _ in range(WRONG_PROOFS_MAX):
        with pytest.raises(TokenRefused):
            site.coordinator.join("10.0.0.1", **(request | {"proof": bytes(32)}))
    with pytest.raises(TooManyAttempts):
        site.coordinator.join("10.0.0.1", **request)
    assert site.coordinator.join("10.0.0.2", **request).worker_id
    site.clock.advance(WRONG_PROOFS_WINDOW_S)
    assert site.coordinator.join("10.0.0.1", **request).worker_id


def test_an_unknown_token_looks_like_a_wrong_secret(site: Site) -> None:
    worker, token = Worker(site, "w"), site.token()
    with pytest.raises(TokenRefused) as wrong:
        site.coordinator.join("p", **(worker.join_request(token) | {"proof": bytes(32)}))
    with pytest.raises(TokenRefused) as unknown:
        site.coordinator.join("p", **(worker.join_request(token) | {"token_id": "AAAAAA"}))
    assert str(wrong.value) == str(unknown.value)


def test_a_proof_serves_no_other_statement(site: Site) -> None:
    token = site.token()
    a, b = Worker(site, "a").join_request(token), Worker(site, "b").join_request(token)
    with pytest.raises(TokenRefused):
        site.coordinator.join("p", **(a | {"statement": b["statement"]}))


@pytest.mark.parametrize(
    "payload", [b"", b"5", b"[]", b"null", b"{}", b'{"public_key": "zz", "nonce": "n"}', b"\xff"]
)
def test_bytes_that_are_no_join_statement_are_refused(site: Site, payload: bytes) -> None:
    worker = Worker(site, "w")
    request = worker.join_request(site.token())
    with pytest.raises(WeftError):
        site.coordinator.join("p", **(request | {"statement": Signed.sign(worker.key, JOIN_TYPE, payload)}))
    assert site.coordinator.roster.workers == {}


def test_a_statement_of_another_key_is_refused(site: Site) -> None:
    request = Worker(site, "w").join_request(site.token())
    forged = Signed.sign(SigningKey.generate(), JOIN_TYPE, request["statement"].payload)
    with pytest.raises(AccessError, match="not signed"):
        site.coordinator.join("p", **(request | {"statement": forged}))


def test_who_joins_again_is_the_same_worker(site: Site) -> None:
    token, other = site.token(), site.token(role=Role.ADMIN)
    first = Worker(site, "w").join(token)
    again = Worker(site, "w").join(other)
    assert (again.worker_id, again.role) == (first.worker_id, Role.WORKER)
    assert sorted(item.num_uses_left for item in bare(site.coordinator.list_tokens(site.operator))) == [
        15,
        16,
    ]
    site.restart()
    assert Worker(site, "w").join(token).worker_id == first.worker_id


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_a_session_needs_the_key_and_a_fresh_nonce(site: Site) -> None:
    worker = joined(site)
    proof = worker.session_proof()
    session = site.coordinator.open_session("p", worker_id=worker.worker_id, statement=proof)
    assert site.coordinator.authenticate(session.session_token).worker_id == worker.worker_id
    with pytest.raises(SessionExpired):
        site.coordinator.open_session("p", worker_id=worker.worker_id, statement=proof)
    late = worker.session_proof()
    site.clock.advance(NONCE_S)
    with pytest.raises(SessionExpired):
        site.coordinator.open_session("p", worker_id=worker.worker_id, statement=late)
    nonce = bare(site.coordinator.start_session("p", worker_id=worker.worker_id))
    payload = session_statement(nonce, site.pin, worker.worker_id)  # type: ignore[arg-type]
    forged = Signed.sign(worker_key("another"), SESSION_TYPE, payload)
    with pytest.raises(SessionExpired):
        site.coordinator.open_session("p", worker_id=worker.worker_id, statement=forged)


def test_a_session_ends_by_the_monotonic_clock(site: Site) -> None:
    worker = joined(site)
    worker.open_session()
    site.clock.jump(10 * SESSION_S)
    assert worker.caller
    site.clock.advance(SESSION_S)
    with pytest.raises(SessionExpired):
        _ = worker.caller
    with pytest.raises(SessionExpired):
        site.coordinator.authenticate("never given")


def test_who_asks_for_nonces_in_anothers_name_locks_it_out_only_in_numbers(site: Site) -> None:
    worker = joined(site)
    proof = worker.session_proof()
    for _ in range(NONCES_MAX - 1):
        site.coordinator.start_session("attacker", worker_id=worker.worker_id)
    assert site.coordinator.open_session("p", worker_id=worker.worker_id, statement=proof)


def test_an_unknown_worker_is_told_to_join(site: Site) -> None:
    for call in (
        lambda: site.coordinator.start_session("p", worker_id="w-nobody"),
        lambda: site.coordinator.approve_worker(site.operator, worker_id="w-nobody"),
        lambda: site.coordinator.revoke_worker(site.operator, worker_id="w-nobody"),
    ):
        with pytest.raises(NotFound, match="w-nobody"):
            call()


def test_approval_is_waited_for_and_lasts(site: Site) -> None:
    worker = joined(site, needs_approval=True)
    with pytest.raises(ApprovalPending) as pending:
        worker.open_session()
    assert f"weft workers approve {worker.worker_id}" in pending.value.hint
    site.coordinator.approve_worker(site.operator, worker_id=worker.worker_id)
    worker.open_session()
    site.restart()
    worker.open_session()


def test_a_revoked_worker_stays_out(site: Site) -> None:
    worker = joined(site)
    worker.open_session()
    site.coordinator.revoke_worker(site.operator, worker_id=worker.worker_id)
    with pytest.raises(SessionExpired):
        _ = worker.caller
    worker.join(site.token())
    with pytest.raises(PermissionRefused):
        worker.open_session()


def test_the_operator_is_whose_key_lies_in_the_state_directory(site: Site) -> None:
    roster = site.coordinator.roster
    for name in ("first", "second", "second"):
        roster.admit_operator(worker_key(name).public)
        assert roster.workers[OPERATOR].public_key == worker_key(name).public.hex()
    assert roster.workers[OPERATOR].role is Role.ADMIN
    with pytest.raises(PermissionRefused):
        site.coordinator.revoke_worker(site.operator, worker_id=OPERATOR)


def test_ids_of_two_keys_differ_though_their_beginnings_are_taken(site: Site) -> None:
    worker = joined(site)
    record = site.coordinator.roster.workers[worker.worker_id]  # type: ignore[index]
    fresh = site.coordinator.roster._new_id(record.public_key)
    assert fresh.startswith(worker.worker_id)
    assert len(fresh) == len(worker.worker_id) + 1
    assert dataclasses.replace(record, revoked=True).may_see("any")
