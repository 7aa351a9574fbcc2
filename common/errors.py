"""Every error that Weft raises on purpose.

An error carries a one-line cause and, where there is one, the next command to type. The command line
prints both and leaves with ``exit_code``; the gRPC edge sends the class by name, so that the other side
raises the same class. ``assert`` is for our own bugs only.

    WeftError                       1
    ├── UsageError                  2   the command or the run file is wrong
    │   └── RunFileError
    ├── InputError                  3   a file, a base or a data set cannot be used
    │   ├── DataError               ·   empty, unreadable, too short
    │   ├── BaseModelError          ·   digest differs, unsupported class, target matches nothing
    │   ├── RouterMismatch          ·   fitted to another base or other paths
    │   ├── TensorFileError         ·   not a well-formed tensor file
    │   └── CodecError              ·   not a well-formed update
    ├── AccessError                 4   who you are, or what you may do
    │   ├── IdentityMismatch        ·   the coordinator has another key
    │   ├── TokenRefused            ·   wrong, expired, used up, revoked
    │   ├── SessionExpired          ·   open a new session
    │   ├── PermissionRefused       ·   not for this role, or somebody else's object
    │   ├── ApprovalPending         ·   the operator has to approve this worker
    │   └── TooManyAttempts         ·   rate limit
    ├── SubmissionRefused           5   an update that changes nothing
    │   ├── LeaseLost               ·   expired, revoked or of an older epoch
    │   ├── RoundClosed             ·   too late: the round no longer collects
    │   ├── UpdateTooStale          ·   asynchronous: it started from too old a version
    │   ├── ConflictingUpdate       ·   another payload was accepted for this task and epoch
    │   ├── ForgedUpdate            ·   signature or statement does not fit the lease
    │   └── UpdateRejected          ·   schema, finiteness or size
    ├── StorageError                6   state on disk
    │   ├── DiskFull
    │   ├── CorruptState
    │   ├── StateLocked             ·   another coordinator uses this state
    │   └── NotFound                ·   no such run, module, version, blob
    ├── NetworkError                7
    │   ├── Unreachable             ·   retry later
    │   ├── TransferStalled         ·   no byte within the idle time
    │   └── PortTaken
    └── ComputeError                8
        ├── OutOfMemory
        ├── NonFiniteLoss           ·   training diverged
        └── EngineFailed            ·   the merge process died or refused
"""

from __future__ import annotations

from typing import ClassVar


class WeftError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: The cause, one line, no full stop needed.
        hint: What to type or change next; empty when there is nothing to say.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(WeftError):
    """The command, an option or a setting is wrong."""

    exit_code = 2


class RunFileError(UsageError):
    """A run file does not describe a run."""


class InputError(WeftError):
    """A file, a base or a data set cannot be used."""

    exit_code = 3


class DataError(InputError):
    """Training or held-out data is empty, unreadable or too short."""


class BaseModelError(InputError):
    """The base differs from the pinned one or cannot carry the modules asked for."""


class RouterMismatch(InputError):
    """The router was fitted to another base, or to other paths."""


class TensorFileError(InputError):
    """Bytes are not a well-formed tensor file."""


class CodecError(InputError):
    """Bytes are not a well-formed update."""


class AccessError(WeftError):
    """Who you are, or what you may do."""

    exit_code = 4


class IdentityMismatch(AccessError):
    """The coordinator does not have the key that the token pins."""


class TokenRefused(AccessError):
    """The join token is wrong, expired, used up or revoked."""


class SessionExpired(AccessError):
    """The session is unknown or over; open a new one."""


class PermissionRefused(AccessError):
    """The role may not do this, or the object belongs to somebody else."""


class ApprovalPending(AccessError):
    """The operator has to approve this worker first."""


class TooManyAttempts(AccessError):
    """Too many wrong proofs; wait."""


class SubmissionRefused(WeftError):
    """An update was refused and changed nothing."""

    exit_code = 5


class LeaseLost(SubmissionRefused):
    """The lease expired, was revoked or is of an older epoch."""


class RoundClosed(SubmissionRefused):
    """The round no longer collects updates."""


class UpdateTooStale(SubmissionRefused):
    """Asynchronous rounds: the update started from a version that is too old."""


class ConflictingUpdate(SubmissionRefused):
    """Another payload was accepted for this task and epoch."""


class ForgedUpdate(SubmissionRefused):
    """The signature is wrong or the statement does not fit the lease."""


class UpdateRejected(SubmissionRefused):
    """The update's tensors do not fit the task: schema, finiteness or size."""


class StorageError(WeftError):
    """State on disk cannot be read or written."""

    exit_code = 6


class DiskFull(StorageError):
    """The file system has no space left."""


class CorruptState(StorageError):
    """Stored bytes are not what was stored."""


class StateLocked(StorageError):
    """Another process uses this state directory."""


class NotFound(StorageError):
    """There is no such run, module, version, worker or blob."""


class NetworkError(WeftError):
    """The other side cannot be reached or has gone silent."""

    exit_code = 7


class Unreachable(NetworkError):
    """The connection failed; trying later is right."""


class TransferStalled(NetworkError):
    """No byte arrived within the idle time."""


class PortTaken(NetworkError):
    """The address to listen on is in use."""


class ComputeError(WeftError):
    """Training, merging or evaluation failed."""

    exit_code = 8


class OutOfMemory(ComputeError):
    """The device has too little memory for the task."""


class NonFiniteLoss(ComputeError):
    """Training produced NaN or infinity."""


class EngineFailed(ComputeError):
    """The merge process died or could not do the job."""


def _tree(root: type[WeftError]) -> dict[str, type[WeftError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_NAME: dict[str, type[WeftError]] = _tree(WeftError)
"""Every class of the tree, so that the wire can name one."""
