"""The files of deploy/ agree with each other, with the documentation and with the server."""

from pathlib import Path

import pytest

from serve.addresses import is_loopback
from serve.front.supervisor import END_S
from serve.settings import Settings
from tests.deploy.files import COMPOSE, CONTAINER, NETWORK, POD, SETTINGS, UNIT, commands, parse, port_of


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


def test_a_stop_waits_for_the_calls_under_way() -> None:
    (before,) = [float(word) for word in CONTAINER["lifecycle"]["preStop"]["exec"]["command"] if word.isdecimal()]
    assert POD["spec"]["terminationGracePeriodSeconds"] > before + SETTINGS["kubernetes"].drain + END_S
    grace_s = float(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > SETTINGS["compose"].drain + END_S
    assert float(UNIT["TimeoutStopSec"][0]) > SETTINGS["systemd"].drain + END_S


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
