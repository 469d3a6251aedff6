"""What a model directory with an index has besides: graphs that answer a query, the items' arrays, and the index.

The arrays are files that `serve` maps into memory, and the weights of `sequence.onnx`, `step.onnx` and `parts.onnx` lie
in the same files (ONNX' external data), so that a large catalogue is on disk and in memory once.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.onnx.ann_index import CANDIDATES_PER_ANSWER, INDEX_TOP, MANY, Index, build_index, probe_requests
from jaxrec.onnx.convert import Graph, sequence_query_graph, step_query_graph
from jaxrec.onnx.parity import check_query_parity
from jaxrec.onnx.quantize import quantize_lstms
from jaxrec.onnx.signature import sequence_query_signature, step_query_signature
from jaxrec.onnx.weights import RECENT_WEIGHTS, Weights

ANN_INDEX_FILE = "items.faiss"
SEQUENCE_QUERY_FILE = "sequence_query.onnx"
STEP_QUERY_FILE = "step_query.onnx"
ARRAYS = ("item_bias", "neighbour_item", "neighbour_weight")
"""Fields of `Weights`, each with a file of its name; that of the item vectors is in every model directory."""


@dataclasses.dataclass(frozen=True)
class Search:
    """Verified, and ready to be written."""

    weights: Weights = dataclasses.field(repr=False)
    sequence_query: Graph = dataclasses.field(repr=False)
    step_query: Graph = dataclasses.field(repr=False)
    index: Index = dataclasses.field(repr=False)
    parity: float

    @property
    def graphs(self) -> dict[str, Any]:
        """Their entries in the manifest."""
        widths = self.weights.state_width, self.weights.width
        return {
            "sequence_query": {"file": SEQUENCE_QUERY_FILE, **sequence_query_signature(*widths).to_json()},
            "step_query": {"file": STEP_QUERY_FILE, **step_query_signature(*widths).to_json()},
        }

    @property
    def summary(self) -> dict[str, Any]:
        """The index' entry in the manifest; `recall` by kind of request, beside it the least of them."""
        recalls = self.index.recall.values()
        return {
            "file": ANN_INDEX_FILE,
            "kind": self.index.kind,
            "candidates": self.index.candidates,
            "candidates_per_answer": CANDIDATES_PER_ANSWER,
            "recent_weights": RECENT_WEIGHTS.tolist(),
            f"recall_{INDEX_TOP}": min(recall.of_top for recall in recalls),
            f"recall_{MANY}": min(recall.of_many for recall in recalls),
            "recall": {
                kind: {f"recall_{INDEX_TOP}": recall.of_top, f"recall_{MANY}": recall.of_many, "probes": recall.probes}
                for kind, recall in self.index.recall.items()
            },
        }

    def write(self, folder: Path) -> None:
        (folder / SEQUENCE_QUERY_FILE).write_bytes(self.sequence_query.content)
        (folder / STEP_QUERY_FILE).write_bytes(self.step_query.content)
        (folder / ANN_INDEX_FILE).write_bytes(self.index.content)
        for name in ARRAYS:
            write_array(folder / f"{name}.npy", getattr(self.weights, name))


def make_search(
    weights: Weights, sequence: Graph, trend: np.ndarray, data: PreparedData, max_history: int, int8: bool
) -> Search:
    """Converts, verifies and measures; `sequence` is the verified float32 graph, `trend` [items + 1] that of the last
    event. Raises ExportError."""
    sequence_query, step_query = sequence_query_graph(weights), step_query_graph(weights)
    parity = check_query_parity(weights, sequence, sequence_query, step_query, max_history)
    if int8:
        sequence_query, step_query = quantize_lstms(sequence_query), quantize_lstms(step_query)
    probes = probe_requests(data, sequence_query, weights.item_vectors, max_history, not weights.allow_seen)
    index = build_index(weights.item_vectors, weights.item_bias, trend, probes)
    return Search(weights, sequence_query, step_query, index, parity)


def write_array(path: Path, array: np.ndarray) -> None:
    np.save(path, np.ascontiguousarray(array), allow_pickle=False)


def externalized(graph: Graph, folder: Path) -> bytes:
    """The graph with its items' arrays in the files of `folder`, which hold them already, and all others in it."""
    import onnx

    own = {name: array for name, array in graph.arrays.items() if name not in (*ARRAYS, "item_vectors")}
    model = onnx.load_from_string(dataclasses.replace(graph, arrays=own).whole())
    for tensor in model.graph.initializer:
        if tensor.name in graph.arrays and tensor.name not in own:
            path, length = folder / f"{tensor.name}.npy", graph.arrays[tensor.name].nbytes
            del tensor.external_data[:]
            for key, value in (("location", path.name), ("offset", path.stat().st_size - length), ("length", length)):
                tensor.external_data.add(key=key, value=f"{value}")
    return bytes(model.SerializeToString())
