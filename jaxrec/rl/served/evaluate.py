"""Evaluates a new policy on a server's log: what it would have earned, beside what the policy in use did."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxrec.models.features import Array
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.config import ServedConfig
from jaxrec.rl.ope.estimators import Terms, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.gate import GateDecision, format_interval, gate
from jaxrec.rl.ope.intervals import Interval, interval
from jaxrec.rl.ope.weights import ImportanceWeights, slate_weights
from jaxrec.rl.rewards import slot_discounts, total_reward
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served.policy import logged_logprobs, reproduced_versions
from jaxrec.rl.served.reward_model import expected_features, fit_reward_model, logged_features
from jaxrec.rl.served.states import ServedStates

VERSION_ROWS = 200  # of each model version, by which the policy in use is recognized


class LogEvaluation(NamedTuple):
    """The gate's `decision`, by the self-normalized estimate, and the `doubly_robust` gain, which is reported in the
    decision's reason but decides nothing; None where the log does not allow the first, or has too few rows to fit a
    reward model to."""

    decision: GateDecision
    doubly_robust: Interval | None


def evaluate_on_log(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    training: ServedStates,
    states: ServedStates,
    config: ServedConfig,
) -> LogEvaluation:
    """Applies the gate to recommendations that trained nothing: self-normalized RIPS, resampled by user.

    `states` are recommendations of the policy in use (variables `current`) itself. With those of another policy the
    value of the policy in use would be an estimate as well, without information on what the other one never showed. The
    reward model of the doubly robust gain is fitted to `training`, recommendations to other users.
    """
    rewards, users = slot_rewards(states, config), np.asarray(states.user)
    weights = _weights(logged_logprobs(graphdef, new, scoring, states), states)
    mean_discounts = slot_discounts(np.asarray(states.slate) > 0).mean(axis=0)
    logged = on_policy(rewards)
    decision = gate(
        snips(weights, rewards), logged, weights, users, mean_discounts, config.minimum_effective, seed=config.seed
    )
    gain, note = None, f"no doubly robust gain: {len(training.user)} recommendation(s) trained, expected at least two"
    if decision.gain is None:
        note = "for the same reason there is no doubly robust gain"
    elif len(training.user) >= 2:
        gain = _doubly_robust_gain(graphdef, new, current, scoring, training, states, weights, config)
        note = f"the doubly robust gain is {format_interval(gain)}"
    return LogEvaluation(dataclasses.replace(decision, reason=f"{decision.reason}; {note}"), gain)


def _doubly_robust_gain(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    training: ServedStates,
    states: ServedStates,
    weights: ImportanceWeights,
    config: ServedConfig,
) -> Interval:
    """The gain of the new policy (by `weights`) over the policy in use, paired and resampled by user.

    Self-normalized: if few users carry the weights, its error is smaller and its intervals cover the truth more often
    than those of the plain mean. The value of the policy in use is a doubly robust estimate as well, though the mean
    reward of its own slates would do: the model removes the same noise from both, which reduces the error of their
    difference.
    """
    of_logged = logged_features(graphdef, current, scoring, training)
    model = fit_reward_model(of_logged, slot_rewards(training, config), np.asarray(training.slate) > 0)
    rewards, where = slot_rewards(states, config), np.asarray(states.slate) > 0
    q_logged = model.q(logged_features(graphdef, current, scoring, states), where)

    def terms(policy: Any, weights: ImportanceWeights) -> Terms:
        q_policy = model.q(expected_features(graphdef, policy, current, scoring, states), where)
        return self_normalized_doubly_robust(weights, rewards, q_logged, q_policy)

    return interval(
        terms(new, weights).minus(terms(current, _weights(states.log_propensities, states))),
        np.asarray(states.user),
        seed=config.seed,
    )


def slot_rewards(states: ServedStates, config: ServedConfig) -> np.ndarray:
    """[rows, k] float64: each slot's discounted reward; their sum is the slate's."""
    rewards = np.asarray(total_reward(states.terms, config.rewards), np.float64)
    return rewards * slot_discounts(np.asarray(states.slate) > 0)


def own_versions(
    graphdef: nnx.GraphDef[PolicyHead], current: Any, scoring: Scoring, states: ServedStates, count: int
) -> np.ndarray:
    """[count] bool: which of the log's model versions are the policy in use, by VERSION_ROWS of each, spread over the
    log."""
    version = np.asarray(states.version)
    of_each = [np.flatnonzero(version == one) for one in range(count)]
    spread = [rows[np.linspace(0, len(rows) - 1, min(VERSION_ROWS, len(rows))).astype(np.int64)] for rows in of_each]
    some = states.at(np.concatenate(spread))
    logprobs = logged_logprobs(graphdef, current, scoring, some)
    return reproduced_versions(logprobs, np.asarray(some.log_propensities), np.asarray(some.version), count)


def _weights(logprobs: Array, states: ServedStates) -> ImportanceWeights:
    """Uncapped weights, as the gate requires: a cap would cut where the policies differ most."""
    logged = np.minimum(np.asarray(states.log_propensities, np.float64), 0.0)
    return slate_weights(np.minimum(np.asarray(logprobs, np.float64), 0.0), logged, np.asarray(states.slate) > 0)
