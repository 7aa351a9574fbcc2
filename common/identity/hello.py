"""The first connection: find the pinned authority in the coordinator's TLS chain, and send nothing secret.

A new worker knows the coordinator's pin and has no certificate to verify with. It makes a TLS 1.3 handshake
that accepts any certificate, reads the chain and hangs up. What it keeps is the one certificate whose public
key has the pinned hash, provided that it issued the leaf of this very connection: TLS proved that the other
side holds the leaf's key, the issuer's signature that the authority vouches for it, the pin that it is the
authority meant. The connection for work is then verified in the ordinary way, with that certificate as its
only root. Nobody in between can pass, and nobody learns more than that somebody called.
"""

from __future__ import annotations

import socket
import ssl
import sys
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from weft.common.errors import IdentityMismatch, Unreachable
from weft.common.identity.authority import certificate_pem, is_authority, is_issued_by, pin_of, tls_name

CHAIN_MAX: Final = 8
"""A chain is a leaf and an authority; what more is looked at only bounds the work."""


def fetch_pinned_ca(host: str, port: int, pin: bytes, timeout_s: float, *, now: datetime) -> str:
    """Get the certificate of the authority that ``pin`` names, as PEM: the only root to trust from now on.

    Args:
        host: Name or address of the coordinator; it need not be in any certificate.
        port: Its TLS port.
        pin: SHA-256 of the authority's public key, 32 bytes, from the join token.
        timeout_s: Limit of connecting, and again of the handshake.
        now: With a time zone; certificates have to be valid at this time.

    Raises:
        IdentityMismatch: The other side is not the coordinator that the token is for, or a certificate is not
            valid at ``now``.
        Unreachable: Nobody answers, or not with TLS 1.3.
    """
    chain = [_parse(der) for der in _unverified_chain(host, port, pin, timeout_s)[:CHAIN_MAX]]
    authority = next((c for c in chain if pin_of(c) == pin), None)
    if authority is None:
        got = pin_of(chain[-1]).hex()[:16] if chain else "nothing"
        raise _mismatch(f"{host}:{port} is another coordinator: expected {pin.hex()[:16]}…, got {got}…")
    if not (is_authority(authority) and is_issued_by(chain[0], authority)):
        raise _mismatch(f"{host}:{port} shows the certificate of {pin.hex()[:16]}… but was not issued by it")
    for certificate in (authority, chain[0]):
        _check_validity(certificate, now)
    return certificate_pem(authority)


def _unverified_chain(host: str, port: int, pin: bytes, timeout_s: float) -> list[bytes]:
    """Make the handshake; returns the chain as DER, leaf first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Nothing to verify with yet: fetch_pinned_ca judges the chain, and nothing is sent over this connection.
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=tls_name(pin)) as connection,
        ):
            return _chain_of(connection)
    except ssl.SSLError as error:
        hint = "check the port; a coordinator started with --insecure is joined with --insecure"
        raise Unreachable(f"{host}:{port} answers, but not with TLS 1.3", hint=hint) from error
    except (OSError, UnicodeError) as error:
        cause = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
        hint = "check the address, and that the coordinator runs and its port is open"
        raise Unreachable(f"{host}:{port} cannot be reached: {cause}", hint=hint) from error


def _chain_of(connection: ssl.SSLSocket) -> list[bytes]:
    if sys.version_info >= (3, 13):
        return list(connection.get_unverified_chain())
    # Before 3.13 the method is there without a public name, and gives certificate objects.
    chain = connection._sslobj.get_unverified_chain() or []  # type: ignore[attr-defined]
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in chain]


def _parse(der: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        pin_of(certificate)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise _mismatch("the other side's certificate cannot be read") from error
    return certificate


def _check_validity(certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        raise IdentityMismatch(
            f"the coordinator's certificate is valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}, "
            f"and this machine's clock says {now:%Y-%m-%d %H:%M}",
            hint="check the clocks of both machines",
        )


def _mismatch(message: str) -> IdentityMismatch:
    return IdentityMismatch(
        message, hint="nothing was sent; ask the operator for the line that `weft serve` prints"
    )
