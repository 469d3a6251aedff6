"""The files of deploy/ keep the schemas of the programs that read them."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import DEPLOY, KUBERNETES, MANIFESTS, ON_QUEUE, QUEUE

# The oldest and the newest that the package knows.
VERSIONS = ("1.25", kubernetes_validate.latest_version())
RESOURCES = {
    **{name: content for name, content in MANIFESTS.items() if name != "kustomization"},  # for kubectl alone
    "cronjob": yaml.safe_load((KUBERNETES / "learn/cronjob.yaml").read_text("utf-8")),
}
SCALER = "horizontalpodautoscaler"
UNITS = ("jaxrec.service", "jaxrec-learn.service", "jaxrec-learn.timer")
DROP_INS = {"jaxrec-network.conf": "network.conf", "jaxrec-models.conf": "models.conf"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", RESOURCES)
def test_the_manifests_keep_the_schema_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_queue_time_fits_the_autoscaler(version: str) -> None:
    kubernetes_validate.validate(scaled_on_queue(), version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_adds_the_queue_time_to_the_autoscaler_and_changes_nothing_else() -> None:
    built = subprocess.run(["kubectl", "kustomize", QUEUE], check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    expected = [*(content for name, content in MANIFESTS.items() if name not in (SCALER, "kustomization"))]
    assert by_kind(yaml.safe_load_all(built.stdout)) == by_kind([*expected, scaled_on_queue()])


def scaled_on_queue() -> dict[str, Any]:
    """The autoscaler with what the patch adds."""
    assert (ON_QUEUE["op"], ON_QUEUE["path"]) == ("add", "/spec/metrics/-")
    scaler: dict[str, Any] = copy.deepcopy(MANIFESTS[SCALER])
    scaler["spec"]["metrics"].append(ON_QUEUE["value"])
    return scaler


def by_kind(resources: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in resources}


def test_a_misspelled_field_of_a_manifest_is_found() -> None:
    service: dict[str, Any] = copy.deepcopy(RESOURCES["service"])
    service["spec"]["port"] = service["spec"].pop("ports")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, VERSIONS[-1], strict=True)


def check_schema(name: str, file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{name}", str(file)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_compose_keeps_the_schema_of_its_specification(tmp_path: Path) -> None:
    ended = check_schema("compose-spec", DEPLOY / "compose.yaml")
    assert ended.returncode == 0, ended.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text("utf-8").replace("read_only:", "readonly:"), "utf-8")
    ended = check_schema("compose-spec", wrong)
    assert ended.returncode == 1
    assert "readonly" in ended.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_reads_its_settings_and_the_alerts(tmp_path: Path) -> None:
    for kind, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        ended = subprocess.run(["promtool", "check", kind, DEPLOY / file], check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    wrong = tmp_path / "alerts.yml"
    wrong.write_text((DEPLOY / "alerts.yml").read_text("utf-8").replace("rate(", "rat(", 1), "utf-8")
    ended = subprocess.run(["promtool", "check", "rules", wrong], check=False, capture_output=True, text=True)
    assert ended.returncode != 0


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with the units, their drop-ins and programs, and the targets of systemd."""
    units, targets = tmp_path / "etc/systemd/system", tmp_path / "usr/lib/systemd/system"
    (units / "jaxrec.service.d").mkdir(parents=True)
    targets.mkdir(parents=True)
    for file in UNITS:
        shutil.copy(DEPLOY / file, units)
    for file, name in DROP_INS.items():
        shutil.copy(DEPLOY / file, units / "jaxrec.service.d" / name)
    for target in Path("/lib/systemd/system").glob("*.target"):
        shutil.copy(target, targets)
    for program in ("opt/jaxrec/bin/python", "opt/jaxrec-learn/bin/jaxrec"):
        (tmp_path / program).parent.mkdir(parents=True)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    return tmp_path


def verify(machine: Path) -> str:
    """What systemd says of the units; it says nothing of good ones, and exits with 0 for unknown keys, too."""
    command = ["systemd-analyze", "verify", f"--root={machine}", *UNITS]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    return ended.stdout + ended.stderr + (f"exit status {ended.returncode}" if ended.returncode else "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(machine: Path) -> None:
    assert verify(machine) == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("file", ["jaxrec.service", "jaxrec.service.d/network.conf"])
def test_systemd_finds_a_misspelled_key(machine: Path, file: str) -> None:
    with (machine / "etc/systemd/system" / file).open("a", encoding="utf-8") as unit:
        unit.write("\n[Service]\nProtectHomes=yes\n")
    assert "ProtectHomes" in verify(machine)
