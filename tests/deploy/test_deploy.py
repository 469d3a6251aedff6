"""The files of deploy/ name settings, ports, commands and metrics that exist, and agree with each other."""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import click
import numpy as np
import pytest
import yaml

from serve.addresses import host_and_port, is_loopback
from serve.cli.main import main
from serve.model.recommender import POPULARITY
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


def unit(file: str) -> Mapping[str, list[str]]:
    """The values of a unit by key; a key may be there more than once."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / file).read_text("utf-8").splitlines():
        if not line.startswith(("#", "[")) and line:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


UNIT = unit("jaxrec.service")
NETWORK = unit("jaxrec-network.conf")


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


def variables_of_unit(values: Mapping[str, list[str]]) -> dict[str, str]:
    return dict(one.split("=", 1) for text in values["Environment"] for one in text.split())


SETTINGS = {
    "image": settings(variables_of_image()),
    "compose": settings(variables_of_image() | COMPOSE["services"]["server"]["environment"]),
    "kubernetes": settings(variables_of_pod()),
    "systemd": settings(variables_of_unit(UNIT)),
    "systemd network": settings(variables_of_unit(UNIT) | variables_of_unit(NETWORK)),
}


def commands(page: str) -> list[list[str]]:
    """The words of each command in the shell blocks of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [
        shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines() if "<<" not in line
    ]


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


@pytest.mark.parametrize(
    ("where", "metrics"),
    [("compose", 9090), ("kubernetes", 9090), ("systemd", 50052), ("systemd network", 50052)],
)
def test_ports_of_calls_and_metrics(where: str, metrics: int) -> None:
    """Beside the server of systemd there may be a Prometheus, which listens on 9090."""
    assert port_of(SETTINGS[where].address) == port_of(Settings(Path("m")).address) == 50051
    assert port_of(SETTINGS[where].metrics) == metrics


def test_only_compose_allows_calls_without_tls_and_only_kubernetes_metrics_for_others() -> None:
    assert {where for where, given in SETTINGS.items() if given.allow_insecure} == {"compose"}
    assert {where for where, given in SETTINGS.items() if given.allow_insecure_metrics} == {"kubernetes"}


def test_what_the_server_may_write_to_is_the_same_everywhere() -> None:
    """`/tmp` while a model is loaded, and the volume of the store where the store is a file."""
    (command,) = [line for line in commands("docs/deploying.md") if line[:2] == ["docker", "run"]]
    mounts = [command[at + 1] for at, word in enumerate(command) if word == "--volume"]
    written = [mount.split(":")[1] for mount in mounts if not mount.endswith(":ro")]
    assert "--read-only" in command
    assert written == [str(Path(SETTINGS["image"].store).parent)]
    in_memory = [command[at + 1] for at, word in enumerate(command) if word == "--tmpfs"]
    empty = {volume["name"] for volume in POD["spec"]["volumes"] if "emptyDir" in volume}
    assert in_memory == COMPOSE["services"]["server"]["tmpfs"] == ["/tmp"]
    assert [one["mountPath"] for one in CONTAINER["volumeMounts"] if one["name"] in empty] == in_memory
    assert [one["mountPath"] for one in CONTAINER["volumeMounts"] if not one.get("readOnly")] == in_memory


def test_the_image_serves_on_the_port_that_it_exposes_and_opens_no_door_by_itself() -> None:
    assert [rest for name, rest in LAST_STAGE if name == "EXPOSE"] == [str(port_of(SETTINGS["image"].address))]
    assert not SETTINGS["image"].allow_insecure
    assert not SETTINGS["image"].allow_insecure_metrics


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


def locked(file: Path) -> dict[tuple[str, str], int]:
    """Packages and versions of a lock, with the number of their hashes."""
    pins = re.findall(r"^([\w.-]+)==(\S+)([^#]*?)(?=^\S|^ *#)", file.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {(name, version): rest.count("--hash=sha256:") for name, version, rest in pins}


def test_the_lock_of_the_image_has_its_extras_with_hashes_in_the_versions_of_the_whole_lock() -> None:
    pins = locked(DEPLOY / "requirements.lock")
    assert all(pins.values())
    assert pins.keys() <= locked(ROOT / "requirements.lock").keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve-base"], *extras["postgres"], *extras["redis"]]
    wanted += [one for one in extras["serve-cpu"] if not one.startswith("jaxrec[")]
    names = {match[0] for one in wanted if (match := re.match(r"[\w-]+", one)) is not None}
    assert names <= {name for name, _ in pins}
    assert "onnxruntime-gpu" not in {name for name, _ in pins}


def test_the_image_installs_its_lock_by_hashes_and_nothing_besides() -> None:
    installs = [rest for name, rest in IMAGE if name == "RUN" and "bin/pip " in rest]
    assert ["--require-hashes" in rest or "--no-deps" in rest for rest in installs] == [True, True]


def test_compose_publishes_to_this_machine_only() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports["server"] == [f"127.0.0.1:50051:{port_of(SETTINGS['compose'].address)}"]
    assert SETTINGS["compose"].allow_insecure
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_compose_has_a_read_only_server_whose_store_is_its_database() -> None:
    server, database = COMPOSE["services"]["server"], COMPOSE["services"]["postgres"]["environment"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    (volume,) = server["volumes"]
    assert volume.endswith(f":{SETTINGS['compose'].model}:ro")
    user, name = database["POSTGRES_USER"], database["POSTGRES_DB"]
    assert SETTINGS["compose"].store == f"postgresql://{user}@postgres/{name}"
    assert (server["build"]["context"], server["build"]["dockerfile"]) == ("..", "deploy/Dockerfile")


def test_compose_joins_only_containers_that_speak_with_each_other() -> None:
    members: dict[str, set[str]] = {}
    for name, service in COMPOSE["services"].items():
        for network in service["networks"]:
            members.setdefault(network, set()).add(name)
    assert sorted(map(sorted, members.values())) == [
        ["grafana", "prometheus"],
        ["postgres", "server"],
        ["prometheus", "server"],
    ]
    assert members.keys() == COMPOSE["networks"].keys()
    assert SETTINGS["compose"].tokens is not None


def test_compose_waits_for_the_database_over_tcp() -> None:
    database = COMPOSE["services"]["postgres"]
    environment, (program, *options) = database["environment"], database["healthcheck"]["test"][1:]
    assert program == "pg_isready"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given == {
        "--host": "127.0.0.1",
        "--username": environment["POSTGRES_USER"],
        "--dbname": environment["POSTGRES_DB"],
    }


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


def series() -> dict[str, dict[str, set[str]]]:
    """Every time series of the server's metrics: by label the values that the server has without any traffic."""
    metrics = Metrics()
    metrics.call("/package.Service/Method", "OK", 0.1)
    metrics.rejected("overload", "/package.Service/Method")
    metrics.reloaded("loaded")
    metrics.serving([("v", "hybrid", 0.0, 1)])
    metrics.age_of_trend(lambda: 0.0)
    for policy in ("hybrid", POPULARITY):
        metrics.answered(policy, np.array([1], np.int32))
    found: dict[str, dict[str, set[str]]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def test_the_dashboard_asks_for_series_labels_and_values_that_there_are() -> None:
    there = series()
    targets = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for expression, legend in ((target["expr"], target["legendFormat"]) for target in targets):
        names = re.findall(r"\bjaxrec_\w+", expression)
        assert names, expression
        assert [name for name in names if name not in there] == [], expression
        labels = {label for name in names for label in there[name]} | {"instance"}
        for name, selected in re.findall(r"\b(jaxrec_\w+){(.*?)}", expression):
            for label, value in re.findall(r'(\w+)="(.*?)"', selected):
                assert value in there[name][label], expression
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


def test_a_server_is_restarted_only_if_its_port_is_closed() -> None:
    assert CONTAINER["livenessProbe"]["tcpSocket"] == {"port": "grpc"}
    assert "exec" not in CONTAINER["livenessProbe"]


def test_the_database_is_verified_and_the_policy_lets_out_to_named_places_only() -> None:
    (line,) = [words for words in commands("docs/deploying.md") if words[0] == "printf"]
    assert not any(
        "PASSWORD" in word for words in commands("docs/deploying.md") if words[0] == "kubectl" for word in words
    )
    query = parse_qs(urlsplit(line[2]).query)
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert query == {"sslmode": ["verify-full"], "sslrootcert": [f"{mounts['database-ca']}/ca.pem"]}
    secret = next(one["secret"] for one in POD["spec"]["volumes"] if one["name"] == "database-ca")
    (create,) = [
        words for words in commands("docs/deploying.md") if words[:4] == ["kubectl", "create", "secret", "generic"]
    ]
    keys = {word.removeprefix("--from-file=") for word in create if word.startswith("--")}
    assert create[4] == secret["secretName"]
    assert keys == {"store", "tokens", *(item["key"] for item in secret["items"])}
    assert all(rule["to"] for rule in MANIFESTS["networkpolicy"]["spec"]["egress"])


def test_the_rule_for_the_queue_time_asks_for_series_that_there_are() -> None:
    page = (ROOT / "docs/deploying.md").read_text("utf-8")
    rules, metrics = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    )
    (rule,), (metric,) = rules["rules"], metrics
    asked = re.findall(r"\bjaxrec_\w+(?={)", rule["seriesQuery"] + rule["metricsQuery"])
    assert len(asked) == 3
    assert set(asked) <= set(series())
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe"])
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


def test_the_unit_for_other_machines_is_encrypted_and_authenticated_with_files_that_root_alone_reads() -> None:
    given = SETTINGS["systemd network"]
    assert not is_loopback(given.address)
    names = [one.split(":")[0] for one in NETWORK["LoadCredential"]]
    assert [str(path) for path in (given.tls_cert, given.tls_key, given.tokens_file)] == [f"%d/{one}" for one in names]
    assert all(one == f"{name}:/etc/jaxrec/{name}" for name, one in zip(names, NETWORK["LoadCredential"], strict=True))
