"""Answers from a large catalogue without multiplying all of it, where the model directory has an index of its items.

Graphs without the items' arrays give the query and the state. The index (faiss, `jaxrec.onnx.ann_index`) names
candidates for the query; the neighbours of the recent items, the items with the highest trend and those of a history
that may be answered are candidates too, since what is added to their logits is not in the index. The logits of all of
those are computed exactly, so an item can be missing from an answer, but none has a wrong score. How many candidates it
takes for that to be rare was measured at the export.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.model.directory import Artifact, IndexFiles
from serve.model.manifest import ArtifactError
from serve.model.ranking.faiss_index import ItemIndex
from serve.model.ranking.live_trend import Blocked, Graph, Trend, Trending

NEVER = np.float32(-1e30)
"""The score of what is excluded, as the graphs have it."""
OF_ANSWER = ("exclude", "k", "seen", "seen_score")
"""Inputs that the state and the query do not depend on."""
NARROW = 32
"""If a filter allows at most one in NARROW items, all of them are multiplied and the index is not searched.

Measured with 500,000 vectors of 256 numbers on one core, for one query: to copy and multiply 1/16 of them took 37 ms,
1/24 20 ms, 1/32 15 ms and 1/64 10 ms; the index 15 to 29 ms for any share, and the product of all 97 to 155 ms."""
MORE = 1.5
"""A filtered search asks the index for MORE / (share of allowed items) times as many candidates as another one.

The share is that among all items. Among the best items of a query it may be smaller."""
CHECKED_QUERIES = 16
CHECKED_ITEMS = 10
LEAST_KEPT = 0.5
"""Share of the best CHECKED_ITEMS of the exact product that must be candidates, over the CHECKED_QUERIES.

The export refuses less than 0.99 of them on requests; the queries here are others; they detect an index of other
items, which holds a few thousandths of them."""


class IndexedGraph:
    """Takes and answers what `sequence.onnx` or `step.onnx` would; safe to share between threads.

    But `k` may also be `[batch]`, each row's own: then a row's answer depends on its own only, and ends with items 0
    and scores NEVER where its neighbours asked for more.
    """

    def __init__(self, query_graph: Graph, state: str, search: "Search") -> None:
        """Runs nothing yet.

        Args:
            query_graph: The graph of the same name that answers a query.
            state: The name of its other output.
            search: Finds the items for a query.
        """
        self._graph = query_graph
        self._state = state
        self._search = search

    def run(
        self,
        outputs: Sequence[str],
        inputs: dict[str, NDArray[Any]],
        trend: Trend,
        blocked: Sequence[Blocked | None] = (),
    ) -> list[NDArray[Any]]:
        """As a session of ONNX Runtime.

        Args:
            outputs: Names among `items`, `scores`, `query` and that of the state.
            inputs: Those of the graph but the trend and `blocked`; `k` int64 `[1]` or `[batch]`.
            trend: With what `Search.trending` made of it.
            blocked: What is blocked in each row, None: nothing; empty: nothing in any row.

        Returns:
            The outputs in the order of their names.
        """
        events = {name: tensor for name, tensor in inputs.items() if name not in OF_ANSWER}
        events["vector"] = self._search.item_vectors[inputs["item"]]
        state, query = self._graph.run([self._state, "query"], events)
        k = np.broadcast_to(inputs["k"], len(query))
        seen = (inputs["seen"], inputs["seen_score"]) if "seen" in inputs else None
        assert trend.trending is not None
        items, scores = self._search.best(query, state, inputs["exclude"], k, trend.trending, seen, blocked)
        answer = {self._state: state, "items": items, "scores": scores, "query": query}
        return [answer[name] for name in outputs]


class Search:
    """The items of one model, and the index over them. Immutable."""

    def __init__(self, artifact: Artifact, files: IndexFiles) -> None:
        """Loads the index, and checks on some queries that it is one of the model's items.

        Args:
            artifact: The model.
            files: What the model directory says about the index.

        Raises:
            ArtifactError: The index does not fit the model, or faiss is not installed.
        """
        self.item_vectors = artifact.item_vectors
        self._bias = files.item_bias
        self._neighbour_item = files.neighbour_item
        self._neighbour_weight = files.neighbour_weight
        self._recent_weights = files.recent_weights
        self._recent = len(files.recent_weights)
        self._candidates = files.candidates
        self._candidates_per_answer = files.candidates_per_answer
        self._count = artifact.info.item_count
        self._index = ItemIndex(files.path, files.content, self._count, self.item_vectors.shape[1] + 1)
        self._of_thread = threading.local()
        kept = self._kept()
        if kept < LEAST_KEPT:
            raise ArtifactError(
                f"{files.path}: its candidates hold {kept:.2f} of the best items of {CHECKED_QUERIES} queries, expected"
                f" {LEAST_KEPT} or more: it is an index of other items than {artifact.directory / 'item_vectors.npy'},"
                " or the items are too much alike for an index; use --search exact, or export the model again with"
                " --index never"
            )

    def trending(self, trend: NDArray[np.float32]) -> Trending:
        """What searches need of a trend.

        Args:
            trend: `[items+1]` float32, what is added to the items' logits.

        Returns:
            The bias with the trend, and as many of the items with the highest trend as a search has candidates, without
            those that have the lowest one.
        """
        most = min(self._candidates, self._count)
        items = 1 + np.argpartition(-trend[1:], most - 1)[:most]
        # Those with the lowest gain on no other.
        return Trending(self._bias + trend, items[trend[items] > trend[1:].min()])

    def best(
        self,
        query: NDArray[np.float32],
        state: NDArray[np.float32],
        exclude: NDArray[np.int32],
        k: NDArray[np.int64],
        trending: Trending,
        seen: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
        blocked: Sequence[Blocked | None] = (),
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k best items. How many candidates a row gets depends on its own k, exclusions and items alone.

        A row with blocked items gets as many allowed candidates as a row without blocked items gets in all. If the
        index does not name that many, or few items are allowed, every allowed item is a candidate.

        Args:
            query: `[batch, width]` float32.
            state: `[batch, state width]` float32, ends with the recent items.
            exclude: `[batch, m]` int32, item indices that are never answered; 0 excludes nothing.
            k: `[batch]` int64, at most the number of items each.
            trending: What `trending` made of the trend.
            seen: Items of the histories `[batch, n]` int32, 0 is none, and what is added to their logits `[batch, n]`
                float32; None: nothing.
            blocked: For each row the items that are never answered, None: none; empty: none in any row.

        Returns:
            Item indices `[batch, largest k]` int32 and their logits float32, best first, lower indices first among
            equals; beyond a row's own k items, or those that are not blocked, 0 with the logit NEVER.
        """
        shape = len(query), int(k.max(initial=0))
        items, scores = np.zeros(shape, np.int32), np.full(shape, NEVER, np.float32)
        counts = self._candidates + self._candidates_per_answer * k + np.count_nonzero(exclude, axis=1)
        own, own_scores = (exclude[:, :0], np.zeros((len(query), 0), np.float32)) if seen is None else seen
        # What is subtracted from an item may take it out of the answer; then another one has to be found.
        counts += np.count_nonzero(own_scores < 0, axis=1)
        masks = blocked or [None] * len(query)
        rows = [None if row is None else _Allowed(row[: self._count + 1]) for row in masks]
        found = self._found_allowed(query, counts, rows)
        recent = state[:, -self._recent :].astype(np.int32)
        more = self._zeros()
        for row, wanted in enumerate(k.tolist()):
            near = self._neighbour_item[recent[row]].ravel()
            excluded, of_history = exclude[row], own[row]
            # What is added to the product: an array of all items, zeros but here, and afterwards zeros again.
            try:
                np.add.at(more, near, (self._neighbour_weight[recent[row]] * self._recent_weights).ravel())
                np.add.at(more, of_history, own_scores[row])
                more[excluded] = more[0] = NEVER
                best, of_index, allowed = None, found[row], rows[row]
                if of_index is not None:
                    candidates = np.concatenate((near, of_index, trending.items, of_history))
                    if allowed is not None:
                        candidates = allowed.of(candidates)
                    best = self._best_of(candidates, query[row], trending.bias, more, wanted)
                if best is None:
                    # Too few were found: so much is asked for, or excluded, that all items have to be looked at.
                    best = self._best_of_all(allowed, query[row], trending.bias, more, wanted)
            finally:
                more[near] = more[of_history] = more[excluded] = more[0] = 0
            n = len(best[0])
            items[row, :n], scores[row, :n] = best
        return items, scores

    def _found_allowed(
        self, query: NDArray[np.float32], counts: NDArray[np.int64], rows: "Sequence[_Allowed | None]"
    ) -> list[NDArray[np.int64] | None]:
        """As `_found`, of the allowed items: as if the index held those alone. None: all of them are to be candidates,
        since they are few, or the index did not name enough."""
        shares = np.array([1.0 if row is None else row.count / self._count for row in rows])
        searched = np.flatnonzero(shares > 1 / NARROW)
        more = np.where(shares < 1, MORE, 1.0)
        wanted = np.ceil(counts[searched] * more[searched] / shares[searched]).astype(np.int64)
        # More than all blocked items beside those that are wanted need not be named.
        wanted = np.minimum(wanted, counts[searched] + np.ceil((1 - shares[searched]) * self._count).astype(np.int64))
        found: list[NDArray[np.int64] | None] = [None] * len(query)
        for row, items in zip(searched.tolist(), self._found(query[searched], wanted), strict=True):
            allowed = rows[row]
            if allowed is None:
                found[row] = items
                continue
            kept = allowed.of(items)[: counts[row]]
            if len(kept) == counts[row]:
                found[row] = kept
        return found

    def _found(self, query: NDArray[np.float32], counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each row of `query` as many items as `counts` says, the best of the index first; 0 is none.

        Rows are searched together with those whose counts have the same next power of two.
        """
        points = np.ones((len(query), query.shape[1] + 1), np.float32)
        points[:, :-1] = query  # and 1 times the bias
        searched = np.minimum(2 ** np.ceil(np.log2(counts)).astype(np.int64), self._count)
        found: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(query)
        for n in np.unique(searched).tolist():
            rows = np.flatnonzero(searched == n)
            for row, items in zip(rows.tolist(), self._index.search(points[rows], n), strict=True):
                found[row] = items[: counts[row]]
        return found

    def _kept(self) -> float:
        """The share of the best items that are among the candidates, with some of the item vectors as queries.

        None of them is zero, if there are others: new items have such vectors, and no request has such a query. The
        best items would be those with the highest bias, which says little of the index.
        """
        nonzero = np.flatnonzero(self.item_vectors.any(axis=1))
        items = nonzero if len(nonzero) else np.arange(1, 1 + self._count)
        query = self.item_vectors[items[np.linspace(0, len(items) - 1, CHECKED_QUERIES).astype(np.int64)]]
        k = min(CHECKED_ITEMS, self._count)
        counts = np.full(len(query), self._candidates + self._candidates_per_answer * k)
        scores = self.item_vectors @ query.T + self._bias[:, None]
        scores[0] = NEVER
        least = np.partition(scores, len(scores) - k, axis=0)[len(scores) - k]
        found = self._found(query, counts)
        # Among equals others than those of the exact product are as good.
        held = [np.count_nonzero(scores[items, row] >= least[row]) for row, items in enumerate(found)]
        return float(np.minimum(held, k).mean() / k)

    def _best_of(
        self,
        candidates: NDArray[np.int64],
        query: NDArray[np.float32],
        bias: NDArray[np.float32],
        more: NDArray[np.float32],
        k: int,
    ) -> tuple[NDArray[Any], NDArray[np.float32]] | None:
        """The k best of candidates, some of which are there several times, and their logits; None: there are fewer."""
        scores = self._logits(candidates, query, bias, more)
        # An item is near each recent one, found, trending and seen at most.
        most = k * (self._recent + 3)
        if most < len(scores):
            chosen = _at_least(scores, most)
            candidates, scores = candidates[chosen], scores[chosen]
        candidates, first = np.unique(candidates, return_index=True)
        scores = scores[first]
        return best_of(candidates, scores, k) if np.count_nonzero(scores > NEVER) >= k else None

    def _best_of_all(
        self,
        allowed: "_Allowed | None",
        query: NDArray[np.float32],
        bias: NDArray[np.float32],
        more: NDArray[np.float32],
        k: int,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The k best of the allowed items, None: of all; fewer where there are fewer."""
        if allowed is not None and allowed.count * NARROW <= self._count:
            items = allowed.items()
            return best_of(items, self._logits(items, query, bias, more), min(k, len(items)))
        # A slice is no copy; one of most of the vectors would take longer than their product, and their memory again.
        logits = self._logits(slice(1, None), query, bias, more)
        if allowed is not None:
            logits[allowed.blocked[1:]] = -np.inf
            k = min(k, allowed.count)
        return best_of(np.arange(1, self._count + 1), logits, k)

    def _logits(
        self,
        items: NDArray[np.int64] | slice,
        query: NDArray[np.float32],
        bias: NDArray[np.float32],
        more: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        return self.item_vectors[items] @ query + bias[items] + more[items]

    def _zeros(self) -> NDArray[np.float32]:
        """`[items+1]` zeros, the calling thread's own."""
        zeros: NDArray[np.float32] | None = getattr(self._of_thread, "zeros", None)
        if zeros is None:
            zeros = self._of_thread.zeros = np.zeros(self._count + 1, np.float32)
        return zeros


class _Allowed:
    """The items of a row in which some are blocked."""

    def __init__(self, blocked: Blocked) -> None:
        self.blocked = blocked
        self.count = len(blocked) - 1 - int(np.count_nonzero(blocked[1:]))
        """How many are allowed."""

    def items(self) -> NDArray[np.int64]:
        """`[count]`, those that are allowed."""
        return 1 + np.flatnonzero(~self.blocked[1:])

    def of(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of some items that are allowed, without 0."""
        return items[(items > 0) & ~self.blocked[items]]


def best_of(items: NDArray[Any], scores: NDArray[np.float32], k: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The k best of at least as many items, lower ones first among equals."""
    chosen = _at_least(scores, k)
    chosen = chosen[np.lexsort((items[chosen], -scores[chosen]))[:k]]
    return items[chosen], scores[chosen]


def _at_least(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Places of the k best scores, and of all that equal the last of them."""
    if k == 0:
        return np.empty(0, np.intp)
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    return np.flatnonzero(~(scores < last))  # so that nan is not lost
