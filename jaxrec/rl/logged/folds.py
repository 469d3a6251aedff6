"""Cross-fitting: models that never saw a user score that user's events.

The users are divided into folds. For each fold both sequence models, the co-occurrence and all tables are made from the
training events of the other users, and the held-out users' last training events are the decisions that the reranker is
fitted to. Fitted to decisions on events that the models were trained on, it would trust them too much (van der Laan,
Polley and Hubbard 2007, "Super Learner").
"""

import dataclasses

import numpy as np

from jaxrec.data.histories import Histories
from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.rl.config import LoggedConfig


def fold_of_users(users: int, config: LoggedConfig) -> np.ndarray:
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


def last_events(histories: Histories, counts: np.ndarray, events: int, limit: int) -> Cases:
    """The last of each user's first events, but no user's first one.

    Args:
        histories: Of the users.
        counts: [users] int, how many of each user's first events may be used, such as those of training; 0: none.
        events: Largest number of each user.
        limit: Largest number in all. If there would be more, each user has fewer, and at one each some have none.
    """
    others = np.maximum(counts - 1, 0)
    each = next((n for n in range(events, 1, -1) if np.minimum(others, n).sum() <= limit), 1)
    of_user = np.minimum(others, each)
    owner = np.repeat(np.arange(len(others)), of_user)
    ago = np.arange(len(owner)) - np.repeat(np.cumsum(of_user) - of_user, of_user)
    rows = histories.offsets[owner] + (others + 1 - of_user)[owner] + ago
    return Cases(owner, rows).at_most(limit)
