"""``weft join``: put this machine on a coordinator's roster, then work until stopped.

    1  find the pinned authority in the coordinator's TLS chain; nothing secret has been sent (common.identity.hello)
    2  connect again, trusting that authority alone
    3  Join: the worker's own key, and a proof of the token's secret, which never travels
    4  check that the authority endorses the key that signs recipes and manifests
    5  remember the membership, and live the loop (client.loop)

A viewer joins in the same way and then only looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import logging
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final, TextIO

from weft.client.home import (
    KEY,
    Access,
    Home,
    Membership,
    WorkerSettings,
    join_address,
    load_member,
    load_settings,
    save_member,
    split_address,
)
from weft.client.loop import Life, exit_code
from weft.client.transport import Transport
from weft.common.errors import CorruptState, DataError, IdentityMismatch, StateLocked, UsageError
from weft.common.identity.authority import tls_name, verify_endorsement
from weft.common.identity.files import private_directory
from weft.common.identity.hello import fetch_pinned_ca
from weft.common.identity.signing import SigningKey
from weft.common.identity.token import JoinToken, join_proof
from weft.common.manifest import Signed, canonical_json
from weft.common.protocol import Role
from weft.common.settings import to_table
from weft.common.statements import JOIN_TYPE, JoinStatement

if TYPE_CHECKING:
    # torch takes seconds to import: a wrong token is refused before.
    from weft.client.device import Device
    from weft.client.trainer.group import Group
    from weft.client.worker import Setup, View, Worker
    from weft.common.composition import Quantisation

logger = logging.getLogger(__name__)

TOKEN_VARIABLE: Final = "WEFT_JOIN_TOKEN"  # noqa: S105 - the name of a variable
HELLO_S: Final = 10.0
_TOKEN_BYTES_MAX: Final = 4096
_GLANCE_S: Final = 0.5


def read_token(given: str | None, environ: Mapping[str, str], stdin: TextIO) -> JoinToken | None:
    """The token from the command line, ``-`` for standard input, a file, or ``WEFT_JOIN_TOKEN``; None without any.

    Raises:
        UsageError: It is not a token; the message never repeats it.
    """
    text = given if given is not None else environ.get(TOKEN_VARIABLE)
    if not text:
        return None
    if text == "-":
        return JoinToken.parse(stdin.read(_TOKEN_BYTES_MAX))
    if not text.strip().upper().startswith("WEFT") and Path(text).is_file():
        with Path(text).open(encoding="utf-8", errors="replace") as file:
            return JoinToken.parse(file.read(_TOKEN_BYTES_MAX))
    return JoinToken.parse(text)


# ---- becoming a member -------------------------------------------------------------------------------------------


def greet(address: str, token: JoinToken, *, insecure: bool, now: datetime) -> str:
    """Check the coordinator's identity before anything secret is sent; the authority's certificate, or nothing.

    Raises:
        IdentityMismatch: Somebody else answers there.
        Unreachable: Nobody does.
    """
    if insecure:
        return ""
    host, port = split_address(address)
    return fetch_pinned_ca(host, port, token.pin, HELLO_S, now=now)


def register(
    directory: Path, address: str, token: JoinToken, *, ca_pem: str, name: str, device: str
) -> Membership:
    """Join with the key in ``directory``, made there at the first time, and remember the membership.

    Args:
        directory: This member's own; made with mode 0700.
        address: host:port.
        token: Proved, not sent.
        ca_pem: From :func:`greet`.
        name: Display name, cut at 80 characters.
        device: For people, cut at 120 characters.

    Raises:
        TokenRefused: Wrong, expired, used up or revoked.
        IdentityMismatch: The authority does not endorse the coordinator's signing key.
    """
    key = SigningKey.create_or_load(directory / KEY)
    statement = JoinStatement(
        public_key=key.public.hex(), nonce=secrets.token_hex(16), display_name=name[:80], device=device[:120]
    )
    signed = Signed.sign(key, JOIN_TYPE, canonical_json(to_table(statement)))
    proof = join_proof(token, hashlib.sha256(signed.payload).digest())
    with Transport(address, ca_pem=ca_pem or None, tls_name=tls_name(token.pin)) as transport:
        joined = transport.join(token_id=token.token_id, statement=signed, proof=proof)
    if ca_pem and not verify_endorsement(ca_pem, joined.coordinator_public_key, joined.endorsement):
        raise IdentityMismatch(
            "the coordinator's authority does not endorse the key that signs its recipes",
            hint="ask the operator for a new `weft join` line",
        )
    member = Membership(
        address=address,
        pin=token.pin.hex(),
        ca_pem=ca_pem,
        tls_name=tls_name(token.pin),
        worker_id=joined.worker_id,
        role=joined.role,
        coordinator_key=joined.coordinator_public_key.hex(),
        insecure=not ca_pem,
    )
    save_member(directory, member)
    return member


def connect(access: Access, *, stop: threading.Event | None = None) -> Transport:
    """A connection with a session of this member, opened at the first call."""
    from weft.client.transport import Member

    member = access.member
    who = Member(worker_id=member.worker_id, signing_key=access.key(), pin=bytes.fromhex(member.pin))
    return Transport(
        member.address,
        ca_pem=None if member.insecure else member.ca_pem,
        tls_name=member.tls_name,
        member=who,
        stop=stop,
    )


def access_to(home: Home, address: str | None, token: JoinToken | None, *, insecure: bool = False) -> Access:
    """The coordinator to look at: joined now with ``token``, or known here.

    Raises:
        UsageError: None is known, or several are.
        AccessError, Unreachable: Joining failed.
    """
    if token is None:
        return home.find(address)
    if address is None:
        raise UsageError("a token needs the address that it is for", hint="give --coordinator HOST:PORT too")
    address = join_address(*split_address(address))
    ca_pem = greet(address, token, insecure=insecure, now=datetime.now(UTC))
    directory = home.viewer_directory(token.pin)
    member = register(directory, address, token, ca_pem=ca_pem, name=socket.gethostname(), device="")
    if member.role is Role.WORKER:
        raise UsageError(
            "this token is for workers, who see nothing but their tasks",
            hint="the operator types: weft token create --role viewer",
        )
    return Access(member=member, key_file=directory / KEY)


# ---- working -----------------------------------------------------------------------------------------------------


def resolve_state(home: Home, state: Path | None, address: str | None, token: JoinToken | None) -> Path:
    """The directory of the worker that is meant; raises UsageError when that is not clear."""
    if state is not None:
        return state.expanduser().absolute()
    if token is not None:
        return home.worker_directory(token.pin)
    known = home.workers()
    if address is not None:
        wanted = join_address(*split_address(address))
        known = tuple(path for path in known if load_member(path).address == wanted)
        if not known:
            raise UsageError(
                f"this machine has not joined {address}",
                hint="give the token that the operator handed out: weft join HOST:PORT TOKEN --data PATH",
            )
    if not known:
        raise UsageError("no coordinator was joined from here", hint="weft join HOST:PORT TOKEN --data PATH")
    if len(known) > 1:
        listed = ", ".join(load_member(path).address for path in known)
        raise UsageError(
            f"this machine works for several coordinators: {listed}", hint="name one: weft join HOST:PORT"
        )
    return known[0]


def settle(state: Path, given: Mapping[str, str | int | None]) -> WorkerSettings:
    """What was given, over what was remembered.

    Raises:
        DataError: There is nothing at the data path.
        UsageError: A base cannot be divided so.
    """
    remembered = load_settings(state)
    values: dict[str, str | int] = {"name": socket.gethostname(), "data": ""}
    if remembered is not None:
        values |= to_table(remembered)
    values |= {key: value for key, value in given.items() if value is not None}
    for key in ("data", "base"):
        if values.get(key):
            values[key] = str(Path(str(values[key])).expanduser().absolute())
    settings = WorkerSettings(**values)  # type: ignore[arg-type]
    if settings.data and not Path(settings.data).exists():
        raise DataError(f"there is no {settings.data}", hint="give --data a file or a directory that exists")
    if settings.shard_base:
        check_sharding(settings.processes, settings.quantise)
    return settings


def check_sharding(num_processes: int, quantise: str) -> None:
    """Raise UsageError when a base would not be divided: among one, or with weights of 4 bits."""
    if num_processes < 2:
        raise UsageError(
            "--shard-base divides the base among processes, and there is one",
            hint="add --processes N, one for each GPU, or leave it out: --no-shard-base",
        )
    if quantise:
        raise UsageError(
            f"--shard-base does not divide weights that --quantise {quantise} has packed",
            hint="take one of the two: 4 bits take a quarter of the memory, N processes an N-th each",
        )


def choose_device(settings: WorkerSettings) -> Device:
    """The best device, or the one asked for.

    Raises:
        UsageError: This machine does not have it.
    """
    import torch

    from weft.client.device import Device, find_device

    if settings.threads:
        torch.set_num_threads(settings.threads)
    found = find_device()
    kind = settings.device or found.torch_device.type
    if kind == "cpu" and found.torch_device.type != "cpu":
        found = Device(
            torch_device=torch.device("cpu"), dtype=torch.float32, name=f"{torch.get_num_threads()} threads"
        )
    if kind != found.torch_device.type:
        raise UsageError(
            f"this machine has no {kind} device", hint=f"leave --device away: it has {found.describe()}"
        )
    if settings.quantise and kind != "cuda":
        raise UsageError(
            f"--quantise {settings.quantise} needs CUDA and the device is {kind}", hint="leave it away"
        )
    dtype = {"": found.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    return Device(torch_device=found.torch_device, dtype=dtype, name=found.name)


def alone(state: Path) -> TextIO:
    """Lock a worker's directory; the lock ends with the file that is returned, or the process.

    Raises:
        StateLocked: Another process is this worker.
    """
    private_directory(state)
    lock = (state / "lock").open("w")
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StateLocked(
            f"another process already works with {state}",
            hint="for a second worker on this machine give it its own: --state DIR",
        ) from error
    return lock


def make_worker(
    home: Home,
    state: Path,
    member: Membership,
    settings: WorkerSettings,
    device: Device,
    *,
    view: View,
    leave_when_finished: bool,
    group: Group | None = None,
) -> tuple[Worker, Transport]:
    """The worker and its connection; ``group`` is what :func:`beside` gives."""
    from weft.client.worker import Setup, Worker

    quantise: Quantisation = "4bit" if settings.quantise else "none"

    stop_waits = threading.Event()
    access = Access(member=member, key_file=state / KEY)
    if not member.coordinator_key:
        raise CorruptState(f"{state} does not know the coordinator's key", hint="join again with a token")
    transport = connect(access, stop=stop_waits)
    setup = Setup(
        worker_id=member.worker_id,
        key=access.key(),
        pin=bytes.fromhex(member.pin),
        coordinator_key=bytes.fromhex(member.coordinator_key),
        state=state,
        bases=home.base_directory,
        data=Path(settings.data) if settings.data else None,
        base=Path(settings.base) if settings.base else None,
        device=device,
        quantise=quantise,
        rank_max=settings.rank,
    )
    if group is not None:
        setup = with_group(setup, group, divided=settings.shard_base)
    worker = Worker(
        setup,
        transport,
        view=view,
        stop_waits=stop_waits,
        clock=time.monotonic,
        chance=random.random,
        leave_when_finished=leave_when_finished,
    )
    return worker, transport


@contextlib.contextmanager
def beside(settings: WorkerSettings, device: Device) -> Iterator[Group | None]:
    """Processes that share each batch, for as long as the worker lives; none unless the settings ask for several.

    Raises:
        UsageError: There are not as many devices.
    """
    if settings.processes < 2:
        yield None
        return
    from weft.client.trainer.group import launch

    with launch(settings.processes, device.torch_device) as group:
        yield group


def with_group(setup: Setup, group: Group, *, divided: bool) -> Setup:
    """Let a group compute for a worker, each process over the whole base or over its share of it."""
    from weft.client.trainer.parallel import Shared
    from weft.client.trainer.sharding import InStep, open_sharded

    if not divided:
        return dataclasses.replace(setup, gradients=Shared(group, quantise=setup.quantise))
    # Processes without GPUs of their own divide one memory, in which all shares are.
    num_shares = group.size if group.device.type == "cuda" else 1
    return dataclasses.replace(
        setup,
        gradients=InStep(group),
        load=functools.partial(open_sharded, group),
        num_shares=num_shares,
    )


def work(worker: Worker, on_stop: Callable[[int], None]) -> int:
    """Let the worker live in a thread of its own while this one takes signals; returns the exit code.

    SIGINT and SIGTERM ask it to stop, the second one at once; ``on_stop`` is told how often that was.
    The worker's error, when it leaves because of one, is raised.
    """
    num_signals = 0

    def on_signal(_: int, __: FrameType | None) -> None:
        nonlocal num_signals
        num_signals += 1
        worker.request_stop()
        on_stop(num_signals)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Events set in a signal's handler deadlock when the thread that it interrupts waits for them.
        with ThreadPoolExecutor(1, thread_name_prefix="weft-worker") as pool:
            living = pool.submit(worker.run)
            while not living.done():
                wait([living], timeout=_GLANCE_S)
            life: Life = living.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if life.error is not None:
        raise life.error
    return exit_code(life)
