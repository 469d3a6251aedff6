"""An approximate index of the items, so that an answer from a large catalogue need not multiply all of it.

faiss' product quantization with 4 bits for each dimension (fast scan) reads an eighth of the bytes of the item vectors,
and what comes out is only a choice of candidates. `serve` computes their logits exactly, together with those of the
recent items' neighbours. The item's bias is one more dimension, in which every query is 1; all are rotated at random,
because the scan counts in steps of the largest range, which would be that of the bias (with 1,000,000 items 4,000
candidates held 0.92 of the ten best, rotated 250 held all). Lists of which only the nearest are scanned (an inverted
file) were no gain: requests of random models needed all of them.

The items with the highest trend are candidates, too: the trend is not in the index.

How many candidates are needed is measured here, with the trend of the last event, on requests of validation cases and
on made-up ones separately: the fewest that hold WANTED_RECALL of the ten best items of both kinds, on every second
request. What they hold is measured on the other requests; where that is less than LEAST_RECALL for either kind, the
export is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrec.data.batches import case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.errors import ExportError
from jaxrec.onnx.convert import Graph
from jaxrec.onnx.parity import OF_ANSWER, PROBE_ROWS, make_probe, open_session

FROM_ITEMS = 50_000
"""So many items and more get an index; with fewer the exact product costs little more (bench/large_catalogue.md)."""
INDEX_TOP, MANY = 10, 100
"""Recall of the INDEX_TOP best decides; that of the MANY best is only reported."""
LEAST_RECALL = 0.99
"""Mean share of the INDEX_TOP best items that are among the candidates."""
WANTED_RECALL = 0.995
"""Other requests than those of the measurement keep less or more."""
CANDIDATES = (250, 500, 1000, 2000, 4000)
# With k and with what is excluded more candidates are needed; `serve` does the same.
CANDIDATES_PER_ANSWER = 4
SAMPLE = 20_000  # items, from which the 16 steps of each dimension are learned
LEAST_ITEMS = 16  # as many as there are steps
ITEMS_PER_ADD = 50_000
MOST_PROBES = 250


@dataclass(frozen=True)
class Recall:
    """Mean shares of the best items that are among the candidates, on `probes` requests."""

    of_top: float
    of_many: float
    probes: int


@dataclass(frozen=True)
class Index:
    """The file's content, and what the manifest says of it."""

    content: bytes
    kind: str
    candidates: int
    recall: dict[str, Recall]
    """By kind of request."""


@dataclass(frozen=True)
class Probes:
    """Requests to measure recall on: `query` [requests, width] float32, `exclude` [requests, m] int32 (0 = nothing)."""

    query: np.ndarray
    exclude: np.ndarray


def probe_requests(
    data: PreparedData, sequence_query: Graph, item_vectors: np.ndarray, max_history: int, exclude_seen: bool = True
) -> dict[str, Probes]:
    """Requests by kind: at most MOST_PROBES validation cases, and as many made-up ones, which may be less alike."""
    session = open_session(sequence_query)
    item_count = len(item_vectors) - 1
    made_up = (make_probe(item_count, max_history, seed).inputs() for seed in range(MOST_PROBES // PROBE_ROWS))
    probes = {}
    for kind, requests in (("validation", _validation_requests(data, max_history, exclude_seen)), ("made_up", made_up)):
        queries, excluded = [], []
        for request in requests:
            inputs = {name: array for name, array in request.items() if name not in OF_ANSWER}
            queries.append(session.run(["query"], {**inputs, "vector": item_vectors[request["item"]]})[0])
            excluded.append(request["exclude"])
        if queries:
            width = max(rows.shape[1] for rows in excluded)
            exclude = [np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in excluded]
            probes[kind] = Probes(np.concatenate(queries), np.concatenate(exclude))
    return probes


def _validation_requests(data: PreparedData, max_history: int, exclude_seen: bool) -> Iterator[dict[str, np.ndarray]]:
    """Batches as the inputs of `sequence.onnx`, without k."""
    cases = data.split.validation
    if not len(cases):
        return
    chosen = np.unique(np.linspace(0, len(cases) - 1, MOST_PROBES).astype(np.int64))
    left = len(chosen)
    cases = Cases(cases.users[chosen], cases.rows[chosen])
    for batch in case_batches(data, cases, max_history, exclude_seen=exclude_seen):
        arrays = {**batch.events._asdict(), "request_gap": batch.request_gap, "exclude": batch.exclude}
        # The last batch is filled with repeats of its last case.
        yield {name: np.asarray(array)[:left] for name, array in arrays.items()}
        left -= len(batch.target)


def build_index(
    item_vectors: np.ndarray, item_bias: np.ndarray, trend: np.ndarray, probes: Mapping[str, Probes]
) -> Index:
    """The index of `item_vectors` [items + 1, width] and `item_bias` [items + 1], without the padding in row 0.

    `trend` [items + 1] is added to the logits of the requests that it is measured on. The same arrays give the same
    index on the same machine. Raises ExportError.
    """
    faiss = _faiss()
    points = index_points(item_vectors[1:], item_bias[1:])
    count, width = points.shape
    if count < LEAST_ITEMS:
        raise ExportError(
            f"index: the catalogue has {count} items, expected {LEAST_ITEMS} or more; export with --index never"
        )
    kind = f"RR{width},PQ{width}x4fs"
    index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    with tqdm(total=count, desc="index", unit="item") as progress:
        index.train(points[np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])])
        for start in range(0, count, ITEMS_PER_ADD):
            chunk = points[start : start + ITEMS_PER_ADD]
            index.add(chunk)
            progress.update(len(chunk))
    candidates, recall = choose_candidates(index, points, trend[1:], probes)
    return Index(bytes(faiss.serialize_index(index)), kind, candidates, recall)


def index_points(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[n, width + 1] float32: vectors with their bias."""
    return np.ascontiguousarray(np.concatenate([vectors, bias[:, None]], axis=1), np.float32)


def choose_candidates(
    index: Any, points: np.ndarray, trend: np.ndarray, probes: Mapping[str, Probes]
) -> tuple[int, dict[str, Recall]]:
    """The fewest candidates that hold WANTED_RECALL of both kinds of requests, else the most, and what they hold.

    They are chosen on every second request of a kind, and measured on the others. Raises ExportError where they hold
    less than LEAST_RECALL.
    """
    chosen_on = [_Searched(index, points, trend, _every_second(of_kind, 0)) for of_kind in probes.values()]
    candidates = 0
    for candidates in CANDIDATES:
        if all(searched.recall(candidates, INDEX_TOP) >= WANTED_RECALL for searched in chosen_on):
            break
    recall = {}
    for kind, of_kind in probes.items():
        # A lone request is all there is.
        others = _every_second(of_kind, 1 if len(of_kind.query) > 1 else 0)
        searched = _Searched(index, points, trend, others)
        recall[kind] = Recall(
            searched.recall(candidates, INDEX_TOP), searched.recall(candidates, MANY), len(others.query)
        )
        if recall[kind].of_top < LEAST_RECALL:
            raise ExportError(
                f"index: {candidates} candidates hold {recall[kind].of_top:.4f} of the {INDEX_TOP} best items on"
                f" {len(others.query)} requests ({kind}), expected {LEAST_RECALL} or more; export with --index never"
            )
    return candidates, recall


def _every_second(probes: Probes, start: int) -> Probes:
    return Probes(probes.query[start::2], probes.exclude[start::2])


class _Searched:
    """What the index and the exact product give for some requests."""

    def __init__(self, index: Any, points: np.ndarray, trend: np.ndarray, probes: Probes) -> None:
        queries = index_points(probes.query, np.ones(len(probes.query), np.float32))
        self._best = _best_items(points, trend, queries, probes.exclude)
        self._trending = np.argsort(-trend, kind="stable")[: max(CANDIDATES)]
        self._trending = self._trending[trend[self._trending] > trend.min()]
        self._excluded = (probes.exclude > 0).sum(axis=1)
        most = max(CANDIDATES) + CANDIDATES_PER_ANSWER * MANY + int(self._excluded.max(initial=0))
        self._found = index.search(queries, min(len(points), most))[1]

    def recall(self, candidates: int, k: int) -> float:
        """Of the k best."""
        best = self._best[:, :k]
        count = candidates + CANDIDATES_PER_ANSWER * k + self._excluded
        trending = self._trending[:candidates]
        held = [
            np.isin(row[row >= 0], np.concatenate([ids[:n], trending])).sum()
            for row, ids, n in zip(best, self._found, count, strict=True)
        ]
        wanted = int(np.sum(best >= 0))
        return float(np.sum(held) / wanted) if wanted else 1.0


def _best_items(points: np.ndarray, trend: np.ndarray, queries: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """[requests, MANY] places of the exact best that are not excluded, best first; -1 where there are no more."""
    most = min(MANY, len(points))
    best = np.empty((len(queries), most), np.int64)
    for row, (query, excluded) in enumerate(zip(queries, exclude, strict=True)):
        scores = points @ query + trend
        scores[excluded[excluded > 0] - 1] = -np.inf
        chosen = np.argpartition(-scores, most - 1)[:most]
        chosen = chosen[np.argsort(-scores[chosen])]
        best[row] = np.where(scores[chosen] > -np.inf, chosen, -1)
    return best


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ExportError(f'the index needs faiss: pip install "jaxrec[export]" ({error})') from error
    return faiss
