"""Directories that other programs open: a PEFT adapter, a whole Hugging Face model, or a new base.

An export appears at its place complete or not at all: it is written beside the target under a temporary name and
renamed. The adapter needs neither torch nor ``peft`` to be written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.common.base import CONFIG, TOKENIZER_FILES, WEIGHTS, base_file_names
from weft.common.errors import BaseModelError, DiskFull, StorageError, UsageError
from weft.common.initial import normal_tensor
from weft.common.modules import LORA_A, LORA_B, Kind, TensorSpec
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.tensors import Bf16, TensorData, float32_to_bf16, write_tensors

Float32Array = npt.NDArray[np.float32]
_PREFIX = "base_model.model."
_PEFT_TASKS = {TaskKind.CAUSAL_LM: "CAUSAL_LM", TaskKind.SEQUENCE_CLASSIFICATION: "SEQ_CLS"}


def write_peft(
    to: Path,
    recipe: Recipe,
    tensors: Mapping[str, Float32Array],
    *,
    card: str,
    base_name: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a PEFT adapter directory that ``PeftModel.from_pretrained(base, to)`` loads.

    Args:
        to: A directory that does not exist or is empty.
        recipe: Of the run.
        tensors: All tensors of one path, float32 by Weft's names.
        card: Text of README.md.
        base_name: What the adapter says it belongs to: a Hub id or a name, not a path of this machine.
        extra_files: More files by plain name, such as the signed manifest.

    Raises:
        UsageError: ``to`` is not empty, or the run's modules are full weights, which no adapter holds.
        StorageError: It cannot be written; nothing is left.
    """
    if recipe.topology.kind is Kind.FULL:
        raise UsageError(
            f"the modules of {recipe.run} are full weights, which a PEFT adapter cannot hold",
            hint="add --as hf for a Hugging Face model directory",
        )
    with _fresh_directory(to) as directory:
        config = _adapter_config(recipe, tensors, base_name)
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        prefixed = {_PREFIX + name: array for name, array in tensors.items()}
        write_tensors(directory / "adapter_model.safetensors", prefixed, {"format": "pt"})
        _write_around(directory, card, extra_files)


def write_hf(
    to: Path,
    base_dir: Path,
    recipe: Recipe,
    tensors: Mapping[str, Float32Array],
    *,
    card: str,
    extra_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the base with the path in its weights: a directory that ``from_pretrained`` loads.

    LoRA factors are merged in float32, full modules replace the base's blocks; the weights are then stored in the
    base's own dtype. Arguments and errors are those of ``write_peft``; BaseModelError when the base cannot be
    loaded.
    """
    from weft.common.composition import save_merged

    with _fresh_directory(to) as directory:
        save_merged(directory, base_dir, recipe, tensors)
        for name in base_file_names(base_dir):
            if name not in ("config.json", "generation_config.json") and ".safetensors" not in name:
                shutil.copyfile(base_dir / name, directory / name)
        _write_around(directory, card, extra_files)


def create_base(source: Path, to: Path, *, seed: int) -> None:
    """Make a base without pretrained weights: what to train from scratch, with kind full.

    Matrices are normal with the configuration's ``initializer_range``, each from a stream of its own
    (``weft.common.initial``); vectors (norms, biases) start where transformers starts them, which is one number
    each. The same configuration, seed and tensor names give the same bytes on every machine.

    Args:
        source: A directory with config.json and a tokenizer; weights there are not looked at.
        to: A directory that does not exist or is empty; it gets them too.
        seed: Of the weights.

    Raises:
        BaseModelError: No configuration or tokenizer, or a model that cannot be started like this.
        OutOfMemory: The model in float32 does not fit into the host's memory, twice.
        UsageError: ``to`` is not empty.
        StorageError: It cannot be written; nothing is left.
    """
    from weft.common.composition import read_config, untrained_parameters

    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise BaseModelError(
            f"{source} has no tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json beside config.json",
        )
    config, parameters = read_config(source, TaskSettings()), untrained_parameters(source)
    std = float(getattr(config.get_text_config(), "initializer_range", 0.02))
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    with _fresh_directory(to) as directory:
        for name in sorted(TOKENIZER_FILES | {CONFIG, "generation_config.json"}):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        weights = {
            name: _stored(_starting(name, array, seed=seed, std=std), dtype)
            for name, array in parameters.items()
        }
        write_tensors(directory / WEIGHTS, weights, {"format": "pt"})


def _starting(name: str, drawn: Float32Array, *, seed: int, std: float) -> Float32Array:
    if drawn.ndim >= 2:
        return normal_tensor(TensorSpec(name, "F32", drawn.shape), seed=seed, std=std)
    if drawn.size and (drawn != drawn.flat[0]).any():
        raise BaseModelError(
            f"{name} does not start at one number, which is all that is known here",
            hint="save a model of this configuration with save_pretrained and use it as the base",
        )
    return drawn


def _stored(values: Float32Array, dtype: str) -> TensorData:
    if dtype == "bfloat16":
        return Bf16(float32_to_bf16(values))
    return values.astype(np.float16) if dtype == "float16" else values


def model_card(
    *, title: str, recipe: Recipe, base_name: str, lineage: Sequence[str], is_adapter: bool = True
) -> str:
    """README.md of an export: what it is, how to load it, and where it comes from, one line an ancestor."""
    library = "peft" if is_adapter else "transformers"
    task = "text-generation" if recipe.task.kind is TaskKind.CAUSAL_LM else "text-classification"
    header = ["---", f"library_name: {library}", f"pipeline_tag: {task}"]
    if recipe.base.hub_id:
        header.append(f"base_model: {recipe.base.hub_id}")
    usage = _adapter_usage(recipe, base_name) if is_adapter else _model_usage(recipe)
    origin = [
        f"- run: `{recipe.run}`",
        f"- base: `{base_name}`, BLAKE3 of its files `{recipe.base.digest}`",
        *(f"- {line}" for line in lineage),
    ]
    parts = [
        "\n".join([*header, "tags: [weft]", "---"]),
        f"# {title}",
        "Trained with Weft.",
        f"```python\n{usage}\n```",
        "## Lineage",
        "\n".join(origin),
    ]
    return "\n\n".join(parts) + "\n"


def _adapter_usage(recipe: Recipe, base_name: str) -> str:
    auto_class = _auto_class_name(recipe)
    options = f", num_labels={recipe.task.num_labels}" if recipe.task.num_labels else ""
    return "\n".join(
        [
            f"from peft import PeftModel; from transformers import {auto_class}",
            f'base = {auto_class}.from_pretrained("{base_name}"{options})',
            'model = PeftModel.from_pretrained(base, "this directory")',
        ]
    )


def _model_usage(recipe: Recipe) -> str:
    auto_class = _auto_class_name(recipe)
    return f'from transformers import {auto_class}\nmodel = {auto_class}.from_pretrained("this directory")'


def _auto_class_name(recipe: Recipe) -> str:
    return (
        "AutoModelForCausalLM"
        if recipe.task.kind is TaskKind.CAUSAL_LM
        else "AutoModelForSequenceClassification"
    )


def _adapter_config(recipe: Recipe, tensors: Mapping[str, Float32Array], base_name: str) -> dict[str, Any]:
    lora = recipe.topology.lora
    heads = sorted({name.partition(".")[0] for name in tensors if not name.endswith((LORA_A, LORA_B))})
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": heads or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": recipe.base.revision or None,
        "target_modules": sorted(lora.target_modules),
        "task_type": _PEFT_TASKS[recipe.task.kind],
        "use_rslora": lora.rslora,
    }


def _write_around(directory: Path, card: str, extra_files: Mapping[str, bytes] | None) -> None:
    (directory / "README.md").write_text(card, encoding="utf-8")
    for name, content in (extra_files or {}).items():
        if Path(name).name != name or (directory / name).exists():
            raise ValueError(f"{name!r} is not a free plain file name")
        (directory / name).write_bytes(content)


@contextlib.contextmanager
def _fresh_directory(to: Path) -> Iterator[Path]:
    """A temporary sibling of ``to`` that takes its place at the end, or is removed on any error."""
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UsageError(f"{to} is not empty", hint="give a directory that does not exist yet")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        try:
            inner = temporary / "content"
            inner.mkdir()  # with the mode that the user's umask gives; mkdtemp's is private
            yield inner
            inner.replace(to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"no space left for {to}", hint="free space or give another --to") from error
        raise StorageError(f"cannot write {to}: {error.strerror}", hint="give another --to") from error
