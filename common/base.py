"""The base: which files of a Hugging Face model directory count, and the digest that pins them.

Only what ``transformers`` reads for a model and its tokenizer is part of a base: the configuration, the
weights (``model.safetensors``, or the files that its index names) and the tokenizer's files. Other files that
repositories carry (pickled copies of the weights, other frameworks' formats) are neither pinned nor fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from weft.common.errors import BaseModelError, UsageError
from weft.common.ids import Digest, digest
from weft.common.modules import TensorSpec
from weft.common.recipe import BaseFile, BasePin
from weft.common.tensors import FOREIGN, Float32Array, TensorFile, read_header, to_float32

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
TOKENIZER_FILES: Final = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""What tokenizers are made of."""
_SMALL_FILES: Final = TOKENIZER_FILES | {CONFIG, "generation_config.json", WEIGHTS_INDEX}
_PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".ckpt"})
_OTHER_NAMES: Final = {"lm_head.weight": "embed_out.weight"}
"""Names in files that transformers still reads under others (GPT-NeoX's output layer)."""
_READ_BYTES: Final = 1 << 20


def pin_base(directory: Path, *, hub_id: str = "", revision: str = "") -> BasePin:
    """Pin the base in ``directory`` by the BLAKE3-256 digests of its files.

    The base's own digest is that of the canonical JSON list of ``[name, size, digest]``, sorted by name.
    Without ``hub_id``, a directory of the Hub's cache tells its own id and revision.

    Raises:
        BaseModelError: Files are missing or unreadable, or the weights are only there as pickles.
    """
    files = tuple(_pin_file(directory, name) for name in base_file_names(directory))
    listed = json.dumps([[file.name, file.size_bytes, file.digest] for file in files], separators=(",", ":"))
    if not hub_id:
        hub_id, revision = _hub_origin(directory)
    return BasePin(
        digest=Digest(blake3(listed.encode()).hexdigest()), hub_id=hub_id, revision=revision, files=files
    )


def check_base(directory: Path, pin: BasePin) -> None:
    """Raise BaseModelError, naming the file, unless ``directory`` holds exactly what ``pin`` lists."""
    hint = "use the directory or the Hub revision that the coordinator uses"
    names = set(base_file_names(directory))
    for file in pin.files:
        if file.name not in names:
            raise BaseModelError(f"the base in {directory} lacks {file.name}", hint=hint)
        if (directory / file.name).stat().st_size != file.size_bytes or _pin_file(
            directory, file.name
        ) != file:
            raise BaseModelError(f"{directory / file.name} differs from the run's base", hint=hint)
    extra = sorted(names - {file.name for file in pin.files})
    if extra:
        raise BaseModelError(f"{directory / extra[0]} is not part of the run's base", hint=hint)


def has_weights(directory: Path) -> bool:
    """Whether there are weights of any kind beside the configuration."""
    return any(
        path.suffix in {".safetensors", ".bin", ".pt", ".pth"}
        for path in directory.iterdir()
        if path.is_file()
    )


def base_file_names(directory: Path) -> tuple[str, ...]:
    """Names of the files in ``directory`` that make up a base, sorted; raises BaseModelError."""
    if not directory.is_dir():
        raise BaseModelError(
            f"{directory} is not a directory", hint="give a Hugging Face model directory or a Hub id"
        )
    present = {path.name for path in directory.iterdir() if path.is_file()}
    if CONFIG not in present:
        raise BaseModelError(
            f"{directory} has no {CONFIG}",
            hint="give a Hugging Face model directory, not a single file or an adapter",
        )
    weights = _weight_names(directory, present)
    if missing := sorted(weights - present):
        raise BaseModelError(f"{directory} lacks {missing[0]}", hint="download the model again")
    if WEIGHTS in weights:
        # A single file wins over an index in transformers too; pinning both would pin what nobody reads.
        present.discard(WEIGHTS_INDEX)
    return tuple(sorted(weights | (present & _SMALL_FILES)))


def num_base_parameters(directory: Path) -> int:
    """Number of elements of all weight tensors, from the headers alone.

    Raises:
        BaseModelError: Not a base.
        TensorFileError: A weight file is damaged.
    """
    weights = (name for name in base_file_names(directory) if name.endswith(".safetensors"))
    return sum(spec.size for name in weights for spec in read_header(directory / name, FOREIGN).specs)


def base_tensors(directory: Path, specs: Iterable[TensorSpec]) -> dict[str, Float32Array]:
    """Float32 copies of some of the base's weights, by the names that they have in the model; only these are read.

    Files that hold the model without its head name its weights without the first part of their names, such as
    ``model.``; both are found.

    Raises:
        BaseModelError: The files do not hold a tensor, or hold it in another shape or as no floating point.
        TensorFileError: A weight file is damaged.
    """
    names = [name for name in base_file_names(directory) if name.endswith(".safetensors")]
    tensors: dict[str, Float32Array] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(directory / name, FOREIGN)) for name in names]
        held = {name: file for file in files for name in file.header.entries}
        for spec in specs:
            names_there = (spec.name, spec.name.partition(".")[2], _OTHER_NAMES.get(spec.name, ""))
            found = next((name for name in names_there if name in held), None)
            if found is None:
                raise BaseModelError(
                    f"the files of {directory} do not hold {spec.name} by this name",
                    hint='save the model again with save_pretrained, or set topology.kind = "lora"',
                )
            tensors[spec.name] = _float32_copy(held[found], found, spec)
    return tensors


def _float32_copy(file: TensorFile, name: str, wanted: TensorSpec) -> Float32Array:
    spec = file.header.entries[name].spec
    if spec.shape != wanted.shape or spec.dtype not in {"F32", "F16", "BF16"}:
        raise BaseModelError(
            f"the base holds {name} as {spec.dtype} {list(spec.shape)}, and its configuration says "
            f"{list(wanted.shape)} of floating point",
            hint="use weights that fit config.json, stored as float32, float16 or bfloat16",
        )
    return np.array(to_float32(file.array(name), spec.dtype))


def resolve_source(source: str, *, revision: str = "", cache: Path | None = None) -> Path:
    """The directory of a base: ``source`` itself when it is one, else the snapshot of that Hub id.

    Args:
        source: A directory, or a Hub id such as ``org/model``.
        revision: Branch, tag or commit on the Hub; the default branch when empty.
        cache: The Hub's cache directory; its usual place when None.

    Raises:
        BaseModelError: No such directory, or the Hub cannot be asked (``HF_HUB_OFFLINE`` is honoured).
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BaseModelError(
            f"there is no directory {source}", hint="give a model directory or a Hub id: org/model"
        )
    return _download(source, revision, cache)


def _download(hub_id: str, revision: str, cache: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        found = snapshot_download(
            hub_id,
            revision=revision or None,
            cache_dir=cache,
            allow_patterns=[*_SMALL_FILES, "model*.safetensors"],
        )
    except HFValidationError as error:
        raise BaseModelError(
            f"{hub_id} is neither a directory nor a Hub id", hint="check the path"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"cannot get {hub_id} from the Hub: {cause}",
            hint="check the id, the network and HF_TOKEN, or give the directory of a model already here",
        ) from error
    return Path(found)


def _weight_names(directory: Path, present: set[str]) -> set[str]:
    if WEIGHTS in present:
        return {WEIGHTS}
    if WEIGHTS_INDEX in present:
        return _indexed_names(directory / WEIGHTS_INDEX)
    pickles = sorted(name for name in present if Path(name).suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise BaseModelError(
            f"{directory / pickles[0]} is a pickle, which can run code; Weft never opens one",
            hint="save the model with save_pretrained, or fetch a revision that has model.safetensors",
        )
    raise BaseModelError(f"{directory} has no {WEIGHTS}", hint="download the model's safetensors files")


def _indexed_names(index: Path) -> set[str]:
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise BaseModelError(
            f"{index} is not an index of weights", hint="download the model again"
        ) from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BaseModelError(f"{index} names {name!r}, which is not a safetensors file beside it")
    return names


def _pin_file(directory: Path, name: str) -> BaseFile:
    hasher = blake3()
    try:
        with (directory / name).open("rb") as file:
            size = 0
            while part := file.read(_READ_BYTES):
                size += len(part)
                hasher.update(part)
        return BaseFile(name=name, size_bytes=size, digest=digest(hasher.hexdigest()))
    except OSError as error:
        raise BaseModelError(f"cannot read {directory / name}: {error.strerror}") from error
    except UsageError as error:
        raise BaseModelError(error.message, hint="rename the file") from error


def _hub_origin(directory: Path) -> tuple[str, str]:
    """Hub id and commit of ``…/models--org--name/snapshots/<commit>``, or two empty texts."""
    resolved = directory.absolute()
    owner = resolved.parent.parent.name
    if resolved.parent.name != "snapshots" or not owner.startswith("models--"):
        return "", ""
    return owner.removeprefix("models--").replace("--", "/"), resolved.name
