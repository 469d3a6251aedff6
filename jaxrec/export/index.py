"""An approximate index of the items, so that an answer from a large catalogue need not multiply all of it.

The search is faiss' inverted file with product quantization to 4 bits for each dimension (fast scan): the lists whose
centres fit the query best are scanned in compressed form, and what comes out is only a choice of candidates. `serve`
computes their logits exactly, together with those of the recent items' neighbours. The item's bias is one more
dimension, in which every query is 1; all are rotated at random, because the scan counts in steps of the largest range,
which would be that of the bias (with 1,000,000 items 4,000 candidates held 0.92 of the ten best, rotated 250 all).

How many lists are scanned and how many candidates are taken is measured here, on real requests: the cheapest pair that
keeps WANTED_RECALL of the ten best items. Where no pair keeps LEAST_RECALL the export is refused.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrec.batches import case_batches
from jaxrec.export.errors import ExportError
from jaxrec.export.parity import PROBE_ROWS, make_probe, open_session
from jaxrec.prepare import PreparedData
from jaxrec.split import Cases

FROM_ITEMS = 50_000
"""So many items and more get an index; with fewer the exact product costs little more (bench/large_catalogue.md)."""
TOP = 10
LEAST_RECALL = 0.99
"""Mean share of the ten best items that are among the candidates."""
WANTED_RECALL = 0.995
"""Other requests than those of the measurement keep less or more."""
CANDIDATES = (250, 500, 1000, 2000, 4000)
# With k and with what is excluded more candidates are taken; `serve` does the same.
CANDIDATES_PER_ANSWER = 4
# What a pair costs, as measured on one core: nanoseconds for each item of the lists, and for each candidate.
SCAN_NS, RESCORE_NS = 8, 150
POINTS_PER_LIST = 64  # of the k-means
ITERATIONS = 10
CHUNK = 50_000
MOST_PROBES = 250


@dataclass(frozen=True)
class Index:
    """The file's content, and what the manifest says of it."""

    content: bytes
    kind: str
    lists: int
    probed_lists: int
    candidates: int
    recall: float
    probes: int


@dataclass(frozen=True)
class Probes:
    """Requests to measure recall on: `query` [requests, width] float32, `exclude` [requests, m] int32 (0 = nothing)."""

    query: np.ndarray
    exclude: np.ndarray


def probe_requests(data: PreparedData, sequence_query: bytes, item_vectors: np.ndarray, max_history: int) -> Probes:
    """Requests of at most MOST_PROBES validation cases, and as many made-up ones, which may be less alike."""
    session = open_session(sequence_query)
    queries, excluded = [], []
    item_count = len(item_vectors) - 1
    made_up = (vars(make_probe(item_count, max_history, seed)) for seed in range(MOST_PROBES // PROBE_ROWS))
    for request in itertools.chain(_validation_requests(data, max_history), made_up):
        inputs = {name: array for name, array in request.items() if name != "exclude"}
        queries.append(session.run(["query"], {**inputs, "vector": item_vectors[request["item"]]})[0])
        excluded.append(request["exclude"])
    width = max(rows.shape[1] for rows in excluded)
    exclude = [np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in excluded]
    return Probes(np.concatenate(queries), np.concatenate(exclude))


def _validation_requests(data: PreparedData, max_history: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches as the inputs of `sequence.onnx`, without k."""
    cases = data.split.validation
    if not len(cases):
        return
    chosen = np.unique(np.linspace(0, len(cases) - 1, MOST_PROBES).astype(np.int64))
    left = len(chosen)
    for batch in case_batches(data, Cases(cases.users[chosen], cases.rows[chosen]), max_history):
        arrays = {**batch.events._asdict(), "request_gap": batch.request_gap, "exclude": batch.exclude}
        # The last batch is filled with repeats of its last case.
        yield {name: np.asarray(array)[:left] for name, array in arrays.items()}
        left -= len(batch.target)


def build_index(item_vectors: np.ndarray, item_bias: np.ndarray, probes: Probes) -> Index:
    """The index of `item_vectors` [items + 1, width] and `item_bias` [items + 1], without the padding in row 0.

    The same arrays give the same index on the same machine. Raises ExportError.
    """
    faiss = _faiss()
    points = index_points(item_vectors[1:], item_bias[1:])
    count, width = points.shape
    lists = max(1, min(round(4 * count**0.5), count // POINTS_PER_LIST))
    kind = f"RR{width},IVF{lists},PQ{width}x4fs"
    index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    clustering = faiss.extract_index_ivf(index).cp
    clustering.niter, clustering.max_points_per_centroid = ITERATIONS, POINTS_PER_LIST
    with tqdm(total=count, desc=f"index: {lists} lists", unit="item") as progress:
        sample = np.random.default_rng(0).permutation(count)[: max(lists * POINTS_PER_LIST, 10_000)]
        index.train(points[np.sort(sample)])
        for start in range(0, count, CHUNK):
            chunk = points[start : start + CHUNK]
            index.add(chunk)
            progress.update(len(chunk))
    probed, candidates, recall = choose_search(index, points, probes)
    content = bytes(faiss.serialize_index(index))
    return Index(content, kind, lists, probed, candidates, recall, len(probes.query))


def index_points(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[n, width + 1] float32: vectors with their bias."""
    return np.ascontiguousarray(np.concatenate([vectors, bias[:, None]], axis=1), np.float32)


def choose_search(index: Any, points: np.ndarray, probes: Probes) -> tuple[int, int, float]:
    """The cheapest (probed lists, candidates) that keeps WANTED_RECALL, or the best that keeps LEAST_RECALL, and what
    it keeps. Raises ExportError when there is none."""
    lists = _faiss().extract_index_ivf(index)
    queries = index_points(probes.query, np.ones(len(probes.query), np.float32))
    best = _best_items(points, queries, probes.exclude)
    excluded = (probes.exclude > 0).sum(axis=1)
    most = min(len(points), max(CANDIDATES) + CANDIDATES_PER_ANSWER * TOP + int(excluded.max(initial=0)))
    halves = [lists.nlist >> shift for shift in range(lists.nlist.bit_length())]
    tried: dict[tuple[int, int], float] = {}
    for probed in halves:
        lists.nprobe = probed
        _, found = index.search(queries, most)
        for candidates in CANDIDATES:
            taken = candidates + CANDIDATES_PER_ANSWER * TOP + excluded
            kept = [np.isin(items[items >= 0], row[:n]).sum() for items, row, n in zip(best, found, taken, strict=True)]
            tried[probed, candidates] = float(np.sum(kept) / np.sum(best >= 0))

    def cost(pair: tuple[int, int]) -> float:
        probed, candidates = pair
        return SCAN_NS * probed * len(points) / lists.nlist + RESCORE_NS * candidates

    good = [pair for pair in sorted(tried, key=cost) if tried[pair] >= WANTED_RECALL]
    pair = good[0] if good else max(tried, key=lambda one: tried[one])
    if tried[pair] < LEAST_RECALL:
        raise ExportError(
            f"index: at most {tried[pair]:.4f} of the {TOP} best items are found (with {pair[0]} of {lists.nlist} lists"
            f" and {pair[1]} candidates, on {len(queries)} requests), expected {LEAST_RECALL} or more; export with"
            " --index never"
        )
    return *pair, tried[pair]


def _best_items(points: np.ndarray, queries: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """[requests, TOP] places of the exact best that are not excluded; -1 where there are no more."""
    top = min(TOP, len(points))
    best = np.empty((len(queries), top), np.int64)
    for row, (query, excluded) in enumerate(zip(queries, exclude, strict=True)):
        scores = points @ query
        scores[excluded[excluded > 0] - 1] = -np.inf
        chosen = np.argpartition(-scores, top - 1)[:top]
        best[row] = np.where(scores[chosen] > -np.inf, chosen, -1)
    return best


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ExportError(f"the index needs faiss: pip install 'jaxrec[export]' ({error})") from error
    return faiss
