"""What an OCI runtime runs: the image as it is, without what a server does not need."""

from pathlib import Path
from typing import Any

import click
import pytest

from bench import image
from bench.image import base_name, runtime_config, steps
from tests.deploy.files import DEPLOY, LAST_STAGE

CONFIG: dict[str, Any] = {
    "User": "10001:10001",
    "Env": ["PATH=/opt/jaxrec/bin"],
    "Entrypoint": ["python", "-m", "serve"],
    "Cmd": ["run"],
    "Volumes": {"/models": {}, "/store": {}},
}
VOLUMES = {"/models": Path("/folder/model"), "/store": Path("/folder/store")}


def test_the_image_runs_as_its_user_with_nothing_to_write_but_the_store_and_tmp() -> None:
    config = runtime_config(CONFIG, Path("/root"), VOLUMES)
    assert config["root"] == {"path": "/root", "readonly": True}
    assert config["process"]["user"] == {"uid": 10001, "gid": 10001}
    assert config["process"]["args"] == ["python", "-m", "serve", "run"]
    assert config["process"]["noNewPrivileges"]
    assert config["process"]["capabilities"] == {}
    options = {mount["destination"]: mount.get("options", []) for mount in config["mounts"]}
    assert {place for place, given in options.items() if "rw" in given} == {"/store"}
    assert "ro" in options["/models"]
    assert {"type": "network"} in config["linux"]["namespaces"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"User": "0:0"}, "root"), ({"Volumes": {"/models": {}}}, r"the image has the volumes \['/models'\]")],
)
def test_an_image_of_root_or_with_other_volumes_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(click.ClickException, match=message):
        runtime_config({**CONFIG, **change}, Path("/root"), VOLUMES)


def test_the_base_is_the_one_of_the_dockerfile() -> None:
    assert base_name((DEPLOY / "Dockerfile").read_text("utf-8")) == "debian:bookworm-slim"
    with pytest.raises(click.ClickException, match="ARG BASE"):
        base_name("FROM debian\n")
    assert dict(LAST_STAGE)["USER"] == CONFIG["User"]


def test_the_log_of_a_build_in_short() -> None:
    log = "STEP 1/2: FROM a\nGet:1 https://x y\n[2/3] STEP 2/2: RUN pip     install b\nSuccessfully installed b-1\n"
    assert steps(log) == ["STEP 1/2: FROM a", "[2/3] STEP 2/2: RUN pip install b", "Successfully installed b-1"]


def test_a_machine_without_the_tools_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "TOOLS", ("no-such-tool",))
    with pytest.raises(click.ClickException, match="no-such-tool missing: apt-get install buildah"):
        image.require_tools()
