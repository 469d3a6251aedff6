"""The files of deploy/ name settings, ports, commands and metrics that exist, and agree with each other."""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from serve.addresses import host_and_port
from serve.cli.main import main
from serve.observability.metrics import Metrics
from serve.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
DASHBOARD = json.loads((DEPLOY / "grafana/server.json").read_text("utf-8"))
MANIFESTS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(KUBERNETES.glob("*.yaml"))}
POD = MANIFESTS["deployment"]["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, in upper case, with their text in one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


IMAGE = dockerfile()
LAST_STAGE = IMAGE[max(at for at, (name, _) in enumerate(IMAGE) if name == "FROM") :]


def unit() -> Mapping[str, list[str]]:
    """The values of jaxrec.service by key; a key may be there more than once."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "jaxrec.service").read_text("utf-8").splitlines():
        if not line.startswith(("#", "[")) and line:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


UNIT = unit()


def variables_of_image() -> dict[str, str]:
    (text,) = [rest for name, rest in LAST_STAGE if name == "ENV"]
    return dict(one.split("=", 1) for one in shlex.split(text))


def settings(variables: Mapping[str, str]) -> Settings:
    """As the server reads them; raises SettingsError for a name or a value that is none."""
    return read_settings({}, variables)


def variables_of_pod() -> dict[str, str]:
    """Those of the image and of the pod, with an example for each secret."""
    secrets = {"JAXREC_STORE": "postgresql://jaxrec:secret@host/events", "JAXREC_TOKENS": "read a-secret-of-20-letters"}
    given = {one["name"]: one.get("value", secrets.get(one["name"])) for one in CONTAINER["env"]}
    assert {one["name"] for one in CONTAINER["env"] if "valueFrom" in one} == set(secrets)
    return variables_of_image() | given


SETTINGS = {
    "image": settings(variables_of_image()),
    "compose": settings(variables_of_image() | COMPOSE["services"]["server"]["environment"]),
    "kubernetes": settings(variables_of_pod()),
    "systemd": settings(dict(one.split("=", 1) for text in UNIT["Environment"] for one in text.split())),
}


def port_of(address: str | None) -> int:
    assert address is not None
    return host_and_port(address)[1]


def parse(words: list[str]) -> None:
    """Parses `python -m serve ...` as click does; raises click.UsageError."""
    program, command, *rest = words[2:]
    assert (Path(words[0]).name, words[1], program) == ("python", "-m", "serve")
    found = main.get_command(click.Context(main), command)
    assert found is not None, command
    found.make_context(command, rest)


@pytest.mark.parametrize("where", ["compose", "kubernetes", "systemd"])
def test_ports_of_calls_and_metrics(where: str) -> None:
    assert port_of(SETTINGS[where].address) == port_of(Settings(Path("m")).address) == 50051
    assert port_of(SETTINGS[where].metrics) == 9090


def test_the_image_serves_on_the_port_that_it_exposes_and_opens_no_door_by_itself() -> None:
    assert [rest for name, rest in LAST_STAGE if name == "EXPOSE"] == [str(port_of(SETTINGS["image"].address))]
    assert not SETTINGS["image"].allow_insecure
    assert not SETTINGS["systemd"].allow_insecure


def test_the_image_runs_without_root_and_keeps_models_and_store_in_volumes() -> None:
    instructions = dict(LAST_STAGE)
    assert instructions["USER"] == "10001:10001"
    (volumes,) = [json.loads(rest) for name, rest in LAST_STAGE if name == "VOLUME"]
    assert volumes == [str(SETTINGS["image"].model), str(Path(SETTINGS["image"].store).parent)]
    assert f"--owner=10001 --group=10001 {' '.join(volumes)}" in instructions["RUN"]
    assert instructions["STOPSIGNAL"] == "SIGTERM"
    entry = json.loads(instructions["ENTRYPOINT"])
    parse([*entry, *json.loads(instructions["CMD"])])
    check = json.loads(instructions["HEALTHCHECK"].partition(" CMD ")[2])
    assert check == [*entry, "check"]
    parse(check)


def test_the_image_is_made_of_files_that_are_there_and_sent() -> None:
    wanted = [word for name, rest in IMAGE if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert sorted(f"!{name}" for name in wanted) == sorted(line for line in sent if line.startswith("!"))
    assert all((ROOT / name).exists() for name in wanted)


def test_the_image_installs_extras_that_there_are() -> None:
    (installed,) = [rest for name, rest in IMAGE if name == "RUN" and "bin/pip " in rest]
    match = re.search(r'"\.\[(.+)\]"', installed)
    assert match is not None
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(match[1].split(",")) == {"serve-cpu", "postgres", "redis"} <= set(extras)


def test_compose_publishes_to_this_machine_only() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports["server"] == [f"127.0.0.1:50051:{port_of(SETTINGS['compose'].address)}"]
    assert SETTINGS["compose"].allow_insecure
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_compose_has_a_read_only_server_whose_store_is_its_database() -> None:
    server, database = COMPOSE["services"]["server"], COMPOSE["services"]["postgres"]["environment"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert [volume.rpartition(":/")[2] for volume in server["volumes"]] == [f"{SETTINGS['compose'].model}:ro"[1:]]
    user, name = database["POSTGRES_USER"], database["POSTGRES_DB"]
    assert SETTINGS["compose"].store == f"postgresql://{user}@postgres/{name}"
    assert (server["build"]["context"], server["build"]["dockerfile"]) == ("..", "deploy/Dockerfile")


def test_compose_mounts_files_that_are_there() -> None:
    mounted = [volume.split(":")[0] for one in COMPOSE["services"].values() for volume in one.get("volumes", [])]
    files = [name for name in mounted if name.startswith("./")]
    assert len(files) == 4
    assert all((DEPLOY / name).is_file() for name in files)
    volumes = [name for name in mounted if not name.startswith((".", "$"))]
    assert sorted(volumes) == sorted(COMPOSE["volumes"])


def test_prometheus_reads_the_metrics_of_the_server_and_grafana_reads_prometheus() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port_of(SETTINGS['compose'].metrics)}"]}]
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text("utf-8"))["providers"]
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/server.json" in mounted


def series() -> dict[str, set[str]]:
    """Every time series of the server's metrics, with its labels."""
    metrics = Metrics()
    metrics.call("/package.Service/Method", "OK", 0.1)
    metrics.rejected("overload", "/package.Service/Method")
    metrics.reloaded("loaded")
    metrics.serving([("v", "hybrid", 0.0, 1)])
    metrics.age_of_trend(lambda: 0.0)
    metrics.answered("hybrid", np.array([1], np.int32))
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_the_dashboard_asks_for_series_and_labels_that_there_are() -> None:
    there = series()
    targets = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for expression, legend in ((target["expr"], target["legendFormat"]) for target in targets):
        names = re.findall(r"\bjaxrec_\w+", expression)
        assert names, expression
        assert [name for name in names if name not in there] == [], expression
        labels = {label for name in names for label in there[name]} | {"instance"}
        used = re.findall(r"(\w+)=", expression) + re.findall(r"{{(\w+)}}", legend)
        used += [label for by in re.findall(r"by \((.*?)\)", expression) for label in by.split(", ")]
        assert set(used) <= labels, expression


def test_every_manifest_is_applied() -> None:
    assert sorted(MANIFESTS["kustomization"]["resources"]) == sorted(
        f"{name}.yaml" for name in MANIFESTS if name != "kustomization"
    )


def test_manifests_select_the_pods_of_the_deployment() -> None:
    labels, deployment = POD["metadata"]["labels"], MANIFESTS["deployment"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        MANIFESTS["service"]["spec"]["selector"],
        MANIFESTS["poddisruptionbudget"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["networkpolicy"]["spec"]["podSelector"]["matchLabels"],
        POD["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert selectors == [labels] * 5
    target = MANIFESTS["horizontalpodautoscaler"]["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_the_autoscaler_keeps_more_pods_than_the_budget_needs() -> None:
    scaler = MANIFESTS["horizontalpodautoscaler"]["spec"]
    assert MANIFESTS["poddisruptionbudget"]["spec"]["minAvailable"] < scaler["minReplicas"] <= scaler["maxReplicas"]
    assert "replicas" not in MANIFESTS["deployment"]["spec"]  # each `apply` would undo what the autoscaler did
    (metric,) = scaler["metrics"]
    assert metric["resource"]["name"] in CONTAINER["resources"]["requests"]  # of which its target is a share


def test_ports_of_the_pod_are_those_of_the_server_the_service_and_the_policy() -> None:
    expected = {"grpc": port_of(SETTINGS["kubernetes"].address), "metrics": port_of(SETTINGS["kubernetes"].metrics)}
    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]} == expected
    service = MANIFESTS["service"]["spec"]["ports"]
    assert {port["targetPort"]: port["port"] for port in service} == expected
    allowed = [port["port"] for rule in MANIFESTS["networkpolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert sorted(allowed) == sorted(expected.values())


def test_the_pod_is_encrypted_authenticated_and_shares_its_store() -> None:
    given = SETTINGS["kubernetes"]
    assert given.tokens is not None
    assert given.store.startswith("postgresql://")
    mounts = {mount["name"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {path and path.parent for path in (given.tls_cert, given.tls_key)} == {Path(mounts["tls"]["mountPath"])}
    assert mounts["models"] == {"name": "models", "mountPath": str(given.model), "readOnly": True}
    assert set(mounts) == {volume["name"] for volume in POD["spec"]["volumes"]}


def test_the_pod_has_no_root_and_no_file_system_to_write() -> None:
    assert POD["spec"]["securityContext"]["runAsNonRoot"]
    assert POD["spec"]["securityContext"]["runAsUser"] == 10001
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    assert not CONTAINER["securityContext"]["allowPrivilegeEscalation"]


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_are_commands_that_there_are(probe: str) -> None:
    parse(CONTAINER[probe]["exec"]["command"])
    assert MANIFESTS["service"]["metadata"]["name"] == CONTAINER[probe]["exec"]["command"][-1]


def test_a_stop_waits_for_the_calls_under_way() -> None:
    (before,) = [float(word) for word in CONTAINER["lifecycle"]["preStop"]["exec"]["command"] if word.isdecimal()]
    assert POD["spec"]["terminationGracePeriodSeconds"] > before + SETTINGS["kubernetes"].drain
    assert float(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > SETTINGS["compose"].drain
    assert float(UNIT["TimeoutStopSec"][0]) > SETTINGS["systemd"].drain


def test_the_unit_runs_a_server_without_root() -> None:
    parse(UNIT["ExecStart"][0].split())
    assert UNIT["DynamicUser"] == ["yes"]
    assert UNIT["ProtectSystem"] == ["strict"]
    assert SETTINGS["systemd"].store.startswith(f"/var/lib/{UNIT['StateDirectory'][0]}/")
