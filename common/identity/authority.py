"""The coordinator's identity: a certificate authority of its own, a TLS leaf, and a signing key.

    authority.pem  ECDSA P-256 key and certificate, 10 years; may sign leaves and nothing below them
    signing.pem    Ed25519 key that signs manifests; the authority endorses it
    leaf.pem       ECDSA P-256 key and certificate of the TLS endpoint, 30 days, renewed after 20

Each file holds a key together with its certificate, so that no crash can part them. They are made in this
order; a file that is missing while a later one exists was lost, not interrupted, and is not made anew:
another authority would be another coordinator to every worker.

Names and addresses in the leaf serve browsers and scrapers. Workers check the fixed name :func:`tls_name`
under the pinned authority, so that it does not matter by which name or NAT they reach the coordinator.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from weft.common.errors import AccessError, CorruptState, NotFound, UsageError
from weft.common.identity.files import private_directory, read_private, write_private
from weft.common.identity.signing import SigningKey

AUTHORITY_LIFE: Final = timedelta(days=3650)
LEAF_LIFE: Final = timedelta(days=30)
CLOCK_SLACK: Final = timedelta(hours=1)
"""How far a worker's clock may be behind ours."""

_AUTHORITY, _SIGNING, _LEAF = "authority.pem", "signing.pem", "leaf.pem"
_ENDORSEMENT: Final = b"weft-signing-key-v1"
_HOST: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")


def pin_of(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's public key as SubjectPublicKeyInfo, 32 bytes (RFC 7469, section 2.4)."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(certificate.public_key().public_bytes(encoding, form)).digest()


def load_certificate(pem: str) -> x509.Certificate:
    """Read one PEM certificate; raises CorruptState."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise CorruptState("the authority's certificate is damaged", hint="join again: weft join") from error


def certificate_pem(certificate: x509.Certificate) -> str:
    """Write one certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def tls_name(pin: bytes) -> str:
    """The name to expect in the TLS certificate under the authority of ``pin``, whatever the address."""
    return f"coordinator.{pin.hex()[:8]}.weft"


def verify_endorsement(ca_pem: str, public: bytes, endorsement: bytes) -> bool:
    """Say whether the authority endorsed ``public`` [32 bytes] as the key that signs manifests.

    Never raises for a wrong ``public`` or ``endorsement``; raises CorruptState where ``ca_pem`` is none. That
    is what :func:`weft.common.identity.hello.fetch_pinned_ca` gave for the pin.
    """
    key = load_certificate(ca_pem).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(endorsement, _ENDORSEMENT + public, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An ECDSA P-256 key and its certificate, as one file holds them."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    """The private key."""
    certificate: x509.Certificate
    """The certificate of its public key."""

    @property
    def key_pem(self) -> str:
        """The private key, unencrypted PKCS #8."""
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(encoding, form, serialization.NoEncryption()).decode("ascii")

    def save(self, path: Path) -> None:
        """Write key and certificate, readable by their owner alone."""
        write_private(path, (self.key_pem + certificate_pem(self.certificate)).encode("ascii"))

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Read what :meth:`save` wrote; raises AccessError if others can read it, CorruptState, NotFound."""
        data = read_private(path)
        try:
            key = serialization.load_pem_private_key(data, password=None)
            certificate = x509.load_pem_x509_certificate(data)
        except (ValueError, TypeError) as error:
            raise _corrupt(path, "holds no readable key and certificate") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _corrupt(path, "holds a key and the certificate of another")
        return cls(key=key, certificate=certificate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """What a TLS endpoint serves: a key and its chain, which belong together."""

    key_pem: str = field(repr=False)
    """The leaf's private key."""
    chain_pem: str
    """The leaf's certificate, then the authority's, so that a worker finds its pin in the handshake."""
    expires_at: datetime
    """When the leaf's certificate ends, in UTC."""


class CoordinatorIdentity:
    """The coordinator's keys; made by :meth:`create_or_load`.

    Everything stays as it is but the leaf, which :meth:`renew_if_due` replaces by one assignment: a thread
    that reads ``leaf`` has a key and a chain that fit, old or new.
    """

    def __init__(self, directory: Path, names: Sequence[str], authority: Bundle, now: datetime) -> None:
        self._directory = directory
        self._authority = authority
        self._names = _general_names(names, self.tls_name)
        self.signing_key = SigningKey.create_or_load(directory / _SIGNING)
        self._bundle = self._load_or_issue(now)

    @classmethod
    def create_or_load(cls, directory: Path, names: Sequence[str], now: datetime) -> CoordinatorIdentity:
        """Read the identity in ``directory``, or make one at the first time.

        The caller holds the lock of the state directory: two at once would make two authorities.

        Args:
            directory: Made with mode 0700 where missing.
            names: Host names and IP addresses to put into the TLS certificate; a change renews it.
            now: With a time zone.

        Raises:
            AccessError: Other users can read the keys, or the authority is not valid at ``now``.
            CorruptState: A file is damaged, or lost while later ones exist.
            UsageError: A name is neither a host name nor an address.
            StorageError: Something cannot be read or written.
        """
        private_directory(directory)
        _check_none_lost(directory)
        path = directory / _AUTHORITY
        if not path.exists():
            _issue_authority(now).save(path)
        authority = Bundle.load(path)
        _check_authority(authority.certificate, path, now)
        identity = cls(directory, names, authority, now)
        identity.renew_if_due(now)
        return identity

    @property
    def pin(self) -> bytes:
        """What join tokens carry: SHA-256 of the authority's public key, 32 bytes."""
        return pin_of(self._authority.certificate)

    @property
    def tls_name(self) -> str:
        """The fixed name in the TLS certificate, which workers check instead of the address."""
        return tls_name(self.pin)

    @property
    def ca_pem(self) -> str:
        """The authority's certificate."""
        return certificate_pem(self._authority.certificate)

    @property
    def leaf(self) -> Leaf:
        """The TLS key and chain of this moment."""
        bundle = self._bundle
        return Leaf(
            key_pem=bundle.key_pem,
            chain_pem=certificate_pem(bundle.certificate) + self.ca_pem,
            expires_at=bundle.certificate.not_valid_after_utc,
        )

    def renew_if_due(self, now: datetime) -> bool:
        """Renew the leaf when two thirds of its life are over, on disk and here; say whether it was done.

        Also when its names are not those asked for, when another authority issued it, and when it is not
        valid yet because the clock was set back.
        """
        if self._is_good(self._bundle.certificate, now):
            return False
        self._bundle = self._issue(now)
        return True

    def endorse_signing_key(self) -> bytes:
        """The authority's word that ``signing_key`` is the coordinator's: ECDSA-SHA256 in DER.

        With it, a worker or a puller that knows the pin alone can check every manifest: see
        :func:`verify_endorsement`. The text that is signed cannot be mistaken for a certificate, which begins
        with byte 0x30. ECDSA is randomised: each call gives other bytes.
        """
        return self._authority.key.sign(_ENDORSEMENT + self.signing_key.public, ec.ECDSA(hashes.SHA256()))

    def _load_or_issue(self, now: datetime) -> Bundle:
        try:
            return Bundle.load(self._directory / _LEAF)
        except (NotFound, CorruptState):
            # A damaged leaf is not worth a refusal: another one costs nobody anything.
            return self._issue(now)

    def _issue(self, now: datetime) -> Bundle:
        bundle = _issue_leaf(self._authority, self._names, now)
        bundle.save(self._directory / _LEAF)
        return bundle

    def _is_good(self, leaf: x509.Certificate, now: datetime) -> bool:
        start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return (
            start <= now < start + (end - start) * 2 / 3
            and tuple(alternative) == self._names
            and is_issued_by(leaf, self._authority.certificate)
        )


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether ``authority`` signed ``certificate``; never raises, whatever the certificates hold."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def is_authority(certificate: x509.Certificate) -> bool:
    """Say whether the certificate signed itself and may sign others; never raises for a stranger's."""
    # The signature first: past it, the extensions are what the key's owner wrote, and need no defence.
    if not is_issued_by(certificate, certificate):
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _issue_authority(now: datetime) -> Bundle:
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The name differs from authority to authority, or TLS libraries would try the wrong one of two.
    name = _name(f"Weft authority {identifier.digest.hex()[:8]}")
    builder = _builder(name, name, key, now, now + AUTHORITY_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(key_cert_sign=True), critical=True)
    return Bundle(
        key=key, certificate=builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
    )


def _issue_leaf(authority: Bundle, names: tuple[x509.GeneralName, ...], now: datetime) -> Bundle:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    end = min(now + LEAF_LIFE, issuer.not_valid_after_utc)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _builder(_name("Weft coordinator"), issuer.subject, key, now, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(identifier, critical=False)
    return Bundle(key=key, certificate=builder.sign(authority.key, hashes.SHA256()))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(end)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_names(names: Sequence[str], fixed: str) -> tuple[x509.GeneralName, ...]:
    """``fixed`` and ``names``, each once, in an order that does not depend on theirs."""
    return (
        x509.DNSName(fixed),
        *(_general_name(name) for name in sorted({n.split("%")[0] for n in names} - {fixed})),
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        host = name.encode("idna").decode("ascii")
    except UnicodeError:
        host = ""
    if not _HOST.fullmatch(host):
        raise UsageError(
            f"{name!r} is neither a host name nor an IP address", hint="for example --name coord.example.org"
        )
    return x509.DNSName(host)


def _check_none_lost(directory: Path) -> None:
    """Refuse a directory in which an earlier file is missing while a later one exists."""
    there = [(directory / name).exists() for name in (_AUTHORITY, _SIGNING, _LEAF)]
    if there != sorted(there, reverse=True):
        lost = (_AUTHORITY, _SIGNING, _LEAF)[there.index(False)]
        raise CorruptState(
            f"{directory / lost} is lost",
            hint=f"restore it from a backup; or move {directory} away and let every worker join anew",
        )


def _check_authority(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    if not is_authority(certificate):
        raise _corrupt(path, "holds no certificate authority")
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now < end:
        raise AccessError(
            f"{path} is valid from {start:%Y-%m-%d} to {end:%Y-%m-%d} and the clock says {now:%Y-%m-%d}",
            hint=f"set the clock; or move {path.parent} away and let every worker join anew",
        )


def _corrupt(path: Path, what: str) -> CorruptState:
    return CorruptState(f"{path} {what}", hint=f"restore {path} from a backup")
