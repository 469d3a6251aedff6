"""Improves a policy from a server's log, off-policy, and judges it on other users of the same log.

The gradient is that of the policy's value, by per-decision importance sampling (Precup et al. 2000, "Eligibility Traces
for Off-Policy Policy Evaluation", section 3, with the slots of a slate as its steps). With the cumulative weights
W_i = prod_(j <= i) pi(slot j | slots before it) / logged propensity, in log space and capped, slot j is answerable for

    sum_j grad log pi(slot j | slots before it) * (sum_(i >= j) W_i d_i r_i - W_j b_j(state))

b_j is a baseline, linear in the query, that learns the logged reward from slot j on; W_j b_j has no gradient in
expectation. pi is the policy as it is served: the same pool of best items, at the temperature of the log
(`jaxrec.rl.served_policy`). The leash holds it near the policy in use.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxrec.config import RLConfig
from jaxrec.metrics import exclude_items
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.learner import KL_COEFFICIENT_START, Learner, apply_update, guards, policy_optimizer, slate_coverage
from jaxrec.rl.log_states import LogStates
from jaxrec.rl.methods import Linear, weight_metrics
from jaxrec.rl.objectives.off_policy import importance_weights
from jaxrec.rl.objectives.policy_gradient import baseline_loss
from jaxrec.rl.offline_evaluation.estimators import on_policy, snips
from jaxrec.rl.offline_evaluation.gating import Decision, gate
from jaxrec.rl.offline_evaluation.weights import Weights, slate_weights
from jaxrec.rl.policy import kl_divergence, recommendable
from jaxrec.rl.rewards import discounts, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.served_policy import EXACT, Fit, fit_temperature, own_share, served_logits, served_logprobs
from jaxrec.rl.train_policy import step_records
from jaxrec.schema import DataError
from jaxrec.stopping import StopRequested, TrainingStopped, never

TRAIN_SHARE = 0.5  # of the log's users; the others judge
FIT_ROWS = 200
ROWS_PER_BATCH = 256


class FromLog(NamedTuple):
    """What came of a log: the gate's `decision`, the new `variables` of PolicyHead, one record per update, the
    temperature that was assumed and how well the policy in use explains the log with it, and how many recommendations
    trained and judged."""

    decision: Decision
    variables: Any
    steps: list[dict[str, float]]
    fit: Fit
    train_rows: int
    gate_rows: int


def trains(names: Sequence[str], seed: int) -> np.ndarray:
    """[names] bool: which of the users train; the others judge. By a hash of the id: who trained a policy does not
    judge its successor, however the log has grown."""
    digests = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    return np.array([int.from_bytes(digest[:4]) < TRAIN_SHARE * 2**32 for digest in digests], bool)


def split_users(users: np.ndarray, names: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the users that train, and of those that judge; `users` [rows] counts `names`, the raw ids.

    Raises DataError where either part has fewer than two users.
    """
    labels = np.unique(users)
    training = labels[trains([names[user] for user in labels], seed)]
    if not 2 <= len(training) <= len(labels) - 2:
        raise DataError(
            f"the log has usable recommendations of {len(labels)} users, of whom {len(training)} would train and "
            f"{len(labels) - len(training)} judge, expected two or more of each"
        )
    of_training = np.isin(users, training)
    return np.flatnonzero(of_training), np.flatnonzero(~of_training)


def train_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    current: Any,
    scoring: Scoring,
    states: LogStates,
    names: Sequence[str],
    config: RLConfig,
    fit: Fit,
    minimum_effective: float,
    stop: StopRequested = never,
) -> FromLog:
    """Trains from the policy in use (`current`: variables of PolicyHead) on half of the users, and has the gate judge
    it on the other half (`judge_from_log`).

    Raises DataError where too few users are there, TrainingError where a figure is not finite, TrainingStopped where
    `stop()` became true: nothing is kept then.
    """
    training_rows, judging_rows = split_users(np.asarray(states.user), names, config.seed)
    device = jax.devices()[0]
    current = jax.device_put(jax.tree.map(jnp.asarray, current), device)
    updates = _make_updates(graphdef, config, fit.temperature)
    slots, width = states.slate.shape[1], states.query.shape[1]
    critic = Linear(jnp.zeros((width, slots)), jnp.zeros(slots))
    head = jax.tree.map(jnp.copy, current)
    optimizer = policy_optimizer(config).init((head, critic))
    learner = Learner(head, critic, optimizer, jnp.float32(KL_COEFFICIENT_START), jnp.zeros((), jnp.int32))
    training, key = jax.device_put(states.at(training_rows), device), jax.random.key(config.seed)
    steps: list[dict[str, float]] = []
    with tqdm(total=config.steps, desc="train policy on the log", unit="step") as bar:
        while (start := len(steps)) < config.steps:
            count = min(config.steps_per_evaluation, config.steps - start)
            learner, metrics = updates(learner, current, scoring, training, key, count)
            steps += step_records(jax.device_get(metrics), start)
            bar.update(count)
            bar.set_postfix(value=f"{steps[-1]['value']:.4f}", kl=f"{steps[-1]['kl']:.4f}")
            if stop():
                raise TrainingStopped(f"stopped after step {start + count} of {config.steps}; the policy in use stays")
    variables = jax.tree.map(np.array, learner.head)
    judging = states.at(judging_rows)
    decision = judge_from_log(graphdef, variables, current, scoring, judging, config, fit, minimum_effective)
    return FromLog(decision, variables, steps, fit, len(training_rows), len(judging_rows))


def judge_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    states: LogStates,
    config: RLConfig,
    fit: Fit,
    minimum_effective: float,
) -> Decision:
    """The gate's word on recommendations that trained nothing: self-normalized RIPS, resampled by user.

    Judged is by what the policy in use itself showed, where that is of `minimum_effective` users at least: older
    policies' slates are further from what the new one would show, and would tell of its gain over them. Else all of the
    log counts, and what the policy in use is worth is estimated, too.
    """
    of_current = _logprobs(graphdef, current, scoring, states, fit.temperature)
    shown_by_current = np.abs(of_current - np.asarray(states.log_propensities)).max(axis=1) <= EXACT
    own = len(np.unique(np.asarray(states.user)[shown_by_current])) >= minimum_effective
    rows = np.flatnonzero(shown_by_current | (not own))
    states, of_current = states.at(rows), of_current[rows]
    rewards = slot_rewards(states, config)
    of_new = _logprobs(graphdef, new, scoring, states, fit.temperature)
    weights = _weights(of_new, states)
    before = on_policy(rewards) if own else snips(_weights(of_current, states), rewards)
    users = np.asarray(states.user)
    return gate(
        snips(weights, rewards),
        before,
        weights,
        users,
        discounts(rewards.shape[1]),
        minimum_effective,
        seed=config.seed,
    )


def slot_rewards(states: LogStates, config: RLConfig) -> np.ndarray:
    """[rows, k] float64: each slot's reward as it counts in the slate's."""
    rewards = np.asarray(total_reward(states.terms, config.rewards), np.float64)
    return np.where(np.asarray(states.slate) > 0, rewards, 0.0) * discounts(rewards.shape[1])


def fit_log(
    graphdef: nnx.GraphDef[PolicyHead],
    current: Any,
    scoring: Scoring,
    states: LogStates,
    times: np.ndarray,
    temperature: float | None,
) -> Fit:
    """The temperature at which the policy in use comes closest to what was shown last (by `times` [rows] seconds), or
    the given one, and how much of the log is that policy's. By FIT_ROWS recommendations each."""

    def logged(rows: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        some = states.at(rows)
        return _logits(graphdef, current, scoring, some), jnp.asarray(some.slate), jnp.asarray(some.log_propensities)

    latest = np.argsort(times, kind="stable")[-FIT_ROWS:]
    found, error = fit_temperature(*logged(latest), temperature)
    spread = np.linspace(0, len(times) - 1, min(FIT_ROWS, len(times))).astype(np.int64)
    return Fit(found, error, own_share(*logged(spread), found))


def _logits(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
    """The policy's logits [rows, items + 1]; NEVER at the items of the history."""
    logits = policy_logits(nnx.merge(graphdef, head), jnp.asarray(states.query), jnp.asarray(states.recent), scoring)
    return exclude_items(logits, jnp.asarray(states.exclude))


def _logprobs(
    graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates, temperature: float
) -> np.ndarray:
    """[rows, k] float64: log-probabilities of the logged slots under a policy as it is served."""

    @jax.jit
    def logprobs(head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
        logits = served_logits(_logits(graphdef, head, scoring, states), temperature, states.slate.shape[1])
        return served_logprobs(logits, jnp.asarray(states.slate))

    found = []
    for start in range(0, len(states.user), ROWS_PER_BATCH):
        rows = np.minimum(np.arange(start, start + ROWS_PER_BATCH), len(states.user) - 1)
        found.append(np.asarray(logprobs(head, scoring, states.at(rows)), np.float64))
    return np.minimum(np.concatenate(found)[: len(states.user)], 0.0)


def _weights(logprobs: np.ndarray, states: LogStates) -> Weights:
    """Uncapped: a cap cuts away where the policies differ most, and the gate refuses that."""
    logged = np.minimum(np.asarray(states.log_propensities, np.float64), 0.0)
    return slate_weights(logprobs, logged, np.asarray(states.slate) > 0)


def _make_updates(graphdef: nnx.GraphDef[PolicyHead], config: RLConfig, temperature: float) -> Any:
    """updates(learner, current, scoring, states, key, count) -> (learner, metrics [count] each), one compiled scan."""
    optimizer = policy_optimizer(config)

    def update(
        current: Any, scoring: Scoring, states: LogStates, key: jax.Array, learner: Learner
    ) -> tuple[Learner, dict[str, jax.Array]]:
        rows = jax.random.randint(jax.random.fold_in(key, learner.step), (config.batch_size,), 0, len(states.user))
        batch = states.at(rows)
        slate = jnp.asarray(batch.slate)
        where, slots = slate > 0, slate.shape[1]
        discount = jnp.asarray(discounts(slots))
        rewards = jnp.where(where, total_reward(batch.terms, config.rewards), 0.0) * discount
        reference = _logits(graphdef, current, scoring, batch)

        def loss_of(trained: tuple[Any, Linear]) -> tuple[jax.Array, dict[str, jax.Array]]:
            head, critic = trained
            logits = _logits(graphdef, head, scoring, batch)
            logprobs = served_logprobs(served_logits(logits, temperature, slots), slate)
            ratios = jnp.cumsum(jnp.where(where, logprobs - batch.log_propensities, 0.0), axis=1)
            weights, clipped = importance_weights(ratios, jnp.zeros_like(ratios), config.importance_cap)
            weights = jnp.where(where, weights, 0.0)
            ahead = jax.lax.cumsum(weights * rewards, axis=1, reverse=True)
            values = critic(jnp.asarray(batch.query))
            advantages = jax.lax.stop_gradient(ahead - weights * values)
            drawn = where & (weights > 0)
            policy_loss = -jnp.mean(jnp.sum(jnp.where(drawn, logprobs * advantages, 0.0), axis=1))
            value_loss = baseline_loss(values, jax.lax.cumsum(rewards, axis=1, reverse=True), where)
            tempered, before = (jnp.where(recommendable(x), x / temperature, x) for x in (logits, reference))
            kl = jnp.mean(kl_divergence(tempered, before))
            guard, guarded = guards(tempered, before, config)
            earned = {
                f"reward_{name}": jnp.mean(jnp.sum(jnp.where(where, term, 0.0) * discount, axis=1))
                for name, term in batch.terms._asdict().items()
            }
            metrics = {
                "reward": jnp.mean(jnp.sum(rewards, axis=1)),
                "value": jnp.sum(jnp.sum(weights * rewards, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1e-6)),
                **earned,
                "kl": kl,
                "kl_coefficient": learner.kl_coefficient,
                **weight_metrics(weights, clipped, where),
                "coverage": slate_coverage(slate, logits.shape[1]),
                "baseline_loss": value_loss,
                **guarded,
            }
            return policy_loss + value_loss + learner.kl_coefficient * kl + guard, metrics

        return apply_update(loss_of, learner, optimizer, config)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=5)
    def updates(
        learner: Learner, current: Any, scoring: Scoring, states: LogStates, key: jax.Array, count: int
    ) -> tuple[Learner, dict[str, jax.Array]]:
        return jax.lax.scan(lambda carry, _: update(current, scoring, states, key, carry), learner, length=count)

    return updates
