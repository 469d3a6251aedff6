"""EASE, the linear item-item model in closed form (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data",
equation 8), with a history that is weighted by recency: what a sequence model is compared with."""

import numpy as np
import scipy.linalg
import scipy.sparse

from jaxrec.data.batches import CaseBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Scorer

FIRST_PENALTY, STEP = 100.0, 3.0
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
        rows, places = np.nonzero(later >= 0)
        values = (decay ** later[rows, places]).astype(np.float32)
        history = scipy.sparse.csr_array((values, (rows, item[rows, places])), shape=(len(item), len(weights)))
        return np.asarray(history @ weights)

    return score


def best_ease(data: PreparedData, max_length: int) -> tuple[Scorer, float, float]:
    """The scorer, the penalty and the decay with the best NDCG@10 on validation.

    From FIRST_PENALTY on the penalty is multiplied with STEP, and divided by it, as long as that helps.
    """
    cases = data.split.validation.at_most(MAX_CASES)

    def best_decay(penalty: float) -> tuple[float, float]:
        weights = ease(data, penalty)
        scorers = {decay: ease_scorer(weights, decay) for decay in DECAYS}
        return max(
            (float(ndcg(rank_cases(scorer, data, cases, max_length, False).ranks, 10).mean()), decay)
            for decay, scorer in scorers.items()
        )

    chosen, best = FIRST_PENALTY, best_decay(FIRST_PENALTY)
    for factor in (STEP, 1 / STEP):
        while (found := best_decay(chosen * factor)) > best:
            chosen, best = chosen * factor, found
    return ease_scorer(ease(data, chosen), best[1]), chosen, best[1]


def _gram(users: np.ndarray, items: np.ndarray, count: int) -> np.ndarray:
    """[count, count] float32: how many users have both items; `items` from 0 on."""
    ones = np.ones(len(items), np.float32)
    known = scipy.sparse.csr_array((ones, (users, items)), shape=(int(users.max(initial=0)) + 1, count))
    known.sum_duplicates()
    known.data[:] = 1
    return (known.T @ known).toarray()
