"""Answers from a large catalogue without multiplying all of it, where the model directory has an index of its items.

Graphs without the items' arrays give the query and the state. The index (faiss, `jaxrec.export.index`) names candidates
for the query; the neighbours of the recent items are candidates too, since what they add to their logits is not in the
index. The logits of all of those are computed exactly, so an item can be missing from an answer, but none has a wrong
score. How many candidates it takes for that to be rare was measured at the export.
"""

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

    def best(
        self, query: NDArray[np.float32], state: NDArray[np.float32], exclude: NDArray[np.int32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k best items and their logits `[batch, k]`, best first, lower indices first among equals.

        `query` is `[batch, width]`, `state` `[batch, state width]` ends with the recent items, `exclude` is
        `[batch, m]`; k is at most the number of items.
        """
        files = self._files
        candidates = files.candidates + files.candidates_per_answer * k + exclude.shape[1]
        points = np.zeros((len(query), self._index.d), np.float32)
        points[:, : query.shape[1]] = query
        points[:, query.shape[1]] = 1  # times the bias
        # Places in the index, -1 for none; with the padding in row 0 of all arrays, item indices.
        found = self._index.search(points, min(candidates, self._count))[1] + 1
        recent = state[:, -self._recent :].astype(np.int32)
        items, scores = np.empty((len(query), k), np.int32), np.empty((len(query), k), np.float32)
        for row in range(len(query)):
            items[row], scores[row] = self._best_of(found[row], query[row], recent[row], exclude[row], k)
        return items, scores

    def _best_of(
        self,
        found: NDArray[np.int64],
        query: NDArray[np.float32],
        recent: NDArray[np.int32],
        exclude: NDArray[np.int32],
        k: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        files = self._files
        near = files.neighbour_item[recent].ravel()
        closeness = (files.neighbour_weight[recent] * files.recent_weights).ravel()
        items, places = np.unique(np.concatenate((near, found)), return_inverse=True)
        scores = self._logits(items, query, places[: len(near)], closeness)
        where = np.searchsorted(items, exclude)
        where[where == len(items)] = 0
        scores[where[items[where] == exclude]] = NEVER
        if items[0] == 0:
            scores[0] = NEVER
        if np.count_nonzero(scores > NEVER) < k:
            # Too few were found: so much is asked for, or excluded, that all items have to be looked at.
            items = np.arange(self._count + 1)
            scores = self._logits(items, query, near, closeness)
            scores[exclude] = NEVER
            items, scores = items[1:], scores[1:]
        chosen = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
        chosen = chosen[np.lexsort((items[chosen], -scores[chosen]))]
        return items[chosen].astype(np.int32), scores[chosen]

    def _logits(
        self, items: NDArray[Any], query: NDArray[np.float32], places: NDArray[Any], closeness: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Logits `[items]`; `closeness` is added at `places`, some of them twice."""
        scores = self.item_vectors[items] @ query + self._files.item_bias[items]
        scores += np.bincount(places, closeness, len(items))
        return scores


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
        index.nprobe = files.probed_lists
    except (RuntimeError, AttributeError) as error:
        raise ArtifactError(f"{files.path}: faiss cannot load it: {error}") from error
    least = artifact.item_vectors.shape[1] + 1
    if count != artifact.info.item_count or width not in (least, least + 1):
        raise ArtifactError(
            f"{files.path}: holds {count} points of {width} numbers, expected {artifact.info.item_count} of {least}"
        )
    return index
