"""The manifests name settings, ports, commands and metrics that exist, and agree with each other."""

import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.deploy.files import CONTAINER, MANIFESTS, ON_QUEUE, POD, QUEUE, SETTINGS, commands, parse, port_of, series


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
    settings = SETTINGS["kubernetes"]
    addresses = {"grpc": settings.address, "https": settings.http, "metrics": settings.metrics}
    expected = {name: port_of(address) for name, address in addresses.items()}
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
    (rule,) = yaml.safe_load((QUEUE / "prometheus-adapter.yaml").read_text("utf-8"))["rules"]
    asked = re.findall(r"\bjaxrec_\w+(?={)", rule["seriesQuery"] + rule["metricsQuery"])
    assert len(asked) == 3
    assert set(asked) <= set(series())
    assert ON_QUEUE["value"]["pods"]["metric"]["name"] == rule["name"]["as"]


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe"])
def test_probes_are_commands_that_there_are(probe: str) -> None:
    parse(CONTAINER[probe]["exec"]["command"])
    assert MANIFESTS["service"]["metadata"]["name"] == CONTAINER[probe]["exec"]["command"][-1]
