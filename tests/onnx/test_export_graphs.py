"""What the two graphs promise beyond the right numbers."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from jaxrec.errors import ExportError
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.linear import RANK
from jaxrec.models.summary import NUMBERS
from jaxrec.onnx import convert
from jaxrec.onnx.convert import Graph, parts_graph, sequence_graph, step_graph, trend_graph
from jaxrec.onnx.parity import check_parity, check_written, make_probe
from jaxrec.onnx.weights import LSTMWeights, TrendWeights, Weights, extract_weights

PROBE = make_probe(item_count=60, max_history=50, seed=3)
OPEN = dataclasses.replace(PROBE, blocked=np.zeros((1, 61), bool))
"""Nothing is blocked."""


@pytest.mark.parametrize("name", ["sequence", "step"])
def test_two_fused_lstms_and_no_loop(exported, name: str) -> None:
    model = onnx.load_from_string(getattr(exported, f"{name}_bytes"))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("LSTM") == 2
    assert not {"Loop", "Scan", "If"} & set(operators)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 17


def test_no_operator_only_leads_to_another(exported) -> None:
    """Items are scattered and gathered as they are, and `step.onnx` computes nothing from shapes but the zeros that
    co-occurrence is added to. Each operator costs a microsecond of every answer."""
    sequence, step = (
        onnx.load_from_string(graph).graph.node for graph in (exported.sequence_bytes, exported.step_bytes)
    )
    of_sequence, of_step = ([node.op_type for node in nodes] for nodes in (sequence, step))
    assert not {"ScatterND", "GatherND", "Scan"} & {*of_sequence, *of_step}
    assert not {"Range", "Expand", "Loop"} & set(of_step)
    assert of_step.count("Shape") == of_step.count("ConstantOfShape") == (exported.hybrid.reranker is not None)
    for nodes in (sequence, step):
        assert [node.input[1] for node in nodes if node.op_type == "TopK"][-1] == "k"
    assert len(of_step) <= (200 if exported.hybrid.reranker else 90)


def test_the_item_matrix_is_stored_once(exported) -> None:
    for graph in (exported.sequence_bytes, exported.step_bytes):
        model = onnx.load_from_string(graph)
        large = [array.name for array in model.graph.initializer if 61 in array.dims]
        arrays = ["item_bias", "item_vectors", "neighbour_item", "neighbour_weight"]
        arrays += [] if exported.hybrid.new_items is None else ["new_items"]
        if exported.hybrid.reranker is not None:
            arrays += ["encoder", "decoder", "attributes"]
            constants = set(large) - set(arrays)  # the policy's bias of the items, which comes after the reranker
            assert len(constants) == 1
            large = [name for name in large if name not in constants]
        assert sorted(large) == sorted(arrays)


def test_excluded_items_are_never_answered(exported) -> None:
    inputs = vars(OPEN) | {"exclude": np.tile(np.array([1, 60, 7, 7, 0], np.int32), (12, 1))}
    answer = exported.sequence(**inputs, k=np.array([57]))
    assert not np.isin(answer["items"], [0, 1, 7, 60]).any()
    assert (answer["scores"] > -1e30).all()


def test_with_k_beyond_the_candidates_excluded_items_come_last_and_padding_not_at_all(exported) -> None:
    exclude = np.tile(np.array([1, 60, 7, 0], np.int32), (12, 1))
    answer = exported.sequence(**(vars(OPEN) | {"exclude": exclude}), k=exported.everything)
    np.testing.assert_array_equal(np.sort(answer["items"]), np.tile(np.arange(1, 61), (12, 1)))
    np.testing.assert_array_equal(np.sort(answer["items"][:, -3:]), np.tile([1, 7, 60], (12, 1)))
    assert (answer["scores"][:, -3:] <= -1e30).all()
    everything = np.tile(np.arange(1, 61, dtype=np.int32), (12, 1))
    answer = exported.sequence(**(vars(OPEN) | {"exclude": everything}), k=exported.everything)
    assert (answer["items"] > 0).all()
    assert (answer["scores"] <= -1e30).all()


def test_blocked_items_are_as_excluded_ones(exported) -> None:
    """A row for all, and a row for each; new items are below the first places of the known ones that are left."""
    rng = np.random.default_rng(4)
    blocked = rng.random((12, 61)) < rng.random((12, 1))
    listed = np.where(blocked, np.arange(61), 0).astype(np.int32)
    for rows in (blocked, blocked[:1]):
        of_rows = np.broadcast_to(np.where(rows, listed[: len(rows)], 0), listed.shape)
        expected = exported.sequence(**(vars(OPEN) | {"exclude": of_rows}), k=exported.everything)
        answer = exported.sequence(
            **(vars(OPEN) | {"exclude": np.zeros((12, 1), np.int32), "blocked": rows}), k=exported.everything
        )
        np.testing.assert_array_equal(answer["items"], expected["items"])
        np.testing.assert_allclose(answer["scores"], expected["scores"], atol=1e-5)


def test_a_smaller_k_gives_the_first_of_a_larger(exported) -> None:
    everything = exported.sequence(**vars(PROBE), k=exported.everything)
    for k in (1, 10, 59):
        answer = exported.sequence(**vars(PROBE), k=np.array([k]))
        assert answer["items"].shape == answer["scores"].shape == (12, k)
        np.testing.assert_array_equal(answer["items"], everything["items"][:, :k])


def test_types_and_shapes_follow_the_inputs(exported) -> None:
    for batch, length, excluded, k in ((1, 1, 1, 1), (3, 7, 2, 5), (2, 120, 60, 60)):
        answer = exported.sequence(
            item=np.ones((batch, length), np.int32),
            rating=np.ones((batch, length), np.float32),
            gap=np.ones((batch, length), np.float32),
            length=np.full(batch, length, np.int32),
            request_gap=np.ones(batch, np.float32),
            trend=np.zeros(exported.item_count + 1, np.float32),
            exclude=np.zeros((batch, excluded), np.int32),
            blocked=np.zeros((1, exported.item_count + 1), bool),
            k=np.array([k]),
        )
        found = {name: (array.dtype.name, array.shape) for name, array in answer.items()}
        summary = 0 if exported.hybrid.reranker is None else 2 * RANK + NUMBERS
        assert found == {
            "state": ("float32", (batch, 64 + summary + RECENT_ITEMS)),
            "items": ("int32", (batch, k)),
            "scores": ("float32", (batch, k)),
            "query": ("float32", (batch, exported.hybrid.item_vectors().shape[1])),
        }


def test_what_stands_in_the_padding_changes_nothing(exported) -> None:
    where = np.arange(PROBE.item.shape[1]) < PROBE.length[:, None]
    other = {
        "item": np.where(where, PROBE.item, 5).astype(np.int32),
        "rating": np.where(where, PROBE.rating, 0.5).astype(np.float32),
        "gap": np.where(where, PROBE.gap, 77).astype(np.float32),
    }
    first = exported.sequence(**vars(PROBE), k=np.array([10]))
    second = exported.sequence(**(vars(PROBE) | other), k=np.array([10]))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_an_item_beyond_the_catalogue_is_an_error_and_not_an_answer(exported) -> None:
    inputs = vars(PROBE.row(0)) | {"item": np.array([[61]], np.int32)}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
        exported.sequence(**inputs, k=np.array([1]))


def one_unit_weights(gates: tuple[list[float], list[float]]) -> Weights:
    """Two LSTMs of one unit. Of an event's features only the item's vector counts: 2.0 (LSTM) or 3.0 (content)."""

    def lstm(parameters: list[float]) -> LSTMWeights:
        kernel = np.zeros((3, 4), np.float32)
        kernel[0], recurrent_kernel, bias = np.array(parameters, np.float32).reshape(3, 4)
        return LSTMWeights(kernel, recurrent_kernel[None], bias)

    zeros, bias = np.zeros(2, np.float32), np.array([-1e30, 0], np.float32)
    return Weights(
        item_vectors=np.array([[0, 0], [2, 3]], np.float32),
        item_bias=bias,
        part_bias=np.zeros((2, 3), np.float32),
        rating_slope=zeros,
        rating_offset=zeros,
        rating_missing=zeros,
        gap_vectors=np.zeros((32, 2), np.float32),
        lstm=lstm(gates[0]),
        content=lstm(gates[1]),
        request_scale=np.ones((32, 2), np.float32),
        request_shift=np.zeros((32, 2), np.float32),
        projection=np.eye(2, dtype=np.float32),
        projection_bias=zeros,
        neighbour_item=np.zeros((2, 1), np.int32),
        neighbour_weight=np.zeros((2, 1), np.float32),
        policy=None,
        trend=TrendWeights(np.zeros((2, 6), np.float32), np.zeros(6, np.float32)),
    )


def test_gate_order_by_hand() -> None:
    # Rows: the weight of x, the weight of h, the bias; columns: input, forget, candidate, output.
    weights = one_unit_weights(
        (
            [0.1, 0.2, 0.3, 0.4, 0.5, -0.6, 0.7, -0.8, 0.0, 1.0, -0.5, 0.25],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0],
        )
    )
    session = onnxruntime.InferenceSession(step_graph(weights).whole(), providers=["CPUExecutionProvider"])
    nothing = [0.0] * RECENT_ITEMS
    state = np.array([[0.3, 0.9, 0.0, 0.5, *nothing]], np.float32)  # h, c of the LSTM; h, c of the content model
    inputs = {
        "state": state,
        "item": np.array([1], np.int32),
        "rating": np.zeros(1, np.float32),
        "gap": np.zeros(1, np.float32),
        "request_gap": np.zeros(1, np.float32),
        "trend": np.array([0, 0.5], np.float32),
        "exclude": np.zeros((1, 1), np.int32),
        "blocked": np.zeros((1, 2), bool),
        "k": np.array([1]),
    }
    next_state, scores = session.run(["next_state", "scores"], inputs)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    i, f = 0.1 * 2 + 0.5 * 0.3 + 0.0, 0.2 * 2 - 0.6 * 0.3 + 1.0
    g, o = 0.3 * 2 + 0.7 * 0.3 - 0.5, 0.4 * 2 - 0.8 * 0.3 + 0.25
    c_lstm = sigmoid(f) * 0.9 + sigmoid(i) * math.tanh(g)
    h_lstm = sigmoid(o) * math.tanh(c_lstm)
    c_content = sigmoid(2) * 0.5 + sigmoid(1) * math.tanh(3)
    h_content = sigmoid(4) * math.tanh(c_content)
    expected = [h_lstm, c_lstm, h_content, c_content, 1.0, *nothing[1:]]  # item 1 is the most recent one
    np.testing.assert_allclose(next_state, [expected], atol=1e-6)
    np.testing.assert_allclose(scores, [[2 * h_lstm + 3 * h_content + 0.5]], atol=1e-6)


def test_a_graph_has_the_arrays_of_the_items_beside_it(small_hybrid: Hybrid) -> None:
    """All graphs share them: of a large catalogue each copy takes more than a gigabyte."""
    weights = extract_weights(small_hybrid)
    for graph in (sequence_graph(weights), step_graph(weights), parts_graph(weights)):
        assert all(array is getattr(weights, name) for name, array in graph.arrays.items())
        outside = [one for one in onnx.load_from_string(graph.content).graph.initializer if one.name in graph.arrays]
        assert sorted(one.name for one in outside) == sorted(graph.arrays)
        assert {len(one.raw_data) for one in outside} == {0}
        for one in onnx.load_from_string(graph.whole()).graph.initializer:
            if one.name in graph.arrays:
                np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), graph.arrays[one.name])


def tampered(weights: Weights, name: str) -> Weights:
    """The weights with one number of `name` moved by 0.01."""
    array = getattr(weights, name).copy()
    array[-1] += 0.01 if array.ndim == 1 else 0.01 * np.eye(1, array.shape[1], dtype=np.float32)[0]
    return dataclasses.replace(weights, **{name: array})


@pytest.mark.parametrize("name", ["item_vectors", "rating_missing", "projection_bias"])
def test_one_number_that_differs_is_found(small_hybrid: Hybrid, model_directory: Path, name: str) -> None:
    sequence = sequence_graph(tampered(extract_weights(small_hybrid), name))
    names = ("step.onnx", "parts.onnx", "trend.onnx")
    step, parts, trend = (Graph((model_directory / name).read_bytes()) for name in names)
    with pytest.raises(ExportError, match=r"sequence\.onnx: \w+ differ from JAX by up to .*, tolerance 0\.0001"):
        check_parity(small_hybrid, sequence, step, parts, trend, max_history=50)


def test_a_step_that_differs_is_found(small_hybrid: Hybrid, model_directory: Path) -> None:
    names = ("sequence.onnx", "parts.onnx", "trend.onnx")
    sequence, parts, trend = (Graph((model_directory / name).read_bytes()) for name in names)
    weights = extract_weights(small_hybrid)
    swapped = step_graph(dataclasses.replace(weights, lstm=weights.content, content=weights.lstm))
    with pytest.raises(ExportError, match=r"step\.onnx: states differ from JAX"):
        check_parity(small_hybrid, sequence, swapped, parts, trend, max_history=50)


@pytest.mark.parametrize(("file", "makes"), [("sequence.onnx", sequence_graph), ("step.onnx", step_graph)])
def test_a_file_that_differs_from_the_verified_graph_is_found(
    small_hybrid: Hybrid, tmp_path: Path, file: str, makes: Callable[[Weights], Graph]
) -> None:
    weights = extract_weights(small_hybrid)
    graph, asked = makes(weights), (weights.item_count, 50, weights.allow_seen)
    (tmp_path / file).write_bytes(graph.whole())
    check_written(tmp_path / file, graph, *asked)
    (tmp_path / file).write_bytes(makes(tampered(weights, "item_vectors")).whole())
    with pytest.raises(ExportError, match=rf"{file}: \w+ of the file differ from those of the verified graph"):
        check_written(tmp_path / file, graph, *asked)


def test_parts_that_differ_are_found(small_hybrid: Hybrid, model_directory: Path) -> None:
    names = ("sequence.onnx", "step.onnx", "trend.onnx")
    sequence, step, trend = (Graph((model_directory / name).read_bytes()) for name in names)
    parts = parts_graph(tampered(extract_weights(small_hybrid), "part_bias"))
    with pytest.raises(ExportError, match=r"parts\.onnx: lstm differ from JAX"):
        check_parity(small_hybrid, sequence, step, parts, trend, max_history=50)


def test_a_trend_that_differs_is_found(small_hybrid: Hybrid, model_directory: Path) -> None:
    names = ("sequence.onnx", "step.onnx", "parts.onnx")
    sequence, step, parts = (Graph((model_directory / name).read_bytes()) for name in names)
    weights = extract_weights(small_hybrid)
    other = TrendWeights(weights.trend.views + np.float32(0.01), weights.trend.typical)
    trend = trend_graph(dataclasses.replace(weights, trend=other))
    with pytest.raises(ExportError, match=r"trend\.onnx differ from JAX"):
        check_parity(small_hybrid, sequence, step, parts, trend, max_history=50)


def test_trend_by_hand(small_hybrid: Hybrid) -> None:
    """One half-life counts: 2 events of item 1 and 6 of item 2, where 8 are usual. The scale is 2 * 8 / (8 + 8) = 1."""
    views = np.array([[0.0, 3.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]], np.float32)
    weights = dataclasses.replace(extract_weights(small_hybrid), trend=TrendWeights(views, np.full(6, 8, np.float32)))
    session = onnxruntime.InferenceSession(trend_graph(weights).content, providers=["CPUExecutionProvider"])
    counts = np.ones((6, 4), np.float32)
    counts[1] = [0, 2, 6, 0]
    (trend,) = session.run(["trend"], {"counts": counts})
    expected = [3 * math.log(1 + 2 / 0.5) + 0.5 * math.sqrt(2), 3 * math.log(1 + 6 / 0.5) + 0.5 * math.sqrt(6), 0]
    np.testing.assert_allclose(trend, [0, *expected], rtol=1e-6)
    (nothing,) = session.run(["trend"], {"counts": np.zeros((6, 4), np.float32)})
    np.testing.assert_array_equal(nothing, np.zeros(4))


def test_what_tf2onnx_only_logs_is_an_error(small_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    tf, _ = convert._load_tensorflow()
    from jaxrec.onnx import tf_forward

    monkeypatch.setattr(tf_forward, "_policy_shift", lambda policy, query: tf.math.igamma(query, query))
    with pytest.raises(ExportError, match=r"step\.onnx: tf2onnx: .*Igamma"):
        step_graph(extract_weights(small_hybrid))


def test_an_lstm_that_is_not_fused_is_an_error(small_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    convert._load_tensorflow()
    from jaxrec.onnx import tf_forward

    monkeypatch.setattr(tf_forward, "_lstm", lambda weights, x, h, c: (h, c))
    with pytest.raises(ExportError, match=r"step\.onnx: expected 2 LSTM operators and no loop, found"):
        step_graph(extract_weights(small_hybrid))


def test_zero_weights_are_no_special_case() -> None:
    zeros = [0.0] * 12
    graph = sequence_graph(one_unit_weights((zeros, zeros)))
    assert [node.op_type for node in onnx.load_from_string(graph.content).graph.node].count("LSTM") == 2
