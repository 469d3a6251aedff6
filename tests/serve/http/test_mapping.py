"""What HTTP answers is what gRPC answers: results, statuses, messages, details, ids and deadlines."""

import base64
import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import Parse
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.errors import DETAILS_KEY, InvalidRequest
from serve.client import RecommenderClient, UserEvent
from serve.front.server import METHODS
from serve.http.app import SERVICES
from serve.http.connect import path_of
from serve.http.errors import HTTP_STATUS, code_name
from serve.http.messages import from_json, load_json, to_json
from serve.model.recommender import Recommender
from serve.pb import open_inference_pb2
from serve.pb import recommender_pb2 as pb
from tests.serve.http.asking import Doors, ask

SCRIPT = Path(__file__).parents[3] / "bench" / "fault_hostile.py"
RECOMMEND = "/jaxrec.v1.Recommender/Recommend"
TIMEOUT_S = 30
UNARY = [
    method
    for service in SERVICES
    for method in service.methods
    if not (method.client_streaming or method.server_streaming)
]
READING = ("Recommend", "BatchRecommend", "SimilarItems", "GetUserProfile", "List", "Get", "Server", "Model", "Check")
CLOCK = re.compile(rb"\d{10}")


@pytest.fixture(scope="module")
def hostile() -> Any:
    spec = spec_from_file_location("fault_hostile_messages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["fault_hostile_messages"] = module
    spec.loader.exec_module(module)
    return module


def asked_by_grpc(address: str, path: str, message: bytes) -> tuple[grpc.StatusCode, str, bytes, bytes]:
    """Status, message, details and the response."""
    with grpc.insecure_channel(address) as channel:
        try:
            return grpc.StatusCode.OK, "", b"", channel.unary_unary(path)(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata()).get(DETAILS_KEY, b"")
            return error.code(), error.details(), details, b""


def without_ids(answer: Message) -> bytes:
    """Each answer has a new one."""
    clear_ids(answer)
    return answer.SerializeToString(deterministic=True)


def clear_ids(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name == "recommendation_id":
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                clear_ids(one)


def test_every_unary_method_of_the_server_has_its_path() -> None:
    assert {path_of(method) for method in UNARY} == METHODS - {path for path in METHODS if path.endswith("/Watch")}


@pytest.mark.parametrize("method", UNARY, ids=lambda method: method.name)
def test_answers_and_errors_are_those_of_grpc(doors: Doors, model: Recommender, hostile: Any, method: Any) -> None:
    attacker, path = hostile.Attacker(model.catalog.item_ids[1:], model.filters.tags, seed=3), path_of(method)
    asked, answered = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    with RecommenderClient(doors.address) as client:
        client.record_events([UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)])
    statuses = set()
    plain = {"user_id": "u", "item_id": "1007", "name": "jaxrec"}
    known = {name: value for name, value in plain.items() if name in method.input_type.fields_by_name}
    for message in [asked(), asked(**known), *(attacker._message(asked) for _ in range(15))]:
        code, text, details, response = asked_by_grpc(doors.address, path, message.SerializeToString())
        said = ask(doors.port, path, to_json(message.SerializeToString(), method.input_type))
        statuses.add(code)
        if code is grpc.StatusCode.OK:
            assert said.status == 200
            found = Parse(said.body, answered())
            if method.name.startswith(READING):
                assert without_ids(found) == without_ids(answered.FromString(response))
        else:
            assert (said.status, said.json["code"]) == (HTTP_STATUS[code], code_name(code))
            assert CLOCK.sub(b"T", said.json["message"].encode()) == CLOCK.sub(b"T", text.encode())
            expected = [
                (one.TypeName(), CLOCK.sub(b"T", one.value)) for one in status_pb2.Status.FromString(details).details
            ]
            assert expected == [
                (one["type"], CLOCK.sub(b"T", base64.b64decode(one["value"] + "==")))
                for one in said.json.get("details", [])
            ]
    assert statuses


@given(seed=st.integers(0, 2**32), at=st.integers(0, len(UNARY) - 1))
@settings(max_examples=60, deadline=None)
def test_every_message_survives_json(hostile: Any, seed: int, at: int) -> None:
    kind = UNARY[at].input_type
    message = hostile.Attacker(["1", "2"], ["tag"], seed)._message(GetMessageClass(kind))
    back = from_json(to_json(message.SerializeToString(), kind), kind)
    assert back.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda v: (
            st.dictionaries(st.sampled_from(["history", "userId", "events", "k", "filter", "x", "rating"]), v)
            | st.lists(v)
        ),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_message_or_an_error_of_a_field(value: Any) -> None:
    try:
        from_json(json.dumps(value).encode(), pb.RecommendRequest.DESCRIPTOR)
    except InvalidRequest as error:
        found = ": expected " in str(error)
    else:
        found = isinstance(value, dict)
    assert found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"k": 1', "message: expected JSON, came at line 1, column 8: Expecting ',' delimiter"),
        ('{\n"k": x}', "message: expected JSON, came at line 2, column 6: Expecting value"),
        ("", "message: expected JSON, came at line 1, column 1: Expecting value"),
        ("[1]", "message: expected a JSON object, came a list"),
        ('{"k": NaN}', "message: expected JSON, in which such a number is in quotes, came NaN"),
        ('{"k": 1, "k": 2}', "message: expected each name once in an object, came 'k'"),
        (b'{"userId": "\xff"}', "message: expected JSON in UTF-8, came another byte at 12"),
        ('{"k":' + "1" * 5000 + "}", "message: expected JSON of a message, came a number that is too long"),
        ("[" * 100_000, "message: expected JSON of a message, came values that are nested too deep"),
        ('{"history": {"events": [{}, {"itm": "1"}]}}', "history.events[1].itm: expected a field of Event: itemId"),
        ('{"history": {"events": [{"item_id": 1}]}}', "history.events[0].item_id: expected a text, came 1"),
        ('{"history": {"events": {}}}', "history.events: expected a list, came an object"),
        ('{"history": "x"}', "history: expected the object of a History, came the text 'x'"),
        ('{"k": "many"}', "k: expected a whole number, within the bounds of its type, came the text 'many'"),
        ('{"k": 99999999999}', "k: expected a whole number, within the bounds of its type, came 99999999999"),
        ('{"k": true}', "k: expected a whole number, within the bounds of its type, came true or false"),
        ('{"seen": "SEEN_NEVER"}', "seen: expected a name of the enum, came the text 'SEEN_NEVER'"),
        ('{"excludeItemIds": ["1", 2]}', "exclude_item_ids[1]: expected a text, came 2"),
        ('{"filter": {"minimumScore": 1e39}}', "filter.minimum_score: expected a number, came 1e+39"),
        ('{"userId": "\\ud800"}', "message: expected JSON in UTF-8, came half of a surrogate pair"),
        ('{"\\ud800": 1}', "message: expected JSON in UTF-8, came half of a surrogate pair"),
        ('{"history": {"events": ["\\uDFFF"]}}', "message: expected JSON in UTF-8, came half of a surrogate pair"),
        ('{"history": {"events": [' + "{}," * 2**16 + "{}]}}", "message: expected JSON of at most 65536 objects, came"),
        ('{"seen": 1e400}', "message: expected JSON of a message, came a number that is too large"),
        ('{"filter": {"minimumScore": 1' + "0" * 400 + "}}", "filter.minimum_score: expected a number, came 1000"),
        ('{"' + "x" * 500 + '": 1}', "x" * 80 + ": expected a field of RecommendRequest"),
    ],
)  # fmt: skip
def test_bad_json_is_blamed_where_it_is(doors: Doors, text: bytes | str, message: str) -> None:
    said = ask(doors.port, RECOMMEND, text)
    assert (said.status, said.json["code"]) == (400, "invalid_argument")
    assert said.json["message"].startswith(message)
    details = {detail["type"]: detail["debug"] for detail in said.json["details"]}
    violations = details["google.rpc.BadRequest"]["fieldViolations"]
    assert violations[0]["field"] == message.partition(":")[0]


def all_kinds() -> list[Any]:
    kinds = {method.input_type.full_name: method.input_type for method in UNARY}
    for kind in (waiting := list(kinds.values())):
        for field in kind.fields:
            if (inner := field.message_type) is not None and inner.full_name not in kinds:
                kinds[inner.full_name] = inner
                waiting.append(inner)
    return list(kinds.values())


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.name)
def test_odd_values_of_every_field_are_read_or_refused(hostile: Any, kind: Any) -> None:
    for field in kind.fields:
        for value in hostile.ODD_VALUES:
            try:
                from_json(f'{{"{field.json_name}": {value}}}'.encode(), kind).SerializeToString()
            except InvalidRequest as error:
                assert ": expected " in str(error).encode().decode()  # noqa: PT017


def test_a_failure_of_the_server_is_an_internal_error_and_one_line(
    doors: Doors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bytes:
        raise AttributeError("secret")

    monkeypatch.setattr("serve.http.connect.to_json", broken)
    said = ask(doors.port, "/jaxrec.v1.Recommender/GetModelInfo", {})
    assert (said.status, said.json) == (500, {"code": "internal", "message": "the server failed, see its log"})
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "GetModelInfo' failed: AttributeError at " in line.getMessage()
    assert (line.exc_info, "secret" in line.getMessage()) == (None, False)


def test_of_fields_that_exclude_each_other_one_may_be_there() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^int64_param: expected one field of parameter_choice, came bool_param too"
    ):
        from_json(b'{"boolParam": true, "int64Param": 1}', open_inference_pb2.InferParameter.DESCRIPTOR)


def test_what_is_not_handed_on_is_counted(doors: Doors) -> None:
    for body in ("{", '{"nothing": 1}', '{"k": -1}', '{"userId": "u"}'):
        ask(doors.port, RECOMMEND, body)
    counted = {"reason": "http", "method": RECOMMEND}
    assert doors.metrics.registry.get_sample_value("jaxrec_rejected_calls_total", counted) == 2


def test_numbers_that_json_cannot_have_come_as_texts_and_go_back() -> None:
    message = pb.ItemFilter(minimum_score=float("-inf"))
    text = to_json(message.SerializeToString(), message.DESCRIPTOR)
    assert load_json(text) == {"minimumScore": "-Infinity"}
    assert from_json(text, message.DESCRIPTOR) == message


def test_an_encoded_message_is_taken_too(doors: Doors) -> None:
    request = pb.GetItemRequest(item_id="1007").SerializeToString()
    said = ask(doors.port, "/jaxrec.v1.Recommender/GetItem", request, {"content-type": "application/proto"})
    assert said.headers["content-type"] == "application/proto"
    assert pb.GetItemResponse.FromString(said.body).item.item.item_id == "1007"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"content-type": "text/plain"}, 415, "unimplemented"),
        ({"content-type": "application/json; charset=latin-1"}, 415, "unimplemented"),
        ({"content-type": "application/json; charset=UTF-8"}, 200, None),
        ({"content-encoding": "gzip"}, 415, "unimplemented"),
        ({"connect-protocol-version": "2"}, 400, "invalid_argument"),
        ({"connect-protocol-version": "1"}, 200, None),
        ({"connect-timeout-ms": "soon"}, 400, "invalid_argument"),
        ({"connect-timeout-ms": "12345678901"}, 400, "invalid_argument"),
        ({"connect-timeout-ms": "0"}, 504, "deadline_exceeded"),
        ({"connect-timeout-ms": "20000"}, 200, None),
    ],
)
def test_headers_of_the_protocol(doors: Doors, headers: dict[str, str], status: int, code: str | None) -> None:
    said = ask(doors.port, RECOMMEND, {"userId": "u"}, headers)
    assert (said.status, said.json.get("code")) == (status, code)


def test_the_id_of_a_request_comes_back(doors: Doors) -> None:
    said = ask(doors.port, RECOMMEND, {"userId": "u"}, {"x-request-id": "mine"})
    assert (said.headers["x-request-id"], said.headers["trailer-x-request-id"]) == ("mine", "mine")
    failed = ask(doors.port, RECOMMEND, {"k": 10**6}, {"x-request-id": "mine"})
    assert (failed.status, failed.headers["x-request-id"]) == (400, "mine")
    assert ask(doors.port, RECOMMEND, {"userId": "u"}, {"x-request-id": "\xff"}).headers["x-request-id"] != "\xff"


@pytest.mark.parametrize(
    ("path", "verb", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/jaxrec.v1.Recommender/Nothing", "POST", 404),
        ("/grpc.health.v1.Health/Watch", "POST", 404),
        (RECOMMEND, "GET", 405),
        ("/openapi.json", "POST", 405),
        (RECOMMEND, "OPTIONS", 405),
        ("/healthz/", "GET", 404),
    ],
)
def test_paths_that_are_not_there(doors: Doors, path: str, verb: str, status: int) -> None:
    said = ask(doors.port, path, "{}" if verb == "POST" else None, verb=verb)
    assert (said.status, said.json["code"]) == (status, "unimplemented")


def test_health(doors: Doors) -> None:
    assert ask(doors.port, "/healthz").json == {"status": "SERVING"}
    assert ask(doors.port, "/grpc.health.v1.Health/Check", {}).json == {"status": "SERVING"}
    unknown = ask(doors.port, "/grpc.health.v1.Health/Check", {"service": "none"})
    assert (unknown.status, unknown.json["code"]) == (404, "not_found")
    doors.server.finish_calls()
    said = ask(doors.port, "/healthz")
    assert (said.status, said.json) == (503, {"status": "NOT_SERVING"})
    refused = ask(doors.port, RECOMMEND, {"userId": "u"})
    assert (refused.status, refused.json["code"]) == (503, "unavailable")
