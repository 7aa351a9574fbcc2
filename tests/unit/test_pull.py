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

from weft.client.deliver import Form, deliver
from weft.client.deliver_grid import DeliveredGrid, deliver_grid
from weft.client.grid import Grid
from weft.client.home import Home
from weft.client.pull import Resolved, fetch, lineage, resolve
from weft.common.base import pin_base
from weft.common.blobs import manifest_of
from weft.common.errors import CorruptState, IdentityMismatch, RouterMismatch, UsageError
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, ModuleRef, RunId
from weft.common.ids import Path as ModulePath
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
from weft.common.protocol import BlobRef, PathStatus, ResolvedModule, RunStatus, Status
from weft.common.recipe import RECIPE_TYPE, BasePin, Recipe
from weft.common.routing import random_router, write_router
from weft.common.settings import to_table
from weft.common.tensors import FOREIGN, TensorFile, write_module, write_tensors

LORA = LoraSettings(rank=2, alpha=4.0, target_modules=("q_proj",))
BASE = BasePin(digest=Digest("a" * 64), hub_id="org/base")


def schema_of(level: int) -> Schema:
    layer = f"model.layers.{level}.self_attn.q_proj"
    return Schema(
        (TensorSpec(f"{layer}{LORA_A}", "F32", (2, 8)), TensorSpec(f"{layer}{LORA_B}", "F32", (8, 2)))
    )


class Coordinator:
    """A coordinator's published versions, to be tampered with."""

    def __init__(
        self,
        directory: Path,
        identity: CoordinatorIdentity,
        *,
        experts: tuple[int, ...] = (1,),
        kind: Kind = Kind.LORA,
        base: BasePin = BASE,
    ) -> None:
        self.directory = directory
        self.identity = identity
        self.key = identity.signing_key
        topology = Topology(experts=experts, lora=LORA, kind=kind)
        self.recipe = Recipe(run=RunId("alpha"), base=base, topology=topology)
        self.endorsement = identity.endorse_signing_key()
        self.versions: dict[ModuleKey, list[VersionManifest]] = {}
        self.files: dict[Digest, Path] = {}
        self.router: BlobRef | None = None
        self.best: dict[str, tuple[int, ...]] = {}
        self.fetched: list[Digest] = []
        for module in topology.modules:
            self.publish(module)
            self.publish(module)

    def publish(self, module: ModuleKey, **changes: Any) -> None:
        versions = self.versions.setdefault(module, [])
        schema = schema_of(module.level)
        # All experts of a level start equal, as those of whole transformer blocks do.
        value = len(versions) + 1 + (module.expert if versions else 0) / 10
        path = self.directory / f"{module}-{len(versions)}"
        write_module(
            path,
            {spec.name: np.full(spec.shape, value, np.float32) for spec in schema.tensors},
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
            base_digest=self.recipe.base.digest,
            schema_digest=schema_digest(schema),
            content_digest=digest,
            content_bytes=path.stat().st_size,
            content_sha256=Sha256(hashlib.sha256(path.read_bytes()).hexdigest()),
            kind=self.recipe.topology.kind,
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
        path = self.recipe.topology.find_path(wanted.path) if wanted.path else None
        keys = list(path.modules) if path else [wanted.module] if wanted.module else sorted(self.versions)
        number = -1 if wanted.version is None else wanted.version
        numbers = self.best[str(path)] if wanted.best else (number,) * len(keys)
        chosen = [self.versions[key][which] for key, which in zip(keys, numbers, strict=True)]
        return ResolvedModule(
            recipe=Signed.sign(self.key, RECIPE_TYPE, canonical_json(to_table(self.recipe))),
            manifests=tuple(sign_version(manifest, self.key) for manifest in chosen),
            coordinator_public_key=self.key.public,
            endorsement=self.endorsement,
            router=self.router,
        )

    def get_status(self, run_id: str = "") -> Status:
        paths = tuple(
            PathStatus(path=path, state="waits", workers=(), num_in=0, best_loss=2.5, best_versions=versions)
            for path, versions in self.best.items()
        )
        run = RunStatus(
            run_id="alpha",
            num_rounds=3,
            finished=False,
            reason="",
            base_digest="",
            rule="mean",
            codec="fp32",
            modules=(),
            paths=(*paths, PathStatus(path="0.0", state="waits", workers=(), num_in=0)),
        )
        return Status(coordinator="loom", started_at=0.0, taken_at=0.0, runs=(run,), workers=())

    def list_versions(self, run_id: str, module: str = "") -> tuple[Signed, ...]:
        keys = [key for key in sorted(self.versions) if module in ("", str(key))]
        return tuple(sign_version(manifest, self.key) for key in keys for manifest in self.versions[key])

    def download(
        self, blake3: Digest, to: Path, *, idle_s: float, size_bytes: int | None = None, progress: Any = None
    ) -> Path:
        self.fetched.append(blake3)
        shutil.copyfile(self.files[blake3], to)
        if progress is not None:
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


def pulled(coordinator: Coordinator, to: Path, ref: str = "alpha", form: Form | None = None) -> Any:
    return deliver(
        coordinator,
        ModuleRef.parse(ref),
        to,
        home=Home(to.parent / "home"),
        ca_pem=coordinator.identity.ca_pem,
        form=form,
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
    pulled(Coordinator(tmp_path, identity, experts=(1, 1)), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"weft-manifest-0.0.json", "weft-manifest-1.0.json"} <= names


def test_one_level_of_several_is_no_adapter(tmp_path: Path, identity: CoordinatorIdentity) -> None:
    with pytest.raises(UsageError) as caught:
        pulled(Coordinator(tmp_path, identity, experts=(1, 1)), tmp_path / "out", "alpha/1.0")
    assert caught.value.hint.endswith("weft pull alpha/path:0.0 --to DIR")


def test_a_full_directory_is_refused_before_anything_is_fetched(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError):
        pulled(coordinator, tmp_path / "out")
    assert not (tmp_path / "home").exists()


# ---- paths -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The files of a base, as far as a pull looks at them."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    write_tensors(directory / "model.safetensors", {"weight": np.zeros(2, np.float32)})
    return directory


@pytest.fixture
def grid(tmp_path: Path, identity: CoordinatorIdentity, base: Path) -> Coordinator:
    return Coordinator(tmp_path, identity, experts=(2, 2), base=pin_base(base))


def give_router(coordinator: Coordinator, *, base_digest: Digest | None = None) -> None:
    """Let a run have a router."""
    topology = coordinator.recipe.topology
    router = random_router(
        paths=topology.paths, base_digest=base_digest or coordinator.recipe.base.digest, width=4, seed=0
    )
    path = coordinator.directory / "router"
    write_router(path, router)
    digest = manifest_of(path).blake3
    coordinator.files[digest] = path
    coordinator.router = BlobRef(blake3=digest, size_bytes=path.stat().st_size)


def pulled_all(coordinator: Coordinator, to: Path, base: Path, ref: str = "alpha") -> DeliveredGrid:
    return deliver_grid(
        coordinator,
        ModuleRef.parse(ref),
        to,
        home=Home(to.parent / "home"),
        ca_pem=coordinator.identity.ca_pem,
        base=base,
        progress=lambda done, total: None,
    )


def test_one_path_of_several_is_an_adapter(grid: Coordinator, tmp_path: Path) -> None:
    delivered = pulled(grid, tmp_path / "out", "alpha/path:1.0")
    assert [item["module"] for item in delivered.table()["modules"]] == ["0.1", "1.0"]
    with TensorFile(tmp_path / "out" / "adapter_model.safetensors", FOREIGN) as file:
        values = sorted({float(file.array(spec.name).flat[0]) for spec in file.header.specs})
    assert values == pytest.approx([2.0, 2.1])


def test_a_path_at_its_best(grid: Coordinator, tmp_path: Path) -> None:
    grid.best = {"1.0": (0, 1)}
    delivered = pulled(grid, tmp_path / "out", "alpha/path:1.0@best")
    assert [item["version"] for item in delivered.table()["modules"]] == [0, 1]


def test_a_path_is_named_by_its_shared_levels(
    tmp_path: Path, identity: CoordinatorIdentity, base: Path
) -> None:
    own = Coordinator(tmp_path, identity, experts=(2, 0), base=pin_base(base))
    delivered = pulled(own, tmp_path / "out", "alpha/path:1")
    assert [item["module"] for item in delivered.table()["modules"]] == ["0.1", "1.1"]


def test_a_run_of_several_paths_says_how_to_pull_one_or_all(grid: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pulled(grid, tmp_path / "out")
    assert "has 4 paths" in caught.value.message
    assert "weft pull alpha/path:0.0 --to DIR" in caught.value.hint
    assert "weft pull alpha --all --to DIR" in caught.value.hint


def test_whole_blocks_are_no_adapter(tmp_path: Path, identity: CoordinatorIdentity) -> None:
    full = Coordinator(tmp_path, identity, kind=Kind.FULL)
    with pytest.raises(UsageError) as caught:
        pulled(full, tmp_path / "out", form=Form.PEFT)
    assert caught.value.hint == "weft pull alpha --to DIR writes the whole model"
    assert full.fetched == []


def test_all_paths_are_a_grid_with_router_best_versions_and_signed_documents(
    grid: Coordinator, base: Path, tmp_path: Path
) -> None:
    give_router(grid)
    grid.best = {"1.0": (0, 1)}
    delivered = pulled_all(grid, tmp_path / "out", base)
    opened = Grid.open(tmp_path / "out")
    assert opened.recipe == grid.recipe
    assert opened.router is not None
    assert opened.index.base == str(base)
    path = ModulePath((1, 0))
    assert [item.version for item in opened.versions(path)] == [1, 1]
    assert [item.version for item in opened.versions(path, best=True)] == [0, 1]
    assert opened.index.best[0].validation_loss == 2.5
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert {"weft-recipe.json", "weft-manifest-0.1@0.json", "weft-manifest-0.1@1.json"} <= names
    table = json.loads(json.dumps(delivered.table()))
    assert table["best"] == {"1.0": [0, 1]}
    assert len(table["modules"]) == 5
    assert delivered.lines()[-1].startswith("weft eval ")
    assert list((tmp_path / "home" / "pulls").iterdir()) == []


def test_what_is_the_same_is_fetched_once(tmp_path: Path, identity: CoordinatorIdentity, base: Path) -> None:
    grid = Coordinator(tmp_path, identity, experts=(4,), base=pin_base(base))
    for versions in grid.versions.values():
        del versions[1:]
    pulled_all(grid, tmp_path / "out", base)
    assert len(grid.fetched) == 1
    assert len(list((tmp_path / "out" / "modules").iterdir())) == 4


def test_a_pull_of_all_that_was_cut_goes_on_and_leaves_nothing_before(
    grid: Coordinator, base: Path, tmp_path: Path
) -> None:
    last = grid.versions[ModuleKey(1, 1)][1].content_digest
    whole = grid.files.pop(last)
    with pytest.raises(KeyError):
        pulled_all(grid, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "home" / "pulls").iterdir())) == 3
    grid.files[last] = whole
    pulled_all(grid, tmp_path / "out", base)
    assert Grid.open(tmp_path / "out").router is None


def test_a_router_of_another_base_is_refused(grid: Coordinator, base: Path, tmp_path: Path) -> None:
    give_router(grid, base_digest=Digest("b" * 64))
    with pytest.raises(RouterMismatch):
        pulled_all(grid, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
    assert grid.router is not None
    assert grid.fetched == [grid.router.blake3]


def test_all_of_one_path_makes_no_sense(grid: Coordinator, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        pulled_all(grid, tmp_path / "out", base, "alpha/path:0.0")
    assert caught.value.hint == "weft pull alpha --all --to DIR"


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
