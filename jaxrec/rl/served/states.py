"""States of the policy at served recommendations: what the models made of the user's history, what was shown with which
propensity, and what it earned."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.events import Events
from jaxrec.data.schema import MISSING_RATING, UNKNOWN_GAP, RatingScale
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.states import rating_or_mean
from jaxrec.rl.reward_tables import SHRINKAGE
from jaxrec.rl.rewards import RewardTables, RewardTerms, slate_reward_terms
from jaxrec.rl.served.event_store import Recommendation, unit_ratings

ROWS_PER_BATCH = 64
SHORTEST = 8  # events that a history is padded to at least


class LogStates(NamedTuple):
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

    def at(self, rows: Array) -> "LogStates":
        """These rows alone."""
        return jax.tree.map(lambda column: column[rows], self)


def log_states(
    hybrid: Hybrid, recommendations: list[Recommendation], scale: RatingScale | None, tables: RewardTables
) -> LogStates:
    """Encodes the recommendations' histories as the server does: the models read the last `max_length` events and the
    gap to the time that the request told, and all of the history is excluded."""
    graphdef, variables = nnx.split(hybrid)
    order = np.argsort([len(one.history.items) for one in recommendations], kind="stable")
    batches = _batches([recommendations[row] for row in order], scale, hybrid.lstm.config.max_length)
    encoded = [jax.device_get(_encode(graphdef, variables, events, gap)) for events, gap in batches]
    query, recent = (
        np.concatenate(column)[: len(recommendations)][np.argsort(order)] for column in zip(*encoded, strict=True)
    )
    slate = _padded([one.slate for one in recommendations], np.int32)
    return LogStates(
        query=query,
        recent=recent,
        exclude=_padded([np.union1d(one.history.items, one.excluded) for one in recommendations], np.int32),
        slate=slate,
        log_propensities=_padded([one.log_propensities for one in recommendations], np.float32),
        temperature=np.array([one.temperature for one in recommendations], np.float32),
        terms=_answer_terms(recommendations, slate, scale, tables),
        user=np.array([one.user for one in recommendations], np.int32),
        version=np.array([one.version for one in recommendations], np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    graphdef: nnx.GraphDef[Hybrid], variables: nnx.State, events: Events, request_gap: Array
) -> tuple[jax.Array, jax.Array]:
    """Queries [batch, width] with the request gap [batch], and the most recent items [batch, RECENT]."""
    model = nnx.merge(graphdef, variables)
    _, state = model.encode(events)
    h_lstm, _, h_content, _, recent = model.split_state(state)
    return model.supervised_query((h_lstm, h_content), jnp.asarray(request_gap)), recent


def _batches(
    recommendations: list[Recommendation], scale: RatingScale | None, max_length: int
) -> Iterator[tuple[Events, np.ndarray]]:
    """Histories and request gaps of ROWS_PER_BATCH recommendations at a time; the last batch repeats its last one.

    Each is as long as its longest history, as a power of two, so that few lengths are compiled; most of a log's
    histories are far shorter than what the models may read.
    """
    for start in range(0, len(recommendations), ROWS_PER_BATCH):
        rows = np.minimum(np.arange(start, start + ROWS_PER_BATCH), len(recommendations) - 1)
        batch = [recommendations[row] for row in rows]
        longest = max(SHORTEST, *(len(one.history.items) for one in batch))
        shape = (ROWS_PER_BATCH, min(1 << (longest - 1).bit_length(), max_length))
        item, rating = np.zeros(shape, np.int32), np.full(shape, MISSING_RATING, np.float32)
        gap, length = np.full(shape, UNKNOWN_GAP, np.float32), np.zeros(ROWS_PER_BATCH, np.int32)
        request_gap = np.full(ROWS_PER_BATCH, UNKNOWN_GAP, np.float32)
        for number, one in enumerate(batch):
            items, ratings, times = one.history
            count = length[number] = min(len(items), max_length)
            gaps = np.concatenate([[UNKNOWN_GAP], np.diff(times)])  # the first that is read keeps its true gap
            item[number, :count], gap[number, :count] = items[-count:], gaps[-count:]
            rating[number, :count] = unit_ratings(ratings[-count:], scale)
            if one.request_time is not None:
                request_gap[number] = one.request_time - times[-1]
        yield Events(item, rating, gap, length), request_gap


def _answer_terms(
    recommendations: list[Recommendation], slate: np.ndarray, scale: RatingScale | None, tables: RewardTables
) -> RewardTerms:
    """Each [rows, k]: of several answers to a recommendation each slot has the best hit and the nearest genres, and the
    last rating that was given to it. What was not taken earns no rating: that of others is no answer of this user."""
    item_ratings = np.asarray(tables.item_ratings)
    answers = _padded([one.answers for one in recommendations], np.int32)
    given = _padded([unit_ratings(one.answer_ratings, scale) for one in recommendations], np.float32)
    ratings = rating_or_mean(given, answers, item_ratings)
    means = np.array([_mean_rating(one, scale, float(item_ratings[0])) for one in recommendations], np.float32)

    def of_answer(column: int) -> tuple[RewardTerms, jax.Array]:
        """The terms by one of the answers, and which slots it rated."""
        logged = jnp.asarray(answers[:, column]), jnp.asarray(ratings[:, column]), jnp.asarray(means)
        terms = slate_reward_terms(jnp.asarray(slate), *logged, tables)
        return terms, (terms.hit > 0) & (given[:, column, None] >= 0)

    found, rated = of_answer(0)
    for column in range(1, answers.shape[1]):
        terms, is_rated = of_answer(column)
        newer = is_rated | ((terms.hit > 0) & ~rated)
        found = found._replace(
            hit=jnp.maximum(found.hit, terms.hit),
            genre=jnp.maximum(found.genre, terms.genre),
            rating=jnp.where(newer, terms.rating, found.rating),
            centred_rating=jnp.where(newer, terms.centred_rating, found.centred_rating),
        )
        rated |= is_rated
    taken = found.hit > 0
    found = found._replace(
        rating=jnp.where(taken, found.rating, 0.0), centred_rating=jnp.where(taken, found.centred_rating, 0.0)
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
