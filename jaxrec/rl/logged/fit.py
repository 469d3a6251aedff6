"""Fits a reranker's weights to held-out decisions.

The loss of a decision is

    cross-entropy of the item that came next, among the candidates
    + reward_weight * minus the slate's expected reward, by PL-Rank-2 (`jaxrec.rl.losses.pl_rank`) or by REINFORCE with
      the other samples as the baseline (`jaxrec.rl.losses.policy_gradient.plackett_luce_loss`)
    + penalty * the squared weights

A decision whose next item is no candidate has no cross-entropy. Its slate still earns what the other reward terms give.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import CONTEXT, FEATURES, Candidates, RerankerWeights, Scales, scaled, scores
from jaxrec.rl.config import PL_RANK, LoggedConfig, RewardWeights
from jaxrec.rl.logged.decisions import Decisions
from jaxrec.rl.losses.pl_rank import pl_rank_loss
from jaxrec.rl.losses.policy_gradient import plackett_luce_loss
from jaxrec.rl.policy import sample_slates, slate_logprobs
from jaxrec.rl.rewards import rank_discounts
from jaxrec.rl.states import by_batches
from jaxrec.rl.updates import Learner, Updates, make_updates, new_learner, run_updates
from jaxrec.training.stopping import StopRequested, never

UPDATES_PER_CHUNK = 100
SCALED_BY = 5_000  # decisions that the scales are measured on
ROUNDING = 1e-5  # of a mean, or of 1: what deviates less from it varies by rounding alone
SCALE_OF_NOTHING = 1e9  # makes it nothing also where it varies later
ROWS, ROWS_FILLED = 2048, 4096  # decisions that are computed at once; the number of a fit is filled to a multiple


class Fitted(NamedTuple):
    """The scales, the weights, and the weights after every UPDATES_PER_CHUNK updates, the last ones included."""

    scales: Scales
    weights: RerankerWeights
    path: list[RerankerWeights]


class Problem(NamedTuple):
    """Decisions on the device, scaled: `features` [decisions, candidates, FEATURES] float16, `context`, `mix`, `place`
    as in `Decisions`, and the `rewards` [decisions, candidates] of each candidate. The first `real` [] int32 are
    decisions, the others fill up. `reward_weight` [] float32 is that of the configuration."""

    features: jax.Array
    context: jax.Array
    mix: jax.Array
    place: jax.Array
    rewards: jax.Array
    real: jax.Array
    reward_weight: jax.Array


def fit_reranker(
    decisions: Decisions, rewards: np.ndarray, config: LoggedConfig, stop: StopRequested = never
) -> Fitted:
    """Fits scales and weights.

    Args:
        decisions: On users that neither the models nor the tables behind the features know.
        rewards: [decisions, candidates] float32, what each candidate would earn on the first place.
        config: Of the loss and of the optimizer.
        stop: Asked between chunks of updates.

    Returns:
        What was fitted.

    Raises:
        TrainingError: The loss is not finite.
        TrainingStopped: `stop()` was true.
    """
    scales = measured_scales(decisions)
    features, context = scaled_rows(decisions, scales)
    # One shape for folds of like size, since the program takes seconds to compile.
    filled = -decisions.size % ROWS_FILLED
    columns = features, context, decisions.mix, decisions.place, np.asarray(rewards, np.float32)
    filled_columns = (np.pad(column, ((0, filled), *[(0, 0)] * (column.ndim - 1))) for column in columns)
    problem = Problem(*jax.device_put((*filled_columns, np.int32(decisions.size), np.float32(config.reward_weight))))
    start = RerankerWeights(jnp.zeros(len(FEATURES)), jnp.zeros((len(CONTEXT), len(FEATURES))))
    path, key = list[RerankerWeights](), jax.random.key(config.seed)
    name, kept = "learning to rerank", "the decisions are kept"
    alike = dataclasses.replace(config, seed=0, reward_weight=float(config.reward_weight > 0), rewards=RewardWeights())
    updates, optimizer = _updates(alike)
    for learner, _ in run_updates(
        updates, new_learner(start, optimizer), problem, key, config.updates, UPDATES_PER_CHUNK, name, stop, kept
    ):
        path.append(jax.tree.map(np.array, learner.params))
    return Fitted(scales, path[-1], path)


@functools.cache
def _updates(config: LoggedConfig) -> tuple[Updates, optax.GradientTransformation]:
    """Compiled once for all fits that differ in seed, in the reward's terms and in its weight, unless that is 0."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.updates, 0.02)),
    )
    return make_updates(_loss(config), optimizer), optimizer


def measured_scales(decisions: Decisions) -> Scales:
    """Standard deviations of features and context, and the context's mean; SCALE_OF_NOTHING for what varies by rounding
    alone, as the weight of such a feature would be learned from noise, and act as soon as the feature varies."""
    some = np.unique(np.linspace(0, decisions.size - 1, SCALED_BY).astype(np.int64))
    features = decisions.features[some][decisions.mix[some] > NEVER / 2].astype(np.float32)
    context = decisions.context
    deviations = []
    for values in (features, context):
        deviation, least = values.std(axis=0), ROUNDING * np.maximum(1, np.abs(values.mean(axis=0)))
        deviations.append(np.where(deviation < least, SCALE_OF_NOTHING, deviation).astype(np.float32))
    return Scales(deviations[0], context.mean(axis=0), deviations[1])


def scaled_rows(decisions: Decisions, scales: Scales) -> tuple[np.ndarray, np.ndarray]:
    """`jaxrec.models.reranker.scaled` of all decisions; features as float16."""
    return by_batches(
        lambda rows: _scaled(decisions.features[rows], decisions.context[rows], scales), decisions.size, ROWS
    )


@jax.jit
def _scaled(features: jax.Array, context: jax.Array, scales: Scales) -> tuple[jax.Array, jax.Array]:
    nothing = jnp.zeros(features.shape[:2])
    found = scaled(Candidates(nothing, nothing, features.astype(jnp.float32), context), scales)
    return found[0].astype(jnp.float16), found[1]


def reranked_scores(fitted: Fitted, decisions: Decisions) -> np.ndarray:
    """[decisions, candidates] float32: by which the candidates are ranked."""
    return scores_along(fitted._replace(path=[fitted.weights]), decisions)[0]


def scores_along(fitted: Fitted, decisions: Decisions) -> list[np.ndarray]:
    """`reranked_scores` by the weights of each part of the path."""
    features, context = scaled_rows(decisions, fitted.scales)
    return [
        by_batches(
            lambda rows, weights=weights: _scores(weights, decisions.mix[rows], features[rows], context[rows]),  # type: ignore[misc]
            decisions.size,
            ROWS,
        )
        for weights in fitted.path
    ]


@jax.jit
def _scores(weights: RerankerWeights, mix: jax.Array, features: jax.Array, context: jax.Array) -> jax.Array:
    return scores(weights, mix, features.astype(jnp.float32), context)


def _loss(config: LoggedConfig) -> Any:
    discounts = jnp.asarray(rank_discounts(config.slate_size))

    def loss(
        weights: RerankerWeights, learner: Learner, problem: Problem, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        row_key, slate_key = jax.random.split(jax.random.fold_in(key, learner.step))
        rows = jax.random.randint(row_key, (config.batch_size,), 0, problem.real)
        batch = problem._replace(
            **{name: getattr(problem, name)[rows] for name in ("features", "context", "mix", "place", "rewards")}
        )
        where = batch.mix > NEVER / 2
        logits = jnp.where(where, scores(weights, batch.mix, batch.features.astype(jnp.float32), batch.context), NEVER)
        known = batch.place >= 0
        of_target = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(batch.place, 0)[:, None], axis=1)[:, 0]
        imitation = -jnp.sum(jnp.where(known, of_target, 0.0)) / jnp.maximum(jnp.sum(known), 1)
        squares = jnp.sum(jnp.square(weights.direct)) + jnp.sum(jnp.square(weights.by_context))
        total = imitation + config.penalty * squares
        top = jax.lax.top_k(logits, min(config.slate_size, logits.shape[1]))[1]
        earned = jnp.take_along_axis(batch.rewards, top, axis=1) @ discounts[: top.shape[1]]
        if config.reward_weight:
            total += problem.reward_weight * reward_loss(slate_key, logits, batch.rewards, where, config)
        return total, ({"reward": jnp.mean(earned), "imitation_loss": imitation, "squares": squares}, ())

    return loss


def reward_loss(
    key: jax.Array, logits: jax.Array, rewards: jax.Array, where: jax.Array, config: LoggedConfig
) -> jax.Array:
    """Scalar whose gradient is minus that of the slate's expected reward, by `config.method`.

    Args:
        key: Of the slates that are drawn.
        logits: [batch, candidates] float32, NEVER where there is no candidate.
        rewards: [batch, candidates] float32, on a first place.
        where: [batch, candidates] bool, the candidates.
        config: Size and number of slates.
    """
    size = min(config.slate_size, logits.shape[1])
    discounts = jnp.asarray(rank_discounts(config.slate_size))
    if config.method == PL_RANK:
        return pl_rank_loss(key, logits, rewards, where, discounts, config.samples)
    drawn = jax.lax.stop_gradient(jnp.broadcast_to(logits, (config.samples, *logits.shape)))
    slates = sample_slates(key, drawn, size)
    every = jnp.broadcast_to(logits, drawn.shape)
    earned = jnp.take_along_axis(jnp.broadcast_to(rewards, drawn.shape), slates, axis=-1) * discounts[:size]
    shown = jnp.arange(size) < jnp.sum(where, axis=1, keepdims=True)
    earned = jnp.where(shown, earned, 0.0)
    to_come = jax.lax.cumsum(earned, axis=2, reverse=True)
    return plackett_luce_loss(slate_logprobs(every, slates), to_come, shown)
