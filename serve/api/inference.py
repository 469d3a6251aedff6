"""The Open Inference Protocol (KServe v2): `sequence.onnx` for clients that bring their own features.

What the model directory's contract says of the graph's inputs is checked before the graph runs, since ONNX Runtime
answers an index that is out of range with an error at best.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.api.context import Context
from serve.api.errors import InvalidRequest
from serve.api.rules import MAX_BATCH, MAX_BATCH_EVENTS, MAX_EXCLUDED_ITEMS, MAX_HISTORY_EVENTS, MAX_K, latest_time
from serve.model.graphs import BLOCKED, QUERY, SEQUENCE_OUTPUTS, TREND, Signature, sequence_inputs
from serve.model.recommender import Recommender
from serve.pb import open_inference_pb2 as pb
from serve.pb import open_inference_pb2_grpc
from serve.serving.errors import Cancelled, Expired, UnknownModel
from serve.serving.loaded import Models

MODEL_NAME = "jaxrec"
PLATFORM = "onnxruntime_onnx"
# By ONNX Runtime's name of a type: the protocol's, NumPy's (little-endian, as in raw contents), and the typed field.
OUTPUTS = {name: kind for name, kind in SEQUENCE_OUTPUTS.items() if name != QUERY}
_TYPES: dict[str, tuple[str, np.dtype[Any], str]] = {
    "int32": ("INT32", np.dtype("<i4"), "int_contents"),
    "int64": ("INT64", np.dtype("<i8"), "int64_contents"),
    "float": ("FP32", np.dtype("<f4"), "fp32_contents"),
}
_INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "item": (-1, -1),
    "rating": (-1, -1),
    "gap": (-1, -1),
    "length": (-1,),
    "request_gap": (-1,),
    "exclude": (-1, -1),
    "seen": (-1, -1),
    "seen_score": (-1, -1),
    "k": (1,),
}
MOST_SEEN_SCORE = 1e6

Tensors = dict[str, NDArray[Any]]


class InferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Runs the graph of any loaded model; `ready` says whether the server takes calls."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.ready = False

    def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        try:
            self._model(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self.ready)

    def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=MODEL_NAME, version=_version())

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        model = self._model(request.name, request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        shapes = {"state": (-1, model.engine.state_width), "items": (-1, -1), "scores": (-1, -1)}
        return pb.ModelMetadataResponse(
            name=MODEL_NAME,
            versions=self._models.versions(),
            platform=PLATFORM,
            inputs=[
                tensor(name=name, datatype=_TYPES[dtype][0], shape=_INPUT_SHAPES[name])
                for name, dtype in _inputs(model).items()
            ],
            outputs=[
                tensor(name=name, datatype=_TYPES[dtype][0], shape=shapes[name]) for name, dtype in OUTPUTS.items()
            ],
        )

    def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        model = self._model(request.model_name, request.model_version)
        wanted = [output.name for output in request.outputs] or list(OUTPUTS)
        for at, name in enumerate(wanted):
            if name not in OUTPUTS or name in wanted[:at]:
                raise InvalidRequest(f"outputs[{at}]", f"one of {', '.join(OUTPUTS)}, each once", repr(name))
        inputs = _decoded(request, _inputs(model))
        _check(inputs, model)
        if not context.is_active():
            raise Cancelled("cancelled by the client")
        if context.time_remaining() == 0:
            raise Expired("the deadline passed before the model ran")
        withheld = model.live.withheld()
        outputs = model.engine.run_sequence(inputs, wanted, None if withheld is None else withheld.mask)
        response = pb.ModelInferResponse(model_name=MODEL_NAME, model_version=model.info.model_version, id=request.id)
        for name, values in zip(wanted, outputs, strict=True):
            datatype, dtype, _ = _TYPES[OUTPUTS[name]]
            response.outputs.add(name=name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(values.astype(dtype, copy=False).tobytes())
        return response

    def _model(self, name: str, version: str) -> Recommender:
        if name != MODEL_NAME:
            raise UnknownModel(f"there is no model {name!r}, the one here is {MODEL_NAME!r}")
        return self._models.version(version).model


@cache
def _version() -> str:
    """Of the installed package; "" for a copy of the sources that is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("jaxrec")
    return ""


def _inputs(model: Recommender) -> Signature:
    """What clients send: all but the trend, which is the server's, and what requests of `Recommender` block."""
    return {name: dtype for name, dtype in sequence_inputs(model.info).items() if name not in (TREND, BLOCKED)}


def _decoded(request: pb.ModelInferRequest, expected: Signature) -> Tensors:
    """The inputs as arrays of the graph's types; raises InvalidRequest unless each is there once, whole."""
    names = [tensor.name for tensor in request.inputs]
    if sorted(names) != sorted(expected):
        came = ", ".join(repr(name[:80]) for name in names[:20]) or "none"
        raise InvalidRequest("inputs", f"{', '.join(expected)}, each once", came)
    raw: Sequence[bytes | None] = request.raw_input_contents or [None] * len(names)
    if len(raw) != len(names):
        raise InvalidRequest("raw_input_contents", f"none or {len(names)} entries", len(raw))
    return {
        tensor.name: _tensor(tensor, content, expected[tensor.name])
        for tensor, content in zip(request.inputs, raw, strict=True)
    }


def _tensor(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, kind: str) -> NDArray[Any]:
    where = f"inputs[{tensor.name}]"
    datatype, dtype, field = _TYPES[kind]
    if tensor.datatype != datatype:
        raise InvalidRequest(f"{where}.datatype", datatype, repr(tensor.datatype[:80]))
    shape, expected = tuple(tensor.shape), _INPUT_SHAPES[tensor.name]
    if len(shape) != len(expected) or any(size != want for size, want in zip(shape, expected, strict=True) if want > 0):
        raise InvalidRequest(f"{where}.shape", str(list(expected)), list(shape[:8]))
    if any(size < 1 for size in shape):
        raise InvalidRequest(f"{where}.shape", "sizes from 1 on", list(shape))
    # Python's numbers don't overflow, so a product of huge sizes is just wrong.
    size = 1
    for length in shape:
        size *= length
    if raw is not None:
        if tensor.HasField("contents"):
            raise InvalidRequest(f"{where}.contents", "nothing, since raw_input_contents is used", "values")
        if len(raw) != size * dtype.itemsize:
            raise InvalidRequest(f"{where}.raw", f"{size * dtype.itemsize} bytes for the shape", len(raw))
        return np.frombuffer(raw, dtype).reshape(shape)
    values = getattr(tensor.contents, field)
    if len(values) != size:
        raise InvalidRequest(f"{where}.contents.{field}", f"{size} values for the shape", len(values))
    return np.array(values, dtype).reshape(shape)


def _check(inputs: Mapping[str, NDArray[Any]], model: Recommender) -> None:
    """Raises InvalidRequest for what the contract of `sequence.onnx` excludes."""
    item, exclude, length = inputs["item"], inputs["exclude"], inputs["length"]
    batch, longest = item.shape
    if batch > MAX_BATCH or longest > MAX_HISTORY_EVENTS or item.size > MAX_BATCH_EVENTS:
        limits = f"at most {MAX_BATCH} rows of {MAX_HISTORY_EVENTS} events, and {MAX_BATCH_EVENTS} in all"
        raise InvalidRequest("inputs[item].shape", limits, [batch, longest])
    for name in ("rating", "gap"):
        if inputs[name].shape != item.shape:
            raise InvalidRequest(f"inputs[{name}].shape", f"[{batch}, {longest}] as item", list(inputs[name].shape))
    for name in ("length", "request_gap", "exclude"):
        if inputs[name].shape[0] != batch:
            raise InvalidRequest(f"inputs[{name}].shape", f"{batch} rows as in item", inputs[name].shape[0])
    if exclude.shape[1] > MAX_EXCLUDED_ITEMS:
        raise InvalidRequest("inputs[exclude].shape", f"at most {MAX_EXCLUDED_ITEMS} items", exclude.shape[1])
    items = model.info.item_count
    if model.info.repeat is not None:
        _check_seen(inputs["seen"], inputs["seen_score"], batch, items)
    _check_range("k", inputs["k"], 1, min(MAX_K, items))
    _check_range("length", length, 1, longest)
    _check_range("exclude", exclude, 0, items)
    event = np.arange(longest) < length[:, None]
    _check_range("item", item, 0, items)
    if (item[event] == 0).any():
        raise InvalidRequest("inputs[item]", f"1..{items} for the first `length` events", 0)
    rating, gap, request_gap = inputs["rating"], inputs["gap"], inputs["request_gap"]
    if not (((rating >= 0) & (rating <= 1)) | (rating == -1))[event].all():
        raise InvalidRequest("inputs[rating]", "0..1, or -1 for no rating", "others")
    latest = latest_time()  # between two valid times there is no longer gap
    for name, seconds in (("gap", gap[event]), ("request_gap", request_gap)):
        if not (((seconds >= 0) & (seconds <= latest)) | (seconds == -1)).all():
            raise InvalidRequest(f"inputs[{name}]", f"seconds in 0..{latest}, or -1 for not known", "others")


def _check_seen(seen: NDArray[np.int32], score: NDArray[np.float32], batch: int, items: int) -> None:
    if len(seen) != batch or seen.shape[1] > MAX_HISTORY_EVENTS or seen.size > MAX_BATCH_EVENTS:
        limits = f"{batch} rows as in item, of at most {MAX_HISTORY_EVENTS} items, and {MAX_BATCH_EVENTS} in all"
        raise InvalidRequest("inputs[seen].shape", limits, list(seen.shape))
    if score.shape != seen.shape:
        raise InvalidRequest("inputs[seen_score].shape", f"{list(seen.shape)} as seen", list(score.shape))
    _check_range("seen", seen, 0, items)
    in_order = np.sort(seen, axis=1)
    if ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] > 0)).any():
        raise InvalidRequest("inputs[seen]", "each item once in a row", "the same item again")
    if not (np.abs(score) <= MOST_SEEN_SCORE).all():
        raise InvalidRequest("inputs[seen_score]", f"numbers in {-MOST_SEEN_SCORE:g}..{MOST_SEEN_SCORE:g}", "others")


def _check_range(name: str, values: NDArray[Any], low: int, high: int) -> None:
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest > high:
        raise InvalidRequest(f"inputs[{name}]", f"{low}..{high}", smallest if smallest < low else largest)
