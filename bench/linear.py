"""EASE, the linear item-item model in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data",
equation 8), with a history that is weighted by recency: what a sequence model is compared with."""

import itertools

import numpy as np
import scipy.linalg

from jaxrec.data.batches import CaseBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Scorer

PENALTIES = (10.0, 100.0, 500.0)
DECAYS = (0.5, 0.75, 0.9, 0.97, 1.0)
MAX_CASES = 5_000  # of validation, by which both are chosen


def ease(data: PreparedData, penalty: float) -> np.ndarray:
    """The weights of the items for each other: the ridge regression of each item on all others, by training events.

    Args:
        data: Whether a user has an event on an item is all that counts.
        penalty: Added to the diagonal of the items' Gram matrix.

    Returns:
        [items + 1, items + 1] float32; row and column 0 (padding) and the diagonal are zero.
    """
    rows = data.split.train_rows(data.histories)
    users, items = data.histories.users()[rows], np.asarray(data.histories.items)[rows]
    gram = _gram(users, items - 1, len(data.catalog))
    gram[np.diag_indices_from(gram)] += penalty
    inverse = scipy.linalg.inv(gram, overwrite_a=True, check_finite=False)
    weights = np.zeros((len(inverse) + 1, len(inverse) + 1), np.float32)
    weights[1:, 1:] = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return weights


def ease_scorer(weights: np.ndarray, decay: float) -> Scorer:
    """score(j) = sum over the events of the history of decay ** (how many came later) * weights[item, j]."""

    def score(batch: CaseBatch) -> np.ndarray:
        item, length = np.asarray(batch.events.item), np.asarray(batch.events.length)
        later = length[:, None] - 1 - np.arange(item.shape[1])
        history = np.zeros((len(item), len(weights)), np.float32)
        events = np.where(later >= 0, decay ** np.maximum(later, 0), 0.0)
        np.add.at(history, (np.arange(len(item))[:, None], item), events.astype(np.float32))
        return history @ weights

    return score


def best_ease(data: PreparedData, max_length: int) -> tuple[Scorer, float, float]:
    """The scorer, the penalty and the decay with the best NDCG@10 on validation."""
    cases = data.split.validation.at_most(MAX_CASES)
    best, chosen = -1.0, None
    for penalty in PENALTIES:
        weights = ease(data, penalty)
        for decay in DECAYS:
            scorer = ease_scorer(weights, decay)
            found = float(ndcg(rank_cases(scorer, data, cases, max_length, False).ranks, 10).mean())
            if found > best:
                best, chosen = found, (scorer, penalty, decay)
    assert chosen is not None
    return chosen


def _gram(users: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """[count, count] float32: how many users have both items; `users` are in order, `items` from 0 on."""
    gram = np.zeros((count, count), np.float32)
    for _, rows in itertools.groupby(range(len(users)), key=users.__getitem__):
        own = np.unique(items[list(rows)])
        gram[np.ix_(own, own)] += 1
    return gram
