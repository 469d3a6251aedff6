"""Improves a policy from a server's log, off-policy, and judges it on other users of the same log.

What is followed is the clipped surrogate of the policy's value (`jaxrec.rl.objectives.clipped_surrogate`) by
per-decision importance sampling (Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation", section 3,
with the slots of a slate as its steps): the sum over the slots of W_i (d_i r_i - b_i(state)) with cumulative weights

    W_i = prod_(j <= i) pi(slot j | slots before it) / logged propensity

b_i is a baseline, linear in the query, that learns a slot's logged reward; W_i b_i has no gradient in expectation. pi
is the policy as it is served: the same pool of best items, at the temperature that the slate was drawn at
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
from jaxrec.rl.objectives.clipped_surrogate import clipped_surrogate_loss
from jaxrec.rl.objectives.off_policy import importance_weights
from jaxrec.rl.objectives.policy_gradient import baseline_loss
from jaxrec.rl.offline_evaluation.estimators import on_policy, snips
from jaxrec.rl.offline_evaluation.gating import Decision, gate
from jaxrec.rl.offline_evaluation.weights import Weights, slate_weights
from jaxrec.rl.policy import kl_divergence
from jaxrec.rl.rewards import discounts, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.served_policy import reproduced_versions, served_logits, served_logprobs, tempered
from jaxrec.rl.train_policy import step_records
from jaxrec.schema import DataError
from jaxrec.stopping import StopRequested, TrainingStopped, never

TRAIN_SHARE = 0.5  # of the log's users; the others judge
VERSION_ROWS = 200  # of each model version, to tell whose it is
ROWS_PER_BATCH = 256


class FromLog(NamedTuple):
    """What came of a log: the gate's `decision`, the new `variables` of PolicyHead, one record per update, and how many
    recommendations trained and judged."""

    decision: Decision
    variables: Any
    steps: list[dict[str, float]]
    train_rows: int
    gate_rows: int


def split_users(users: np.ndarray, names: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the users that train, and of those that judge; `users` [rows] counts `names`, the raw ids.

    By a hash of the id: who trained a policy does not judge its successor, however the log has grown. Raises DataError
    where either part has fewer than two users.
    """
    labels = np.unique(users)
    digests = [hashlib.sha256(f"{seed} {names[user]}".encode()).digest() for user in labels]
    trains = labels[[int.from_bytes(digest[:4]) < TRAIN_SHARE * 2**32 for digest in digests]]
    if not 2 <= len(trains) <= len(labels) - 2:
        raise DataError(
            f"the log has usable recommendations of {len(labels)} users, of whom {len(trains)} would train and "
            f"{len(labels) - len(trains)} judge, expected two or more of each"
        )
    of_training = np.isin(users, trains)
    return np.flatnonzero(of_training), np.flatnonzero(~of_training)


def train_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    current: Any,
    scoring: Scoring,
    states: LogStates,
    names: Sequence[str],
    own: np.ndarray,
    config: RLConfig,
    minimum_effective: float,
    stop: StopRequested = never,
) -> FromLog:
    """Trains from the policy in use (`current`: variables of PolicyHead) on half of the users, and has the gate judge
    it on the other half (`judge_from_log`). `own` [rows] bool: what the policy in use itself showed (`own_versions`).

    Raises DataError where too few users are there, TrainingError where a figure is not finite, TrainingStopped where
    `stop()` became true: nothing is kept then.
    """
    trains, judges = split_users(np.asarray(states.user), names, config.seed)
    device = jax.devices()[0]
    current = jax.device_put(jax.tree.map(jnp.asarray, current), device)
    updates = _make_updates(graphdef, config)
    slots, width = states.slate.shape[1], states.query.shape[1]
    critic = Linear(jnp.zeros((width, slots)), jnp.zeros(slots))
    head = jax.tree.map(jnp.copy, current)
    optimizer = policy_optimizer(config).init((head, critic))
    learner = Learner(head, critic, optimizer, jnp.float32(KL_COEFFICIENT_START), jnp.zeros((), jnp.int32))
    training, key = jax.device_put(states.at(trains), device), jax.random.key(config.seed)
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
    judging = states.at(judges), own[judges]
    decision = judge_from_log(graphdef, variables, current, scoring, *judging, config, minimum_effective)
    return FromLog(decision, variables, steps, len(trains), len(judges))


def judge_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    new: Any,
    current: Any,
    scoring: Scoring,
    states: LogStates,
    own: np.ndarray,
    config: RLConfig,
    minimum_effective: float,
) -> Decision:
    """The gate's word on recommendations that trained nothing: self-normalized RIPS, resampled by user.

    Judged is by what the policy in use itself showed (`own` [rows] bool), where that is of `minimum_effective` users at
    least: older policies' slates are further from what the new one would show, and would tell of its gain over them.
    Else all of the log counts, and what the policy in use is worth is estimated, too.
    """
    by_own = len(np.unique(np.asarray(states.user)[own])) >= minimum_effective
    states = states.at(np.flatnonzero(own | (not by_own)))
    rewards = slot_rewards(states, config)
    weights = _weights(logged_logprobs(graphdef, new, scoring, states), states)
    if by_own:
        before = on_policy(rewards)
    else:
        before = snips(_weights(logged_logprobs(graphdef, current, scoring, states), states), rewards)
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


def _logits(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
    """The policy's logits [rows, items + 1]; NEVER at the items of the history."""
    logits = policy_logits(nnx.merge(graphdef, head), jnp.asarray(states.query), jnp.asarray(states.recent), scoring)
    return exclude_items(logits, jnp.asarray(states.exclude))


def _slot_logprobs(logits: jax.Array, states: LogStates) -> jax.Array:
    """[rows, k]: of the logged slots, as a policy with these logits is served at the temperature of each row."""
    slate = jnp.asarray(states.slate)
    return served_logprobs(served_logits(logits, jnp.asarray(states.temperature), slate), slate)


def logged_logprobs(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> np.ndarray:
    """[rows, k] float64: log-probabilities of the logged slots under a policy as it is served."""

    @jax.jit
    def logprobs(head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
        return _slot_logprobs(_logits(graphdef, head, scoring, states), states)

    found = []
    for start in range(0, len(states.user), ROWS_PER_BATCH):
        rows = np.minimum(np.arange(start, start + ROWS_PER_BATCH), len(states.user) - 1)
        found.append(np.asarray(logprobs(head, scoring, states.at(rows)), np.float64))
    return np.minimum(np.concatenate(found)[: len(states.user)], 0.0)


def _weights(logprobs: np.ndarray, states: LogStates) -> Weights:
    """Uncapped: a cap cuts away where the policies differ most, and the gate refuses that."""
    logged = np.minimum(np.asarray(states.log_propensities, np.float64), 0.0)
    return slate_weights(logprobs, logged, np.asarray(states.slate) > 0)


def _make_updates(graphdef: nnx.GraphDef[PolicyHead], config: RLConfig) -> Any:
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
            logprobs = _slot_logprobs(logits, batch)
            ratios = jnp.cumsum(jnp.where(where, logprobs - batch.log_propensities, 0.0), axis=1)
            weights, clipped = importance_weights(ratios, jnp.zeros_like(ratios), config.importance_cap)
            weights = jnp.where(where, weights, 0.0)
            values = critic(jnp.asarray(batch.query))
            policy_loss = clipped_surrogate_loss(ratios, rewards - values, where, config.importance_cap)
            value_loss = baseline_loss(values, rewards, where)
            drawn_by, before = (tempered(x, jnp.asarray(batch.temperature)) for x in (logits, reference))
            kl = jnp.mean(kl_divergence(drawn_by, before))
            guard, guarded = guards(drawn_by, before, config)
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
