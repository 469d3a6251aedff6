"""Judges a new policy by a server's log: what it would have earned beside what the policy in use did."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxrec.config import RLConfig
from jaxrec.models.features import Array
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.ope.estimators import Terms, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.gate import GateDecision, format_interval, gate
from jaxrec.rl.ope.intervals import Interval, interval
from jaxrec.rl.ope.weights import ImportanceWeights, slate_weights
from jaxrec.rl.rewards import slot_discounts, total_reward
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served.log_policy import logged_logprobs
from jaxrec.rl.served.policy import reproduced_versions
from jaxrec.rl.served.reward_model import expected_features, fit_reward_model, logged_features
from jaxrec.rl.served.states import LogStates

VERSION_ROWS = 200  # of each model version, to tell whose it is


class Judgement(NamedTuple):
    """The gate's `decision`, by the self-normalized estimate, and the `doubly_robust` gain beside it, which decides
    nothing; the decision's reason tells both. None where the log does not allow the first, or has too little to fit a
    reward model to."""

    decision: GateDecision
    doubly_robust: Interval | None


def judge_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    training: LogStates,
    states: LogStates,
    config: RLConfig,
    minimum_effective: float,
) -> Judgement:
    """The gate's word on recommendations that trained nothing, self-normalized RIPS resampled by user.

    `states` are what the policy in use itself showed. Others' slates would tell of a gain over those others, and what
    the policy in use is worth would be an estimate as well, blind to whatever they never showed. `training`: what the
    reward model of the doubly robust gain is fitted to, of other users.
    """
    rewards, users = slot_rewards(states, config), np.asarray(states.user)
    weights = _weights(logged_logprobs(graphdef, new, scoring, states), states)
    mean_discounts = slot_discounts(np.asarray(states.slate) > 0).mean(axis=0)
    logged = on_policy(rewards)
    decision = gate(
        snips(weights, rewards), logged, weights, users, mean_discounts, minimum_effective, seed=config.seed
    )
    gain, told = None, f"no doubly robust gain: {len(training.user)} recommendation(s) trained, expected at least two"
    if decision.gain is None:
        told = "for the same reason no doubly robust gain is told"
    elif len(training.user) >= 2:
        gain = _doubly_robust_gain(graphdef, new, current, scoring, training, states, weights, config)
        told = f"the doubly robust gain is {format_interval(gain)}"
    return Judgement(dataclasses.replace(decision, reason=f"{decision.reason}; {told}"), gain)


def _doubly_robust_gain(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    training: LogStates,
    states: LogStates,
    weights: ImportanceWeights,
    config: RLConfig,
) -> Interval:
    """Of the new policy (by `weights`) over the policy in use, paired and resampled by user.

    Self-normalized: where few users carry the weights it errs less and its intervals cover the truth more often than
    those of the plain mean, since the normalization takes back what the log happens to weigh too much. The policy in
    use is taken doubly robust as well, though the mean reward of its own slates would do: the model then takes the same
    chance from both, and their difference errs less.
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


def slot_rewards(states: LogStates, config: RLConfig) -> np.ndarray:
    """[rows, k] float64: each slot's reward as it counts in the slate's."""
    rewards = np.asarray(total_reward(states.terms, config.rewards), np.float64)
    return rewards * slot_discounts(np.asarray(states.slate) > 0)


def own_versions(
    graphdef: nnx.GraphDef[PolicyHead], current: Any, scoring: Scoring, states: LogStates, count: int
) -> np.ndarray:
    """[count] bool: which of the log's model versions are the policy in use, by VERSION_ROWS of each, spread over the
    log."""
    version = np.asarray(states.version)
    of_each = [np.flatnonzero(version == one) for one in range(count)]
    spread = [rows[np.linspace(0, len(rows) - 1, min(VERSION_ROWS, len(rows))).astype(np.int64)] for rows in of_each]
    some = states.at(np.concatenate(spread))
    logprobs = logged_logprobs(graphdef, current, scoring, some)
    return reproduced_versions(logprobs, np.asarray(some.log_propensities), np.asarray(some.version), count)


def _weights(logprobs: Array, states: LogStates) -> ImportanceWeights:
    """Uncapped: a cap cuts away where the policies differ most, and the gate refuses that."""
    logged = np.minimum(np.asarray(states.log_propensities, np.float64), 0.0)
    return slate_weights(np.minimum(np.asarray(logprobs, np.float64), 0.0), logged, np.asarray(states.slate) > 0)
