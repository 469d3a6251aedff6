"""A linear autoencoder of histories in low rank: which items the users with the same items have.

EASE (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", equation 8) scores item j for a history by the
sum of B_ij over its items i. With X [users, items], which is 1 where a user has an item, and a penalty λ

    P = (X'X + λI)^-1 and B_ij = -P_ij / P_jj off the diagonal.

With the eigenvectors V and eigenvalues w of X'X and D = diag(w / (w + λ)), P = (I - V D V') / λ. So off the diagonal

    B_ij = (V D V')_ij / (1 - (V D V')_jj),

and the largest eigenvalues, for which D is not yet close to 0, are enough: the score is an inner product of the
decoder's row of j with the sum of the encoder's rows of the history.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from jaxrec.data.prepared import PreparedData

RANK = 128
PENALTY = 300.0
DENSE_ITEMS = 2000  # up to here a full eigendecomposition takes a second
TOLERANCE = 1e-3  # of the eigenvalues


class LinearAutoencoder(NamedTuple):
    """`encoder` and `decoder` [items + 1, rank] float32; rows 0 (padding) are zero."""

    encoder: np.ndarray
    decoder: np.ndarray


def fit_linear(data: PreparedData, rank: int = RANK, penalty: float = PENALTY) -> LinearAutoencoder:
    """The autoencoder of the training events.

    Args:
        data: Whether a user has a training event on an item is all that counts.
        rank: Width of the code; columns beyond the rank of the data are zero.
        penalty: λ above, in users.

    Returns:
        The two tables.
    """
    count = len(data.catalog)
    rows = data.split.train_rows(data.histories)
    users = np.searchsorted(data.histories.offsets, rows, side="right") - 1
    ones = np.ones(len(rows), np.float32)
    has = scipy.sparse.csr_array(
        (ones, (users, data.histories.items[rows] - 1)), shape=(len(data.histories.offsets) - 1, count)
    )
    has.sum_duplicates()
    has.data[:] = 1
    values, vectors = _largest_eigenpairs(has, min(rank, count))
    share = values / (values + penalty)
    code = vectors * np.sqrt(share)
    encoder, decoder = np.zeros((2, count + 1, rank), np.float32)
    encoder[1:, : code.shape[1]] = code
    decoder[1:, : code.shape[1]] = code / (1 - np.square(code).sum(axis=1, keepdims=True))
    return LinearAutoencoder(encoder, decoder)


def _largest_eigenpairs(has: scipy.sparse.csr_array, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Of X'X: the eigenvalues [rank] float64, none below 0, and the vectors [items, rank]."""
    items = has.shape[1]
    if items <= DENSE_ITEMS or rank >= items:
        values, vectors = np.linalg.eigh((has.T @ has).toarray().astype(np.float64))
        return np.maximum(values[-rank:], 0), vectors[:, -rank:]
    wide = has.astype(np.float64)
    gram = scipy.sparse.linalg.LinearOperator((items, items), lambda x: wide.T @ (wide @ x), dtype=np.float64)
    values, vectors = scipy.sparse.linalg.eigsh(gram, rank, which="LA", v0=np.ones(items), tol=TOLERANCE)
    return np.maximum(values, 0), vectors
