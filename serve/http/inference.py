"""The Open Inference Protocol over REST: its own JSON of tensors, in front of the gRPC methods of the same protocol.

https://github.com/kserve/open-inference-protocol (specification/protocol/inference_rest.md), without its extension for
binary tensors.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.errors import InvalidRequest, status_of
from serve.http.calls import Failed, Refused
from serve.http.connect import Gateway, content_type_of, in_loop_or_thread
from serve.http.errors import JSON, json_response, plain_error_response, refused
from serve.http.messages import from_value, kind_of, load_json
from serve.pb import open_inference_pb2 as pb

SERVICE = "/inference.GRPCInferenceService"
# By datatype: the field of InferTensorContents, and NumPy's type of the raw contents.
TYPES = {
    "BOOL": ("boolContents", "?"),
    "INT32": ("intContents", "<i4"),
    "INT64": ("int64Contents", "<i8"),
    "FP32": ("fp32Contents", "<f4"),
    "FP64": ("fp64Contents", "<f8"),
}
DEEPEST_TENSOR = 8
REQUEST_FIELDS = ("id", "parameters", "inputs", "outputs")
INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
OUTPUT_FIELDS = ("name", "parameters")


def inference_routes(gateway: Gateway) -> Iterator[Route]:
    """The paths of the protocol."""

    async def live(request: Request) -> Response:
        return await _state(gateway, request, "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse())

    async def ready(request: Request) -> Response:
        return await _state(gateway, request, "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse())

    async def model_ready(request: Request) -> Response:
        asked = pb.ModelReadyRequest(**_model(request))
        return await _state(gateway, request, "ModelReady", asked, pb.ModelReadyResponse())

    async def server(request: Request) -> Response:
        return await _answer(
            gateway, request, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse()
        )

    async def model(request: Request) -> Response:
        asked = pb.ModelMetadataRequest(**_model(request))
        return await _answer(gateway, request, "ModelMetadata", asked, pb.ModelMetadataResponse())

    async def infer(request: Request) -> Response:
        return await _infer(gateway, request)

    yield Route("/v2", server)
    yield Route("/v2/health/live", live)
    yield Route("/v2/health/ready", ready)
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        yield Route(prefix, model)
        yield Route(f"{prefix}/ready", model_ready)
        yield Route(f"{prefix}/infer", infer, methods=["POST"])


def _model(request: Request) -> dict[str, str]:
    return {"name": request.path_params["name"], "version": request.path_params.get("version", "")}


async def _called(gateway: Gateway, request: Request, method: str, asked: Message, answer: Message) -> None:
    """Fills the answer of a method; raises Failed."""
    content, _ = await gateway.call(request, f"{SERVICE}/{method}", asked.SerializeToString())
    answer.ParseFromString(content)


async def _answer(gateway: Gateway, request: Request, method: str, asked: Message, answer: Message) -> Response:
    try:
        await _called(gateway, request, method, asked, answer)
    except Failed as failed:
        return plain_error_response(failed)
    content = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for tensor in (*content.get("inputs", ()), *content.get("outputs", ())):
        # The protocol's sizes are numbers, 64-bit ones of protobuf's JSON texts.
        tensor["shape"] = [int(size) for size in tensor["shape"]]
    return json_response(content)


async def _state(gateway: Gateway, request: Request, method: str, asked: Message, answer: Message) -> Response:
    """True is 200; false is 503, so that whoever looks at the status alone sends no requests."""
    try:
        await _called(gateway, request, method, asked, answer)
    except Failed as failed:
        return plain_error_response(failed)
    content = MessageToDict(answer, always_print_fields_with_no_presence=True)
    return json_response(content, 200 if all(content.values()) else 503)


async def _infer(gateway: Gateway, request: Request) -> Response:
    path = f"{SERVICE}/ModelInfer"
    try:
        if "inference-header-content-length" in request.headers:
            raise refused(grpc.StatusCode.UNIMPLEMENTED, "expected tensors as JSON, came the binary extension", 415)
        content_type = content_type_of(request, (JSON,))
        async with gateway.body(request, path, content_type) as body:
            message = await in_loop_or_thread(len(body), lambda: _request(body, **_model(request)))
            content, _ = await gateway.call(request, path, message.SerializeToString())
        return await in_loop_or_thread(len(content), lambda: json_response(_response(content)))
    except InvalidRequest as error:
        return gateway.failed(Refused(status_of(error)), path, plain_error_response)
    except Failed as failed:
        return gateway.failed(failed, path, plain_error_response)


def _request(body: bytes, name: str, version: str) -> Message:
    """The message of a JSON inference request; raises InvalidRequest."""
    value = _fields(load_json(body), "", REQUEST_FIELDS)
    inputs, outputs = (_list(value.get(field), field) for field in ("inputs", "outputs"))
    whole = value | {
        "inputs": [_tensor(one, f"inputs[{at}]") for at, one in enumerate(inputs)],
        "outputs": [_fields(one, f"outputs[{at}]", OUTPUT_FIELDS) for at, one in enumerate(outputs)],
        "modelName": name,
        "modelVersion": version,
    }
    return from_value(whole, pb.ModelInferRequest.DESCRIPTOR)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(where, "a list of tensors", kind_of(value))
    return value


def _fields(value: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a JSON object without its parameters; raises InvalidRequest for a field that is not known."""
    if not isinstance(value, dict):
        raise InvalidRequest(where or "message", "a JSON object", kind_of(value))
    unknown = next((name for name in value if name not in known), None)
    if unknown is not None:
        raise InvalidRequest(where or "message", f"fields of {', '.join(known)}", kind_of(unknown))
    # Parameters change nothing, and those of others' extensions need not be of the contract's types.
    return {name: value[name] for name in value if name != "parameters"}


def _tensor(value: Any, where: str) -> dict[str, Any]:
    tensor = _fields(value, where, INPUT_FIELDS)
    datatype, data = tensor.get("datatype"), tensor.pop("data", None)
    if not isinstance(datatype, str) or datatype not in TYPES:
        raise InvalidRequest(f"{where}.datatype", f"one of {', '.join(TYPES)}", kind_of(datatype))
    if not isinstance(data, list):
        raise InvalidRequest(f"{where}.data", "a list", kind_of(data))
    return tensor | {"contents": {TYPES[datatype][0]: _flat(data, f"{where}.data")}}


def _flat(values: list[Any], where: str) -> list[Any]:
    """Data may be nested as the shape is, or flat."""
    for _ in range(DEEPEST_TENSOR):
        if not any(isinstance(value, list) for value in values):
            return values
        values = [inner for value in values for inner in (value if isinstance(value, list) else [value])]
    raise InvalidRequest(where, f"lists nested at most {DEEPEST_TENSOR} times", "deeper ones")


def _response(content: bytes) -> dict[str, Any]:
    answer = pb.ModelInferResponse.FromString(content)
    tensors = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "data": [_number(value) for value in np.frombuffer(raw, TYPES[tensor.datatype][1]).tolist()],
        }
        for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    ]
    known = {"model_name": answer.model_name, "model_version": answer.model_version, "outputs": tensors}
    return known | ({"id": answer.id} if answer.id else {})


def _number(value: float) -> float | str:
    """JSON has no infinite numbers; protobuf writes them as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
