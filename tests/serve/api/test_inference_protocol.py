"""The Open Inference Protocol: another project's client works unchanged, and nothing bad reaches the graph."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from serve.client import Event, RecommenderClient
from serve.front.server import create_server
from serve.model.directory import Artifact
from serve.model.recommender import Recommender
from serve.pb import open_inference_pb2 as pb
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serve.stores.base import EventStore
from tests.serve.one_model import one_model

TIMEOUT_S = 30
DATATYPES = {"int32": "INT32", "int64": "INT64", "float32": "FP32"}

# In a process of its own: its stubs register the same names as ours.
TRITON = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import triton_to_np_dtype

address, inputs = sys.argv[1], json.loads(sys.argv[2])
client = triton.InferenceServerClient(address)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("jaxrec")
assert not client.is_model_ready("jaxrec", "no such version")
metadata = client.get_model_metadata("jaxrec", as_json=True)
tensors = []
for described in metadata["inputs"]:
    name, datatype = described["name"], described["datatype"]
    values = np.array(inputs[name], triton_to_np_dtype(datatype))
    tensor = triton.InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values)
    tensors.append(tensor)
wanted = [triton.InferRequestedOutput(name) for name in ("scores", "items")]
answer = client.infer("jaxrec", tensors, request_id="7", outputs=wanted)
assert answer.get_response().id == "7"
whole = client.infer("jaxrec", tensors)
print(json.dumps({
    "server": client.get_server_metadata(as_json=True),
    "metadata": metadata,
    "items": answer.as_numpy("items").tolist(),
    "scores": answer.as_numpy("scores").tolist(),
    "state": list(whole.as_numpy("state").shape),
}))
"""


@pytest.fixture
def inference(address: str) -> Iterator[GRPCInferenceServiceStub]:
    with grpc.insecure_channel(address) as channel:
        yield GRPCInferenceServiceStub(channel)


def features(**changed: Any) -> dict[str, np.ndarray]:
    """Two histories of the lengths 3 and 1, as `sequence.onnx` takes them."""
    good = {
        "item": np.array([[5, 9, 7], [11, 0, 0]], np.int32),
        "rating": np.array([[0.5, -1, 1], [0, 0, 0]], np.float32),
        "gap": np.array([[-1, 60, 3600], [-1, 0, 0]], np.float32),
        "length": np.array([3, 1], np.int32),
        "request_gap": np.array([86400, -1], np.float32),
        "exclude": np.array([[5, 9, 7], [11, 0, 0]], np.int32),
        "k": np.array([4], np.int64),
    }
    return {**good, **changed}


def request(inputs: dict[str, np.ndarray], **fields: Any) -> pb.ModelInferRequest:
    """The inputs as typed contents."""
    message = pb.ModelInferRequest(**{"model_name": "jaxrec", **fields})
    for name, values in inputs.items():
        tensor = message.inputs.add(name=name, datatype=DATATYPES[values.dtype.name], shape=values.shape)
        field = {"INT32": "int_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}[tensor.datatype]
        getattr(tensor.contents, field).extend(values.ravel().tolist())
    return message


def test_tritons_client_works_unchanged(address: str, client: RecommenderClient, model: Recommender) -> None:
    inputs = json.dumps({name: values.tolist() for name, values in features().items()})
    command = [sys.executable, "-W", "error", "-c", TRITON, address, inputs]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    answered = json.loads(ended.stdout)
    assert answered["server"]["name"] == "jaxrec"
    assert answered["metadata"]["versions"] == [model.info.model_version]
    assert answered["metadata"]["platform"] == "onnxruntime_onnx"
    described = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in answered["metadata"]["inputs"]}
    assert described["item"] == ("INT32", ["-1", "-1"])
    assert described["k"] == ("INT64", ["1"])
    assert answered["state"] == [2, model.engine.state_width]

    ids = model.catalog.item_ids
    times = (1000, 1060, 4660)
    events = [
        Event(item_id=ids[item], rating=rating, timestamp=time)
        for item, rating, time in zip((5, 9, 7), (2.75, None, 5), times, strict=True)
    ]
    answer = client.recommend(history=events, k=4, request_time=4660 + 86400)
    assert [ids[item] for item in answered["items"][0]] == [one.item_id for one in answer.recommendations]
    np.testing.assert_allclose(answered["scores"][0], [one.score for one in answer.recommendations], atol=1e-5)
    lone = client.recommend(history=[Event(item_id=ids[11], rating=0.5, timestamp=9)], k=4)
    assert [ids[item] for item in answered["items"][1]] == [one.item_id for one in lone.recommendations]


def test_typed_and_raw_contents_give_the_same(inference: GRPCInferenceServiceStub, model: Recommender) -> None:
    typed = request(features(), id="a", model_version=model.info.model_version)
    raw = request(features(), id="a")
    for tensor in raw.inputs:
        tensor.ClearField("contents")
        raw.raw_input_contents.append(features()[tensor.name].tobytes())
    by_typed, by_raw = (inference.ModelInfer(one, timeout=TIMEOUT_S) for one in (typed, raw))
    assert by_typed == by_raw
    assert [output.name for output in by_raw.outputs] == ["state", "items", "scores"]
    items = np.frombuffer(by_raw.raw_output_contents[1], np.int32).reshape(tuple(by_raw.outputs[1].shape))
    direct = model.engine.run_sequence(features(), ["items"])[0]
    np.testing.assert_array_equal(items, direct)


def test_the_trend_is_the_servers(artifact: Artifact, store: EventStore) -> None:
    """A client sends none, and gets the scores that the server gives with its own."""
    model = Recommender(artifact, "cpu")
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    answers = []
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        inference, k = GRPCInferenceServiceStub(channel), np.array([60], np.int64)
        for taken in (0, 50):
            counts = np.zeros_like(model.engine.exported.counts)
            counts[:, 30] = taken
            model.engine.use_counts(counts)
            answer = inference.ModelInfer(request(features(k=k)), timeout=TIMEOUT_S)
            items, scores = (
                np.frombuffer(answer.raw_output_contents[at], dtype).reshape(2, 60)
                for at, dtype in ((1, np.int32), (2, np.float32))
            )
            answers.append(np.take_along_axis(scores, np.argsort(items, axis=1), axis=1)[:, 30 - 1])
            trend = model.engine.trend.values[30]
    server.drain()
    without, with_trend = answers
    assert trend > 1
    np.testing.assert_allclose(with_trend - without, trend, atol=1e-4)


NAN = np.full((2, 3), np.nan, np.float32)
BAD = [
    ({"item": np.array([[5, 61, 7], [11, 0, 0]], np.int32)}, "inputs[item]: expected 0..60, came 61"),
    ({"item": np.array([[5, -1, 7], [11, 0, 0]], np.int32)}, "inputs[item]: expected 0..60, came -1"),
    ({"item": np.array([[5, 0, 7], [11, 0, 0]], np.int32)}, "inputs[item]: expected 1..60 for the first"),
    ({"item": np.zeros((0, 3), np.int32)}, "inputs[item].shape: expected sizes from 1 on, came [0, 3]"),
    ({"item": np.zeros(3, np.int32)}, "inputs[item].shape: expected [-1, -1], came [3]"),
    ({"item": np.zeros((2, 3), np.int64)}, "inputs[item].datatype: expected INT32, came 'INT64'"),
    ({"rating": NAN}, "inputs[rating]: expected 0..1, or -1 for no rating"),
    ({"rating": np.full((2, 3), 1.5, np.float32)}, "inputs[rating]: expected 0..1"),
    ({"rating": np.zeros((2, 4), np.float32)}, "inputs[rating].shape: expected [2, 3] as item"),
    ({"gap": NAN}, "inputs[gap]: expected seconds in 0.."),
    ({"gap": np.full((2, 3), -5, np.float32)}, "inputs[gap]: expected seconds in 0.."),
    ({"gap": np.full((2, 3), 30 * 86_400_000, np.float32)}, "inputs[gap]: expected seconds in 0.."),  # milliseconds
    ({"request_gap": np.array([np.inf, 0], np.float32)}, "inputs[request_gap]: expected seconds in 0.."),
    ({"request_gap": np.zeros(3, np.float32)}, "inputs[request_gap].shape: expected 2 rows"),
    ({"length": np.array([0, 1], np.int32)}, "inputs[length]: expected 1..3, came 0"),
    ({"length": np.array([4, 1], np.int32)}, "inputs[length]: expected 1..3, came 4"),
    ({"exclude": np.array([[61], [0]], np.int32)}, "inputs[exclude]: expected 0..60, came 61"),
    ({"exclude": np.zeros((2, 10_001), np.int32)}, "inputs[exclude].shape: expected at most 10000 items"),
    ({"k": np.array([0], np.int64)}, "inputs[k]: expected 1..60, came 0"),
    ({"k": np.array([2**62], np.int64)}, "inputs[k]: expected 1..60, came 4611686018427387904"),
    ({"k": np.array([1, 2], np.int64)}, "inputs[k].shape: expected [1], came [2]"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_tensor_is_named(inference: GRPCInferenceServiceStub, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        inference.ModelInfer(request(features(**changed)), timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith(message)


def test_shapes_that_lie(inference: GRPCInferenceServiceStub) -> None:
    lying = request(features())
    lying.inputs[0].shape[:] = [2**40, 2**40]
    huge = request(features(length=np.ones(1000, np.int32)))
    trend = request(features(trend=np.zeros(61, np.float32)))
    missing = request({name: values for name, values in features().items() if name != "k"})
    twice = request(features())
    twice.inputs.append(twice.inputs[0])
    both = request(features())
    both.raw_input_contents.extend([b""] * 7)
    few = request(features())
    few.raw_input_contents.append(b"")
    outputs = request(features())
    outputs.outputs.add(name="logits")
    for bad, message in (
        (lying, f"inputs[item].contents.int_contents: expected {2**80} values for the shape, came 6"),
        (huge, "inputs[length].shape: expected 2 rows as in item, came 1000"),
        (missing, "inputs: expected item, rating, gap, length, request_gap, exclude, k, each once, came"),
        (twice, "inputs: expected item, rating"),
        (trend, "inputs: expected item, rating, gap, length, request_gap, exclude, k, each once, came"),
        (both, "inputs[item].contents: expected nothing, since raw_input_contents is used"),
        (few, "raw_input_contents: expected none or 7 entries, came 1"),
        (outputs, "outputs[0]: expected one of state, items, scores, each once, came 'logits'"),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            inference.ModelInfer(bad, timeout=TIMEOUT_S)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.value.details().startswith(message)


@pytest.mark.parametrize("fields", [{"model_name": "other"}, {"model_version": "other"}])
def test_unknown_model(inference: GRPCInferenceServiceStub, fields: dict[str, str]) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        inference.ModelInfer(request(features(), **fields), timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
