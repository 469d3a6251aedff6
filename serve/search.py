"""Answers from a large catalogue without multiplying all of it, where the model directory has an index of its items.

Graphs without the items' arrays give the query and the state. The index (faiss, `jaxrec.export.index`) names candidates
for the query; the neighbours of the recent items are candidates too, since what they add to their logits is not in the
index. The logits of all of those are computed exactly, so an item can be missing from an answer, but none has a wrong
score. How many candidates it takes for that to be rare was measured at the export.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serve.artifact import Artifact, ArtifactError, IndexFiles

NEVER = np.float32(-1e30)
"""The score of what is excluded, as the graphs have it."""


class Graph(Protocol):
    """What of a session of ONNX Runtime is used."""

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]: ...


class IndexedGraph:
    """Takes and answers what `sequence.onnx` or `step.onnx` would; safe to share between threads."""

    def __init__(self, query_graph: Graph, state: str, search: "Search") -> None:
        """`query_graph` is the graph of the same name that answers a query; `state` names its other output."""
        self._graph = query_graph
        self._state = state
        self._search = search

    def run(self, outputs: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """As a session of ONNX Runtime."""
        events = {name: tensor for name, tensor in inputs.items() if name not in ("exclude", "k")}
        events["vector"] = self._search.item_vectors[inputs["item"]]
        state, query = self._graph.run([self._state, "query"], events)
        items, scores = self._search.best(query, state, inputs["exclude"], int(inputs["k"][0]))
        answer = {self._state: state, "items": items, "scores": scores}
        return [answer[name] for name in outputs]


class Search:
    """The items of one model, and the index over them."""

    def __init__(self, artifact: Artifact, files: IndexFiles) -> None:
        """Raises ArtifactError for an index that does not fit the model, or without faiss."""
        self.item_vectors = artifact.item_vectors
        self._files = files
        self._count = artifact.info.item_count
        self._recent = len(files.recent_weights)
        self._index = _read_index(artifact, files)
        self._of_thread = threading.local()

    def best(
        self, query: NDArray[np.float32], state: NDArray[np.float32], exclude: NDArray[np.int32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k best items and their logits `[batch, k]`, best first, lower indices first among equals.

        `query` is `[batch, width]`, `state` `[batch, state width]` ends with the recent items, `exclude` is
        `[batch, m]`; k is at most the number of items.
        """
        files = self._files
        candidates = files.candidates + files.candidates_per_answer * k + exclude.shape[1]
        points = np.ones((len(query), query.shape[1] + 1), np.float32)
        points[:, :-1] = query  # and 1 times the bias
        # Places in the index, -1 for none; with the padding in row 0 of all arrays, item indices.
        found = self._index.search(points, min(candidates, self._count))[1] + 1
        recent = state[:, -self._recent :].astype(np.int32)
        items, scores = np.empty((len(query), k), np.int32), np.empty((len(query), k), np.float32)
        more = self._zeros()
        for row in range(len(query)):
            near = files.neighbour_item[recent[row]].ravel()
            excluded = exclude[row]
            # What is added to the product: an array of all items, zeros but here, and afterwards zeros again.
            try:
                np.add.at(more, near, (files.neighbour_weight[recent[row]] * files.recent_weights).ravel())
                more[excluded] = more[0] = NEVER
                best = self._best_of(np.concatenate((near, found[row])), query[row], more, k)
                if best is None:
                    # Too few were found: so much is asked for, or excluded, that all items have to be looked at.
                    best = self._best_of_all(query[row], more, k)
            finally:
                more[near] = more[excluded] = more[0] = 0
            items[row], scores[row] = best
        return items, scores

    def _best_of(
        self, candidates: NDArray[np.int64], query: NDArray[np.float32], more: NDArray[np.float32], k: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
        """The k best of candidates, some of which are there several times, and their logits; None: there are fewer."""
        scores = self._logits(candidates, query, more)
        most = k * (self._recent + 1)
        if most < len(scores):
            chosen = np.argpartition(scores, len(scores) - most)[len(scores) - most :]
            candidates, scores = candidates[chosen], scores[chosen]
        candidates, first = np.unique(candidates, return_index=True)
        scores = scores[first]
        return _best(candidates, scores, k) if np.count_nonzero(scores > NEVER) >= k else None

    def _best_of_all(
        self, query: NDArray[np.float32], more: NDArray[np.float32], k: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        items = np.arange(1, self._count + 1)
        return _best(items, self._logits(slice(1, None), query, more), k)

    def _logits(
        self, items: NDArray[np.int64] | slice, query: NDArray[np.float32], more: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return self.item_vectors[items] @ query + self._files.item_bias[items] + more[items]

    def _zeros(self) -> NDArray[np.float32]:
        """`[items+1]` zeros, the calling thread's own."""
        zeros: NDArray[np.float32] | None = getattr(self._of_thread, "zeros", None)
        if zeros is None:
            zeros = self._of_thread.zeros = np.zeros(self._count + 1, np.float32)
        return zeros


def _best(items: NDArray[Any], scores: NDArray[np.float32], k: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The k best of at least as many items, lower ones first among equals."""
    chosen = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
    chosen = chosen[np.lexsort((items[chosen], -scores[chosen]))]
    return items[chosen], scores[chosen]


def _read_index(artifact: Artifact, files: IndexFiles) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ArtifactError(
            f"{artifact.directory}: its index needs faiss (pip install 'jaxrec[serve]'), or --search exact: {error}"
        ) from error
    # Requests run beside each other anyway.
    faiss.omp_set_num_threads(1)
    try:
        index: Any = faiss.deserialize_index(np.frombuffer(files.content, np.uint8))
        count, width = index.ntotal, index.d
    except (RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{files.path}: faiss cannot load it: {error}") from error
    expected = artifact.item_vectors.shape[1] + 1
    if count != artifact.info.item_count or width != expected:
        raise ArtifactError(
            f"{files.path}: holds {count} points of {width} numbers, expected {artifact.info.item_count} of {expected}"
        )
    return index
