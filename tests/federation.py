"""A federation of Flower as processes on loopback: one SuperLink, SuperNodes, TLS and node authentication."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.running import eventually

APP = Path(__file__).parents[1] / "deploy" / "flower"


class Federation:
    """Keys and certificates in one directory, and the processes that use them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        directory.mkdir(parents=True)
        write_certificates(directory)
        self._environ = {
            **os.environ,
            "FLWR_HOME": str(directory / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "WEFT_HOME": str(directory / "weft"),
            "XDG_RUNTIME_DIR": str(directory),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PYTHONWARNINGS": "ignore",
        }
        (directory / "flwr").mkdir()
        (directory / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{directory / "ca.pem"}"\n'
        )

    def start_superlink(self) -> None:
        at = self.directory
        self._start(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(at / "ca.pem"), "--ssl-certfile", str(at / "server.pem")),
            *("--ssl-keyfile", str(at / "server.key"), "--enable-supernode-auth"),
            "--disable-runtime-dependency-installation",
        )
        context = ssl.create_default_context(cafile=str(at / "ca.pem"))

        def is_up() -> bool:
            with contextlib.suppress(OSError):
                url = f"https://127.0.0.1:{self.port}/health"
                return bool(urllib.request.urlopen(url, context=context, timeout=2).status == 200)
            return False

        eventually(is_up, lambda: self.log("superlink"))

    def start_supernode(self, name: str, /, **config: object) -> None:
        """Register a node's key and start it."""
        key, public = write_node_key(self.directory, name)
        self.flwr("supernode", "register", str(public), "here")
        self._start(
            name,
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(self.directory / "ca.pem")),
            *("--auth-supernode-private-key", str(key), "--port", str(free_port())),
            *("--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())),
        )

    def flwr(self, *arguments: str) -> Any:
        """Run a command of Flower's that answers in JSON."""
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.log("superlink")
        return json.loads(done.stdout)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")[-6000:]

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        # Whatever they started has this federation's home in its environment, residents too.
        mark = f"WEFT_HOME={self.directory / 'weft'}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _start(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=self._environ,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )


@contextlib.contextmanager
def federation(directory: Path) -> Iterator[Federation]:
    """A federation that ends with the test."""
    found = Federation(directory)
    try:
        yield found
    finally:
        found.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_certificates(to: Path) -> None:
    """An authority and a server's certificate for loopback, as PEM files."""
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
            )
        )

    usage = x509.KeyUsage(
        *(name in ("sign", "crl") for name in ("d", "c", "k", "a", "g", "sign", "crl", "e", "f"))
    )
    authority = (
        builder(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = (
        builder(name, key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    (to / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (to / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    (to / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )


def write_node_key(to: Path, name: str) -> tuple[Path, Path]:
    """A node's key as Flower wants it: ECDSA, in OpenSSH's form."""
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = to / f"{name}.key", to / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return private, public
