"""The Open Inference Protocol over REST: the answers of gRPC, in the protocol's own JSON."""

from typing import Any

import grpc
import numpy as np
import pytest

from serve.pb import open_inference_pb2 as pb
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from tests.serve.http.asking import Doors, ask

INFER = "/v2/models/jaxrec/infer"
DTYPES = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}


def tensors() -> list[dict[str, Any]]:
    """Two rows: one as nested lists, the other flat."""
    return [
        {"name": "item", "datatype": "INT32", "shape": [2, 2], "data": [[1, 2], [3, 0]]},
        {"name": "rating", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 1, -1, -1]},
        {"name": "gap", "datatype": "FP32", "shape": [2, 2], "data": [10, 20.5, -1, -1], "parameters": {"x": [1]}},
        {"name": "length", "datatype": "INT32", "shape": [2], "data": [2, 1]},
        {"name": "request_gap", "datatype": "FP32", "shape": [2], "data": [-1, 7]},
        {"name": "exclude", "datatype": "INT32", "shape": [2, 1], "data": [[4], [0]]},
        {"name": "k", "datatype": "INT64", "shape": [1], "data": [3]},
    ]


def test_a_run_of_the_graph_gives_what_grpc_gives(doors: Doors) -> None:
    request = pb.ModelInferRequest(model_name="jaxrec")
    for one in tensors():
        values = np.array(one["data"], DTYPES[one["datatype"]])
        request.inputs.add(name=one["name"], datatype=one["datatype"], shape=one["shape"])
        request.raw_input_contents.append(values.tobytes())
    with grpc.insecure_channel(doors.address) as channel:
        expected = GRPCInferenceServiceStub(channel).ModelInfer(request)
    said = ask(doors.port, INFER, {"id": "7", "inputs": tensors(), "parameters": {"any": {"thing": 1}}})
    assert said.status == 200
    assert (said.json["model_name"], said.json["model_version"], said.json["id"]) == (
        *("jaxrec", expected.model_version),
        "7",
    )
    for one, wanted, raw in zip(said.json["outputs"], expected.outputs, expected.raw_output_contents, strict=True):
        assert (one["name"], one["datatype"], one["shape"]) == (wanted.name, wanted.datatype, list(wanted.shape))
        found = np.array(one["data"], DTYPES[one["datatype"]])
        np.testing.assert_array_equal(found, np.frombuffer(raw, DTYPES[one["datatype"]]))


def test_outputs_are_those_that_are_asked_for(doors: Doors) -> None:
    path = f"/v2/models/jaxrec/versions/{ask(doors.port, '/v2/models/jaxrec').json['versions'][0]}"
    asked = {"inputs": tensors(), "outputs": [{"name": "items", "parameters": {"binary_data": False}}]}
    outputs = ask(doors.port, f"{path}/infer", asked).json["outputs"]
    assert [one["name"] for one in outputs] == ["items"]
    assert ask(doors.port, f"{path}/ready").json == {"ready": True}
    assert ask(doors.port, path).json["name"] == "jaxrec"


def test_states_and_metadata(doors: Doors) -> None:
    assert ask(doors.port, "/v2/health/live").json == {"live": True}
    assert ask(doors.port, "/v2/health/ready").json == {"ready": True}
    assert ask(doors.port, "/v2/models/jaxrec/ready").json == {"ready": True}
    server = ask(doors.port, "/v2").json
    assert (server["name"], server["extensions"]) == ("jaxrec", [])
    inputs = {one["name"]: one for one in ask(doors.port, "/v2/models/jaxrec").json["inputs"]}
    assert inputs["item"] == {"name": "item", "datatype": "INT32", "shape": [-1, -1]}
    unknown = ask(doors.port, "/v2/models/other/ready")
    assert (unknown.status, unknown.json) == (503, {"ready": False})
    doors.server.finish_calls()
    ended = ask(doors.port, "/v2/health/ready")
    assert (ended.status, ended.json) == (503, {"ready": False})


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        ({"inputs": []}, 400, "inputs: expected item, rating, gap"),
        ({"inputs": "x"}, 400, "inputs: expected a list of tensors"),
        ({"outputs": [{"name": "x"}]}, 400, "outputs[0]: expected one of "),
        ({"outputs": ["x"]}, 400, "outputs[0]: expected a JSON object, came the text 'x'"),
        ({"outputs": 5}, 400, "outputs: expected a list of tensors, came 5"),
        ({"outputs": {"name": "items"}}, 400, "outputs: expected a list of tensors, came an object"),
        ({"outputs": [{"name": "items", "data": 1}]}, 400, "outputs[0]: expected fields of name, parameters, came"),
        ({"more": 1}, 400, "message: expected fields of id, parameters, inputs, outputs, came the text 'more'"),
        ({"modelName": "x"}, 400, "message: expected fields of id, parameters, inputs, outputs, came"),
        ({"model_version": "x"}, 400, "message: expected fields of id, parameters, inputs, outputs, came"),
        ({"data": [3], "contents": {"int64Contents": [9]}}, 400, "inputs[6]: expected fields of name, shape, "),
        ({"data": [1]}, 400, "inputs[k].shape"),
        ({"data": ["x"], "shape": [1]}, 400, "inputs[6].contents.int64_contents[0]: expected a whole number"),
        ({"data": "x"}, 400, "inputs[6].data: expected a list"),
        ({"data": [[[[[[[[[[[1]]]]]]]]]]]}, 400, "inputs[6].data: expected lists nested at most 8 times"),
        ({"datatype": "FP64"}, 400, "inputs[k].datatype: expected INT64, came 'FP64'"),
        ({"datatype": "COMPLEX"}, 400, "inputs[6].datatype: expected one of BOOL, INT32"),
        ({"data": [61]}, 400, "inputs[k]: expected 1..60, came 61"),
    ],
)
def test_bad_requests_name_the_tensor(doors: Doors, changed: dict[str, Any], status: int, message: str) -> None:
    asked: dict[str, Any] = {"inputs": tensors()}
    if changed.keys() & {"data", "datatype"}:
        shape = [2] if changed == {"data": [1]} else [1]
        asked["inputs"][6] |= {"shape": shape} | changed
    else:
        asked |= changed
    said = ask(doors.port, INFER, asked)
    assert (said.status, list(said.json)) == (status, ["error"])
    assert said.json["error"].startswith(message)


def test_other_models_and_other_protocols(doors: Doors) -> None:
    assert ask(doors.port, "/v2/models/other/infer", {"inputs": tensors()}).status == 404
    assert ask(doors.port, "/v2/models/jaxrec/versions/none").status == 404
    binary = ask(doors.port, INFER, b"{}", {"inference-header-content-length": "2"})
    assert (binary.status, list(binary.json)) == (415, ["error"])
    # As a form of another site's page can send it.
    plain = ask(doors.port, INFER, '{"inputs": []}', {"content-type": "text/plain", "origin": "https://example.org"})
    assert (plain.status, list(plain.json)) == (415, ["error"])
    assert ask(doors.port, INFER, "{").json["error"].startswith("message: expected JSON, came at line 1")
    assert ask(doors.port, INFER, "[]").json["error"] == "message: expected a JSON object, came a list"
    assert list(ask(doors.port, "/v2/nothing").json) == ["error"]
