"""Names that the two sides exchange: checked once, then passed about as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NewType

from weft.common.errors import UsageError

RunId = NewType("RunId", str)
"""The operator's name of a run: lower case letters, digits and hyphens, at most 40 characters."""
WorkerId = NewType("WorkerId", str)
"""Issued by the coordinator at Join; never taken from a later request."""
TaskId = NewType("TaskId", str)
Digest = NewType("Digest", str)
"""BLAKE3-256 of exact stored bytes, 64 lower-case hex digits."""

_RUN: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def run_id(text: str) -> RunId:
    """Check a run's name; raises UsageError."""
    if not _RUN.fullmatch(text):
        raise UsageError(
            f"{text!r} is not a run name",
            hint="use lower-case letters, digits and hyphens, at most 40 characters",
        )
    return RunId(text)


def digest(text: str) -> Digest:
    """Check a digest; raises ValueError, since digests come from programs, not from people."""
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is not a BLAKE3-256 digest")
    return Digest(text)


@dataclass(frozen=True, slots=True, order=True)
class ModuleKey:
    """The module at one (level, expert) of a topology; written ``level.expert``."""

    level: int
    expert: int

    def __str__(self) -> str:
        return f"{self.level}.{self.expert}"

    @classmethod
    def parse(cls, text: str) -> ModuleKey:
        """Read ``level.expert``; raises UsageError."""
        match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
        if match is None:
            raise UsageError(f"{text!r} is not a module", hint="write it level.expert, for example 0.0")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Path:
    """One expert per level; written ``2.3`` for expert 2 of level 0 and expert 3 of level 1."""

    experts: tuple[int, ...]

    def __str__(self) -> str:
        return ".".join(str(expert) for expert in self.experts)

    @property
    def modules(self) -> tuple[ModuleKey, ...]:
        """The modules that the path composes onto the base, by level."""
        return tuple(ModuleKey(level, expert) for level, expert in enumerate(self.experts))

    @classmethod
    def parse(cls, text: str) -> Path:
        """Read dotted expert numbers; raises UsageError."""
        if not re.fullmatch(r"\d{1,4}(\.\d{1,4})*", text):
            raise UsageError(
                f"{text!r} is not a path", hint="write one expert number a level, for example 2.3"
            )
        return cls(tuple(int(part) for part in text.split(".")))


@dataclass(frozen=True, slots=True)
class ModuleRef:
    """What people type: ``RUN``, ``RUN/0.0``, ``RUN/path:0.0``, with ``@VERSION`` or without; a path also ``@best``."""

    run: RunId
    module: ModuleKey | None = None
    path: Path | None = None
    version: int | None = None
    best: bool = False
    """The versions of a path with the lowest loss on its held-out data."""

    def __str__(self) -> str:
        part = f"/{self.module}" if self.module else f"/path:{self.path}" if self.path else ""
        which = "@best" if self.best else f"@{self.version}" if self.version is not None else ""
        return f"{self.run}{part}{which}"

    @classmethod
    def parse(cls, text: str) -> ModuleRef:
        """Read what a person typed; raises UsageError naming the three forms."""
        match = re.fullmatch(r"([^/@]+)(?:/([^@]+))?(?:@(\d{1,9}|best))?", text)
        if match is None:
            raise UsageError(
                f"{text!r} names no module", hint="write RUN, RUN/level.expert or RUN/path:0.0, then @VERSION"
            )
        run, part, version = match.groups()
        best = version == "best"
        number = int(version) if version is not None and not best else None
        if part is not None and part.startswith("path:"):
            return cls(run_id(run), path=Path.parse(part.removeprefix("path:")), version=number, best=best)
        if best:
            raise UsageError(f"{text!r}: @best is for paths", hint="write RUN/path:0.0@best, or @VERSION")
        return cls(run_id(run), module=ModuleKey.parse(part) if part else None, version=number)
