"""A router's file: one tensor file, written in one form only, hostile until it is checked.

Tensors: ``paths`` I64 [P, levels], ``centre`` F32 [d], ``weights`` F64 [P, d], ``bias`` F64 [P].
Metadata: format, kind, feature, base (digest), prefix_tokens, seed. Equal routers are equal bytes, so that a router's
digest is that of its file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np

from weft.common.errors import InputError, RouterMismatch, TensorFileError
from weft.common.ids import Digest, Path, digest
from weft.common.modules import PATHS_MAX, TensorSpec
from weft.common.recipe import Recipe
from weft.common.routing.router import FEATURE, Router, RouterKind
from weft.common.tensors import STRICT, TensorFile, write_tensors

FILE_BYTES_MAX: Final = 3 << 30
"""More than 4,096 paths of 16,384 features take."""
_FORMAT: Final = "weft router 1"
_LEVELS_MAX: Final = 64
_WIDTH_MAX: Final = 1 << 16
_PREFIX_TOKENS_MAX: Final = 4096
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_KEYS: Final = frozenset({"format", "kind", "feature", "base", "prefix_tokens", "seed"})
_HINT: Final = "fetch it again, or fit one: weft route fit"


def write_router(to: FilePath, router: Router) -> int:
    """Write a router's file and return its bytes; raises DiskFull."""
    return write_tensors(to, _tensors(router), _metadata(router))


def router_bytes(router: Router) -> bytes:
    """What ``write_router`` writes."""
    buffer = io.BytesIO()
    write_tensors(buffer, _tensors(router), _metadata(router))
    return buffer.getvalue()


def read_router(path: FilePath) -> Router:
    """Read and check a router's file.

    Raises:
        InputError: Not readable, not a router, or not one that can be used: what is wrong is named.
    """
    try:
        with TensorFile(path, STRICT) as file:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise InputError(f"{path.name} is too large for a router", hint=_HINT)
            return _parse(file)
    except TensorFileError as error:
        raise InputError(f"{path} is not a router: {error.message}", hint=_HINT) from error


def check_router(router: Router, recipe: Recipe) -> None:
    """Raise RouterMismatch unless a router was fitted to the recipe's base and paths."""
    if router.base_digest != recipe.base.digest:
        raise RouterMismatch(
            f"the router was fitted to base {router.base_digest[:12]} and the run's is {recipe.base.digest[:12]}",
            hint="fit it with the run's base: weft route fit DATA --base DIR",
        )
    if router.paths != recipe.topology.paths:
        experts = "x".join(str(count) for count in recipe.topology.experts)
        raise RouterMismatch(
            f"the router knows {len(router.paths)} paths ({router.paths[0]} to {router.paths[-1]}) and the run's "
            f"{recipe.topology.num_paths} are {recipe.topology.paths[0]} to {recipe.topology.paths[-1]}",
            hint=f"fit it to the run's topology: weft route fit DATA --experts {experts}",
        )


def _tensors(router: Router) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "paths": np.array([path.experts for path in router.paths], np.int64),
        "centre": router.centre,
        "weights": router.weights,
        "bias": router.bias,
    }


def _metadata(router: Router) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "kind": router.kind.value,
        "feature": FEATURE,
        "base": router.base_digest,
        "prefix_tokens": str(router.num_prefix_tokens),
        "seed": str(router.seed),
    }


def _parse(file: TensorFile) -> Router:
    metadata = file.header.metadata
    _check_metadata(metadata)
    _check_sizes({spec.name: spec for spec in file.header.specs})
    arrays = {name: np.array(file.array(name)) for name in ("centre", "weights", "bias")}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise TensorFileError(f"{name} holds a number that is not finite")
    experts = file.array("paths").tolist()
    return Router(
        kind=RouterKind(metadata["kind"]),
        paths=_paths(experts),
        base_digest=_base(metadata["base"]),
        num_prefix_tokens=_number(metadata, "prefix_tokens", 1, _PREFIX_TOKENS_MAX),
        seed=_number(metadata, "seed", 0, 2**63 - 1),
        centre=arrays["centre"],
        weights=arrays["weights"],
        bias=arrays["bias"],
    )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if metadata.keys() != _KEYS or metadata["format"] != _FORMAT:
        raise TensorFileError("its metadata are not a router's")
    if metadata["kind"] not in {kind.value for kind in RouterKind}:
        raise TensorFileError("its kind is not known here")
    if metadata["feature"] != FEATURE:
        raise TensorFileError("its feature is not known here")


def _check_sizes(specs: Mapping[str, TensorSpec]) -> None:
    """Each tensor has the dtype and shape that the others make of it."""
    shapes = {name: spec.shape for name, spec in specs.items()}
    if len(shapes.get("weights", ())) != 2 or len(shapes.get("paths", ())) != 2:
        raise TensorFileError("it lacks weights or paths")
    (num_paths, width), (_, num_levels) = shapes["weights"], shapes["paths"]
    expected = {
        TensorSpec("paths", "I64", (num_paths, num_levels)),
        TensorSpec("centre", "F32", (width,)),
        TensorSpec("weights", "F64", (num_paths, width)),
        TensorSpec("bias", "F64", (num_paths,)),
    }
    if set(specs.values()) != expected:
        raise TensorFileError("its tensors do not fit one another")
    if not (1 <= num_paths <= PATHS_MAX and 1 <= num_levels <= _LEVELS_MAX and 1 <= width <= _WIDTH_MAX):
        raise TensorFileError(f"it has {num_paths} paths, {num_levels} levels and {width} features")


def _paths(experts: list[list[int]]) -> tuple[Path, ...]:
    if not all(0 <= expert <= PATHS_MAX for path in experts for expert in path):
        raise TensorFileError("an expert's number is out of range")
    paths = tuple(Path(tuple(path)) for path in experts)
    if len(set(paths)) != len(paths):
        raise TensorFileError("it names a path twice")
    return paths


def _base(text: str) -> Digest:
    try:
        return digest(text)
    except ValueError as error:
        raise TensorFileError("its base is not a digest") from error


def _number(metadata: Mapping[str, str], key: str, low: int, high: int) -> int:
    text = metadata[key]
    if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise TensorFileError(f"its {key} is not a number from {low} to {high}")
    return int(text)
