"""Logits of the supervised mix and of a policy on top of it, from what is computed once: queries and item vectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.cooccurrence import neighbour_scores
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.models.reranker import RerankerWeights
from jaxrec.rl.rewards import RewardTables, rank_discounts
from jaxrec.rl.states import PolicyState

OF_RERANKER = ("direct", "by_context")
"""The variables of PolicyHead that shift the reranker's weights."""


class PolicyParams(NamedTuple):
    """`head`: the variables of PolicyHead; `critic`: a pytree of arrays, each algorithm's own."""

    head: Any
    critic: Any


class Linear(NamedTuple):
    """query @ kernel + bias, the usual critic; `kernel` [width, outputs], `bias` [outputs]."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, query: jax.Array) -> jax.Array:
        return query @ self.kernel + self.bias


class Trends(NamedTuple):
    """What is added to the logits at the moments of a log.

    `values` [trends, items + 1] float32: the trends; the first one is zero. `of_moment` [moments + 1] int32: the place
    in `values` of each moment's trend. Moments are counted from 1 on; 0 stands for a recommendation without a trend.
    """

    values: Array
    of_moment: Array

    def at(self, moment: Array) -> jax.Array:
        """What was added to the logits [rows, items + 1] at the moments [rows] int32."""
        return jnp.asarray(self.values)[jnp.asarray(self.of_moment)[moment]]


class Scoring(NamedTuple):
    """The frozen side of the logits: `item_vectors` [items + 1, width] and `item_bias` [items + 1] of the supervised
    hybrid, the neighbours and their weights (both [items + 1, neighbours]) of its co-occurrence, scaled as it adds them
    to the logits, and what the rewards look up. `new_items` [items + 1] bool: those that a server
    caps (`jaxrec.models.new_items`), None for none. `trends`: those that ranked a server's log, None outside of one."""

    item_vectors: jax.Array
    item_bias: jax.Array
    neighbour_item: jax.Array
    neighbour_weight: jax.Array
    tables: RewardTables
    new_items: jax.Array | None = None
    trends: Trends | None = None


def frozen_scoring(supervised: Hybrid, tables: RewardTables) -> Scoring:
    """What a policy on top of `supervised` (a hybrid without a policy) scores with.

    Policies that are trained without a server's log rank new items by the logits of their content heads, without the
    cap of `Hybrid.logits`.
    """
    near = supervised.cooccurrence
    weight = supervised.weights[...][2] * near.neighbour_weight[...]
    new_items = None if supervised.new_items is None else supervised.new_items[...]
    vectors, bias = supervised.item_vectors(), supervised.item_bias()
    return Scoring(vectors, bias, near.neighbour_item[...], weight, tables, new_items)


def new_head(
    width: int, item_count: int, hidden: int, seed: int, reranks: bool = False
) -> tuple[nnx.GraphDef[PolicyHead], Any]:
    """The structure and the variables of a policy head that changes nothing yet."""
    graphdef, variables = nnx.split(PolicyHead(width, hidden, item_count, reranks, rngs=nnx.Rngs(seed)))
    return graphdef, nnx.to_pure_dict(variables)


def zero_critic(width: int, outputs: int) -> Linear:
    """A critic that expects nothing."""
    return Linear(jnp.zeros((width, outputs)), jnp.zeros(outputs))


def supervised_logits(state: PolicyState, scoring: Scoring, shift: RerankerWeights | None = None) -> jax.Array:
    """[batch, items + 1] of states [batch], with what the reranker changes, its weights shifted by `shift`."""
    of_neighbours = neighbour_scores(scoring.neighbour_item, scoring.neighbour_weight, jnp.asarray(state.recent))
    logits = jnp.asarray(state.query) @ scoring.item_vectors.T + scoring.item_bias + of_neighbours
    return logits if state.reranked is None else state.reranked.changes(shift).added_to(logits)


def policy_logits(head: PolicyHead, state: PolicyState, scoring: Scoring) -> jax.Array:
    """The policy's logits [batch, items + 1] in states [batch]."""
    shifted = state._replace(query=head(jnp.asarray(state.query)))
    return supervised_logits(shifted, scoring, head.reranker_shift) + head.item_bias[...]


def returns(rewards: jax.Array) -> jax.Array:
    """rewards [..., k] of the slots -> G [..., k], the discounted rewards from each slot on; the first: the slate's."""
    return jax.lax.cumsum(rewards * rank_discounts(rewards.shape[-1]), axis=rewards.ndim - 1, reverse=True)
