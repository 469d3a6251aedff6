"""Local co-occurrence of items: what people take shortly after, or shortly before, what.

On small logs the items that stood near each other in other people's histories say more about the next item than any
neural model has had the data to learn. Each pair of events of one user at most WINDOW events apart counts

    LAG_DECAY ** (lag - 1)            for later given earlier, and
    BACKWARD * LAG_DECAY ** (lag - 1) for earlier given later,

and the sum for (i, j) is divided by count(i)**POWER * count(j)**(1 - POWER), a cosine that leans towards the first
item. It is item-item nearest neighbours (Sarwar et al. 2001; Deshpande and Karypis 2004, equation 4 for the power)
with pairs weighted by their distance, as in skip-gram's shrinking windows (Mikolov et al. 2013). Kept are the
strongest neighbours of each item.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from jaxrec.data.prepared import PreparedData

WINDOW = 20
LAG_DECAY = 0.85
BACKWARD = 0.5
POWER = 0.68
NEIGHBOURS = 100
MAX_EVENTS = 2_000_000  # of a larger log, the most recent part of it: more events change the counts little
EVENTS_PER_CHUNK = 500_000
ITEMS_PER_CHUNK = 1000  # sorted together: sorting takes several times the memory of the counts
INITIAL_DEVIATION = 0.3
MAX_START_ITEMS = 100_000  # beyond, the factorization takes longer than it can save
DENSE_ITEMS = 2000  # up to here a full eigendecomposition takes a second


class Neighbours(NamedTuple):
    """The strongest neighbours of each item, best first; row 0 (padding) and missing neighbours hold item 0, weight 0.

    `item` [items + 1, width] int32, `weight` [items + 1, width] float32.
    """

    item: np.ndarray
    weight: np.ndarray


def neighbours(data: PreparedData, width: int = NEIGHBOURS) -> Neighbours:
    """Counted in the training events of `data` alone."""
    size = len(data.catalog) + 1
    width = min(width, size - 1)
    items, users = _recent_events(data)
    counts = np.maximum(np.bincount(items, minlength=size), 1).astype(np.float64)
    total = scipy.sparse.csr_array((size, size), dtype=np.float64)
    for first, second, lag in _pairs(items, users):
        weight = LAG_DECAY ** (lag - 1.0)
        total = total + scipy.sparse.csr_array((weight, (first, second)), shape=(size, size))
    total = (total + BACKWARD * total.T).tocsr()
    found = Neighbours(np.zeros((size, width), np.int32), np.zeros((size, width), np.float32))
    for start in range(0, size, ITEMS_PER_CHUNK):
        part = total[start : start + ITEMS_PER_CHUNK].tocoo()
        row, column = part.row + start, part.col
        apart = row != column
        row, column = row[apart], column[apart]
        weight = part.data[apart] / (counts[row] ** POWER * counts[column] ** (1.0 - POWER))
        _keep_strongest(row, column, weight, found)
    return found


def initial_embedding(neighbours: Neighbours, width: int) -> np.ndarray:
    """[items + 1, width] float32: item vectors whose products follow the co-occurrence, for the models to start from.

    The rank-`width` factorization of the symmetric log(1 + weight / median weight), as word vectors come from positive
    pointwise mutual information (Levy and Goldberg 2014, section 4: eigenvectors times the square roots of the
    eigenvalues), scaled to the standard deviation INITIAL_DEVIATION.
    """
    size = len(neighbours.item)
    row = np.repeat(np.arange(size), neighbours.item.shape[1])
    weight = neighbours.weight.ravel()
    known = weight > 0
    if not known.any():
        return np.zeros((size, width), np.float32)
    strength = np.log1p(weight[known] / np.median(weight[known]))
    table = scipy.sparse.csr_array((strength, (row[known], neighbours.item.ravel()[known])), shape=(size, size))
    symmetric = (table + table.T) / 2
    rank = min(width, size - 1)
    if size <= DENSE_ITEMS:
        values, vectors = np.linalg.eigh(symmetric.toarray())
        values, vectors = values[-rank:], vectors[:, -rank:]
    else:
        values, vectors = scipy.sparse.linalg.eigsh(symmetric, rank, which="LA", v0=np.ones(size), tol=1e-3)
    embedding = np.zeros((size, width), np.float32)
    embedding[:, :rank] = vectors * np.sqrt(np.maximum(values, 0.0))
    return embedding * np.float32(INITIAL_DEVIATION / max(float(embedding.std()), 1e-12))


def _recent_events(data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    """Items and users of the training events, users' events together and in order; the most recent MAX_EVENTS."""
    rows = data.split.train_rows(data.histories)
    if len(rows) > MAX_EVENTS:
        times = data.histories.times[rows]
        rows = rows[times >= np.partition(times, -MAX_EVENTS)[-MAX_EVENTS]]
    users = np.searchsorted(data.histories.offsets, rows, side="right")
    return np.asarray(data.histories.items[rows]), users


def _pairs(items: np.ndarray, users: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(earlier item, later item, lag) of all pairs of one user's events at most WINDOW apart, in chunks."""
    for start in range(0, len(items), EVENTS_PER_CHUNK):
        stop = min(start + EVENTS_PER_CHUNK, len(items))
        first, second, lags = [], [], []
        for lag in range(1, WINDOW + 1):
            earlier = np.arange(start, min(stop, len(items) - lag))
            earlier = earlier[users[earlier] == users[earlier + lag]]
            first.append(items[earlier])
            second.append(items[earlier + lag])
            lags.append(np.full(len(earlier), lag))
        yield np.concatenate(first), np.concatenate(second), np.concatenate(lags)


def _keep_strongest(row: np.ndarray, column: np.ndarray, weight: np.ndarray, found: Neighbours) -> None:
    """Fills the given rows of `found` with their largest weights; equal ones in the order of the items."""
    order = np.lexsort((column, -weight, row))
    row, column, weight = row[order], column[order], weight[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < found.item.shape[1]
    found.item[row[kept], place[kept]] = column[kept]
    found.weight[row[kept], place[kept]] = weight[kept]
