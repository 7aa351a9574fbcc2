"""Keys, certificates, tokens and the first hello; real TLS servers on loopback, in threads."""

import contextlib
import hashlib
import ipaddress
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import (
    AccessError,
    CorruptState,
    DiskFull,
    IdentityMismatch,
    NotFound,
    StorageError,
    TokenRefused,
    Unreachable,
    UsageError,
)
from weft.common.identity import files
from weft.common.identity.authority import (
    Bundle,
    CoordinatorIdentity,
    certificate_pem,
    load_certificate,
    pin_of,
    tls_name,
    verify_endorsement,
)
from weft.common.identity.files import private_directory, read_private, write_private
from weft.common.identity.hello import fetch_pinned_ca
from weft.common.identity.session import session_statement, sign_session, verify_session
from weft.common.identity.signing import SigningKey, key_id, preauthentication_encoding, verify
from weft.common.identity.token import (
    JoinToken,
    Role,
    TokenRecord,
    check_proof,
    check_secret,
    join_proof,
    mint,
)
from weft.common.ids import RunId, WorkerId
from weft.common.manifest import parse_json

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
PIN = bytes(range(32))
OTHER_PIN = bytes(range(1, 33))
DIGEST = hashlib.sha256(b"request").digest()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# Files


@pytest.mark.usefixtures("open_umask")
def test_files_and_directories_are_private_under_any_umask(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    private_directory(directory)
    write_private(directory / "key", b"secret")
    assert [mode(tmp_path / "a"), mode(directory), mode(directory / "key")] == [0o700, 0o700, 0o600]
    assert read_private(directory / "key") == b"secret"
    assert os.listdir(directory) == ["key"]


def test_writing_again_replaces_the_whole_file(tmp_path: Path) -> None:
    write_private(tmp_path / "key", b"a long first content")
    write_private(tmp_path / "key", b"short")
    assert read_private(tmp_path / "key") == b"short"


def test_a_file_that_was_writable_by_others_is_private_after_writing(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"old")
    (tmp_path / "key").chmod(0o666)
    write_private(tmp_path / "key", b"new")
    assert mode(tmp_path / "key") == 0o600


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o610, 0o601, 0o644])
def test_a_key_that_others_can_use_is_refused_with_the_command_to_type(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "my key"
    write_private(path, b"secret")
    path.chmod(bits)
    with pytest.raises(AccessError) as refusal:
        read_private(path)
    assert refusal.value.hint == f"chmod 600 '{path}'"


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(AccessError) as refusal:
        private_directory(tmp_path)
    assert refusal.value.hint == f"chmod 700 {tmp_path}"


def test_missing_wrong_and_oversized_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent does not exist"):
        read_private(tmp_path / "absent")
    write_private(tmp_path / "big", bytes(files.FILE_BYTES_MAX + 1))
    with pytest.raises(CorruptState, match="larger than any key"):
        read_private(tmp_path / "big")
    with pytest.raises(StorageError, match="not a directory"):
        private_directory(tmp_path / "big")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "error"),
    [(28, DiskFull), (122, DiskFull), (5, StorageError), (13, AccessError)],
    ids=["ENOSPC", "EDQUOT", "EIO", "EACCES"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, failure: int, error: type[Exception]
) -> None:
    write_private(tmp_path / "key", b"old")

    def fail(*_: object) -> None:
        raise OSError(failure, os.strerror(failure))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error):
            write_private(tmp_path / "key", b"new")
    assert os.listdir(tmp_path) == ["key"]
    assert read_private(tmp_path / "key") == b"old"


# Signatures


def test_signing_key_is_kept_and_is_the_same_after_a_restart(tmp_path: Path) -> None:
    first = SigningKey.create_or_load(tmp_path / "worker" / "key.pem")
    again = SigningKey.create_or_load(tmp_path / "worker" / "key.pem")
    assert first.public == again.public
    assert len(first.public) == 32
    assert mode(tmp_path / "worker") == 0o700
    assert mode(tmp_path / "worker" / "key.pem") == 0o600
    assert first.key_id == key_id(first.public) == hashlib.sha256(first.public).hexdigest()[:16]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key.pem")
    with pytest.raises(StorageError, match="never overwritten"):
        SigningKey.generate().save(tmp_path / "key.pem")


def test_repr_shows_no_secret() -> None:
    assert "private" not in repr(SigningKey.generate())
    token, record = a_token()
    assert token.secret.hex() not in repr(token)
    assert str(token.secret) not in repr(token)
    assert str(record.key) not in repr(record)


def test_a_file_that_is_no_ed25519_key_is_corrupt(tmp_path: Path) -> None:
    write_private(tmp_path / "noise.pem", b"noise")
    with pytest.raises(CorruptState, match="no readable key"):
        SigningKey.load(tmp_path / "noise.pem")
    form = serialization.PrivateFormat.PKCS8
    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write_private(tmp_path / "ec.pem", pem)
    with pytest.raises(CorruptState, match="another kind"):
        SigningKey.load(tmp_path / "ec.pem")
    locked = serialization.BestAvailableEncryption(b"password")
    write_private(tmp_path / "locked.pem", other.private_bytes(serialization.Encoding.PEM, form, locked))
    with pytest.raises(CorruptState, match="no readable key"):
        SigningKey.load(tmp_path / "locked.pem")


def test_preauthentication_encoding_is_dsse() -> None:
    # The test vector of the DSSE specification.
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert preauthentication_encoding("http://example.com/HelloWorld", b"hello world") == expected


def test_signature_holds_for_its_key_type_and_bytes_alone() -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign("type/a", b"payload")
    assert verify(key.public, "type/a", b"payload", signature)
    assert not verify(other.public, "type/a", b"payload", signature)
    assert not verify(key.public, "type/b", b"payload", signature)
    assert not verify(key.public, "type/a", b"payloaD", signature)
    assert not verify(key.public, "type/a 7 payload", b"", signature)
    for position in range(len(signature)):
        changed = bytearray(signature)
        changed[position] ^= 1
        assert not verify(key.public, "type/a", b"payload", bytes(changed))


@given(st.binary(max_size=80), st.text(max_size=8), st.binary(max_size=80), st.binary(max_size=80))
def test_verifying_noise_says_no_and_never_raises(
    public: bytes, kind: str, payload: bytes, signature: bytes
) -> None:
    assert not verify(public, kind, payload, signature)


# Sessions


def test_session_proof_is_bound_to_nonce_coordinator_and_worker() -> None:
    key, nonce, worker = SigningKey.generate(), bytes(32), WorkerId("w-1")
    proof = sign_session(key, nonce, PIN, worker)
    assert verify_session(key.public, nonce, PIN, worker, signature=proof)
    assert not verify_session(key.public, bytes([1, *nonce[1:]]), PIN, worker, signature=proof)
    assert not verify_session(key.public, nonce, OTHER_PIN, worker, signature=proof)
    assert not verify_session(key.public, nonce, PIN, WorkerId("w-2"), signature=proof)
    assert not verify_session(SigningKey.generate().public, nonce, PIN, worker, signature=proof)
    assert not verify_session(key.public, b"", PIN, worker, signature=proof)


def test_session_statement_is_canonical_and_checks_lengths() -> None:
    statement = session_statement(bytes(32), PIN, WorkerId("w-1"))
    expected = {"nonce": "00" * 32, "pin": PIN.hex(), "worker": "w-1"}
    assert parse_json(statement, 1000) == expected
    for nonce, pin in [(b"", PIN), (bytes(31), PIN), (bytes(32), PIN[:31])]:
        with pytest.raises(ValueError, match="32 bytes"):
            session_statement(nonce, pin, WorkerId("w-1"))


# Tokens


def a_token(*, pin: bytes = PIN, uses: int = 2, seed: int = 0) -> tuple[JoinToken, TokenRecord]:
    counter = iter(range(seed, 1000))

    def rng_bytes(count: int) -> bytes:
        return hashlib.sha256(bytes([next(counter)])).digest()[:count]

    expires_at = NOW + timedelta(hours=24)
    return mint(rng_bytes, pin=pin, role=Role.WORKER, expires_at=expires_at, uses=uses, label="lab")


def test_token_text_has_the_promised_form() -> None:
    token, record = a_token()
    mark, pin, token_id, secret = token.text.split(".")
    assert (mark, len(pin), len(token_id), len(secret)) == ("WEFT1", 52, 6, 26)
    assert token_id == record.token_id
    assert record.key == hashlib.sha256(token.secret).digest() != token.secret


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=20, max_size=20))
def test_token_text_reads_back_in_any_case_and_with_blanks_around(pin: bytes, random: bytes) -> None:
    source = iter([random[:4], random[4:]])
    token, _ = mint(
        lambda count: next(source)[:count],
        pin=pin,
        role=Role.VIEWER,
        expires_at=NOW,
        uses=1,
        runs=(RunId("a"),),
    )
    for text in (token.text, token.text.lower(), f"  {token.text}\n"):
        assert JoinToken.parse(text) == token


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: "", "empty"),
        (lambda t: "localhost:7443", "starts with WEFT1"),
        (lambda t: "WEFT2" + t[5:], "newer Weft"),
        (lambda t: "WEFT12" + t[5:], "newer Weft"),
        (lambda t: t[:-1], "cut off"),
        (lambda t: t + "A", "cut off"),
        (lambda t: t.replace(".", " "), "starts with WEFT1"),
        (lambda t: t[:10] + "1" + t[11:], "cut off or has a typing error"),
        (lambda t: t[:57] + "7" + t[58:], "typing error"),
        (lambda t: t[:-1] + "7", "typing error"),
    ],
    ids=["empty", "address", "v2", "v12", "short", "long", "blanks", "digit-1", "pin-end", "secret-end"],
)
def test_a_text_that_is_no_token_is_refused_without_repeating_it(
    change: Callable[[str], str], cause: str
) -> None:
    token, _ = a_token()
    with pytest.raises(UsageError, match=cause) as refusal:
        JoinToken.parse(change(token.text))
    shown = refusal.value.message + refusal.value.hint
    assert token.text[-20:] not in shown
    assert "weft serve" in refusal.value.hint


@given(st.text(max_size=120))
def test_parsing_noise_refuses_and_nothing_else(text: str) -> None:
    with pytest.raises(UsageError):
        JoinToken.parse(text)


def test_minting_checks_what_the_operator_asks_for() -> None:
    for uses in (0, -1, 1_000_001):
        with pytest.raises(UsageError, match=f"{uses} uses"):
            a_token(uses=uses)
    with pytest.raises(ValueError, match="time zone"):
        mint(lambda n: bytes(n), pin=PIN, role=Role.ADMIN, expires_at=NOW.replace(tzinfo=None), uses=1)
    with pytest.raises(ValueError, match="pin of 32 bytes"):
        a_token(pin=b"short")
    with pytest.raises(ValueError, match="not a token id"):
        JoinToken(pin=PIN, token_id="short", secret=bytes(16))


def test_a_proof_takes_one_use_until_there_is_none() -> None:
    token, record = a_token(uses=2)
    proof = join_proof(token, DIGEST)
    once = check_proof(record, PIN, DIGEST, proof, NOW)
    twice = check_proof(once, PIN, DIGEST, proof, NOW)
    assert (once.uses_left, twice.uses_left, record.uses_left) == (1, 0, 2)
    with pytest.raises(TokenRefused, match="used up"):
        check_proof(twice, PIN, DIGEST, proof, NOW)
    # A Join that is repeated after its answer was lost proves the secret and spends nothing.
    assert check_secret(twice, PIN, DIGEST, proof) == twice


@pytest.mark.parametrize(
    ("fields", "now", "cause"),
    [
        ({"revoked": True}, NOW, "was revoked"),
        ({}, NOW + timedelta(hours=24), "expired at 2031-05-07 07:08 UTC"),
        ({"uses_left": 0}, NOW, "used up"),
        ({"revoked": True, "uses_left": 0}, NOW + timedelta(days=2), "was revoked"),
    ],
    ids=["revoked", "expired", "used-up", "revoked-first"],
)
def test_a_right_secret_is_told_why_it_is_refused(
    fields: dict[str, int | bool], now: datetime, cause: str
) -> None:
    token, record = a_token()
    changed = TokenRecord(
        **{name: fields.get(name, getattr(record, name)) for name in TokenRecord.__dataclass_fields__}
    )
    with pytest.raises(TokenRefused, match=cause) as refusal:
        check_proof(changed, PIN, DIGEST, join_proof(token, DIGEST), now)
    assert refusal.value.hint == "ask the operator for a new token: weft token create"


def test_it_is_good_until_the_last_moment() -> None:
    token, record = a_token()
    last = record.expires_at - timedelta(microseconds=1)
    assert check_proof(record, PIN, DIGEST, join_proof(token, DIGEST), last).uses_left == 1


def test_a_proof_for_something_else_is_wrong_and_says_nothing_more() -> None:
    token, record = a_token()
    other, other_record = a_token(seed=50)
    elsewhere = JoinToken(pin=OTHER_PIN, token_id=token.token_id, secret=token.secret)
    good = join_proof(token, DIGEST)
    attempts: list[tuple[TokenRecord | None, bytes, bytes]] = [
        (record, DIGEST, join_proof(other, DIGEST)),
        (other_record, DIGEST, good),
        (record, DIGEST, join_proof(elsewhere, DIGEST)),
        (record, hashlib.sha256(b"another request").digest(), good),
        (record, DIGEST, b""),
        (record, DIGEST, good + b"\0"),
        (None, DIGEST, good),
        (None, DIGEST, bytes(32)),
    ]
    answers = set()
    for stored, digest, proof in attempts:
        with pytest.raises(TokenRefused) as refusal:
            # Long expired: whoever does not know the secret is not told.
            check_proof(stored, PIN, digest, proof, NOW + timedelta(days=9))
        answers.add((refusal.value.message, refusal.value.hint))
    assert len(answers) == 1


def test_every_bit_of_a_proof_counts() -> None:
    token, record = a_token()
    good = join_proof(token, DIGEST)
    for bit in range(len(good) * 8):
        changed = (int.from_bytes(good) ^ (1 << bit)).to_bytes(len(good))
        with pytest.raises(TokenRefused, match="is wrong"):
            check_secret(record, PIN, DIGEST, changed)


def test_proving_checks_its_lengths() -> None:
    token, record = a_token()
    with pytest.raises(ValueError, match="32 bytes each"):
        join_proof(token, b"short")
    with pytest.raises(ValueError, match="32 bytes each"):
        check_secret(record, b"short", DIGEST, bytes(32))


# The coordinator's identity


def leaf_of(identity: CoordinatorIdentity) -> x509.Certificate:
    return x509.load_pem_x509_certificates(identity.leaf.chain_pem.encode())[0]


def names_of(identity: CoordinatorIdentity) -> tuple[set[str], set[str]]:
    names = leaf_of(identity).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return set(names.get_values_for_type(x509.DNSName)), {str(address) for address in addresses}


@pytest.fixture
def identity(tmp_path: Path) -> CoordinatorIdentity:
    return CoordinatorIdentity.create_or_load(tmp_path / "identity", ["localhost", "127.0.0.1"], NOW)


def test_certificates_have_the_promised_extensions(identity: CoordinatorIdentity) -> None:
    leaf, authority = x509.load_pem_x509_certificates(identity.leaf.chain_pem.encode())
    assert certificate_pem(authority) == identity.ca_pem
    assert authority.not_valid_after_utc == NOW + timedelta(days=3650)
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
    assert leaf.not_valid_before_utc <= NOW < leaf.not_valid_after_utc == NOW + timedelta(days=30)
    assert leaf.not_valid_after_utc == identity.leaf.expires_at
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    leaf.verify_directly_issued_by(authority)
    for certificate in (leaf, authority):
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)


def test_pin_and_fixed_name_follow_from_the_authority_alone(identity: CoordinatorIdentity) -> None:
    assert identity.pin == pin_of(load_certificate(identity.ca_pem))
    assert identity.tls_name == tls_name(identity.pin) == f"coordinator.{identity.pin.hex()[:8]}.weft"
    assert names_of(identity) == ({"localhost", identity.tls_name}, {"127.0.0.1"})


def test_everything_is_stored_privately(identity: CoordinatorIdentity, tmp_path: Path) -> None:
    directory = tmp_path / "identity"
    assert sorted(os.listdir(directory)) == ["authority.pem", "leaf.pem", "signing.pem"]
    assert {mode(path) for path in directory.iterdir()} == {0o600}
    assert mode(directory) == 0o700


def test_a_restart_changes_nothing(identity: CoordinatorIdentity, tmp_path: Path) -> None:
    later = NOW + timedelta(days=19)
    names = ["127.0.0.1", "localhost", "localhost"]
    again = CoordinatorIdentity.create_or_load(tmp_path / "identity", names, later)
    assert again.leaf == identity.leaf
    assert (again.pin, again.signing_key.public) == (identity.pin, identity.signing_key.public)


@pytest.mark.parametrize(
    ("passed", "renewed"),
    [
        (timedelta(days=19, hours=23), False),
        (timedelta(days=20), True),
        (timedelta(days=31), True),
        (-timedelta(minutes=59), False),
        (-timedelta(hours=2), True),
    ],
    ids=["before-two-thirds", "two-thirds", "expired", "clock-a-little-behind", "clock-set-back"],
)
def test_the_leaf_is_renewed_at_two_thirds_of_its_life(
    tmp_path: Path, passed: timedelta, renewed: bool
) -> None:
    # The authority is a day older than the leaf, so that a clock that is set back stays in its validity.
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW - timedelta(days=1))
    (tmp_path / "leaf.pem").unlink()
    identity = CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    before = identity.leaf
    assert identity.renew_if_due(NOW + passed) is renewed
    assert (identity.leaf != before) is renewed
    assert not identity.renew_if_due(NOW + passed)
    on_disk = Bundle.load(tmp_path / "leaf.pem")
    assert identity.leaf.chain_pem == certificate_pem(on_disk.certificate) + identity.ca_pem
    assert identity.leaf.key_pem == on_disk.key_pem


def test_other_names_renew_the_leaf_and_keep_the_pin(identity: CoordinatorIdentity, tmp_path: Path) -> None:
    names = ["coord.example.org", "fe80::1%eth0", "bücher.example", identity.tls_name]
    again = CoordinatorIdentity.create_or_load(tmp_path / "identity", names, NOW)
    expected = {"coord.example.org", "xn--bcher-kva.example", identity.tls_name}
    assert names_of(again) == (expected, {"fe80::1"})
    assert again.pin == identity.pin


@pytest.mark.parametrize("name", ["", "a b", "-x", "a..b", "x" * 64, ".", "http://x", "a" * 300, "é" * 300])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="neither a host name nor an IP address"):
        CoordinatorIdentity.create_or_load(tmp_path, [name], NOW)


def test_the_leaf_never_outlives_the_authority(tmp_path: Path) -> None:
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    late = CoordinatorIdentity.create_or_load(tmp_path, [], NOW + timedelta(days=3645))
    assert late.leaf.expires_at == NOW + timedelta(days=3650)


@pytest.mark.parametrize("days", [-1, 3650])
def test_an_authority_that_is_not_valid_now_is_named(tmp_path: Path, days: int) -> None:
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    with pytest.raises(AccessError, match="the clock says") as refusal:
        CoordinatorIdentity.create_or_load(tmp_path, [], NOW + timedelta(days=days))
    assert "set the clock" in refusal.value.hint


@pytest.mark.parametrize("missing", ["leaf.pem", "signing.pem leaf.pem"], ids=str)
def test_a_creation_that_was_cut_short_is_finished(tmp_path: Path, missing: str) -> None:
    pin = CoordinatorIdentity.create_or_load(tmp_path, [], NOW).pin
    for name in missing.split():
        (tmp_path / name).unlink()
    assert CoordinatorIdentity.create_or_load(tmp_path, [], NOW).pin == pin


@pytest.mark.parametrize("lost", ["authority.pem", "signing.pem"])
def test_a_lost_key_is_not_made_anew(tmp_path: Path, lost: str) -> None:
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    (tmp_path / lost).unlink()
    with pytest.raises(CorruptState, match=f"{lost} is lost"):
        CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    assert not (tmp_path / lost).exists()


@pytest.mark.parametrize("damaged", ["authority.pem", "signing.pem"])
def test_a_damaged_key_is_not_made_anew(tmp_path: Path, damaged: str) -> None:
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    write_private(tmp_path / damaged, b"damaged")
    with pytest.raises(CorruptState) as refusal:
        CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    assert "restore" in refusal.value.hint
    assert read_private(tmp_path / damaged) == b"damaged"


def test_an_authority_with_another_key_or_without_the_right_is_corrupt(tmp_path: Path) -> None:
    mine = CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW)
    authority, leaf = Bundle.load(tmp_path / "a" / "authority.pem"), Bundle.load(tmp_path / "a" / "leaf.pem")
    write_private(tmp_path / "a" / "authority.pem", (leaf.key_pem + mine.ca_pem).encode())
    with pytest.raises(CorruptState, match="the certificate of another"):
        CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW)
    leaf.save(tmp_path / "a" / "authority.pem")
    with pytest.raises(CorruptState, match="no certificate authority"):
        CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW)
    authority.save(tmp_path / "a" / "authority.pem")
    assert CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW).pin == mine.pin


def test_a_damaged_or_foreign_leaf_is_replaced(tmp_path: Path) -> None:
    mine = CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW)
    CoordinatorIdentity.create_or_load(tmp_path / "b", [], NOW)
    for content in (b"damaged", (tmp_path / "b" / "leaf.pem").read_bytes()):
        write_private(tmp_path / "a" / "leaf.pem", content)
        again = CoordinatorIdentity.create_or_load(tmp_path / "a", [], NOW)
        leaf_of(again).verify_directly_issued_by(load_certificate(mine.ca_pem))


def test_an_authority_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    (tmp_path / "authority.pem").chmod(0o640)
    with pytest.raises(AccessError) as refusal:
        CoordinatorIdentity.create_or_load(tmp_path, [], NOW)
    assert refusal.value.hint.startswith("chmod 600 ")


def test_the_signing_key_is_endorsed_by_the_authority(identity: CoordinatorIdentity, tmp_path: Path) -> None:
    public, endorsement = identity.signing_key.public, identity.endorse_signing_key()
    other = CoordinatorIdentity.create_or_load(tmp_path / "other", [], NOW)
    assert verify_endorsement(identity.ca_pem, public, endorsement)
    assert not verify_endorsement(other.ca_pem, public, endorsement)
    assert not verify_endorsement(identity.ca_pem, other.signing_key.public, endorsement)
    for wrong in (b"", endorsement[:-1], bytes(72), other.endorse_signing_key()):
        assert not verify_endorsement(identity.ca_pem, public, wrong)
    with pytest.raises(CorruptState, match="damaged"):
        verify_endorsement("noise", public, endorsement)


def test_an_authority_of_another_kind_endorses_nothing() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rsa")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    assert not verify_endorsement(certificate_pem(certificate), bytes(32), bytes(72))


# The first hello


class Server:
    """A TCP server on loopback that answers one caller and keeps what it was sent after the handshake."""

    def __init__(self, answer: Callable[[socket.socket], bytes]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.received = b""
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self.listener.accept()[0] as connection:
            connection.settimeout(10)
            self.received = self._answer(connection)

    def close(self) -> None:
        self.listener.close()
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], bytes]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[socket.socket], bytes]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


Start = Callable[[Callable[[socket.socket], bytes]], Server]


def tls(
    directory: Path, key_pem: str, chain: Sequence[x509.Certificate], *, newest: bool = True
) -> Callable[[socket.socket], bytes]:
    """Answer with TLS: this key and chain."""
    path = directory / "chain.pem"
    path.write_text(key_pem + "".join(map(certificate_pem, chain)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    if not newest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    def answer(connection: socket.socket) -> bytes:
        with context.wrap_socket(connection, server_side=True) as secure:
            return secure.recv(1024)

    return answer


def chain_of(identity: CoordinatorIdentity) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(identity.leaf.chain_pem.encode())


def hello(server: Server, pin: bytes, now: datetime = NOW, timeout_s: float = 10.0) -> str:
    return fetch_pinned_ca("127.0.0.1", server.port, pin, timeout_s, now=now)


def test_the_pinned_authority_is_found_and_nothing_is_sent(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    server = serve(tls(tmp_path, identity.leaf.key_pem, chain_of(identity)))
    assert hello(server, identity.pin) == identity.ca_pem
    server.close()
    assert server.received == b""


def test_what_hello_returns_verifies_an_ordinary_connection(tmp_path: Path, serve: Start) -> None:
    now = datetime.now(UTC)
    identity = CoordinatorIdentity.create_or_load(tmp_path / "identity", [], now)
    answer = tls(tmp_path, identity.leaf.key_pem, chain_of(identity))
    ca_pem = hello(serve(answer), identity.pin, now=now)
    context = ssl.create_default_context(cadata=ca_pem)
    server = serve(answer)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=tls_name(identity.pin)) as connection,
    ):
        assert connection.version() == "TLSv1.3"
        connection.sendall(b"work")
    server.close()
    assert server.received == b"work"


def forged(subject: x509.Name, pinned: x509.Certificate | None = None) -> tuple[str, list[x509.Certificate]]:
    """A key and a chain by somebody who picked the authority's name; with ``pinned`` as its end instead."""
    authority_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    end = NOW + timedelta(days=1)
    start = NOW - timedelta(days=1)
    authority = (
        x509.CertificateBuilder(subject, subject, authority_key.public_key(), 1, start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    leaf = x509.CertificateBuilder(subject, subject, leaf_key.public_key(), 2, start, end)
    bundle = Bundle(key=leaf_key, certificate=leaf.sign(authority_key, hashes.SHA256()))
    return bundle.key_pem, [bundle.certificate, pinned or authority]


def test_another_authority_is_refused_by_name_or_not(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    other = CoordinatorIdentity.create_or_load(tmp_path / "other", ["127.0.0.1"], NOW)
    same_name = load_certificate(identity.ca_pem).subject
    for key_pem, chain in [(other.leaf.key_pem, chain_of(other)), forged(same_name)]:
        server = serve(tls(tmp_path, key_pem, chain))
        with pytest.raises(IdentityMismatch, match="another coordinator") as refusal:
            hello(server, identity.pin)
        assert f"expected {identity.pin.hex()[:16]}…" in refusal.value.message
        assert f"got {pin_of(chain[-1]).hex()[:16]}…" in refusal.value.message
        server.close()
        assert server.received == b""


def test_the_pinned_certificate_without_its_key_is_refused(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    pinned = load_certificate(identity.ca_pem)
    key_pem, chain = forged(pinned.subject, pinned)
    server = serve(tls(tmp_path, key_pem, chain))
    with pytest.raises(IdentityMismatch, match="was not issued by it"):
        hello(server, identity.pin)
    server.close()
    assert server.received == b""


def test_a_certificate_made_up_around_the_pinned_key_is_refused(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    # The public key is public: anyone can put it into a certificate of another content, but not sign it.
    pinned, liar = load_certificate(identity.ca_pem), ec.generate_private_key(ec.SECP256R1())
    end = NOW + timedelta(days=9)
    key = pinned.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    made_up = (
        x509.CertificateBuilder(pinned.subject, pinned.subject, key, 7, NOW, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(liar, hashes.SHA256())
    )
    server = serve(tls(tmp_path, identity.leaf.key_pem, [chain_of(identity)[0], made_up]))
    with pytest.raises(IdentityMismatch, match="was not issued by it"):
        hello(server, identity.pin)


def test_a_chain_without_the_authority_is_refused(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    server = serve(tls(tmp_path, identity.leaf.key_pem, chain_of(identity)[:1]))
    with pytest.raises(IdentityMismatch, match="another coordinator"):
        hello(server, identity.pin)


@pytest.mark.parametrize("days", [-2, 29.999, 31, 3651], ids=["early", "good", "leaf-over", "authority-over"])
def test_a_wrong_clock_is_named(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start, days: float
) -> None:
    server = serve(tls(tmp_path, identity.leaf.key_pem, chain_of(identity)))
    now = NOW + timedelta(days=days)
    if days == 29.999:
        assert hello(server, identity.pin, now) == identity.ca_pem
        return
    with pytest.raises(IdentityMismatch, match=f"clock says {now:%Y-%m-%d}") as refusal:
        hello(server, identity.pin, now)
    assert refusal.value.hint == "check the clocks of both machines"


def plaintext(connection: socket.socket) -> bytes:
    connection.sendall(b"\0\0\0\4\0\0\0\0\0" * 4)
    return connection.recv(16)


def hang_up(connection: socket.socket) -> bytes:
    connection.recv(16)
    return b""


def test_a_server_without_tls_is_unreachable(serve: Start) -> None:
    with pytest.raises(Unreachable, match="not with TLS"):
        hello(serve(plaintext), PIN)
    with pytest.raises(Unreachable):
        hello(serve(hang_up), PIN)


def test_tls_older_than_1_3_is_unreachable(
    identity: CoordinatorIdentity, tmp_path: Path, serve: Start
) -> None:
    server = serve(tls(tmp_path, identity.leaf.key_pem, chain_of(identity), newest=False))
    with pytest.raises(Unreachable, match=r"not with TLS 1\.3"):
        hello(server, identity.pin)


def test_nobody_silence_and_bad_names_are_unreachable(serve: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port} cannot be reached: Connection refused"):
        fetch_pinned_ca("127.0.0.1", port, PIN, 10, now=NOW)
    with pytest.raises(Unreachable, match="no answer"):
        hello(serve(lambda connection: connection.recv(4096) and connection.recv(1)), PIN, timeout_s=0.05)
    with pytest.raises(Unreachable, match="cannot be reached"):
        fetch_pinned_ca("x" * 64, port, PIN, 10, now=NOW)


def test_addresses_in_certificates_are_addresses(identity: CoordinatorIdentity) -> None:
    names = leaf_of(identity).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
