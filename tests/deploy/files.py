"""Reads the files of deploy/, and what their settings mean to the server."""

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jaxrec.evaluation.bootstrap import Estimate
from jaxrec.runs.learn.gate import decide
from jaxrec.runs.learn.metrics import metrics_text
from jaxrec.runs.learn.state import Round, State
from serve.addresses import host_and_port
from serve.cli.main import main
from serve.model.popular import FALLBACKS
from serve.observability.metrics import Metrics
from serve.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
QUEUE = DEPLOY / "kubernetes-queue"  # scales these manifests on the queue time, too
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
DASHBOARDS = {name: json.loads((DEPLOY / f"grafana/{name}.json").read_text("utf-8")) for name in ("server", "learning")}
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))
MANIFESTS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(KUBERNETES.glob("*.yaml"))}
POD = MANIFESTS["deployment"]["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
(ON_QUEUE,) = yaml.safe_load((QUEUE / "horizontalpodautoscaler.yaml").read_text("utf-8"))  # a patch


def dockerfile(file: str = "Dockerfile") -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, in upper case, with their text in one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / file).read_text("utf-8"), flags=re.MULTILINE)
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


def after_a_round() -> State:
    """Of the learning loop, with all that a round can note."""
    noted = {
        "export-events": {"events": 10, "revision": 10},
        "append": {"input": {"bad_rows": 1}},
        "gate": dataclasses.asdict(decide(0.2, 0.1, Estimate(0.1, 0.05, 0.15), 5, 0.05)),
    }
    stages = {name: {"attempts": 1, "began": 0.0, "seconds": 1.0, "result": result} for name, result in noted.items()}
    places = dict.fromkeys(("store", "first_run", "first_run_sha256", "run", "data", "published_data", "folder"), "")
    numbers = {"after": 0, "revision": 10}
    return State(**places, **numbers, changed="models", model_version="1", history=(Round(1, stages, True, "better"),))


def series() -> dict[str, dict[str, set[str]]]:
    """Every time series of the server and of the learning loop: by label the values after one call of each kind."""
    metrics = Metrics()
    metrics.call("/package.Service/Method", "OK", 0.1)
    metrics.rejected("overload", "/package.Service/Method")
    for result in ("loaded", "refused"):
        metrics.reloaded(result)
    metrics.serving([("v", "hybrid", 0.0, 1)])
    metrics.age_of_trend(lambda: 0.0)
    for policy in ("hybrid", *FALLBACKS):
        metrics.answered(policy, np.array([1], np.int32))
    found: dict[str, dict[str, set[str]]] = {}
    for family in (*metrics.registry.collect(), *text_string_to_metric_families(metrics_text(after_a_round()))):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found
