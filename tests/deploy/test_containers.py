"""The image, Docker Compose, Prometheus and Grafana name settings, files and metrics that exist."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import grpc
import pytest
import yaml

from tests.deploy.files import (
    ALERTS,
    COMPOSE,
    DASHBOARDS,
    DEPLOY,
    IMAGE,
    LAST_STAGE,
    ROOT,
    SETTINGS,
    dockerfile,
    parse,
    port_of,
    series,
)


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


def test_the_lock_of_the_learning_loop_has_its_extras_with_hashes_in_the_versions_of_the_other_locks() -> None:
    """ONNX Runtime for a CPU is in that of the server alone."""
    pins, others = locked(DEPLOY / "requirements-learn.lock"), locked(ROOT / "requirements.lock")
    assert all(pins.values())
    assert pins.keys() <= {*others, *locked(DEPLOY / "requirements.lock")}
    names = {name for name, _ in pins}
    assert {"jax", "tensorflow-cpu", "tf2onnx", "faiss-cpu", "onnxruntime", "starlette", "psycopg", "redis"} <= names
    assert "onnxruntime-gpu" not in names


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.learn"])
def test_an_image_installs_its_lock_by_hashes_and_nothing_besides(file: str) -> None:
    installs = [rest for name, rest in dockerfile(file) if name == "RUN" and re.search(r"\bpip\b.* install ", rest)]
    assert ["--require-hashes" in rest or "--no-deps" in rest for rest in installs] == [True, True]


def test_compose_publishes_to_this_machine_only() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    settings = SETTINGS["compose"]
    assert ports["server"] == [
        f"127.0.0.1:50051:{port_of(settings.address)}",
        f"127.0.0.1:8080:{port_of(settings.http)}",
    ]
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
    assert len(files) == 6
    assert all((DEPLOY / name).is_file() for name in files)
    volumes = [name for name in mounted if not name.startswith((".", "$"))]
    assert sorted(volumes) == sorted(COMPOSE["volumes"])


def test_prometheus_reads_the_metrics_of_the_server_and_grafana_reads_prometheus() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port_of(SETTINGS['compose'].metrics)}"]}]
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    panels = [panel for dashboard in DASHBOARDS.values() for panel in dashboard["panels"]]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    (provider,) = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text("utf-8"))["providers"]
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert {f"{provider['options']['path']}/{name}.json" for name in DASHBOARDS} <= set(mounted)


ASKED = {
    **{
        name: [(one["expr"], one["legendFormat"]) for panel in dashboard["panels"] for one in panel["targets"]]
        for name, dashboard in DASHBOARDS.items()
    },
    **{
        group["name"]: [(rule["expr"], rule["annotations"]["summary"]) for rule in group["rules"]]
        for group in ALERTS["groups"]
    },
}


@pytest.mark.parametrize("source", ASKED)
def test_dashboards_and_alerts_ask_for_series_labels_and_values_that_there_are(source: str) -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    there = series() | {"up": {"job": {job["job_name"]}}}
    for expression, text in ASKED[source]:
        names = re.findall(r"\bjaxrec_\w+|\bup(?={)", expression)
        assert names, expression
        assert [name for name in names if name not in there] == [], expression
        labels = {label for name in names for label in there[name]} | {"instance"}
        for name, selected in re.findall(r"\b(jaxrec_\w+|up){(.*?)}", expression):
            for label, value in re.findall(r'(\w+)="(.*?)"', selected):
                assert value in there[name][label], expression
            for label, values in re.findall(r'(\w+)=~"(.*?)"', selected):
                known = {code.name for code in grpc.StatusCode} if label == "code" else there[name][label]
                assert set(values.split("|")) <= known
        used = re.findall(r"(\w+)=", expression) + re.findall(r"{{ ?(?:\$labels\.)?(\w+) ?}}", text)
        used += [label for by in re.findall(r"by \((.*?)\)", expression) for label in by.split(", ")]
        assert set(used) <= labels, expression


def test_alerts_are_loaded_and_complete() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["prometheus"]["volumes"]]
    assert {f"/etc/prometheus/{name}" for name in prometheus["rule_files"]} <= set(mounted)
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m")), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")"), rule["alert"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(("trend", "catalogue", "away"), [(1, 1, False), (900, 1, False), (1, 61, True)])
def test_the_store_is_away_when_the_catalogue_is_old_whatever_the_age_of_the_trend(
    trend: int, catalogue: int, away: bool, tmp_path: Path
) -> None:
    ages = {"jaxrec_trend_age_seconds": trend, "jaxrec_catalogue_age_seconds": catalogue}
    alert = {
        "exp_labels": {"instance": "a", "severity": "page"},
        "exp_annotations": {"summary": "a cannot read its store; recording fails, too"},
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": f'{name}{{instance="a"}}', "values": f"{age}x5"} for name, age in ages.items()],
        "alert_rule_test": [{"eval_time": "5m", "alertname": "JaxrecStoreAway", "exp_alerts": [alert] if away else []}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": [test]}))
    ended = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
