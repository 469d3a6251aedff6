"""The OpenAPI document says what the server does."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from serve.client import RecommenderClient, UserEvent
from serve.http.app import SERVICES
from serve.http.connect import path_of
from serve.http.openapi import openapi, read_comments
from tests.serve.http.asking import Doors, ask

RECOMMENDER = "/jaxrec.v1.Recommender"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi(SERVICES, "1", needs_token=False)


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [one for inner in value.values() for one in references(inner)]
    return [one for inner in value for one in references(inner)] if isinstance(value, list) else []


def checked(document: dict[str, Any], name: str, value: Any) -> None:
    """Raises ValidationError where a value is not of a schema, names that the schema lacks included."""
    Draft202012Validator({**document, "$ref": f"#/components/schemas/{name}"}).validate(value)
    extra = value.keys() - document["components"]["schemas"][name]["properties"].keys()
    if extra:
        raise ValidationError(f"unknown: {extra}")


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    names = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= names
    assert names - set(references(document)) == set()


def test_every_unary_method_is_there(document: dict[str, Any]) -> None:
    methods = [one for service in SERVICES for one in service.methods if not one.server_streaming]
    assert {path_of(one) for one in methods} <= document["paths"].keys()


def test_health_checks_ask_for_no_token() -> None:
    paths = openapi(SERVICES, "1", needs_token=True)["paths"]
    free = {path for path, verbs in paths.items() for one in verbs.values() if one.get("security") == []}
    assert free == {"/healthz", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"}


def test_the_comments_of_the_contract_are_the_descriptions(document: dict[str, Any]) -> None:
    comments = read_comments()
    assert comments["jaxrec.v1.RecommendRequest.k"].startswith("How many items to answer, 1 to 1000. 0: 10.")
    schemas = document["components"]["schemas"]
    assert (
        schemas["jaxrec.v1.RecommendRequest"]["properties"]["k"]["description"]
        == (comments["jaxrec.v1.RecommendRequest.k"])
    )
    assert "SEEN_ALLOW: Items of the history may be recommended." in schemas["jaxrec.v1.Seen"]["description"]
    ours = [name for name in schemas if name.startswith(("jaxrec", "inference"))]
    assert all(schemas[name]["description"] for name in ours)
    fields = [field for name in ours for field in schemas[name].get("properties", {}).values()]
    assert all(field.get("description") for field in fields)
    assert all(document["paths"][path]["post"]["description"] for path in document["paths"] if "jaxrec.v1" in path)


def test_answers_and_errors_are_of_their_schemas(doors: Doors, document: dict[str, Any]) -> None:
    with RecommenderClient(doors.address) as client:
        client.record_events([UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1, rating=4.5)])
    for name, asked in {
        "Recommend": {"userId": "u", "explain": True},
        "GetUserProfile": {"userId": "u"},
        "ListEvents": {"userId": "u"},
        "ListItems": {},
        "GetModelInfo": {},
        "SimilarItems": {"itemId": "1007"},
    }.items():
        checked(document, f"jaxrec.v1.{name}Request", asked)
        answer = ask(doors.port, f"{RECOMMENDER}/{name}", asked)
        assert answer.status == 200
        checked(document, f"jaxrec.v1.{name}Response", answer.json)
    failed = ask(doors.port, f"{RECOMMENDER}/Recommend", {"k": -1})
    assert failed.status == 400
    checked(document, "Error", failed.json)
    with pytest.raises(ValidationError):
        checked(document, "jaxrec.v1.RecommendRequest", {"k": "many"})
    with pytest.raises(ValidationError):
        checked(document, "Error", {"code": "none", "message": ""})


def test_it_is_served(doors: Doors, document: dict[str, Any]) -> None:
    said = ask(doors.port, "/openapi.json")
    assert (said.status, said.json["openapi"], "security" in said.json) == (200, "3.1.0", False)
    assert said.json["paths"] == document["paths"]
