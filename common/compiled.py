"""Loops that numba compiles when they first run, and keeps on disk: what numpy does in several passes, in one.

A loop sees arrays and numbers, allocates nothing, and trusts its arguments: who calls it has checked every length
and index. Additions stay in their order and are never fused, so that results are the same on every machine.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache

P = ParamSpec("P")
R = TypeVar("R")


def compiled(loop: Callable[P, R]) -> Callable[P, R]:
    """Decorate a loop; it runs without the interpreter's lock."""
    made = njit(nogil=True)(loop)
    with contextlib.suppress(
        RuntimeError
    ):  # neither beside the code nor under the home directory is a place for it
        made._cache = _Kept(loop)
    return cast("Callable[P, R]", made)


class _Kept(FunctionCache):  # type: ignore[misc]
    """What numba's ``cache=True`` keeps, for processes that compile at the same time and after a power cut.

    numba names its files before it writes them: of two processes that do so at once, one can leave an index that
    calls the other's code its own. And it reads what a power cut or a full disk has left as if it were whole.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled code for a signature; None where there is none, or none that can be read."""
        try:
            with self._locked():
                return super().load_overload(sig, target_context)
        except Exception:  # damaged bytes raise what they like
            with contextlib.suppress(OSError), self._locked():
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code, if there is room."""
        with contextlib.suppress(OSError), self._locked():
            super().save_overload(sig, data)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with Path(self.cache_path, "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
