"""A slot's reward as a linear model of the state and the item: the direct half of a doubly robust estimate.

For each slot a ridge regression (Hoerl & Kennard 1970) of its discounted reward on FEATURES. A policy's mean over the
items of a slot is then the model at the mean of the features (`expected_features`). The model need not be right: where
the propensities are, it only changes the variance.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER
from jaxrec.rl.policy import recommendable
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served.policy import POOL, ROWS_PER_BATCH, state_logits, state_served_logits, tempered
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.states import by_batches

FEATURES = ("constant", "log-probability", "probability", "rating", "novelty")  # novelty: minus log popularity, scaled
LEAST = -20.0  # nats; an item that the policy in use shows less often, or never, counts as this
REWARD_RIDGE = 1.0  # rows that the penalty weighs as much as, features being scaled to variance 1
CONSTANT = 1e-6  # standard deviation below which a feature is taken to be the same everywhere


class RewardModel(NamedTuple):
    """`coefficients` [k, features] and `mean` [k], both float64: the mean reward of each slot that holds an item."""

    coefficients: np.ndarray
    mean: np.ndarray

    def q(self, features: np.ndarray, where: np.ndarray) -> np.ndarray:
        """[rows, k] float64 of features [rows, k, features]: the reward from each slot on. Of the slot itself that is
        the regression, of those after it their means; 0 where a slot holds no item (`where` [rows, k])."""
        mean = np.where(where, self.mean, 0.0)
        after = np.cumsum(mean[:, ::-1], axis=1)[:, ::-1] - mean
        return np.where(where, np.einsum("rkf,kf->rk", features, self.coefficients) + after, 0.0)


def fit_reward_model(features: np.ndarray, rewards: np.ndarray, where: np.ndarray) -> RewardModel:
    """From the logged items' features [rows, k, features], constant first, and rewards [rows, k] of the slots that hold
    one (`where` [rows, k]). The constant is not penalized; a slot without any row gets 0."""
    slots = [_ridge(features[held, slot, 1:], rewards[held, slot]) for slot, held in enumerate(where.T)]
    coefficients, mean = zip(*slots, strict=True)
    return RewardModel(np.stack(coefficients), np.array(mean))


def _ridge(features: np.ndarray, rewards: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients, that of the constant first, and the mean reward, of features [rows, features] without it."""
    if not len(rewards):
        return np.zeros(1 + features.shape[1]), 0.0
    centre, mean = features.mean(axis=0), float(rewards.mean())
    spread = features.std(axis=0)
    scale = np.where(spread > CONSTANT, spread, np.inf)
    scaled = (features - centre) / scale
    slope = np.linalg.solve(scaled.T @ scaled + REWARD_RIDGE * np.eye(len(centre)), scaled.T @ (rewards - mean)) / scale
    return np.concatenate([[mean - slope @ centre], slope]), mean


def logged_features(
    graphdef: nnx.GraphDef[PolicyHead], reference: Any, scoring: Scoring, states: ServedStates
) -> np.ndarray:
    """[rows, k, features] float64 of the logged items; `reference` (variables of PolicyHead) is the policy in use,
    whose probability of an item as the first of the slate is a feature of it."""
    found = by_batches(
        lambda rows: _of_logged(graphdef, reference, scoring, states.at(rows)), len(states.user), ROWS_PER_BATCH
    )
    return np.asarray(found, np.float64)


def expected_features(
    graphdef: nnx.GraphDef[PolicyHead], policy: Any, reference: Any, scoring: Scoring, states: ServedStates
) -> np.ndarray:
    """[rows, k, features] float64: the mean over what `policy` (variables of PolicyHead) shows in a slot, as it is
    served, given the logged items above it. Exact; 0 where nothing is left to show."""
    found = by_batches(
        lambda rows: _expected(graphdef, policy, reference, scoring, states.at(rows)), len(states.user), ROWS_PER_BATCH
    )
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _of_logged(graphdef: nnx.GraphDef[PolicyHead], reference: Any, scoring: Scoring, states: ServedStates) -> jax.Array:
    return _features(graphdef, reference, scoring, states, jnp.asarray(states.slate))


@functools.partial(jax.jit, static_argnums=0)
def _expected(
    graphdef: nnx.GraphDef[PolicyHead], policy: Any, reference: Any, scoring: Scoring, states: ServedStates
) -> jax.Array:
    slate = jnp.asarray(states.slate)
    logits = state_logits(graphdef, policy, scoring, states)
    served = state_served_logits(logits, states)
    logits, pool = jax.lax.top_k(served, min(max(POOL, slate.shape[1]), served.shape[1]))  # all that has a chance
    features = _features(graphdef, reference, scoring, states, pool)

    def slot(left: jax.Array, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """left [rows, pool]: logits of what is not shown above; item [rows]: what the log showed here."""
        chance = jnp.where(recommendable(left), jax.nn.softmax(left), 0.0)
        means = jnp.sum(chance[..., None] * features, axis=1)
        return jnp.where(pool == item[:, None], NEVER, left), means

    return jnp.swapaxes(jax.lax.scan(slot, logits, slate.T)[1], 0, 1)


def _features(
    graphdef: nnx.GraphDef[PolicyHead], reference: Any, scoring: Scoring, states: ServedStates, items: jax.Array
) -> jax.Array:
    """[rows, n, features] of items [rows, n] int32. The probabilities are shares of the whole catalogue, since another
    policy's pool is another one."""
    logits = tempered(state_logits(graphdef, reference, scoring, states), jnp.asarray(states.temperature))
    log_p = jnp.maximum(jnp.take_along_axis(jax.nn.log_softmax(logits), items, axis=1), LEAST)
    of_items = scoring.tables.item_ratings[items], scoring.tables.item_novelty[items]
    return jnp.stack([jnp.ones_like(log_p), log_p, jnp.exp(log_p), *of_items], axis=-1)
