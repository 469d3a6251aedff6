"""Synthetic logs whose structure is known."""

import numpy as np
import pandas as pd

from jaxrec.data.schema import ITEM, RATING, TIME, USER


def random_log(users: int, items: int, max_events: int, seed: int) -> pd.DataFrame:
    """Histories of 1 to `max_events` random items, with random ratings and irregular times."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, max_events + 1, users)
    return _frame(rng, counts, rng.integers(1, items + 1, counts.sum()))


def markov_log(users: int, items: int, events: int, stay: float, seed: int) -> pd.DataFrame:
    """Each item is followed by the next one of a circle with probability `stay`, else by a random one."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, items, users)]
    for _ in range(events - 1):
        jump = rng.random(users) >= stay
        columns.append(np.where(jump, rng.integers(0, items, users), (columns[-1] + 1) % items))
    return _frame(rng, np.full(users, events), np.stack(columns, axis=1).ravel() + 1)


def shuffled_items(log: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same users, times and item counts with all structure destroyed."""
    return log.assign(**{ITEM: np.random.default_rng(seed).permutation(log[ITEM].to_numpy())})


def _frame(rng: np.random.Generator, counts: np.ndarray, items: np.ndarray) -> pd.DataFrame:
    total = int(counts.sum())
    return pd.DataFrame(
        {
            USER: np.repeat(np.arange(1, len(counts) + 1), counts),
            ITEM: items.astype(np.int64),
            RATING: rng.integers(1, 11, total).astype(np.float32) / 2,
            TIME: 1_000_000_000 + np.cumsum(rng.integers(1, 5000, total)),
        }
    )
