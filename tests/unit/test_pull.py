"""What is pulled is what the coordinator signed for what was asked, or nothing is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weft.client.deliver import deliver
from weft.client.home import Home
from weft.client.pull import Resolved, fetch, lineage, resolve
from weft.common.blobs import manifest_of
from weft.common.errors import CorruptState, IdentityMismatch, UsageError
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, ModuleRef, RunId
from weft.common.manifest import (
    Gate,
    GateOutcome,
    Instant,
    Parent,
    Sha256,
    Signed,
    VersionManifest,
    canonical_json,
    open_version,
    schema_digest,
    sign_version,
)
from weft.common.modules import LORA_A, LORA_B, Kind, LoraSettings, Schema, TensorSpec, Topology
from weft.common.protocol import ResolvedModule
from weft.common.recipe import RECIPE_TYPE, BasePin, Recipe
from weft.common.settings import to_table
from weft.common.tensors import FOREIGN, TensorFile, write_module

LORA = LoraSettings(rank=2, alpha=4.0, target_modules=("q_proj",))
BASE = BasePin(digest=Digest("a" * 64), hub_id="org/base")


def schema_of(level: int) -> Schema:
    layer = f"model.layers.{level}.self_attn.q_proj"
    return Schema(
        (TensorSpec(f"{layer}{LORA_A}", "F32", (2, 8)), TensorSpec(f"{layer}{LORA_B}", "F32", (8, 2)))
    )


class Coordinator:
    """A coordinator's published versions, to be tampered with."""

    def __init__(self, directory: Path, identity: CoordinatorIdentity, *, levels: int = 1) -> None:
        self.directory = directory
        self.identity = identity
        self.key = identity.signing_key
        self.recipe = Recipe(
            run=RunId("alpha"), base=BASE, topology=Topology(experts=(1,) * levels, lora=LORA)
        )
        self.endorsement = identity.endorse_signing_key()
        self.versions: dict[ModuleKey, list[VersionManifest]] = {}
        self.files: dict[Digest, Path] = {}
        for level in range(levels):
            self.publish(ModuleKey(level, 0))
            self.publish(ModuleKey(level, 0))

    def publish(self, module: ModuleKey, **changes: Any) -> None:
        versions = self.versions.setdefault(module, [])
        schema = schema_of(module.level)
        path = self.directory / f"{module}-{len(versions)}"
        write_module(
            path,
            {spec.name: np.full(spec.shape, len(versions) + 1, np.float32) for spec in schema.tensors},
            schema,
        )
        digest = manifest_of(path).blake3
        self.files[digest] = path
        parents = (
            (Parent(version=len(versions) - 1, manifest_digest=versions[-1].digest),) if versions else ()
        )
        manifest = VersionManifest(
            run=self.recipe.run,
            module=module,
            version=len(versions),
            parents=parents,
            base_digest=BASE.digest,
            schema_digest=schema_digest(schema),
            content_digest=digest,
            content_bytes=path.stat().st_size,
            content_sha256=Sha256(hashlib.sha256(path.read_bytes()).hexdigest()),
            kind=Kind.LORA,
            settings=to_table(LORA),
            contributors=(),
            merge=None,
            outer=None,
            gate=Gate(outcome=GateOutcome.SKIPPED, reason="no held-out data"),
            code_version="0.1.0",
            round_number=len(versions),
            created=Instant("2031-05-06T07:08:09Z"),
        )
        versions.append(dataclasses.replace(manifest, **changes))

    def resolve_module(self, ref: str) -> ResolvedModule:
        wanted = ModuleRef.parse(ref)
        keys = [wanted.module] if wanted.module else sorted(self.versions)
        chosen = [self.versions[key][-1 if wanted.version is None else wanted.version] for key in keys]
        return ResolvedModule(
            recipe=Signed.sign(self.key, RECIPE_TYPE, canonical_json(to_table(self.recipe))),
            manifests=tuple(sign_version(manifest, self.key) for manifest in chosen),
            coordinator_public_key=self.key.public,
            endorsement=self.endorsement,
        )

    def list_versions(self, run_id: str, module: str = "") -> tuple[Signed, ...]:
        keys = [key for key in sorted(self.versions) if module in ("", str(key))]
        return tuple(sign_version(manifest, self.key) for key in keys for manifest in self.versions[key])

    def download(
        self, blake3: Digest, to: Path, *, idle_s: float, size_bytes: int | None = None, progress: Any = None
    ) -> Path:
        shutil.copyfile(self.files[blake3], to)
        progress(to.stat().st_size, to.stat().st_size)
        return to


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorIdentity:
    from datetime import UTC, datetime

    directory = tmp_path_factory.mktemp("identity") / "keys"
    return CoordinatorIdentity.create_or_load(directory, ["localhost"], datetime.now(UTC))


@pytest.fixture
def coordinator(tmp_path: Path, identity: CoordinatorIdentity) -> Coordinator:
    return Coordinator(tmp_path, identity)


def resolved(coordinator: Coordinator, ref: str = "alpha") -> Resolved:
    return resolve(coordinator, ModuleRef.parse(ref), ca_pem=coordinator.identity.ca_pem)


def pulled(coordinator: Coordinator, to: Path, ref: str = "alpha") -> Any:
    return deliver(
        coordinator,
        ModuleRef.parse(ref),
        to,
        home=Home(to.parent / "home"),
        ca_pem=coordinator.identity.ca_pem,
        merged=False,
        base=None,
        progress=lambda done, total: None,
    )


def test_an_adapter_with_its_signed_manifest_and_its_lineage(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    delivered = pulled(coordinator, tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "weft-manifest.json",
        "weft-recipe.json",
    ]
    envelope = Signed.from_envelope((out / "weft-manifest.json").read_bytes())
    assert open_version(envelope, coordinator.key.public) == coordinator.versions[ModuleKey(0, 0)][1]
    card = (out / "README.md").read_text()
    assert "alpha/0.0@0" in card
    assert "alpha/0.0@1" in card
    with TensorFile(out / "adapter_model.safetensors", FOREIGN) as file:
        assert all((file.array(spec.name) == 2).all() for spec in file.header.specs)
    assert json.dumps(delivered.table())
    assert 'PeftModel.from_pretrained(base, "' in delivered.lines()[-1]
    # What was fetched is not needed any more.
    assert list((tmp_path / "home" / "pulls").iterdir()) == []


def test_an_older_version(coordinator: Coordinator, tmp_path: Path) -> None:
    pulled(coordinator, tmp_path / "out", "alpha@0")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "alpha/0.0@0" in card
    assert "alpha/0.0@1" not in card


def test_a_path_of_several_levels_has_a_manifest_each(tmp_path: Path, identity: CoordinatorIdentity) -> None:
    pulled(Coordinator(tmp_path, identity, levels=2), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"weft-manifest-0.0.json", "weft-manifest-1.0.json"} <= names


def test_one_level_of_several_is_no_adapter(tmp_path: Path, identity: CoordinatorIdentity) -> None:
    with pytest.raises(UsageError) as caught:
        pulled(Coordinator(tmp_path, identity, levels=2), tmp_path / "out", "alpha/1.0")
    assert caught.value.hint.endswith("weft pull alpha/path:0.0")


def test_a_full_directory_is_refused_before_anything_is_fetched(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError):
        pulled(coordinator, tmp_path / "out")
    assert not (tmp_path / "home").exists()


# ---- tampering ---------------------------------------------------------------------------------------------------


def other_key(coordinator: Coordinator) -> None:
    coordinator.key = SigningKey.generate()


def other_run(coordinator: Coordinator) -> None:
    coordinator.recipe = dataclasses.replace(coordinator.recipe, run=RunId("beta"))


def other_base(coordinator: Coordinator) -> None:
    coordinator.recipe = dataclasses.replace(coordinator.recipe, base=BasePin(digest=Digest("b" * 64)))


def other_rank(coordinator: Coordinator) -> None:
    lora = dataclasses.replace(LORA, alpha=8.0)
    coordinator.recipe = dataclasses.replace(coordinator.recipe, topology=Topology(lora=lora))


def other_module(coordinator: Coordinator) -> None:
    coordinator.versions = {ModuleKey(0, 7): coordinator.versions[ModuleKey(0, 0)]}
    coordinator.publish(ModuleKey(0, 7))


def missing_level(coordinator: Coordinator) -> None:
    coordinator.recipe = dataclasses.replace(coordinator.recipe, topology=Topology(experts=(1, 1), lora=LORA))


@pytest.mark.parametrize(
    ("tamper", "error"),
    [
        (other_key, IdentityMismatch),
        (other_run, CorruptState),
        (other_base, CorruptState),
        (other_rank, CorruptState),
        (other_module, CorruptState),
        (missing_level, CorruptState),
    ],
    ids=lambda value: value.__name__,
)
def test_documents_of_something_else_are_refused(
    coordinator: Coordinator, tmp_path: Path, tamper: Callable[[Coordinator], None], error: type[Exception]
) -> None:
    tamper(coordinator)
    with pytest.raises(error):
        pulled(coordinator, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_version_than_the_one_asked_for_is_refused(coordinator: Coordinator) -> None:
    coordinator.versions[ModuleKey(0, 0)].reverse()
    with pytest.raises(CorruptState):
        resolved(coordinator, "alpha@1")


def test_a_manifest_that_another_key_signed_is_refused(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = coordinator.resolve_module("alpha")
    forged = sign_version(coordinator.versions[ModuleKey(0, 0)][1], SigningKey.generate())
    monkeypatch.setattr(
        coordinator, "resolve_module", lambda ref: dataclasses.replace(answer, manifests=(forged,))
    )
    with pytest.raises(IdentityMismatch):
        resolved(coordinator)


@pytest.mark.parametrize(
    "changes",
    [{"content_sha256": Sha256("0" * 64)}, {"schema_digest": Digest("0" * 64)}],
    ids=["sha256", "schema"],
)
def test_tensors_that_are_not_the_manifests_are_refused(
    coordinator: Coordinator, tmp_path: Path, changes: dict[str, Any]
) -> None:
    coordinator.publish(ModuleKey(0, 0), **changes)
    with pytest.raises(CorruptState):
        fetch(coordinator, resolved(coordinator), tmp_path / "cache", lambda done, total: None)


def test_a_lineage_whose_chain_is_broken_is_refused(coordinator: Coordinator) -> None:
    ref = ModuleRef.parse("alpha/0.0")
    assert len(lineage(coordinator, ref, ca_pem=coordinator.identity.ca_pem)) == 2
    stranger = Parent(version=1, manifest_digest=Digest("0" * 64))
    coordinator.publish(ModuleKey(0, 0), parents=(stranger,))
    with pytest.raises(CorruptState):
        lineage(coordinator, ref, ca_pem=coordinator.identity.ca_pem)


def test_without_tls_there_is_no_authority_to_ask(coordinator: Coordinator) -> None:
    coordinator.endorsement = b""
    assert resolve(coordinator, ModuleRef.parse("alpha"), ca_pem="").recipe == coordinator.recipe
    with pytest.raises(IdentityMismatch):
        resolved(coordinator)
