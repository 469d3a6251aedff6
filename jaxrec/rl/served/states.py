"""States of the policy at served recommendations: the query after the user's history, the slate with its propensities,
and its rewards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import RatingScale
from jaxrec.data.events import pad_events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.states import rating_or_mean
from jaxrec.rl.reward_tables import SHRINKAGE
from jaxrec.rl.rewards import RewardTables, RewardTerms, slate_reward_terms
from jaxrec.rl.served.event_store import Recommendation, unit_ratings
from jaxrec.rl.states import by_batches, encode_histories

HISTORIES_PER_BATCH = 64
SHORTEST = 8  # events that a history is padded to at least


class ServedStates(NamedTuple):
    """Served recommendations [rows]: the supervised `query` [rows, width] before each, `recent` [rows, RECENT] int32 of
    the history, `exclude` [rows, width] int32 (0 = none) of the history and the request, the `slate` [rows, k] int32
    (0 = empty slot) with its `log_propensities` [rows, k] float32 at `temperature` [rows] float32, and the `terms` of
    its rewards, each [rows, k]. `user` and `version` [rows] int32, as `ServedLog` counts them."""

    query: Array
    recent: Array
    exclude: Array
    slate: Array
    log_propensities: Array
    temperature: Array
    terms: RewardTerms
    user: Array
    version: Array

    def at(self, rows: Array) -> "ServedStates":
        """These rows alone."""
        return jax.tree.map(lambda column: column[rows], self)


def served_states(
    hybrid: Hybrid, recommendations: list[Recommendation], scale: RatingScale | None, tables: RewardTables
) -> ServedStates:
    """Encodes the recommendations' histories as the server does: the models read the last `max_length` events and the
    gap to the request time, where the request gave one; all items of the history are excluded."""
    order = np.argsort([len(one.history.items) for one in recommendations], kind="stable")
    encoded = _encoded(hybrid, [recommendations[row] for row in order], scale)
    query, recent = (column[np.argsort(order)] for column in encoded)
    slate = _padded([one.slate for one in recommendations], np.int32)
    return ServedStates(
        query=query,
        recent=recent,
        exclude=_padded([np.union1d(one.history.items, one.excluded) for one in recommendations], np.int32),
        slate=slate,
        log_propensities=_padded([one.log_propensities for one in recommendations], np.float32),
        temperature=np.array([one.temperature for one in recommendations], np.float32),
        terms=_response_terms(recommendations, slate, scale, tables),
        user=np.array([one.user for one in recommendations], np.int32),
        version=np.array([one.version for one in recommendations], np.int32),
    )


def _encoded(
    hybrid: Hybrid, recommendations: list[Recommendation], scale: RatingScale | None
) -> tuple[np.ndarray, np.ndarray]:
    """Queries [rows, width] at the requests, and the most recent items [rows, RECENT].

    Each batch is as long as its longest history, rounded up to a power of two, so that few lengths are compiled: most
    histories of a log are far shorter than what the models may read.
    """
    graphdef, variables = nnx.split(hybrid)

    def encode(rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        batch = [recommendations[row] for row in rows]
        longest = max(SHORTEST, *(len(one.history.items) for one in batch))
        events = pad_events(
            [one.history.items for one in batch],
            [unit_ratings(one.history.ratings, scale) for one in batch],
            # Of more events than are read, the first one that is read keeps its true gap.
            [np.concatenate([[UNKNOWN_GAP], np.diff(one.history.times)]) for one in batch],
            min(1 << (longest - 1).bit_length(), hybrid.lstm.config.max_length),
        )
        gaps = [UNKNOWN_GAP if one.request_time is None else one.request_time - one.history.times[-1] for one in batch]
        queries, recent, _ = encode_histories(graphdef, variables, events, np.array([gaps], np.float32))
        return queries[0], recent

    return by_batches(encode, len(recommendations), HISTORIES_PER_BATCH)  # type: ignore[return-value]


def _response_terms(
    recommendations: list[Recommendation], slate: np.ndarray, scale: RatingScale | None, tables: RewardTables
) -> RewardTerms:
    """Each [rows, k]: of several responses to a recommendation each slot has the best hit and the nearest genres, and
    its last rating. An item that was not chosen earns no rating: other users' ratings are no response of this user."""
    item_ratings = np.asarray(tables.item_ratings)
    responses = _padded([one.responses for one in recommendations], np.int32)
    given = _padded([unit_ratings(one.response_ratings, scale) for one in recommendations], np.float32)
    ratings = rating_or_mean(given, responses, item_ratings)
    means = np.array([_mean_rating(one, scale, float(item_ratings[0])) for one in recommendations], np.float32)

    def of_response(column: int) -> tuple[RewardTerms, jax.Array]:
        """The terms by one of the responses, and which slots it rated."""
        logged = jnp.asarray(responses[:, column]), jnp.asarray(ratings[:, column]), jnp.asarray(means)
        terms = slate_reward_terms(jnp.asarray(slate), *logged, tables)
        return terms, (terms.hit > 0) & (given[:, column, None] >= 0)

    found, rated = of_response(0)
    for column in range(1, responses.shape[1]):
        terms, is_rated = of_response(column)
        newer = is_rated | ((terms.hit > 0) & ~rated)
        found = found._replace(
            hit=jnp.maximum(found.hit, terms.hit),
            genre=jnp.maximum(found.genre, terms.genre),
            rating=jnp.where(newer, terms.rating, found.rating),
            centred_rating=jnp.where(newer, terms.centred_rating, found.centred_rating),
        )
        rated |= is_rated
    chosen = found.hit > 0
    found = found._replace(
        rating=jnp.where(chosen, found.rating, 0.0), centred_rating=jnp.where(chosen, found.centred_rating, 0.0)
    )
    where = jnp.asarray(slate > 0)
    return jax.tree.map(lambda term: np.asarray(jnp.where(where, term, 0.0)), found)


def _mean_rating(one: Recommendation, scale: RatingScale | None, global_mean: float) -> float:
    """The mean of the user's ratings before, shrunk as `jaxrec.rl.reward_tables.running_user_means` does."""
    ratings = unit_ratings(one.history.ratings, scale)
    rated = ratings[ratings >= 0]
    return float((rated.sum() + SHRINKAGE * global_mean) / (len(rated) + SHRINKAGE))


def _padded(rows: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """[rows, longest], right-padded with 0, at least one wide."""
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows))), dtype)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
