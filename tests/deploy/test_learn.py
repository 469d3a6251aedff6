"""The schedules of the learning loop call the command that there is, and share store and models with the server."""

import shlex
from pathlib import Path

import click
import pytest
import yaml

from jaxrec.cli.learn import STOPPED
from jaxrec.cli.main import main
from tests.deploy.files import DEPLOY, KUBERNETES, POD, SETTINGS, UNIT, dockerfile, unit

LEARN, TIMER = unit("jaxrec-learn.service"), unit("jaxrec-learn.timer")
CRONJOB = yaml.safe_load((KUBERNETES / "learn/cronjob.yaml").read_text("utf-8"))
JOB_POD = CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
(CONTAINER,) = JOB_POD["containers"]


def options(words: list[str], monkeypatch: pytest.MonkeyPatch, **more: str) -> dict[str, object]:
    """What click makes of `jaxrec learn ...`; raises click.UsageError. Files need not exist."""
    assert words[0] == "learn"
    command = main.get_command(click.Context(main), "learn")
    assert command is not None
    monkeypatch.setattr(click.Path, "convert", lambda self, value, parameter, context: value)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    return command.make_context("learn", words[1:]).params


def test_the_unit_learns_from_the_store_of_the_server_into_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(LEARN["ExecStart"][0])
    given = options(words, monkeypatch)
    assert program.endswith("/bin/jaxrec")
    assert given["store"] == SETTINGS["systemd"].store
    assert given["models"] == str(SETTINGS["systemd"].model)
    owned = {f"/var/lib/{name}" for name in LEARN["StateDirectory"][0].split()}
    assert all(str(given[name]).startswith(tuple(owned)) for name in ("store", "data", "run", "models"))
    assert str(Path(str(given["metrics_file"])).parent) == LEARN["ReadWritePaths"][0]
    assert LEARN["SuccessExitStatus"] == [str(STOPPED)]


def test_the_unit_has_the_user_of_the_server_and_no_more_rights() -> None:
    assert LEARN["User"] == ["jaxrec"]  # the name of jaxrec.service, which is that of its dynamic user
    assert LEARN["DynamicUser"] == UNIT["DynamicUser"]
    models = unit("jaxrec-models.conf")["StateDirectory"]
    assert {*UNIT["StateDirectory"], *models} < set(LEARN["StateDirectory"][0].split())
    for name in ("NoNewPrivileges", "CapabilityBoundingSet", "ProtectSystem", "ProtectHome", "RestrictAddressFamilies"):
        assert LEARN[name] == UNIT[name], name


def test_the_timer_starts_the_unit_of_its_name() -> None:
    assert (DEPLOY / "jaxrec-learn.timer").with_suffix(".service").is_file()
    assert TIMER["WantedBy"] == ["timers.target"]
    assert TIMER["Persistent"] == ["yes"]


def test_the_job_learns_from_the_store_of_the_pods_into_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(CONTAINER["args"], monkeypatch, JAXREC_STORE="postgresql://h/d")
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")}
    claims = {one["name"]: one["persistentVolumeClaim"] for one in JOB_POD["volumes"] if "persistentVolumeClaim" in one}
    of_server = next(one["persistentVolumeClaim"] for one in POD["spec"]["volumes"] if one["name"] == "models")
    assert claims[mounts[str(given["models"])]]["claimName"] == of_server["claimName"]
    assert all(f"/{str(given[name]).split('/')[1]}" in mounts for name in ("data", "run", "models", "metrics_file"))
    (store,) = [one for one in CONTAINER["env"] if one["name"] == "JAXREC_STORE"]
    assert store in POD["spec"]["containers"][0]["env"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in JOB_POD["volumes"]}


def test_one_job_at_a_time_without_root() -> None:
    assert CRONJOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert JOB_POD["securityContext"] == POD["spec"]["securityContext"]
    assert CONTAINER["securityContext"] == POD["spec"]["containers"][0]["securityContext"]


def test_the_image_of_the_job_is_made_of_files_that_are_sent() -> None:
    instructions = dockerfile("Dockerfile.learn")
    wanted = [word for name, rest in instructions if name == "COPY" for word in rest.split()[:-1]]
    sent = (DEPLOY / "Dockerfile.learn.dockerignore").read_text("utf-8").splitlines()
    assert sorted(f"!{name}" for name in wanted) == sorted(line for line in sent if line.startswith("!"))
    assert ("ENTRYPOINT", '["jaxrec"]') in instructions
