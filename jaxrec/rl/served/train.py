"""Improves a policy from a server's log, off-policy, and judges it on other users of the same log.

What is followed is the clipped surrogate of the policy's value (`jaxrec.rl.losses.clipped_surrogate`) by
per-decision importance sampling (Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation", section 3,
with the slots of a slate as its steps): the sum over the slots of W_i (d_i r_i - b_i(state)) with cumulative weights

    W_i = prod_(j <= i) pi(slot j | slots before it) / logged propensity

b_i is a baseline, linear in the query, that learns a slot's logged reward; W_i b_i has no gradient in expectation. pi
is the policy as it is served: the same pool of best items, at the temperature that the slate was drawn at
(`jaxrec.rl.served.policy`). The leash holds it near the policy in use.
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
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.logged.learner import (
    KL_COEFFICIENT_START,
    Learner,
    apply_update,
    guards,
    policy_optimizer,
    slate_coverage,
)
from jaxrec.rl.logged.methods import Linear, weight_metrics
from jaxrec.rl.logged.train import step_records
from jaxrec.rl.losses.clipped_surrogate import clipped_surrogate_loss
from jaxrec.rl.losses.off_policy import capped_importance_weights
from jaxrec.rl.losses.policy_gradient import baseline_loss
from jaxrec.rl.policy import kl_divergence
from jaxrec.rl.rewards import slot_discounts, total_reward
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served.evaluate import Judgement, judge_from_log
from jaxrec.rl.served.log_policy import slot_logprobs, state_logits
from jaxrec.rl.served.policy import tempered
from jaxrec.rl.served.states import LogStates
from jaxrec.training.stopping import StopRequested, never

TRAIN_SHARE = 0.5  # of the log's users; the others judge


class FromLog(NamedTuple):
    """What came of a log: the `judgement`, the new `variables` of PolicyHead, and one record per update."""

    judgement: Judgement
    variables: Any
    steps: list[dict[str, float]]


def trains(names: Sequence[str], seed: int = 0) -> np.ndarray:
    """[names] bool: which of the users train; the others judge. By a hash of the id and the seed, whoever else there
    is."""
    digests = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    return np.array([int.from_bytes(digest[:4]) < TRAIN_SHARE * 2**32 for digest in digests], bool)


def split_users(users: np.ndarray, names: Sequence[str], own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that train, all of half of the users, and rows that judge, of the others what the policy in use showed them
    (`own` [rows] bool). `users` [rows] counts `names`, the raw ids.

    The halves are the same in every training: who trained a policy does not judge its successor, however the log has
    grown. Raises DataError where either part has fewer than two users.
    """
    of_training = trains(names)[users]
    training, judging = np.flatnonzero(of_training), np.flatnonzero(~of_training & own)
    counts = [len(np.unique(users[rows])) for rows in (training, judging)]
    if min(counts) < 2:
        raise DataError(
            f"the log has usable recommendations of {len(np.unique(users))} users; {counts[0]} of them would train "
            f"and {counts[1]}, whom the policy in use served, judge, expected two or more of each"
        )
    return training, judging


def train_from_log(
    graphdef: nnx.GraphDef[PolicyHead],
    current: Any,
    scoring: Scoring,
    states: LogStates,
    rows: tuple[np.ndarray, np.ndarray],
    config: RLConfig,
    minimum_effective: float,
    stop: StopRequested = never,
) -> FromLog:
    """Trains from the policy in use (`current`: variables of PolicyHead) on the first of the two `rows`, and has it
    judged by the second (`split_users`, `judge_from_log`).

    Raises TrainingError where a figure is not finite, TrainingStopped where `stop()` became true: nothing is kept then.
    """
    training_rows, judging_rows = rows
    device = jax.devices()[0]
    current = jax.device_put(jax.tree.map(jnp.asarray, current), device)
    updates = _make_updates(graphdef, config)
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
    judgement = judge_from_log(graphdef, variables, current, scoring, training, judging, config, minimum_effective)
    return FromLog(judgement, variables, steps)


def _make_updates(graphdef: nnx.GraphDef[PolicyHead], config: RLConfig) -> Any:
    """updates(learner, current, scoring, states, key, count) -> (learner, metrics [count] each), one compiled scan."""
    optimizer = policy_optimizer(config)

    def update(
        current: Any, scoring: Scoring, states: LogStates, key: jax.Array, learner: Learner
    ) -> tuple[Learner, dict[str, jax.Array]]:
        rows = jax.random.randint(jax.random.fold_in(key, learner.step), (config.batch_size,), 0, len(states.user))
        batch = states.at(rows)
        slate = jnp.asarray(batch.slate)
        where = slate > 0
        discount = slot_discounts(where)
        rewards = total_reward(batch.terms, config.rewards) * discount
        reference = state_logits(graphdef, current, scoring, batch)

        def loss_of(trained: tuple[Any, Linear]) -> tuple[jax.Array, dict[str, jax.Array]]:
            head, critic = trained
            logits = state_logits(graphdef, head, scoring, batch)
            logprobs = slot_logprobs(logits, batch)
            ratios = jnp.cumsum(jnp.where(where, logprobs - batch.log_propensities, 0.0), axis=1)
            weights, clipped = capped_importance_weights(ratios, jnp.zeros_like(ratios), config.importance_cap)
            weights = jnp.where(where, weights, 0.0)
            values = critic(jnp.asarray(batch.query))
            policy_loss = clipped_surrogate_loss(ratios, rewards - values, where, config.importance_cap)
            value_loss = baseline_loss(values, rewards, where)
            drawn_by, before = (tempered(x, jnp.asarray(batch.temperature)) for x in (logits, reference))
            kl = jnp.mean(kl_divergence(drawn_by, before))
            guard, guarded = guards(drawn_by, before, config)
            earned = {
                f"reward_{name}": jnp.mean(jnp.sum(term * discount, axis=1))
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
