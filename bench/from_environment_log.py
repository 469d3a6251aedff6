"""Learns a policy for an environment from what another policy did there: a log with known propensities."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.environment_policy import EnvironmentPolicy
from jaxrec.rl.losses.imitation import imitation_loss
from jaxrec.rl.losses.off_policy import capped_importance_weights, top_k_off_policy_loss
from jaxrec.rl.losses.policy_gradient import baseline_loss
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.policy import Params
from jaxrec.rl.updates import Learner, make_updates, new_learner


class EnvironmentLog(NamedTuple):
    """Steps of many visits, each [steps, ...]: `features` and `recommendable` before the `action` int32 (one item),
    `logprob` of the logging policy for it, the `reward`, and the discounted `returns` from the step on."""

    features: jax.Array
    recommendable: jax.Array
    action: jax.Array
    logprob: jax.Array
    reward: jax.Array
    returns: jax.Array


@dataclasses.dataclass(frozen=True)
class FromLogConfig:
    """`cap`: the largest importance weight; `k`: of the top-K correction, 1 where one item is shown. A learned
    baseline is subtracted from the returns where k is 1; for more it would add a bias."""

    seed: int = 0
    updates: int = 2000
    batch_size: int = 1024
    learning_rate: float = 3e-3
    cap: float = 10.0
    k: int = 1


Loss = Callable[[EnvironmentPolicy, Params, EnvironmentLog], tuple[jax.Array, dict[str, jax.Array]]]


def collect_log(
    environment: Environment,
    logprobs: Callable[[Any], jax.Array],
    key: jax.Array,
    users: int,
    steps: int,
    discount: float,
) -> EnvironmentLog:
    """The visits of `users` new users, of at most `steps` steps, to a policy of single items: logprobs(observation)
    [items + 1]. Returns end with the visit, or where it was cut."""

    @jax.jit
    def visits() -> tuple[EnvironmentLog, jax.Array]:
        start = jax.vmap(environment.reset)(jax.random.split(jax.random.fold_in(key, 0), users))

        def go(at: tuple[Any, Any, jax.Array], key: jax.Array) -> tuple[Any, tuple[EnvironmentLog, jax.Array]]:
            state, observation, here = at
            act_key, step_key = jax.random.split(key)
            choices = jax.vmap(logprobs)(observation)
            action = jax.random.categorical(act_key, choices).astype(jnp.int32)
            features = jax.vmap(environment.features)(observation)
            allowed = jax.vmap(environment.recommendable)(observation)
            state, observation, reward, done = jax.vmap(environment.step)(
                state, action, jax.random.split(step_key, users)
            )
            reward = jnp.where(here, reward, 0.0)
            logprob = jnp.take_along_axis(choices, action[:, None], axis=1)[:, 0]
            seen = EnvironmentLog(features, allowed, action, logprob, reward, reward)
            return (state, observation, here & ~done), (seen, here)

        keys = jax.random.split(jax.random.fold_in(key, 1), steps)
        _, (log, here) = jax.lax.scan(go, (*start, jnp.ones(users, bool)), keys)

        def earlier(later: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
            return reward + discount * later, reward + discount * later

        returns = jax.lax.scan(earlier, jnp.zeros(users), log.reward, reverse=True)[1]
        return log._replace(returns=returns), here

    log, here = jax.device_get(visits())
    return jax.tree.map(lambda column: jnp.asarray(np.asarray(column)[here]), log)


def next_item_loss(
    policy: EnvironmentPolicy, params: Params, batch: EnvironmentLog
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The supervised recommender: cross-entropy of the items that were taken."""
    loss = imitation_loss(policy.logits(params, batch.features, batch.recommendable), batch.action, batch.reward)
    return loss, {"nats": loss}


def off_policy_loss(config: FromLogConfig) -> Loss:
    """The off-policy correction of Chen et al. 2019 (`jaxrec.rl.losses.off_policy`)."""

    def loss(
        policy: EnvironmentPolicy, params: Params, batch: EnvironmentLog
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = policy.logits(params, batch.features, batch.recommendable)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.action[:, None], axis=1)[:, 0]
        where = jnp.ones(logprob.shape, bool)
        values = policy.value(params, batch.features)
        baseline = jax.lax.stop_gradient(values) if config.k == 1 else 0.0
        advantages = batch.returns - baseline
        advantages /= jnp.sqrt(jnp.mean(jnp.square(advantages)) + 1e-8)
        weights, clipped = capped_importance_weights(logprob, batch.logprob, config.cap)
        corrected = top_k_off_policy_loss(logprob, batch.logprob, advantages, where, config.k, config.cap)
        metrics = {
            "effective_share": jnp.square(weights.sum()) / (len(weights) * jnp.square(weights).sum()),
            "clipped": jnp.mean(clipped.astype(jnp.float32)),
        }
        return corrected + baseline_loss(values, batch.returns, where), metrics

    return loss


def fit_to_log(
    policy: EnvironmentPolicy, params: Params, log: EnvironmentLog, loss: Loss, config: FromLogConfig
) -> tuple[Params, dict[str, np.ndarray]]:
    """Parameters after `updates` updates on random batches of the log, in one compiled scan, and metrics [updates]."""
    schedule = optax.linear_schedule(config.learning_rate, 0.1 * config.learning_rate, config.updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def update_loss(
        params: Params, learner: Learner, data: tuple[EnvironmentLog, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        log, keys = data
        rows = jax.random.randint(keys[learner.step], (config.batch_size,), 0, len(log.action))
        value, metrics = loss(policy, params, jax.tree.map(lambda column: column[rows], log))
        return value, (metrics, ())

    key = jax.random.key(config.seed)
    updates, keys = make_updates(update_loss, optimizer), jax.random.split(key, config.updates)
    learner, metrics = updates(new_learner(params, optimizer), (log, keys), key, config.updates)
    return learner.params, jax.device_get(metrics)
