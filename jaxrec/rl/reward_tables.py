"""The tables that reward terms look up, fitted on the training events of prepared data."""

import jax.numpy as jnp
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.rl.rewards import RewardTables, Values, centred

SHRINKAGE = 10.0  # ratings from which on an item's (or a user's) mean rating counts as much as the global one


def fit_reward_tables(data: PreparedData) -> RewardTables:
    """The tables of prepared data; only its training events count."""
    items, unit_ratings, count = data.histories.items, data.unit_ratings(), len(data.catalog)
    rows = data.split.train_rows(data.histories)
    item_ratings = shrunk_item_ratings(items[rows], unit_ratings[rows], count)
    means = running_user_means(data.histories.offsets, unit_ratings, float(item_ratings[0]))
    distance = np.where(unit_ratings >= 0, centred(unit_ratings, means) - 0.5, 0.0)[rows]
    rated = np.bincount(items[rows], weights=unit_ratings[rows] >= 0, minlength=count + 1)
    of_items = np.bincount(items[rows], weights=distance, minlength=count + 1)
    users = int((data.split.train_counts > 0).sum())
    return RewardTables(
        jnp.asarray(genre_directions(data.catalog.genre_matrix())),
        jnp.asarray(item_ratings),
        jnp.asarray(0.5 + shrunk_mean(of_items, rated, 0.0), jnp.float32),
        jnp.asarray(novelties(data.train_popularity(), users)),
    )


def shrunk_mean(total: Values, count: Values, prior: float) -> Values:
    """[...]: the mean of `count` [...] values of sum `total` [...], shrunk towards `prior`.

    Examples:
        >>> float(shrunk_mean(np.array(10.0), np.array(10), 0.5))  # as many ones as SHRINKAGE
        0.75
    """
    return (total + SHRINKAGE * prior) / (count + SHRINKAGE)


def genre_directions(genre_matrix: np.ndarray) -> np.ndarray:
    """[items + 1, genres] float32: rows of the binary genre matrix scaled to length 1; rows without genres stay zero.

    Examples:
        >>> genre_directions(np.array([[0, 0, 0, 0], [1, 1, 1, 1]])).tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]]
    """
    lengths = np.linalg.norm(genre_matrix, axis=1, keepdims=True)
    return (genre_matrix / np.maximum(lengths, 1.0)).astype(np.float32)


def shrunk_item_ratings(items: np.ndarray, unit_ratings: np.ndarray, item_count: int) -> np.ndarray:
    """Each item's mean rating, shrunk towards the mean of all ratings.

    Args:
        items: [events] int32, of the training events.
        unit_ratings: [events] float32 in 0..1; missing ratings, below 0, do not count.
        item_count: items of the catalogue.

    Returns:
        [item_count + 1] float32; 0.5 for every item if nothing is rated, so that the rating term is constant.

    Examples:
        >>> ratings = shrunk_item_ratings(np.array([1, 2]), np.array([1.0, 0.0]), item_count=2)
        >>> [round(float(each), 4) for each in ratings]  # 0.5, (1 + 5) / 11, (0 + 5) / 11
        [0.5, 0.5455, 0.4545]
    """
    rated = unit_ratings >= 0
    items, unit_ratings = items[rated], unit_ratings[rated].astype(np.float64)
    global_mean = unit_ratings.mean() if len(unit_ratings) else 0.5
    counts = np.bincount(items, minlength=item_count + 1)
    sums = np.bincount(items, weights=unit_ratings, minlength=item_count + 1)
    return shrunk_mean(sums, counts, global_mean).astype(np.float32)


def rating_or_mean(ratings: np.ndarray, items: np.ndarray, item_ratings: np.ndarray) -> np.ndarray:
    """[events] float32: the unit rating of each event, or item_ratings [items + 1] of its item where it has none."""
    return np.where(ratings < 0, item_ratings[items], ratings).astype(np.float32)


def running_user_means(offsets: np.ndarray, unit_ratings: np.ndarray, global_mean: float) -> np.ndarray:
    """The mean of the user's ratings before each event, shrunk towards `global_mean`; later ones do not enter.

    Args:
        offsets: [users + 1] int64, where each user's events start, and the number of events.
        unit_ratings: [events] float32 in 0..1; missing ratings, below 0, do not count.
        global_mean: of all ratings.

    Returns:
        [events] float32.

    Examples:
        >>> means = running_user_means(np.array([0, 2]), np.array([1.0, 0.0]), global_mean=0.5)
        >>> [round(float(each), 4) for each in means]  # 0.5, (1 + 5) / 11
        [0.5, 0.5455]
    """
    rated = unit_ratings >= 0
    totals = np.concatenate([[0.0], np.cumsum(np.where(rated, unit_ratings, 0.0), dtype=np.float64)])
    counts = np.concatenate([[0], np.cumsum(rated)])
    first = np.repeat(offsets[:-1], np.diff(offsets))
    return shrunk_mean(totals[:-1] - totals[first], counts[:-1] - counts[first], global_mean).astype(np.float32)


def novelties(counts: np.ndarray, users: int) -> np.ndarray:
    """-log2 of the share of users who interacted with an item, scaled to 1 for an item without interactions.

    Vargas and Castells 2011, "Rank and Relevance in Novelty and Diversity Metrics for Recommender Systems", section
    3.1. Deviation: counts and users both count one more, so that a share is never 0.

    Args:
        counts: [items + 1], training events of each item.
        users: of the training events.

    Returns:
        [items + 1] float32 in 0..1; 0 for an item that all users interacted with.

    Examples:
        >>> novelty = novelties(np.array([0, 3]), users=7)
        >>> [round(float(each), 4) for each in novelty]  # log2(8 / 1) and log2(8 / 4), over log2(8)
        [1.0, 0.3333]
    """
    shares = np.minimum((counts + 1.0) / (users + 1.0), 1.0)
    return (np.log2(shares) / -np.log2(users + 1.0)).astype(np.float32)
