"""An approximate index of the items, so that an answer from a large catalogue need not multiply all of it.

faiss' product quantization with 4 bits for each dimension (fast scan) reads an eighth of the bytes of the item vectors,
and what comes out is only a choice of candidates. `serve` computes their logits exactly, together with those of the
recent items' neighbours. The item's bias is one more dimension, in which every query is 1; all are rotated at random,
because the scan counts in steps of the largest range, which would be that of the bias (with 1,000,000 items 4,000
candidates held 0.92 of the ten best, rotated 250 held all). Lists of which only the nearest are scanned (an inverted
file) were no gain: requests of random models needed all of them.

How many candidates are taken is measured here, on requests: the fewest that hold WANTED_RECALL of the ten best items.
Where none hold LEAST_RECALL the export is refused.
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
SAMPLE = 20_000  # items, from which the 16 steps of each dimension are learned
CHUNK = 50_000
MOST_PROBES = 250


@dataclass(frozen=True)
class Index:
    """The file's content, and what the manifest says of it."""

    content: bytes
    kind: str
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
    kind = f"RR{width},PQ{width}x4fs"
    index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    with tqdm(total=count, desc="index", unit="item") as progress:
        index.train(points[np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])])
        for start in range(0, count, CHUNK):
            chunk = points[start : start + CHUNK]
            index.add(chunk)
            progress.update(len(chunk))
    candidates, recall = choose_candidates(index, points, probes)
    return Index(bytes(faiss.serialize_index(index)), kind, candidates, recall, len(probes.query))


def index_points(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[n, width + 1] float32: vectors with their bias."""
    return np.ascontiguousarray(np.concatenate([vectors, bias[:, None]], axis=1), np.float32)


def choose_candidates(index: Any, points: np.ndarray, probes: Probes) -> tuple[int, float]:
    """The fewest candidates that hold WANTED_RECALL, or the most where those hold LEAST_RECALL, and what they hold.

    Raises ExportError where they don't.
    """
    queries = index_points(probes.query, np.ones(len(probes.query), np.float32))
    best = _best_items(points, queries, probes.exclude)
    excluded = (probes.exclude > 0).sum(axis=1)
    most = max(CANDIDATES) + CANDIDATES_PER_ANSWER * TOP + int(excluded.max(initial=0))
    _, found = index.search(queries, min(len(points), most))
    candidates, recall = 0, 0.0
    for candidates in CANDIDATES:
        taken = candidates + CANDIDATES_PER_ANSWER * TOP + excluded
        held = [np.isin(items[items >= 0], row[:n]).sum() for items, row, n in zip(best, found, taken, strict=True)]
        recall = float(np.sum(held) / np.sum(best >= 0))
        if recall >= WANTED_RECALL:
            break
    if recall < LEAST_RECALL:
        raise ExportError(
            f"index: {candidates} candidates hold {recall:.4f} of the {TOP} best items on {len(queries)} requests,"
            f" expected {LEAST_RECALL} or more; export with --index never"
        )
    return candidates, recall


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
