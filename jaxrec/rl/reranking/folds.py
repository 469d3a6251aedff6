"""Cross-fitting: models that never saw a user score that user's events.

The users are divided into folds. For each fold both sequence models, the co-occurrence and all tables are made from the
training events of the other users, and the held-out users' last training events are the decisions that the reranker is
fitted to. Fitted to decisions on events that the models were trained on, it would trust them too much (van der Laan,
Polley and Hubbard 2007, "Super Learner").
"""

import dataclasses

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.rl.config import RerankingConfig


def fold_of_users(users: int, config: RerankingConfig) -> np.ndarray:
    """[users] int: each user's fold, at random from the seed; the folds are of like size."""
    return np.random.default_rng(config.seed).permutation(users) % config.folds


def without_users(data: PreparedData, held_out: np.ndarray) -> PreparedData:
    """The data in which the `held_out` [users] bool have no training events and no validation case."""
    split, kept = data.split, ~held_out
    validation = split.validation
    rows = kept[validation.users]
    return dataclasses.replace(
        data,
        split=dataclasses.replace(
            split,
            train_counts=np.where(kept, split.train_counts, 0),
            validation=Cases(validation.users[rows], validation.rows[rows]),
        ),
    )


def held_out_cases(data: PreparedData, held_out: np.ndarray, config: RerankingConfig) -> Cases:
    """The last training events of the `held_out` users, but no user's first event: `config.events` of each, or as many
    as make at most their share of `config.decisions`."""
    counts = np.where(held_out, data.split.train_counts, 0)
    limit = config.decisions // config.folds
    each = next((n for n in range(config.events, 1, -1) if np.minimum(np.maximum(counts - 1, 0), n).sum() <= limit), 1)
    of_user = np.minimum(np.maximum(counts - 1, 0), each)
    users = np.repeat(np.arange(len(counts)), of_user)
    ago = np.arange(len(users)) - np.repeat(np.cumsum(of_user) - of_user, of_user)
    rows = data.histories.offsets[users] + (counts - of_user)[users] + ago
    return Cases(users, rows).at_most(limit)
