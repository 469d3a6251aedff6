"""Improves a policy from a server's log, off-policy, and evaluates it on other users of the same log.

The objective is the clipped surrogate of the policy's value (`jaxrec.rl.losses.clipped_surrogate`) by per-decision
importance sampling (Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation", section 3, with the
slots of a slate as its steps): the sum over the slots of W_i (d_i r_i - b_i(state)) with cumulative weights

    W_i = prod_(j <= i) pi(slot j | slots before it) / logged propensity

b_i is a baseline, linear in the query, that learns a slot's logged reward; W_i b_i has no gradient in expectation. pi
is the policy as it is served: the same pool of best items, at the temperature that the slate was drawn at
(`jaxrec.rl.served.policy`). A KL penalty keeps it near the policy in use. What is trained is the shift of the
reranker's weights where the run uses one, otherwise the shifts of the query and of the items.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.errors import DataError
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import Reranked, RerankerWeights
from jaxrec.rl.config import ServedConfig
from jaxrec.rl.constraints import floor_penalty, slate_coverage
from jaxrec.rl.losses.clipped_surrogate import clipped_surrogate_loss
from jaxrec.rl.losses.kl_penalty import next_kl_weight
from jaxrec.rl.losses.off_policy import capped_importance_weights, weight_metrics
from jaxrec.rl.losses.policy_gradient import baseline_loss
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.policy import kl_divergence
from jaxrec.rl.rewards import slot_discounts, total_reward
from jaxrec.rl.scoring import PolicyParams, Scoring, zero_critic
from jaxrec.rl.served.evaluate import LogEvaluation, evaluate_on_log
from jaxrec.rl.served.policy import slot_logprobs, state_logits, tempered
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.updates import Learner, Loss, make_updates, new_learner, policy_optimizer, run_updates
from jaxrec.training.stopping import StopRequested, never

TRAIN_SHARE = 0.5  # of the log's users; the others evaluate
LEAST_VARIATION = 0.1  # of a reranker's feature, and of its context, for the weight to be trained
UPDATES_PER_CHUNK = 50  # between two checks whether to stop


def is_training_user(names: Sequence[str], seed: int = 0) -> np.ndarray:
    """[names] bool: which users train; the others evaluate. By a hash of the id and the seed, so that it does not
    depend on the other users."""
    digests = [hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names]
    return np.array([int.from_bytes(digest[:4]) < TRAIN_SHARE * 2**32 for digest in digests], bool)


def split_users(users: np.ndarray, names: Sequence[str], own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that train, all those of half of the users, and rows that evaluate: those of the other half that the policy
    in use showed (`own` [rows] bool). `users` [rows] counts `names`, the raw ids.

    The halves are the same in every training: a user that trained one policy never evaluates a later one, however the
    log has grown. Raises DataError where either part has fewer than two users.
    """
    of_training = is_training_user(names)[users]
    training, evaluation = np.flatnonzero(of_training), np.flatnonzero(~of_training & own)
    counts = [len(np.unique(users[rows])) for rows in (training, evaluation)]
    if min(counts) < 2:
        raise DataError(
            f"the log has usable recommendations of {len(np.unique(users))} users: {counts[0]} for training and "
            f"{counts[1]}, served by the policy in use, for evaluation; expected two or more of each"
        )
    return training, evaluation


@jax.jit
def trained_weights(reranked: Reranked) -> dict[str, jax.Array]:
    """Which weights of the reranker a log can teach, as bool in the shapes of `RerankerWeights`, by their names.

    A weight is one where its feature, among the candidates [rows, candidates] of the log, and its part of the context
    vary by LEAST_VARIATION or more, in standard deviations of the log that the reranker was learned from. Of another
    one the log, and so the gate, does not show what it does, but it would act once its feature varies: Adam's steps do
    not depend on how small a gradient is.
    """
    where = jnp.asarray(reranked.mix)[..., None] > NEVER / 2
    squares = jnp.square(jnp.asarray(reranked.features).astype(jnp.float32))
    # Features are centred within a request.
    features = jnp.sqrt(jnp.sum(jnp.where(where, squares, 0.0), axis=(0, 1)) / jnp.maximum(jnp.sum(where), 1))
    varies = features >= LEAST_VARIATION
    of_context = jnp.std(jnp.asarray(reranked.context), axis=0) >= LEAST_VARIATION
    return RerankerWeights(varies, of_context[:, None] & varies)._asdict()


def train_served(
    graphdef: nnx.GraphDef[PolicyHead],
    current: Any,
    scoring: Scoring,
    states: ServedStates,
    rows: tuple[np.ndarray, np.ndarray],
    config: ServedConfig,
    stop: StopRequested = never,
) -> tuple[TrainedPolicy, LogEvaluation]:
    """Trains from the policy in use (`current`: variables of PolicyHead) on the first of the two `rows`, and evaluates
    on the second (`split_users`, `evaluate_on_log`).

    Raises TrainingError where a metric is not finite, TrainingStopped where `stop()` was true: nothing is kept then.
    """
    device = jax.devices()[0]
    current = jax.device_put(jax.tree.map(jnp.asarray, current), device)
    training, evaluation = jax.device_put(states.at(rows[0]), device), states.at(rows[1])
    reranked = training.state.reranked
    # The shift of a reranker's weights is trained alone: it is small and sees the request, so that it gains more from
    # a log of few users than the shifts of the query and of the items, or than all together.
    trained = None if reranked is None else trained_weights(reranked)
    optimizer = policy_optimizer(config.learning_rate, config.updates, trained)
    critic = zero_critic(states.state.query.shape[1], states.slate.shape[1])
    learner = new_learner(PolicyParams(current, critic), optimizer)
    updates = make_updates(
        served_loss(graphdef, config),
        optimizer,
        lambda weight, metrics: next_kl_weight(weight, metrics["kl"], config.kl_target),
    )
    data, key, records = (current, scoring, training), jax.random.key(config.seed), list[dict[str, float]]()
    name, kept = "training on the server's log", "the policy in use stays"
    chunks = run_updates(updates, learner, data, key, config.updates, UPDATES_PER_CHUNK, name, stop, kept)
    for updated, of_chunk in chunks:
        learner, records = updated, records + of_chunk
    head = jax.tree.map(np.array, learner.params.head)
    found = evaluate_on_log(graphdef, head, current, scoring, training, evaluation, config)
    decision = found.decision
    values = {"policy": decision.new, "logged": decision.logged}
    figures = {name: {"value": value.value} for name, value in values.items() if value is not None}
    gain = decision.gain
    differences = {} if gain is None else {"value": {"mean": gain.value, "low": gain.low, "high": gain.high}}
    outcome = PolicyOutcome(decision.used, decision.reason, figures, differences)
    return TrainedPolicy(outcome, head, records), found


def served_loss(graphdef: nnx.GraphDef[PolicyHead], config: ServedConfig) -> Loss:
    """The loss of PolicyParams for `jaxrec.rl.updates`; its data are the variables of the policy in use, the frozen
    scoring, and the recommendations that train."""

    def loss(
        params: PolicyParams, learner: Learner, data: tuple[Any, Scoring, ServedStates], key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        current, scoring, states = data
        rows = jax.random.randint(jax.random.fold_in(key, learner.step), (config.batch_size,), 0, len(states.user))
        batch = states.at(rows)
        slate = jnp.asarray(batch.slate)
        where = slate > 0
        discount = slot_discounts(where)
        rewards = total_reward(batch.terms, config.rewards) * discount
        reference = state_logits(graphdef, current, scoring, batch)
        logits = state_logits(graphdef, params.head, scoring, batch)
        logprobs = slot_logprobs(logits, batch)
        ratios = jnp.cumsum(jnp.where(where, logprobs - batch.log_propensities, 0.0), axis=1)
        weights, clipped = capped_importance_weights(ratios, jnp.zeros_like(ratios), config.importance_cap)
        weights = jnp.where(where, weights, 0.0)
        values = params.critic(jnp.asarray(batch.state.query))
        policy_loss = clipped_surrogate_loss(ratios, rewards - values, where, config.importance_cap)
        value_loss = baseline_loss(values, rewards, where)
        drawn_by, before = (tempered(x, jnp.asarray(batch.temperature)) for x in (logits, reference))
        kl = jnp.mean(kl_divergence(drawn_by, before))
        penalty, spread = floor_penalty(drawn_by, before, config.entropy_floor, config.coverage_floor)
        by_term = {
            f"reward_{name}": jnp.mean(jnp.sum(term * discount, axis=1)) for name, term in batch.terms._asdict().items()
        }
        metrics = {
            "reward": jnp.mean(jnp.sum(rewards, axis=1)),
            "value": jnp.sum(jnp.sum(weights * rewards, axis=0) / jnp.maximum(jnp.sum(weights, axis=0), 1e-6)),
            **by_term,
            "kl": kl,
            **weight_metrics(weights, clipped, where),
            "coverage": slate_coverage(slate, logits.shape[1]),
            "baseline_loss": value_loss,
            **spread,
        }
        return policy_loss + value_loss + learner.kl_coefficient * kl + penalty, (metrics, ())

    return loss
