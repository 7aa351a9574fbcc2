"""Keys and certificates for a federation of Flower: what compose.flower.yaml mounts.

    python deploy/flower_keys.py deploy/flower-keys --host superlink --node a --node b

    superlink/   ca.pem, server.pem, server.key: for the SuperLink alone
    NODE/        ca.pem, node.key: for that SuperNode alone
    operator/    config.toml, ca.pem, NODE.pub: FLWR_HOME for the `flwr` command on this machine, and what it registers

What is there stays as it is, so the same command adds a node. The authority's key is used once and kept nowhere: a new
``superlink/`` means new ``ca.pem`` files for everyone, and takes removing the old ones. Certificates last a year.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LASTS = timedelta(days=365)
EARLIER = timedelta(hours=1)
"""Clocks differ."""
LOCAL_HOSTS = ("localhost", "127.0.0.1")
"""The operator's `flwr` reaches the SuperLink by its published port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """Signs one certificate and is forgotten."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def main(words: Sequence[str] | None = None) -> int:
    """Make what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description="Keys and certificates for a federation of Flower.")
    parser.add_argument("to", type=Path, help="directory, made if it is not there")
    parser.add_argument(
        "--host", action="append", default=[], help="a name by which nodes reach the SuperLink"
    )
    parser.add_argument("--port", type=int, default=8000, help="the SuperLink's published port")
    parser.add_argument("--node", action="append", default=[], help="a SuperNode to make a key for")
    given = parser.parse_args(words)
    made = [*make_superlink(given.to, [*given.host, *LOCAL_HOSTS], given.port)]
    for name in given.node:
        made += make_node(given.to, name)
    sys.stdout.write("".join(f"wrote {path}\n" for path in made) or "everything is there already\n")
    return 0


def make_superlink(to: Path, hosts: Sequence[str], port: int) -> list[Path]:
    """The SuperLink's certificate and key, and the operator's way to it, unless they are there."""
    directory = to / "superlink"
    if directory.exists():
        return []
    authority = make_authority()
    key = ec.generate_private_key(ec.SECP256R1())
    ca_pem = authority.certificate.public_bytes(serialization.Encoding.PEM)
    server_pem = server_certificate(authority, key.public_key(), hosts).public_bytes(
        serialization.Encoding.PEM
    )
    operator = to / "operator"
    config = (
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{(operator / "ca.pem").resolve()}"\n'
    )
    return [
        write(directory / "ca.pem", ca_pem),
        write(directory / "server.pem", server_pem),
        write(directory / "server.key", pem_of(key, serialization.PrivateFormat.PKCS8)),
        write(operator / "ca.pem", ca_pem),
        write(operator / "config.toml", config.encode()),
    ]


def make_node(to: Path, name: str) -> list[Path]:
    """A node's key in the form that Flower reads, ECDSA as OpenSSH writes it, unless it is there."""
    directory = to / name
    if directory.exists():
        return []
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [
        write(directory / "ca.pem", (to / "superlink" / "ca.pem").read_bytes()),
        write(directory / "node.key", pem_of(key, serialization.PrivateFormat.OpenSSH)),
        # Beside the operator's own files: the rest belongs to the containers' user.
        write(to / "operator" / f"{name}.pub", public),
    ]


def make_authority() -> Authority:
    """A new authority of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Weft's federation")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        begin(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key=key, certificate=certificate)


def server_certificate(
    authority: Authority, public: ec.EllipticCurvePublicKey, hosts: Sequence[str]
) -> x509.Certificate:
    """A certificate for a server with these names and addresses."""
    issuer = authority.key.public_key()
    return (
        begin(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0])]),
            authority.certificate.subject,
            public,
        )
        .add_extension(x509.SubjectAlternativeName([general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def begin(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """What both certificates have."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + LASTS)
    )


def general_name(host: str) -> x509.GeneralName:
    """A host as a certificate names it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem_of(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    """A private key as text."""
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(path: Path, data: bytes) -> Path:
    """Write a file for its owner alone, in a directory for its owner alone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    return path


if __name__ == "__main__":
    sys.exit(main())
