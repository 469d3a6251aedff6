"""Trains a policy by rollouts in an environment: advantage actor-critic.

In one update every user of a batch (`vmap`) goes `steps` steps (`scan`), users who left are replaced by new ones, and
the policy follows its gradient once. The return of a step is the TD(λ) return

    G_t = r_t + γ * (1 - done_t) * ((1 - λ) * v(s_(t+1)) + λ * G_(t+1))

whose distance to v(s_t) is the generalized advantage estimate (Schulman et al. 2016, equation 16); the value continues
the last step. With λ = 1 and long rollouts it is REINFORCE with a learned baseline; with γ = 0 only the next reward
counts. Advantages are divided by their root mean square in the batch, so that one learning rate fits every γ; this
changes the length of the gradient, not its direction. Two terms can be added: an entropy bonus (Williams and Peng 1991)
that falls to 0, and a KL penalty to the policy at the start. The weight of the latter rises while real events lose more
likelihood than `likelihood_budget`, and falls otherwise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrec.rl.checkpoint import PolicyCheckpoint
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.constraints import slate_coverage
from jaxrec.rl.losses.kl_penalty import next_weight_by_cost
from jaxrec.rl.losses.policy_gradient import baseline_loss, reinforce_loss
from jaxrec.rl.policy import entropy, kl_divergence
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.policy import Anchor, Params, Policy, draw_actions, drawn_logprobs
from jaxrec.rl.updates import Learner, Loss, Updates, make_updates, means, new_learner, run_updates
from jaxrec.training.stopping import StopRequested, never

KL_COEFFICIENT_START = 5.0


class Rollout(NamedTuple):
    """What happened, each [steps, users, ...]; `features` and `recommendable` of the observation before the action."""

    features: Any
    recommendable: jax.Array
    slates: jax.Array
    reward: jax.Array
    done: jax.Array
    terms: dict[str, jax.Array]


def train_simulated(
    environment: Environment,
    policy: Policy,
    config: SimulatedConfig,
    checkpoint: PolicyCheckpoint | None = None,
    permuted: bool = False,
    anchor: Anchor | None = None,
    stop: StopRequested = never,
) -> tuple[Params, list[dict[str, float]]]:
    """Trains `policy` from its start on.

    Args:
        environment: With the users that train.
        policy: What is trained.
        config: Its `slate_size` and `temperature` are those of environment and policy.
        checkpoint: Is resumed from, and written after every `updates_per_record` updates.
        permuted: See `simulated_updates`.
        anchor: See `simulated_updates`.
        stop: Ends the training after such a chunk.

    Returns:
        The parameters, and one record per `updates_per_record` updates, the means of its metrics.

    Raises:
        DataError: The checkpoint is damaged.
        TrainingError: A metric is not finite.
        TrainingStopped: `stop()` was true; the checkpoint is written then.
    """
    learner, records = first_learner(environment, policy, config), list[dict[str, float]]()
    if checkpoint is not None and (progress := checkpoint.progress()) is not None:
        learner, records = checkpoint.arrays(learner), progress["updates"]
    updates = simulated_updates(environment, policy, config, permuted, anchor)
    kept = "nothing is kept" if checkpoint is None else "the checkpoint is written"
    key, chunk = jax.random.key(config.seed), config.updates_per_record
    name = "training with simulated users"
    for updated, of_chunk in run_updates(updates, learner, policy.start, key, config.updates, chunk, name, stop, kept):
        learner = updated
        records.append({"step": int(learner.step), **means(of_chunk)})
        if checkpoint is not None:
            checkpoint.write(int(learner.step), learner, {"updates": records})
    return learner.params, records


def first_learner(environment: Environment, policy: Policy, config: SimulatedConfig) -> Learner:
    """A learner before its first update, with new users."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), config.updates), config.users)
    return new_learner(policy.start, _optimizer(config), jax.vmap(environment.reset)(keys), KL_COEFFICIENT_START)


def simulated_updates(
    environment: Environment,
    policy: Policy,
    config: SimulatedConfig,
    permuted: bool = False,
    anchor: Anchor | None = None,
) -> Updates:
    """Compiled updates (`jaxrec.rl.updates`), whose data are the parameters that the KL refers to.

    With `permuted` each user gets the reward of another one of the same step, drawn at random: a control, which has
    nothing to learn. The KL of `anchor` is the penalty, and its cost controls the weight; None: there is no penalty.
    """

    def control(weight: jax.Array, metrics: dict[str, jax.Array]) -> jax.Array:
        return next_weight_by_cost(weight, metrics["likelihood_lost"], config.likelihood_budget)

    loss = simulated_loss(environment, policy, config, permuted, anchor)
    return make_updates(loss, _optimizer(config), None if anchor is None else control)


def simulated_loss(
    environment: Environment, policy: Policy, config: SimulatedConfig, permuted: bool, anchor: Anchor | None
) -> Loss:
    """The loss of the policy's parameters after a rollout; it also returns where the users stand then."""

    def loss(
        params: Params, learner: Learner, reference: Params, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        acting, rollout_key = jax.lax.stop_gradient(params), jax.random.fold_in(key, learner.step)
        state, observation = learner.users
        users, rollout = roll_out(environment, policy, acting, state, observation, rollout_key, config.steps)
        # Keys beyond those of the updates and of the first users, so that neither changes the rollouts.
        permuted_key, anchor_key = (
            jax.random.fold_in(key, rounds * config.updates + 1 + learner.step) for rounds in (1, 2)
        )
        reward = _permuted_among_users(permuted_key, rollout.reward) if permuted else rollout.reward
        last_features = jax.vmap(environment.features)(users[1])
        every_features = jax.tree.map(
            lambda seen, last: jnp.concatenate([seen, last[None]]), rollout.features, last_features
        )
        logits = policy.logits(params, rollout.features, rollout.recommendable)
        values = policy.value(params, every_features)
        achieved = jax.lax.stop_gradient(
            td_lambda_returns(reward, rollout.done, values[1:], config.discount, config.trace)
        )
        advantages = jax.lax.stop_gradient(achieved - values[:-1])
        advantages /= jnp.sqrt(jnp.mean(jnp.square(advantages)) + 1e-8)
        logprobs = drawn_logprobs(logits, rollout.slates)
        # Every slot gets the whole return, since the user looks at the slate as a whole.
        every_slot = jnp.broadcast_to(advantages[..., None], logprobs.shape).reshape(-1, logprobs.shape[-1])
        where = jnp.ones(every_slot.shape, bool)
        policy_loss = reinforce_loss(logprobs.reshape(every_slot.shape), every_slot, jnp.zeros_like(every_slot), where)
        value_loss = baseline_loss(values[:-1], achieved, jnp.ones(achieved.shape, bool))
        spread = jnp.mean(entropy(logits))
        kl = jnp.mean(kl_divergence(logits, policy.logits(reference, rollout.features, rollout.recommendable)))
        allowed = jnp.take_along_axis(rollout.recommendable, rollout.slates, axis=-1)
        metrics = {
            "kl": kl,
            "entropy": spread,
            "baseline_loss": value_loss,
            "reward": jnp.mean(rollout.reward),
            **{f"reward_{name}": jnp.mean(term) for name, term in rollout.terms.items()},
            "left": jnp.mean(rollout.done.astype(jnp.float32)),
            "coverage": slate_coverage(jnp.where(allowed, rollout.slates, 0), environment.item_count + 1),
        }
        bonus = config.entropy_weight * jnp.maximum(1.0 - learner.step / config.updates, 0.0)
        total = policy_loss + value_loss - bonus * spread
        if anchor is not None:
            metrics["kl"], metrics["likelihood_lost"] = anchor(params, anchor_key)
            total += learner.kl_coefficient * metrics["kl"]
        return total, (metrics, users)

    return loss


def td_lambda_returns(
    reward: jax.Array, done: jax.Array, next_value: jax.Array, discount: float, trace: float
) -> jax.Array:
    """G [steps, ...] of the module's text; `next_value` [steps, ...] is v(s_(t+1)), and G after the last step."""

    def earlier(later: jax.Array, at: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        r_t, stays_t, v_tp1 = at
        g_t = r_t + discount * stays_t * ((1.0 - trace) * v_tp1 + trace * later)
        return g_t, g_t

    stays = 1.0 - done.astype(jnp.float32)
    return jax.lax.scan(earlier, next_value[-1], (reward, stays, next_value), reverse=True)[1]


def roll_out(
    environment: Environment,
    policy: Policy,
    params: Params,
    state: Any,
    observation: Any,
    key: jax.Array,
    steps: int,
) -> tuple[tuple[Any, Any], Rollout]:
    """Lets users [users, ...] go `steps` steps under the policy; users that leave are replaced by new ones at once."""
    users = jax.tree.leaves(observation)[0].shape[0]

    def go(at: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], Rollout]:
        state, observation = at
        act_key, step_key, reset_key = jax.random.split(key, 3)
        features = jax.vmap(environment.features)(observation)
        recommendable = jax.vmap(environment.recommendable)(observation)
        slates, actions = draw_actions(environment, act_key, policy.logits(params, features, recommendable))
        new, seen, reward, done = jax.vmap(environment.step)(state, actions, jax.random.split(step_key, users))
        terms = jax.vmap(environment.terms)(seen, reward)
        fresh = jax.vmap(environment.reset)(jax.random.split(reset_key, users))
        after = jax.tree.map(
            lambda old, new: jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new, old), (new, seen), fresh
        )
        return after, Rollout(features, recommendable, slates, reward, done, terms)

    return jax.lax.scan(go, (state, observation), jax.random.split(key, steps))


def _permuted_among_users(key: jax.Array, reward: jax.Array) -> jax.Array:
    """reward [steps, users] in another order in each step."""
    return jax.vmap(jax.random.permutation)(jax.random.split(key, len(reward)), reward)


def _optimizer(config: SimulatedConfig) -> optax.GradientTransformation:
    """Adam, whose rate falls linearly to a tenth."""
    schedule = optax.linear_schedule(config.learning_rate, 0.1 * config.learning_rate, config.updates)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
