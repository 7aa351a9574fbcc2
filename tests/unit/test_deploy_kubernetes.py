"""Manifests and chart name what the program has: commands, ports, paths, users, metrics, versions.

That they are right as Kubernetes objects is ``tests/deploy/check_deploy.py``'s to say, which needs kubectl and helm.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from tests.commandline import check_line

from weft.client.home import PORT
from weft.common.errors import UsageError
from weft.common.protocol import Status
from weft.common.wire import is_loopback
from weft.server.app import DRAIN_S, GRACE_S, ServeOptions, parse_address
from weft.server.metrics import StatusCollector
from weft.server.runfile import load_run_file

yaml = pytest.importorskip("yaml")
ROOT: Final = Path(__file__).parents[2]
KUBERNETES: Final = ROOT / "deploy/kubernetes"
CHART: Final = ROOT / "deploy/helm/weft"
DOCKERFILE: Final = (ROOT / "deploy/Dockerfile").read_text()
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def objects(path: str) -> dict[str, Any]:
    """The objects of a file by kind; the files name each kind of workload once."""
    return {item["kind"]: item for item in yaml.safe_load_all((KUBERNETES / path).read_text())}


def pod(kind: str) -> dict[str, Any]:
    file = {"StatefulSet": "coordinator", "Deployment": "workers"}[kind]
    spec: dict[str, Any] = objects(f"base/{file}.yaml")[kind]["spec"]["template"]["spec"]
    return spec


def container(kind: str) -> dict[str, Any]:
    (found,) = pod(kind)["containers"]
    assert isinstance(found, dict)
    return found


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def mounts(kind: str) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container(kind)["volumeMounts"]}


def gpu_patch() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "overlays/gpu/workers.yaml").read_text())
    return found


# ---- what is started -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_a_container_runs_a_real_command(kind: str) -> None:
    check_line(container(kind)["args"])
    assert "command" not in container(kind), "the image's entry point is the program"


def test_workers_with_a_gpu_run_the_same_command_and_say_which_device() -> None:
    (patched,) = gpu_patch()["spec"]["template"]["spec"]["containers"]
    check_line(patched["args"])
    assert patched["args"] == [*container("Deployment")["args"], "--device", "cuda"]
    for bound in ("requests", "limits"):
        assert patched["resources"][bound]["nvidia.com/gpu"] == 1


def test_commands_that_are_typed_into_the_cluster_would_be_accepted() -> None:
    pages = (ROOT / "deploy/README.md").read_text() + (CHART / "templates/NOTES.txt").read_text()
    typed = re.findall(r"-- weft ([^|>\n\\]+)", pages)
    assert len(typed) > 4
    for line in typed:
        check_line(shlex.split(line))


def test_no_environment_but_what_is_read() -> None:
    environment = {item["name"] for item in container("Deployment")["env"]}
    assert environment == {"POD_NAME", "HF_HUB_OFFLINE"}
    assert "$(POD_NAME)" in container("Deployment")["args"]
    assert "env" not in container("StatefulSet")


# ---- ports -----------------------------------------------------------------------------------------------------


def test_ports_are_those_that_the_coordinator_listens_on() -> None:
    words = container("StatefulSet")["args"]
    ports = {port["name"]: port["containerPort"] for port in container("StatefulSet")["ports"]}
    http_host, http_port = parse_address(option(words, "--http"), "--http", default_port=0)
    assert "--listen" not in words
    defaults = ServeOptions(state=Path())
    assert ports == {"join": defaults.port, "http": http_port}
    assert not is_loopback(http_host), "the kubelet asks from outside the pod"
    assert not is_loopback(defaults.host)


def test_workers_dial_the_service() -> None:
    service = objects("base/coordinator.yaml")["Service"]
    host, _, port = container("Deployment")["args"][1].partition(":")
    assert host == service["metadata"]["name"]
    assert int(port) == PORT
    assert host == option(container("StatefulSet")["args"], "--advertise")


def test_probes_ask_a_page_that_there_is() -> None:
    source = (ROOT / "server/metrics.py").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container("StatefulSet")[probe]["httpGet"]
        assert asked["port"] == "http"
        assert f'"{asked["path"]}"' in source


# ---- users, paths, time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_user_and_places_are_the_images(kind: str) -> None:
    security = pod(kind)["securityContext"]
    ids = re.findall(r"--[ug]id (\d+)", DOCKERFILE)
    assert {security["runAsUser"], security["runAsGroup"], security["fsGroup"]} == {int(one) for one in ids}
    volume = re.search(r"^VOLUME (\S+)$", DOCKERFILE, re.MULTILINE)
    assert volume is not None
    assert mounts(kind)["state"] == volume[1]
    written = re.findall(r"(?:WEFT|HF)_HOME=(\S+)", DOCKERFILE)
    assert written
    assert all(path.startswith(f"{volume[1]}/") for path in written)


def test_state_is_below_the_volume_and_not_the_volume() -> None:
    # The volume's root belongs to root and is open to the group: Weft would refuse it.
    state = option(container("StatefulSet")["args"], "--state")
    assert Path(state).parent == Path(mounts("StatefulSet")["state"])
    assert pod("StatefulSet")["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_run_file_and_token_are_where_the_commands_look() -> None:
    (generated,) = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["configMapGenerator"]
    (file,) = generated["files"]
    assert container("StatefulSet")["args"][1] == f"{mounts('StatefulSet')['run']}/{file}"
    assert container("Deployment")["args"][2] == f"{mounts('Deployment')['token']}/token"
    for page in (ROOT / "deploy/README.md", CHART / "templates/NOTES.txt"):
        assert "--from-file=token=/dev/stdin" in page.read_text()


def test_pods_are_given_time_to_stop() -> None:
    assert pod("StatefulSet")["terminationGracePeriodSeconds"] > DRAIN_S + GRACE_S
    units = (ROOT / "deploy/weft-worker@.service").read_text()
    assert f"TimeoutStopSec={pod('Deployment')['terminationGracePeriodSeconds']}" in units


def test_there_is_one_coordinator() -> None:
    assert objects("base/coordinator.yaml")["StatefulSet"]["spec"]["replicas"] == 1


# ---- versions, runs, metrics -----------------------------------------------------------------------------------


def test_images_and_chart_are_of_this_version() -> None:
    images = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["images"]
    assert {image["name"] for image in images} == {
        container(kind)["image"] for kind in ("StatefulSet", "Deployment")
    }
    assert {image["newTag"] for image in images} == {VERSION}
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)
    (gpu,) = yaml.safe_load((KUBERNETES / "overlays/gpu/kustomization.yaml").read_text())["images"]
    assert gpu["newTag"] == f"{VERSION}-cuda"


@pytest.mark.parametrize(
    "path", [KUBERNETES / "base/run.toml", CHART / "files/run.toml"], ids=["base", "chart"]
)
def test_run_files_can_be_served_by_as_many_workers_as_there_are(path: Path) -> None:
    run_file = load_run_file(path)
    replicas = objects("base/workers.yaml")["Deployment"]["spec"]["replicas"]
    assert run_file.rounds.quorum <= run_file.rounds.target <= replicas


def test_a_run_file_with_a_misspelt_key_would_be_noticed(tmp_path: Path) -> None:
    wrong = tmp_path / "run.toml"
    wrong.write_text((KUBERNETES / "base/run.toml").read_text().replace("quorum", "quorun"))
    with pytest.raises(UsageError, match="quorun"):
        load_run_file(wrong)


def test_alarms_are_about_metrics_that_there_are() -> None:
    status = Status(coordinator="", started_at=0.0, taken_at=0.0, runs=(), workers=())
    known = {family.name for family in StatusCollector(lambda: status).collect()}
    (group,) = objects("components/monitoring/monitoring.yaml")["PrometheusRule"]["spec"]["groups"]
    named = {name for rule in group["rules"] for name in re.findall(r"\bweft_\w+", rule["expr"])}
    assert named
    assert named <= known


def test_network_policies_let_the_programs_ports_through_and_no_others() -> None:
    defaults = ServeOptions(state=Path())
    policies = [
        *yaml.safe_load_all((KUBERNETES / "base/network.yaml").read_text()),
        objects("components/monitoring/monitoring.yaml")["NetworkPolicy"],
        objects("components/public/public.yaml")["NetworkPolicy"],
    ]
    inward = {
        port["port"]
        for item in policies
        for rule in item["spec"].get("ingress", ())
        for port in rule["ports"]
    }
    outward = {
        port["port"] for item in policies for rule in item["spec"].get("egress", ()) for port in rule["ports"]
    }
    assert inward == {defaults.port, defaults.http_port}
    assert outward == {defaults.port, 53, 443}
