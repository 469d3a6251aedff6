"""Errors as JSON: those of the gRPC server, with the HTTP statuses and the form of the Connect protocol."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor_pool import Default
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from starlette.responses import Response

from serve.api.errors import DETAILS_KEY, Status
from serve.http.calls import Failed, Metadata, Refused

JSON = "application/json"
# https://connectrpc.com/docs/protocol#error-codes
HTTP_STATUS: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
_SPELLED = {grpc.StatusCode.CANCELLED: "canceled"}


def code_name(code: grpc.StatusCode) -> str:
    """The name of a status in the Connect protocol."""
    return _SPELLED.get(code, code.name.lower())


def refused(code: grpc.StatusCode, message: str, http: int | None = None) -> Refused:
    """A request that is not handed on to the gRPC server."""
    return Refused(Status(code, message), http)


def error_response(failed: Failed) -> Response:
    """What a Connect client gets for a call that failed."""
    code, message, metadata = failed.status
    content: dict[str, Any] = {"code": code_name(code), "message": message}
    details = _details(metadata)
    if details:
        content["details"] = [_described(detail) for detail in details]
    return json_response(content, failed.http or HTTP_STATUS[code], headers_of(metadata) | _when_to_retry(details))


def plain_error_response(failed: Failed) -> Response:
    """What a client of the Open Inference Protocol gets for a call that failed."""
    code, message, metadata = failed.status
    return json_response({"error": message}, failed.http or HTTP_STATUS[code], headers_of(metadata))


def json_response(content: Any, http: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), http, headers, JSON)


def headers_of(trailing: Metadata) -> dict[str, str]:
    """Trailing metadata as headers: as Connect has it, and the id of the request once more under its own name."""
    own = {
        name: value
        for name, value in trailing
        if isinstance(value, str) and not name.startswith("grpc-") and not name.endswith("-bin")
    }
    return {f"trailer-{name}": value for name, value in own.items()} | {
        name: value for name, value in own.items() if name == "x-request-id"
    }


def _details(metadata: Metadata) -> list[AnyMessage]:
    packed = next((value for name, value in metadata if name == DETAILS_KEY and isinstance(value, bytes)), None)
    return [] if packed is None else list(status_pb2.Status.FromString(packed).details)


def _described(detail: AnyMessage) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": detail.TypeName(),
        "value": base64.b64encode(detail.value).decode("ascii").rstrip("="),
    }
    message = _unpacked(detail)
    if message is not None:
        described["debug"] = MessageToDict(message)
    return described


def _unpacked(detail: AnyMessage) -> Message | None:
    try:
        return GetMessageClass(Default().FindMessageTypeByName(detail.TypeName())).FromString(detail.value)
    except (KeyError, DecodeError):
        return None


def _when_to_retry(details: list[AnyMessage]) -> dict[str, str]:
    """HTTP counts whole seconds; the detail says it to the millisecond."""
    info = error_details_pb2.RetryInfo()
    for detail in details:
        if detail.Unpack(info):
            delay: Duration = info.retry_delay
            return {"retry-after": str(max(1, math.ceil(delay.ToTimedelta().total_seconds())))}
    return {}
