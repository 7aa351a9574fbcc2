"""What this machine remembers of coordinators, so that commands need no flags.

    ~/.weft (or $WEFT_HOME)
        workers/<pin8>/        key, member.json, worker.json: this machine as a worker; its training state
        coordinators/<pin8>/   key, member.json: this machine as a viewer or an admin
        local/<hash>.json      written by `weft serve`: where a coordinator on this machine keeps its state
        bases/<digest>/        bases that were fetched

Directories are 0700 and files 0600: a key is the whole identity. ``pin8`` is the start of the coordinator's pin, by
which it is known whatever its address.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from weft.common.errors import CorruptState, InputError, NotFound, UsageError
from weft.common.identity.files import private_directory, read_private, write_private
from weft.common.identity.signing import SigningKey
from weft.common.identity.token import Role
from weft.common.ids import Digest, WorkerId
from weft.common.manifest import canonical_json, parse_json
from weft.common.settings import from_table, to_table

PORT: Final = 7443
"""Where a coordinator listens when nobody says otherwise."""
MEMBER: Final = "member.json"
KEY: Final = "key"
WORKER: Final = "worker.json"
_FILE_BYTES_MAX: Final = 64 * 1024
_JOIN_HINT: Final = (
    "give --coordinator HOST:PORT --token TOKEN (weft token create --role viewer prints one), "
    "or run it on the coordinator's machine while `weft serve` runs"
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A place on a coordinator's roster: all that is needed, with the key beside it, to open a session."""

    address: str
    """host:port"""
    pin: str
    """SHA-256 of the authority's public key, hex."""
    ca_pem: str
    """The pinned authority's certificate; empty when it was joined without TLS."""
    tls_name: str
    """The name to expect in the TLS certificate."""
    worker_id: WorkerId
    """As the coordinator issued it."""
    role: Role = Role.WORKER
    """What the token allowed."""
    coordinator_key: str = ""
    """Ed25519 public key that signs recipes and manifests, hex; endorsed by the authority when this was written."""
    insecure: bool = False
    """A loopback coordinator without TLS."""

    @property
    def pin8(self) -> str:
        """The short name of the coordinator."""
        return self.pin[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """A membership and where its key lies."""

    member: Membership
    key_file: Path
    """Ed25519 private key."""
    local: bool = False
    """Whether it is the operator's own, on the coordinator's machine."""

    def key(self) -> SigningKey:
        """Read the key; raises AccessError when others can read it."""
        return SigningKey.load(self.key_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How this machine works for a coordinator; remembered for `weft join` without arguments."""

    data: str
    """Absolute path of the training data; empty where only runs that give their data are served."""
    name: str
    """Display name."""
    device: str = ""
    """cpu, cuda or mps; empty finds the best."""
    dtype: str = ""
    """Of the frozen base: float32 or bfloat16; empty takes what the device does best."""
    quantise: str = ""
    """4bit, or empty."""
    base: str = ""
    """Directory of the base; empty uses the cache, the Hub or the coordinator."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    rank: int = 0
    """Largest LoRA rank to train; 0 for any that fits into memory."""
    processes: int = 0
    """Processes that share each batch, a GPU for each; 0 or 1 is this one alone."""
    shard_base: bool = False
    """Each of them holds a share of a frozen base, not all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _LocalFile:
    """What `weft serve` writes to ``<state>/local.json``."""

    address: str
    ca_pem: str
    tls_name: str
    pin: str
    worker_id: str
    insecure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pointer:
    """What `weft serve` writes below ``local/`` while it runs."""

    state: str
    pid: int


class Home:
    """The directory of all this; made when something is first written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Home:
        """``$WEFT_HOME``, or ``~/.weft``."""
        named = environ.get("WEFT_HOME", "")
        return cls(Path(named).expanduser().absolute() if named else Path.home() / ".weft")

    def worker_directory(self, pin: bytes) -> Path:
        """Where this machine's worker of a coordinator lives."""
        return self.root / "workers" / pin.hex()[:8]

    def viewer_directory(self, pin: bytes) -> Path:
        """Where this machine's viewer of a coordinator lives."""
        return self.root / "coordinators" / pin.hex()[:8]

    def base_directory(self, digest: Digest) -> Path:
        """Where a fetched base lies."""
        return self.root / "bases" / digest

    def workers(self) -> tuple[Path, ...]:
        """Directories of this machine's workers."""
        return tuple(path.parent for path in sorted(self.root.glob(f"workers/*/{MEMBER}")))

    def accesses(self) -> tuple[Access, ...]:
        """All coordinators that this machine may look at, each once; its own before others, since it may do more."""
        found: dict[str, Access] = {}
        for access in (*self._local(), *self._remembered()):
            found.setdefault(access.member.pin, access)
        return tuple(found.values())

    def find(self, address: str | None) -> Access:
        """The coordinator at ``address``, or the only one that is known.

        Raises:
            UsageError: None is known, or several are.
        """
        known = self.accesses()
        if address is not None:
            wanted = join_address(*split_address(address))
            known = tuple(access for access in known if access.member.address == wanted)
        if len(known) == 1:
            return known[0]
        if not known:
            where = (
                f"this machine has not joined {address} as a viewer"
                if address
                else "no coordinator is known here"
            )
            raise UsageError(where, hint=_JOIN_HINT)
        addresses = ", ".join(access.member.address for access in known)
        raise UsageError(
            f"several coordinators are known here: {addresses}",
            hint=f"say which: --coordinator {known[0].member.address}",
        )

    def _remembered(self) -> list[Access]:
        directories = [path.parent for path in sorted(self.root.glob(f"coordinators/*/{MEMBER}"))]
        return [Access(member=load_member(directory), key_file=directory / KEY) for directory in directories]

    def _local(self) -> list[Access]:
        pointers = [_load(_Pointer, path) for path in sorted(self.root.glob("local/*.json"))]
        # A coordinator that was killed leaves its pointer behind.
        states = [Path(pointer.state) for pointer in pointers if _is_alive(pointer.pid)]
        return [_local_access(state) for state in states if (state / "local.json").is_file()]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, ``HOST`` or ``[IPv6]:PORT``; raises UsageError."""
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, str(PORT)
    elif ":" in host and not host.startswith("["):
        raise UsageError(f"{address!r} is not an address", hint="write IPv6 addresses as [::1]:7443")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(
            f"{address!r} is not an address", hint="write HOST:PORT, for example coord.example.org:7443"
        )
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of :func:`split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def save_member(directory: Path, member: Membership) -> None:
    """Remember a membership; raises StorageError, AccessError."""
    _save(directory / MEMBER, member)


def load_member(directory: Path) -> Membership:
    """Read what :func:`save_member` wrote; raises NotFound, CorruptState, AccessError."""
    return _load(Membership, directory / MEMBER)


def save_settings(directory: Path, settings: WorkerSettings) -> None:
    """Remember how this machine works."""
    _save(directory / WORKER, settings)


def load_settings(directory: Path) -> WorkerSettings | None:
    """What :func:`save_settings` wrote, or None."""
    try:
        return _load(WorkerSettings, directory / WORKER)
    except NotFound:
        return None


def _local_access(state: Path) -> Access:
    local = _load(_LocalFile, state / "local.json")
    member = Membership(
        address=local.address,
        pin=local.pin,
        ca_pem=local.ca_pem,
        tls_name=local.tls_name,
        worker_id=WorkerId(local.worker_id),
        role=Role.ADMIN,
        insecure=local.insecure,
    )
    return Access(member=member, key_file=state / "operator.key", local=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _save(path: Path, value: Any) -> None:
    private_directory(path.parent)
    write_private(path, canonical_json(to_table(value)))


def _load(cls: type[_T], path: Path) -> _T:
    try:
        return from_table(cls, _read(path))
    except UsageError as error:
        raise _damaged(path, error.message) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_private(path), _FILE_BYTES_MAX)
    except InputError as error:
        raise _damaged(path, error.message) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it holds no JSON object")
    return value


def _damaged(path: Path, cause: str) -> CorruptState:
    return CorruptState(
        f"{path} is damaged: {cause}", hint="remove it and join again: weft join HOST:PORT TOKEN"
    )
