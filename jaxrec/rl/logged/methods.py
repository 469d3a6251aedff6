"""Methods: how drawn slates and logged decisions become a loss of the policy, one `Method` for each objective.

A method's loss is added to the terms that all methods share (`jaxrec.rl.logged.loss`). It includes the loss of the
critic, where the method learns one beside the policy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrec.models.masks import NEVER
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.losses.actor_critic import (
    advantage,
    double_q_target,
    masked_mean,
    q_losses,
    sa2c_loss,
    snqn_loss,
)
from jaxrec.rl.losses.off_policy import capped_importance_weights, top_k_off_policy_loss
from jaxrec.rl.losses.policy_gradient import baseline_loss, plackett_luce_loss, reinforce_loss
from jaxrec.rl.policy import recommendable, sample_slates
from jaxrec.rl.scoring import Linear, zero_critic

NEGATIVES = 10  # of each state, in the actor-critic
ADVANTAGES_FROM = 0.3  # of the updates; before, advantages of an untrained Q would be noise


class Transitions(NamedTuple):
    """A batch of logged decisions, and slates that the policy drew there.

    `query` [batch, width] is the supervised query vector before each, `logits` [batch, items + 1] the policy's (NEVER
    where an item may not be recommended); `target` [batch] int32 came next. Of the drawn slates, each [samples, batch,
    k]: `logprobs` log p(slot | slots before it), `returns` the discounted rewards from each slot on, `where` whether
    the slot holds an item. `reward` [batch] is what the logged item itself earns, `logprob_beta` [batch] its
    log-probability under the behaviour model, `next_query` [batch, width] the query at the user's next decision, and
    `has_next` [batch] bool whether there is one. `progress` [] is the share of all updates that are done.
    """

    query: jax.Array
    logits: jax.Array
    target: jax.Array
    logprobs: jax.Array
    returns: jax.Array
    where: jax.Array
    reward: jax.Array
    logprob_beta: jax.Array
    next_query: jax.Array
    has_next: jax.Array
    progress: jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """`new_critic(width, items, config)`: the critic's variables at the start. `loss(transitions, critic, item_vectors,
    key, config)` -> the loss and what it measured. `logged`: whether it weighs the logged items by the behaviour model,
    which then must be there. `samples`: slates that it wants for each state, at least."""

    name: str
    new_critic: Callable[[int, int, LoggedConfig], Any]
    loss: Callable[[Transitions, Any, jax.Array, jax.Array, LoggedConfig], tuple[jax.Array, dict[str, jax.Array]]]
    logged: bool = False
    samples: int = 1


def _reinforce(
    transitions: Transitions, critic: Linear, item_vectors: jax.Array, key: jax.Array, config: LoggedConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    values = jnp.broadcast_to(critic(transitions.query), transitions.returns.shape)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    logprobs, achieved, values, where = (
        rows(x) for x in (transitions.logprobs, transitions.returns, values, transitions.where)
    )
    value_loss = baseline_loss(values, achieved, where)
    return reinforce_loss(logprobs, achieved, values, where) + value_loss, {"baseline_loss": value_loss}


def _plackett_luce(
    transitions: Transitions, critic: Any, item_vectors: jax.Array, key: jax.Array, config: LoggedConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    return plackett_luce_loss(transitions.logprobs, transitions.returns, transitions.where[0]), {}


def _top_k_off_policy(
    transitions: Transitions, critic: Any, item_vectors: jax.Array, key: jax.Array, config: LoggedConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    logprob_pi = jnp.take_along_axis(jax.nn.log_softmax(transitions.logits), transitions.target[:, None], axis=1)[:, 0]
    where = recommendable(logprob_pi)
    weights, clipped = capped_importance_weights(logprob_pi, transitions.logprob_beta, config.importance_cap)
    loss = top_k_off_policy_loss(
        logprob_pi, transitions.logprob_beta, transitions.reward, where, config.slate_size, config.importance_cap
    )
    return loss, weight_metrics(weights, clipped, where)


def weight_metrics(weights: jax.Array, clipped: jax.Array, where: jax.Array) -> dict[str, jax.Array]:
    """Effective sample size (Kong 1992) as a share of the sample, and the share of weights at the cap; all [...]."""
    count = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    weights = jnp.where(where, weights, 0.0)
    size = jnp.square(jnp.sum(weights)) / jnp.maximum(jnp.sum(jnp.square(weights)), 1e-30)
    return {"ess_share": size / count, "clipped_share": jnp.sum(where & clipped, dtype=jnp.float32) / count}


def _actor_critic(
    transitions: Transitions,
    critic: tuple[Linear, Linear],
    item_vectors: jax.Array,
    key: jax.Array,
    config: LoggedConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    coin_key, negative_key = jax.random.split(key)
    coin = jax.random.bernoulli(coin_key)
    learning, other = (
        jax.tree.map(lambda a, b, first=first: jnp.where(coin == first, a, b), *critic) for first in (True, False)
    )

    def q(head: Linear, query: jax.Array) -> jax.Array:
        return (query @ head.kernel) @ item_vectors.T + head.bias

    allowed = recommendable(transitions.logits)
    left = allowed.at[jnp.arange(len(transitions.target)), transitions.target].set(False)
    negatives = sample_slates(negative_key, jnp.where(left, 0.0, NEVER), min(NEGATIVES, left.shape[1] - 1))
    here, discount = q(learning, transitions.query), config.discount * transitions.has_next
    after = q(learning, transitions.next_query), q(other, transitions.next_query)
    target = double_q_target(transitions.reward, discount, *after, left)
    unchanged = config.discount * jnp.ones_like(transitions.reward)
    nothing = jnp.zeros_like(transitions.reward)
    negative_target = double_q_target(nothing, unchanged, here, q(other, transitions.query), allowed)
    where = jnp.take_along_axis(allowed, transitions.target[:, None], axis=1)[:, 0]
    common = (transitions.logits, here, transitions.target, negatives, target, negative_target)
    weight = jnp.ones_like(transitions.reward)
    loss = jnp.where(
        transitions.progress < ADVANTAGES_FROM, snqn_loss(*common, where), sa2c_loss(*common, weight, where)
    )
    critic_loss = masked_mean(q_losses(here, transitions.target, target), where)
    advantages = masked_mean(advantage(here, transitions.target, negatives), where)
    return loss, {"critic_loss": critic_loss, "advantage": advantages}


def _no_critic(width: int, items: int, config: LoggedConfig) -> Any:
    return ()


def _q_heads(width: int, items: int, config: LoggedConfig) -> tuple[Linear, Linear]:
    head = Linear(jnp.zeros((width, width)), jnp.zeros(items + 1))
    return head, jax.tree.map(jnp.copy, head)


REINFORCE = Method("reinforce", lambda width, items, config: zero_critic(width, config.slate_size), _reinforce)
PLACKETT_LUCE = Method("plackett-luce", _no_critic, _plackett_luce, samples=4)
TOP_K = Method("top-k", _no_critic, _top_k_off_policy, logged=True)
ACTOR_CRITIC = Method("actor-critic", _q_heads, _actor_critic)
METHODS = {method.name: method for method in (REINFORCE, PLACKETT_LUCE, TOP_K, ACTOR_CRITIC)}
