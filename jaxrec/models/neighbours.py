"""Local co-occurrence of items: what people take shortly after, or shortly before, what.

On small logs the items that stood near each other in other people's histories say more about the next item than any
neural model has had the data to learn. Each pair of events of one user at most WINDOW events apart counts

    LAG_DECAY ** (lag - 1)            for later given earlier, and
    BACKWARD * LAG_DECAY ** (lag - 1) for earlier given later,

and the sum for (i, j) is divided by count(i)**POWER * count(j)**(1 - POWER), a cosine that leans towards the first
item. It is item-item nearest neighbours (Sarwar et al. 2001; Deshpande and Karypis 2004, equation 4 for the power)
with pairs weighted by their distance, as in skip-gram's shrinking windows (Mikolov et al. 2013). Kept are the
strongest neighbours of each item.

All training events count. The rows of the table are counted in blocks, each in a pass over the events, so that memory
does not grow with the events; several processes count their own events and add up one block each. Each weight is a
multiple of 2**-25, so that sums are exact: the result is the same to the last bit in any order and for any number of
processes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse

from jaxrec.data.histories import blocks, release, user_blocks
from jaxrec.data.prepared import PreparedData
from jaxrec.data.shares import TrainingShare, share_of

WINDOW = 20
LAG_DECAY = 0.85
BACKWARD = 0.5
POWER = 0.68
NEIGHBOURS = 100
CELLS_PER_BLOCK = 2**25  # pairs of items whose counts are in memory at a time, at most
PAIRS_PER_CHUNK = 2**22  # pairs of events that are added up together
INITIAL_DEVIATION = 0.3
DENSE_ITEMS = 2000  # up to here a full eigendecomposition takes a second
OVERSAMPLE = 64  # dimensions beyond those asked for, in which the randomized factorization searches
POWER_ITERATIONS = 12
COLUMNS_AT_A_TIME = 16  # of a product: what it takes beside its operands is then small

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # item, other item and weight of pairs of events


class Neighbours(NamedTuple):
    """The strongest neighbours of each item, best first; row 0 (padding) and missing neighbours hold item 0, weight 0.

    `item` [items + 1, width] int32, `weight` [items + 1, width] float32.
    """

    item: np.ndarray
    weight: np.ndarray


class Together(NamedTuple):
    """How several processes count together: which of how many this is, an empty folder that all of them see, and a
    function that returns when all have come to the point of a name. What that function raises ends the counting, so it
    raises in all of them."""

    process: int
    processes: int
    folder: Path
    wait: Callable[[str], None]


def nothing(*arguments: object) -> None:
    """Nobody is waited for, and nothing interrupts."""


ALONE = Together(0, 1, Path(), nothing)


def neighbours(data: PreparedData | TrainingShare, width: int = NEIGHBOURS, together: Together = ALONE) -> Neighbours:
    """Counted in the training events of `data` alone.

    Args:
        data: All events, or of several processes its own share, which knows the popularity of all.
        width: Neighbours of an item that are kept.
        together: How several processes count. Each pass over the events ends with its `wait`.

    Returns:
        The neighbours; in the processes after the first only those of the items that it added up.
    """
    share = data if isinstance(data, TrainingShare) else share_of(data)
    index, count = together.process, together.processes
    size = len(share.catalog) + 1
    width = min(width, size - 1)
    popularity = share.train_popularity()
    found = Neighbours(np.zeros((size, width), np.int32), np.zeros((size, width), np.float32))
    bounds = _row_blocks(popularity)
    for start in range(0, len(bounds), count):
        own = None
        for owner, (first, stop) in enumerate(bounds[start : start + count]):
            counted = _count_rows(share.parts, first, stop, size)
            if owner == index:
                own = counted
            else:
                scipy.sparse.save_npz(together.folder / f"{start + owner}-{index}.npz", counted, compressed=False)
        together.wait("a block of neighbours is counted")
        if own is not None:
            for other in set(range(count)) - {index}:
                path = together.folder / f"{start + index}-{other}.npz"
                own = own + scipy.sparse.load_npz(path)
                path.unlink()
            _keep_strongest(own, bounds[start + index][0], popularity, found)
    if count > 1:
        _collect(found, bounds, together)
    return found


def _collect(found: Neighbours, bounds: Sequence[tuple[int, int]], together: Together) -> None:
    """Gives the first process the rows of all."""
    rows = [
        np.concatenate([np.arange(0), *(np.arange(*block) for block in bounds[process :: together.processes])])
        for process in range(together.processes)
    ]
    if together.process:
        own = {name: table[rows[together.process]] for name, table in found._asdict().items()}
        np.savez(together.folder / f"{together.process}.npz", **own)
    together.wait("the neighbours of all blocks are known")
    for other in range(1, 0 if together.process else together.processes):
        with np.load(together.folder / f"{other}.npz") as arrays:
            for name, table in found._asdict().items():
                table[rows[other]] = arrays[name]


def initial_embedding(neighbours: Neighbours, width: int, before_product: Callable[[], None] = nothing) -> np.ndarray:
    """Item vectors whose products follow the co-occurrence, for the models to start from.

    The rank-`width` factorization of the symmetric log(1 + weight / median weight), as word vectors come from positive
    pointwise mutual information (Levy and Goldberg 2014, section 4: eigenvectors times the square roots of the
    eigenvalues), scaled to the standard deviation INITIAL_DEVIATION.

    Args:
        neighbours: Of all items.
        width: Of the vectors.
        before_product: Called before each product of a large matrix; what it raises ends the factorization.

    Returns:
        [items + 1, width] float32; zero for padding and for items without pairs.
    """
    size, known = len(neighbours.item), neighbours.weight > 0
    embedding = np.zeros((size, width), np.float32)
    if not known.any():
        return embedding
    strength = neighbours.weight[known]
    strength /= np.median(strength)
    np.log1p(strength, out=strength)
    row_ends = np.concatenate([[0], np.cumsum(known.sum(axis=1))])
    row_ends = row_ends.astype(np.int32 if len(strength) < 2**31 else np.int64)
    table = scipy.sparse.csr_array((strength, neighbours.item[known], row_ends), shape=(size, size))
    rank = min(width, size - 1)
    if size <= DENSE_ITEMS:
        values, vectors = _exact(table.toarray(), rank)
    else:
        turned = table.T  # a view: the sum of both would take more memory than all else

        def multiply(columns: np.ndarray) -> np.ndarray:
            before_product()
            product = np.empty(columns.shape, np.float32, order="F")
            for start in range(0, columns.shape[1], COLUMNS_AT_A_TIME):
                some = np.ascontiguousarray(columns[:, start : start + COLUMNS_AT_A_TIME])
                product[:, start : start + COLUMNS_AT_A_TIME] = (table @ some + turned @ some) / 2
            return product

        values, vectors = randomized_eigenpairs(multiply, size, rank)
    embedding[:, :rank] = vectors
    embedding[:, :rank] *= np.sqrt(np.maximum(values, 0.0))
    paired = np.isin(np.arange(size), table.indices) | known.any(axis=1)
    embedding[~paired] = 0.0
    embedding *= np.float32(INITIAL_DEVIATION / max(float(embedding.std()), 1e-12))
    return embedding


def _exact(table: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh((table + table.T).astype(np.float64) / 2)
    return values[-rank:], vectors[:, -rank:]


def randomized_eigenpairs(
    multiply: Callable[[np.ndarray], np.ndarray], size: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of a large symmetric matrix and their vectors, by randomized subspace iteration.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3: a random subspace is multiplied with the matrix
    POWER_ITERATIONS times, and the matrix is decomposed within it. It costs POWER_ITERATIONS + 2 products with rank +
    OVERSAMPLE columns, and is the same for the same matrix. Deviation: the powers are those of the matrix plus half of
    its lowest eigenvalue's size times the identity, since the lowest eigenvalues would take the place of the largest
    ones.

    Args:
        multiply: The matrix times columns [size, any] float32, as float32.
        size: Rows of the matrix.
        rank: How many, at most `size`.

    Returns:
        Eigenvalues [rank], which rise, and vectors [size, rank]; float32.
    """
    basis = np.random.default_rng(0).standard_normal((size, min(size, rank + OVERSAMPLE)), np.float32)
    basis = _orthonormal(multiply(basis))
    for _ in range(POWER_ITERATIONS):
        product = multiply(basis)
        lowest = np.linalg.eigvalsh(basis.T @ product)[0]
        basis *= min(lowest, 0.0) / 2
        product -= basis
        basis = _orthonormal(product)
    values, vectors = np.linalg.eigh(basis.T @ multiply(basis))
    return values[-rank:], basis @ vectors[:, -rank:]


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns, in their memory where they follow each other in it."""
    basis: np.ndarray = scipy.linalg.qr(columns, overwrite_a=True, mode="economic", check_finite=False)[0]
    return basis


def _row_blocks(popularity: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of items (first, stop) whose rows have at most CELLS_PER_BLOCK neighbours, or of a single item."""
    cells = np.minimum(2 * WINDOW * popularity, len(popularity))
    bounds = user_blocks(np.concatenate([[0], np.cumsum(cells)]), CELLS_PER_BLOCK)
    return list(bounds)


def _count_rows(parts: Sequence[PreparedData], first: int, stop: int, size: int) -> scipy.sparse.csr_array:
    """[stop - first, size] float64: the sums of the items first..stop - 1 with every item, of the events of `parts`."""
    total = scipy.sparse.csr_array((stop - first, size), dtype=np.float64)
    for row, column, weight in _gathered(itertools.chain.from_iterable(_pairs(part, first, stop) for part in parts)):
        total = total + scipy.sparse.csr_array((weight, (row - first, column)), shape=total.shape)
    return total


def _gathered(chunks: Iterable[Pairs]) -> Iterator[Pairs]:
    """The same pairs in chunks of PAIRS_PER_CHUNK and more: adding a few to a large sum costs as much as many."""
    gathered: list[Pairs] = []
    for chunk in chunks:
        gathered.append(chunk)
        if sum(len(item) for item, _, _ in gathered) >= PAIRS_PER_CHUNK:
            yield _joined(gathered)
            gathered = []
    if gathered:
        yield _joined(gathered)


def _joined(chunks: Sequence[Pairs]) -> Pairs:
    item, other, weight = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return item, other, weight


def _pairs(data: PreparedData, first: int, stop: int) -> Iterator[Pairs]:
    """Item, other item and weight of all pairs of one user's training events at most WINDOW apart, in chunks; the first
    items are first..stop - 1."""
    histories = data.histories
    weights = np.round(LAG_DECAY ** np.arange(WINDOW) * 2**24) / 2**24
    for block in blocks(histories.offsets):
        items = histories.items[block.rows]
        ends = np.cumsum(block.lengths)
        chosen = np.flatnonzero((items >= first) & (items < stop))
        users = np.searchsorted(ends, chosen, side="right")
        lows = ends[users] - block.lengths[users]
        highs = lows + data.split.train_counts[block.users[users]]
        for start in range(0, len(chosen), max(1, PAIRS_PER_CHUNK // (2 * WINDOW))):
            some = slice(start, start + max(1, PAIRS_PER_CHUNK // (2 * WINDOW)))
            at, low, high = chosen[some], lows[some], highs[some]
            of_item, others, of_pair = [], [], []
            for lag in range(1, WINDOW + 1):
                for other, weight in ((at + lag, weights[lag - 1]), (at - lag, BACKWARD * weights[lag - 1])):
                    where = (at < high) & (other < high) & (other >= low)
                    of_item.append(items[at[where]])
                    others.append(items[other[where]])
                    of_pair.append(np.full(len(others[-1]), weight))
            yield np.concatenate(of_item), np.concatenate(others), np.concatenate(of_pair)
        release(histories.items)


def _keep_strongest(counts: scipy.sparse.csr_array, first: int, popularity: np.ndarray, found: Neighbours) -> None:
    """Fills the rows of `found` from `first` on with the largest weights of `counts` [rows, items + 1], each divided by
    what its two items say; equal weights in the order of the items."""
    width = found.item.shape[1]
    popularity = np.maximum(popularity, 1).astype(np.float64)
    of_item, of_other = popularity**POWER, popularity ** (1.0 - POWER)
    counts.sort_indices()
    for row, (start, end) in enumerate(itertools.pairwise(counts.indptr), start=first):
        column = counts.indices[start:end]
        weight = np.where(column == row, 0, counts.data[start:end] / (of_item[row] * of_other[column]))
        if len(column) > width:
            kept = np.flatnonzero(weight >= np.partition(weight, -width)[-width])
            column, weight = column[kept], weight[kept]
        best = np.argsort(-weight, kind="stable")[:width]
        best = best[weight[best] > 0]
        found.item[row, : len(best)], found.weight[row, : len(best)] = column[best], weight[best]
