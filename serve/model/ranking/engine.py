"""Runs the graphs of a model with ONNX Runtime. Knows item indices and arrays, no raw ids and no gRPC."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve.model.directory import Artifact
from serve.model.features import Features
from serve.model.graphs import (
    QUERY,
    TREND,
    exact_graphs,
    graph_arrays,
    neighbour_arrays,
    parts_graph,
    query_graphs,
    searches_index,
    session,
    state_width,
    trend_graph,
)
from serve.model.manifest import ArtifactError
from serve.model.parts import OF_GRAPH, Part
from serve.model.ranking.live_trend import Blocked, ExactGraph, Graph, Trend, TrendGraph
from serve.model.ranking.search import NEVER, IndexedGraph, Search
from serve.model.repeat import SeenScores
from serve.model.trend import Counted
from serve.settings import Provider, SearchBy

Number = TypeVar("Number", np.int32, np.float32)

# The graphs give an excluded item a score of at most this.
EXCLUDED_SCORE = NEVER

# A run costs about as much as so many events of one more row in it (10,000 items, two LSTMs of 128).
PADDING = 10


class Basis(NamedTuple):
    """What the scores of a ranking were computed from."""

    state: NDArray[np.float32]
    """`[1, width]`, after the last event."""
    request_gap: float
    """As in `Features`."""
    seen: SeenScores | None
    """As in `Features`."""
    trend: Trend


class Ranking(NamedTuple):
    """Items best first, at most as many as were asked for."""

    items: NDArray[np.int32]
    scores: NDArray[np.float32]
    counted: Counted | None = None
    """The events of the trend that ranked them; None: they are not noted."""
    query: NDArray[np.float32] | None = None
    """`[width]`, what the items' vectors were multiplied with; None: it was not asked for."""
    basis: Basis | None = None
    """None: it is no ranking by the model."""


class Step(NamedTuple):
    """One user's last event on top of the state before it, as `step.onnx` takes them: a batch of one each."""

    state: NDArray[np.float32]
    """`[1, width]`, zeros for an empty history."""
    item: NDArray[np.int32]
    """`[1]`, not 0."""
    rating: NDArray[np.float32]
    """`[1]`, 0..1 over the rating scale; -1 = no rating."""
    gap: NDArray[np.float32]
    """`[1]`, seconds since the event before; -1 for the first."""
    request_gap: float
    """Seconds from this event to the request; -1 = not known."""
    exclude: NDArray[np.int32]
    """`[1, m]`, m >= 1, item indices that are never answered; 0 excludes nothing."""
    seen: SeenScores | None = None
    """As in `Features`."""
    blocked: Blocked | None = None
    """As in `Features`."""


class Engine:
    """The graphs of one model, ready to run, and safe to share between threads. Immutable but for the trend.

    Both graphs run through plain `session.run`: with inputs and outputs bound to buffers of their own a step of one
    user took as long (0.140 beside 0.142 ms, 10,000 items), and answers would have to be copied out of them.
    """

    def __init__(
        self,
        artifact: Artifact,
        provider: Provider = "auto",
        intra_op_threads: int = 1,
        search_by: SearchBy = "auto",
    ) -> None:
        """Loads the graphs; the trend is that of the export's counts, as of now.

        `search_by`: with the items' index or the whole product; auto: the index, if there is one and the graphs don't
        run on CUDA, where the whole product is fast and the index would search on the CPU.

        More than one intra-op thread made single requests no faster and the tail worse, so requests run
        beside each other on one thread each.

        Raises ArtifactError for a graph that breaks the contract, ProviderError when `provider` is "cuda" and
        CUDA does not run.
        """
        self.item_count = artifact.info.item_count
        self._repeats = artifact.info.repeat is not None
        if search_by == "index" and artifact.index is None:
            raise ArtifactError(f"{artifact.directory}: has no index, export it with --index always")
        index = artifact.index
        sequence = step = None
        if index is not None and search_by != "exact":
            sequence, step = (
                session(graph, provider, intra_op_threads, {}) for graph in query_graphs(artifact.directory, index)
            )
            if not searches_index(search_by, sequence.get_providers()[0]):
                sequence = step = None
        if sequence is None or step is None:
            arrays = {} if index is None else graph_arrays(artifact.item_vectors, index)
            # The graphs may refer to their memory.
            self._arrays = arrays
            sequence, step = (session(graph, provider, intra_op_threads, arrays) for graph in exact_graphs(artifact))
            index = None
        self.state_width = state_width(artifact, sequence, step)
        self.provider: str = sequence.get_providers()[0]
        """ONNX Runtime's name of the execution provider that really runs."""
        self.search_by: Literal["exact", "index"] = "exact" if index is None else "index"
        self.trend: Trend
        """It is replaced as a whole, so that no run sees half of each."""
        self._search: Search | None = None
        self._sequence: TrendGraph = ExactGraph(sequence, self.item_count)
        self._step: TrendGraph = ExactGraph(step, self.item_count)
        if index is not None:
            if len(index.recent_weights) > self.state_width:
                raise ArtifactError(
                    f"{artifact.directory}: index.recent_weights are {len(index.recent_weights)}, expected no more than"
                    f" the state's {self.state_width} numbers"
                )
            self._search = search = Search(artifact, index)
            self._sequence = IndexedGraph(sequence, "state", search)
            self._step = IndexedGraph(step, "next_state", search)
        # Asked for explanations alone.
        self._arrays_of_parts = {} if artifact.index is None else neighbour_arrays(artifact.index)
        self._parts: Graph = session(parts_graph(artifact), "cpu", 1, self._arrays_of_parts)
        self._check_parts(artifact)
        self.exported = artifact.trend
        """The counts that the model was exported with."""
        # Small, and not worth the way to a GPU.
        self._trend_of_counts: Graph = session(trend_graph(artifact), "cpu", 1, {})
        try:
            self.use_counts(artifact.trend.at(time.time()))
        # ONNX Runtime's exceptions have no common base and no public names.
        except Exception as error:
            raise ArtifactError(
                f"{artifact.directory / 'trend.onnx'}: fails on the export's counts: {error}"
            ) from error

    def use_counts(
        self,
        counts: NDArray[np.float32],
        counted: Counted | None = None,
        added: Sequence[str] = (),
        of_added: NDArray[np.float32] | None = None,
    ) -> None:
        """From the next run on, the trend is that of these counts.

        Args:
            counts: `[half-lives, items+1]` float32, decayed to now; column 0 is zeros.
            counted: The events in the counts, for the answers; None: they are not noted.
            added: The raw ids of added items.
            of_added: `[half-lives, added]`, their counts; None: there are none. They do not change the trend of the
                model's own items, which can so be computed again from the log.

        Raises:
            ValueError: `trend.onnx` made numbers of them that are not finite, or not one for each item. The trend
                stays as it was. What ONNX Runtime raises is passed on.
        """
        trend = self._trend_of(counts)
        trends: dict[str, float] = {}
        if of_added is not None:
            # A trend depends on the sum over all items. The first column has what is missing to that of the model's
            # own, so that an added item with as many events as one of these has the same trend.
            missing = counts.sum(axis=1, keepdims=True) - of_added.sum(axis=1, keepdims=True)
            found = self._trend_of(np.concatenate([missing, of_added], axis=1), first=1)
            trends = {added[at]: float(found[at]) for at in np.flatnonzero(found).tolist()}
        trending = None if self._search is None else self._search.trending(trend)
        self.trend = Trend(trend, trending, counted, trends)

    def parts(
        self, basis: Basis, items: NDArray[np.int32], vectors: NDArray[np.float32]
    ) -> dict[Part, NDArray[np.float32]]:
        """What parts of the model gave to the logits of items.

        Args:
            basis: Of a ranking.
            items: `[n]` item indices; 0: one that the model does not know.
            vectors: `[n, width]`, theirs.

        Returns:
            `[n]` for each part of `OF_GRAPH`.
        """
        request_gap = np.array([basis.request_gap], np.float32)
        inputs = {"state": basis.state, "request_gap": request_gap, "item": items[None], "vector": vectors[None]}
        ((parts,),) = self._parts.run(["parts"], inputs)
        return dict(zip(OF_GRAPH, parts.T, strict=True))

    def _check_parts(self, artifact: Artifact) -> None:
        """Raises ArtifactError for a graph that does not know the parts of the model's scores."""
        state, item = np.zeros((1, self.state_width), np.float32), np.ones(1, np.int32)
        trend = Trend(np.zeros(self.item_count + 1, np.float32), None, None, {})
        try:
            found = self.parts(Basis(state, -1.0, None, trend), item, artifact.item_vectors[item])
            if any(part.shape != (1,) for part in found.values()):
                raise ValueError(f"expected a number for each part, came {found}")
        # ONNX Runtime's exceptions have no common base and no public names.
        except Exception as error:
            raise ArtifactError(f"{artifact.directory / 'parts.onnx'}: fails on a state: {error}") from error

    def _trend_of(self, counts: NDArray[np.float32], first: int = 0) -> NDArray[np.float32]:
        """`[items - first]`, not writeable, without that of the first columns; raises ValueError as `use_counts`."""
        trend: NDArray[np.float32]
        (trend,) = self._trend_of_counts.run([TREND], {"counts": counts})
        trend, counts = trend[first:], counts[:, first:]
        if trend.shape != counts.shape[1:] or not np.isfinite(trend).all():
            shape = f"({counts.shape[1]},)"
            raise ValueError(f"expected a trend of finite numbers {shape}, came {trend.dtype} {trend.shape}")
        trend.setflags(write=False)
        return trend

    def rank(
        self, rows: Sequence[Features], k: int | Sequence[int], trend: Trend | None = None, *, queries: bool = False
    ) -> list[Ranking]:
        """Ranks the items for each row with `sequence.onnx`, rows of like length in one run.

        A row's answer does not depend on its neighbours. `k`, one for all or one for each row, is cut to the number of
        items; without the index a row can get as many as the neighbour that asked for most. `trend` None: the newest.
        `queries`: whether each ranking comes with its query.
        """
        return [ranking for ranking, _ in self.replay(rows, k, trend, queries=queries)]

    def replay(
        self,
        rows: Sequence[Features],
        k: int | Sequence[int] = 1,
        trend: Trend | None = None,
        *,
        queries: bool = False,
    ) -> list[tuple[Ranking, NDArray[np.float32]]]:
        """As `rank`, with the state `[1, width]` after each row's last event."""
        ks = [k] * len(rows) if isinstance(k, int) else k
        trend = trend or self.trend  # one for all groups: their scores may be compared
        answers: list[tuple[Ranking, NDArray[np.float32]] | None] = [None] * len(rows)
        for group in like_lengths([len(row.item) for row in rows]):
            found = self._run_sequence([rows[at] for at in group], [ks[at] for at in group], trend, queries)
            for at, answer in zip(group, found, strict=True):
                answers[at] = answer
        return [answer for answer in answers if answer is not None]

    def run_sequence(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], blocked: Blocked | None = None
    ) -> list[NDArray[Any]]:
        """One run of `sequence.onnx` on tensors as its contract has them, without the trend and `blocked`. Nothing is
        checked. `blocked` holds for every row."""
        return self._sequence.run(outputs, dict(inputs), self.trend, [blocked] * len(inputs["length"]))

    def step(
        self, rows: Sequence[Step], k: int | Sequence[int], trend: Trend | None = None, *, queries: bool = False
    ) -> list[tuple[Ranking, NDArray[np.float32]]]:
        """Ranks the items after each row's event, in one run of `step.onnx`, with the next state `[1, width]`.

        Neither does a row's answer depend on its neighbours here, nor may `k` be too large. `trend` None: the newest.
        """
        if len(rows) == 1:
            (row,) = rows
            state, item, rating, gap, exclude = row.state, row.item, row.rating, row.gap, row.exclude
        else:
            state, item, rating, gap = (np.concatenate([row[at] for row in rows]) for at in range(4))
            exclude = _padded([row.exclude[0] for row in rows])
        inputs = {"state": state, "item": item, "rating": rating, "gap": gap, "exclude": exclude}
        return self._run(self._step, "next_state", inputs, rows, k, trend or self.trend, queries)

    def _k(self, k: int | Sequence[int]) -> NDArray[np.int64]:
        """What the graphs take: one number, the largest; with the index one for each row, if they were given so."""
        largest = k if isinstance(k, int) else k if self.search_by == "index" else max(k)
        return np.minimum(np.atleast_1d(np.array(largest, np.int64)), self.item_count)

    def _run_sequence(
        self, rows: Sequence[Features], k: Sequence[int], trend: Trend, queries: bool
    ) -> list[tuple[Ranking, NDArray[np.float32]]]:
        lengths = np.array([len(row.item) for row in rows], np.int32)
        shape = (len(rows), int(lengths.max()))
        item, rating, gap = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for at, row in enumerate(rows):
            n = len(row.item)
            item[at, :n], rating[at, :n], gap[at, :n] = row.item, row.rating, row.gap
        exclude = _padded([row.exclude for row in rows])
        inputs = {"item": item, "rating": rating, "gap": gap, "length": lengths, "exclude": exclude}
        return self._run(self._sequence, "state", inputs, rows, k, trend, queries)

    def _run(
        self,
        graph: TrendGraph,
        state: str,
        inputs: dict[str, NDArray[Any]],
        rows: Sequence[Features | Step],
        k: int | Sequence[int],
        trend: Trend,
        queries: bool,
    ) -> list[tuple[Ranking, NDArray[np.float32]]]:
        """One run of a graph for some rows, with each row's state `[1, width]` from the output called `state`."""
        inputs["request_gap"] = np.array([row.request_gap for row in rows], np.float32)
        inputs["k"] = self._k(k)
        if self._repeats:
            inputs["seen"] = _padded([_NOTHING.items if row.seen is None else row.seen.items for row in rows])
            inputs["seen_score"] = _padded([_NOTHING.scores if row.seen is None else row.seen.scores for row in rows])
        outputs = [state, "items", "scores", *([QUERY] if queries else [])]
        states, items, scores, *query = graph.run(outputs, inputs, trend, [row.blocked for row in rows])
        # Copies of the rows of a batch, else one kept state would keep those of all its neighbours.
        kept = [states] if len(rows) == 1 else [states[at : at + 1].copy() for at in range(len(rows))]
        counts = [items.shape[1]] * len(rows)
        if scores[:, -1].min() <= EXCLUDED_SCORE:
            # Excluded items are last.
            counts = (scores > EXCLUDED_SCORE).sum(axis=1).tolist()
        return [
            (
                Ranking(
                    items[at, : counts[at]],
                    scores[at, : counts[at]],
                    trend.counted,
                    query[0][at] if query else None,
                    Basis(kept[at], row.request_gap, row.seen, trend),
                ),
                kept[at],
            )
            for at, row in enumerate(rows)
        ]


def like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Splits rows into groups that are worth a run of their own each; gives the places of their rows.

    Within a group no row is padded by more than PADDING events or by more than a quarter of the longest.
    """
    if len(lengths) == 1:
        return [[0]]
    groups: list[list[int]] = []
    longest = 0
    for at in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not groups or longest - lengths[at] > max(PADDING, longest // 4):
            groups.append([])
            longest = lengths[at]
        groups[-1].append(at)
    return groups


_NOTHING = SeenScores(np.zeros(0, np.int32), np.zeros(0, np.float32))


def _padded(rows: Sequence[NDArray[Number]]) -> NDArray[Number]:
    """Rows side by side as `[batch, longest]`, right-padded with 0, at least one wide."""
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows))), rows[0].dtype)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded
