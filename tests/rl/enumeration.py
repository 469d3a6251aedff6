"""Exact values over all slates of a tiny catalogue."""

import itertools

import jax
import jax.numpy as jnp

from jaxrec.rl.policy import slate_logprobs
from jaxrec.rl.scoring import returns


def all_slates(items: int, slots: int) -> jax.Array:
    return jnp.array(list(itertools.permutations(range(1, items + 1), slots)), jnp.int32)


def expected_reward(logits: jax.Array, rewards: jax.Array, slots: int) -> jax.Array:
    """Exact, over all slates; `rewards` [items + 1]."""
    slates = all_slates(len(rewards) - 1, slots)
    probabilities = jnp.exp(slate_logprobs(jnp.broadcast_to(logits, (len(slates), len(logits))), slates).sum(axis=1))
    return probabilities @ returns(rewards[slates])[:, 0]
