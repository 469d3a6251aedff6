"""int8 weights for the LSTMs, behind a gate: an export whose answers got worse is refused.

ONNX Runtime's dynamic quantization: weights become int8 once, with a scale for each column (one for all kept 0.984 of
the demo model's first ten items and lost 1 % of NDCG@10; so it is 0.992 and nothing), activations are quantized again
in each run. The head and the embeddings stay float32. A run chooses one scale for all of its rows and steps, so the
answers of a quantized model depend slightly on what is run together: a state that was advanced event by event equals
the replay of the history only within the noise of the quantization, which the manifest tells (`parity.int8`).
"""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxrec.data.batches import CaseBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import ExportError
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import TOP, Ranked, rank_cases
from jaxrec.evaluation.scorers import Scorer
from jaxrec.models.repeat import Repeat
from jaxrec.onnx.convert import Graph
from jaxrec.onnx.parity import open_session

LEAST_OVERLAP = 0.99
"""Mean share of the first ten items that the quantized model keeps, in whatever order."""
MOST_NDCG_LOSS = 0.005
"""Of NDCG@10, relative. A gain is none."""


def quantize_lstms(graph: Graph) -> Graph:
    """The graph with int8 weights in its LSTMs, and the same inputs, outputs and arrays."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_from_string(graph.content)
    # While it is quantized the arrays are inputs, or their data would be read.
    inputs = list(model.graph.input)
    arrays = [tensor for tensor in model.graph.initializer if tensor.name in graph.arrays]
    for tensor in arrays:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    with tempfile.TemporaryDirectory() as folder, _quiet():
        out = Path(folder) / "int8.onnx"
        quantize_dynamic(
            model,
            str(out),
            op_types_to_quantize=["LSTM"],
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        quantized = onnx.load_from_string(out.read_bytes())
    del quantized.graph.input[:]
    quantized.graph.input.extend(inputs)
    quantized.graph.initializer.extend(arrays)
    operators = [node.op_type for node in quantized.graph.node]
    if "LSTM" in operators or "DynamicQuantizeLSTM" not in operators:
        raise ExportError(f"int8: expected quantized LSTMs, found the operators {sorted(set(operators))}")
    return Graph(bytes(quantized.SerializeToString()), graph.arrays)


def check_quality(
    graph: Graph, quantized: Graph, data: PreparedData, max_history: int, repeat: Repeat | None = None
) -> dict[str, float]:
    """Compares the two `sequence.onnx` on the validation cases, with a request time and without a trend. `repeat`: of
    models that allow items of the history.

    Returns the figures.

    Raises ExportError where the quantized graph keeps too little of the first ten items or of NDCG@10, and where there
    is no validation case to tell.
    """
    cases = data.split.validation
    if not len(cases):
        raise ExportError("int8: no validation case is left to compare the models on; export without --int8")
    exact, rough = (
        rank_cases(graph_scorer(one, len(data.catalog), repeat), data, cases, max_history, True, repeat is None)
        for one in (graph, quantized)
    )
    return compare_ranked(exact, rough)


def compare_ranked(exact: Ranked, rough: Ranked) -> dict[str, float]:
    """The figures of the gate; raises ExportError where they are too bad."""
    overlap = float(np.mean([_overlap(*rows) for rows in zip(exact.top, rough.top, strict=True)]))
    before, after = (float(ndcg(one.ranks, TOP).mean()) for one in (exact, rough))
    figures = {"top_10_overlap": overlap, "ndcg_10_float32": before, "ndcg_10_int8": after, "cases": len(exact.ranks)}
    if overlap < LEAST_OVERLAP or after < before * (1 - MOST_NDCG_LOSS):
        raise ExportError(
            f"int8: on {len(exact.ranks)} validation cases the first {TOP} items overlap by {overlap:.4f} (expected "
            f"{LEAST_OVERLAP:g} or more), and NDCG@{TOP} is {after:.5f} beside {before:.5f} (expected to "
            f"fall by at most {MOST_NDCG_LOSS:.1%}); export without --int8"
        )
    return figures


def _overlap(exact: np.ndarray, rough: np.ndarray) -> float:
    """The share of the items `exact` [TOP] (0 = nothing was left) that `rough` has, too."""
    items = exact[exact > 0]
    return len(np.intersect1d(items, rough)) / len(items) if len(items) else 1.0


def graph_scorer(graph: Graph, item_count: int, repeat: Repeat | None = None) -> Scorer:
    """Scores of all items by a `sequence.onnx`, as if each request had a time."""
    session = open_session(graph, threads=0)

    def score(batch: CaseBatch) -> np.ndarray:
        events, rows = batch.events, len(batch.target)
        item, rating, gap = (np.asarray(column) for column in (events.item, events.rating, events.gap))
        timed = np.ones(rows, bool)
        seen = None if repeat is None else repeat.scores_of(batch.history, batch.history_time, batch.time, timed)
        items, scores = session.run(
            ["items", "scores"],
            {
                "item": item.astype(np.int32),
                "rating": rating.astype(np.float32),
                "gap": gap.astype(np.float32),
                "length": np.asarray(events.length, np.int32),
                "request_gap": np.asarray(batch.request_gap, np.float32),
                "trend": np.zeros(item_count + 1, np.float32),
                "exclude": np.zeros((rows, 1), np.int32),
                "blocked": np.zeros((1, item_count + 1), bool),
                "k": np.array([item_count], np.int64),
                **({} if seen is None else {"seen": seen.items, "seen_score": seen.scores}),
            },
        )
        whole = np.zeros((rows, item_count + 1), np.float32)
        np.put_along_axis(whole, items.astype(np.int64), scores, axis=1)
        return whole

    return score


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of ONNX Runtime to optimize the graph first, which undoes the fused LSTM's names."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
