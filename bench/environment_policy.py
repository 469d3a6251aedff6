"""A policy for the synthetic environment: a small network from an observation's features to logits of all items, and to
a value."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.masks import NEVER
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.policy import Params, Policy

HIDDEN = 64


class PolicyNetwork(nnx.Module):
    """Two networks of one hidden layer each: features [..., width] -> logits [..., items + 1], and values [...]."""

    def __init__(self, feature_count: int, hidden: int, item_count: int, *, rngs: nnx.Rngs) -> None:
        small = nnx.initializers.normal(1e-2)  # so that the first policy is nearly uniform, and the first value 0
        self.policy_hidden = nnx.Linear(feature_count, hidden, rngs=rngs)
        self.policy_out = nnx.Linear(hidden, item_count + 1, kernel_init=small, rngs=rngs)
        self.value_hidden = nnx.Linear(feature_count, hidden, rngs=rngs)
        self.value_out = nnx.Linear(hidden, 1, kernel_init=small, rngs=rngs)

    def logits(self, features: jax.Array) -> jax.Array:
        """[..., items + 1], padding included."""
        return self.policy_out(jax.nn.relu(self.policy_hidden(features)))

    def value(self, features: jax.Array) -> jax.Array:
        """[...]"""
        return self.value_out(jax.nn.relu(self.value_hidden(features)))[..., 0]


class EnvironmentPolicy(NamedTuple):
    """The network as functions of its parameters; `start`: new parameters from a seed.

    `logits(params, features, recommendable)` has NEVER where `recommendable` [..., items + 1] is off.
    """

    graphdef: nnx.GraphDef[PolicyNetwork]
    start: Params

    def logits(self, params: Params, features: jax.Array, recommendable: jax.Array) -> jax.Array:
        return jnp.where(recommendable, nnx.merge(self.graphdef, params).logits(features), NEVER)

    def value(self, params: Params, features: jax.Array) -> jax.Array:
        return nnx.merge(self.graphdef, params).value(features)


def new_policy(environment: Environment, hidden: int = HIDDEN, seed: int = 0) -> EnvironmentPolicy:
    """A nearly uniform policy."""
    network = PolicyNetwork(environment.feature_count, hidden, environment.item_count, rngs=nnx.Rngs(seed))
    graphdef, variables = nnx.split(network)
    return EnvironmentPolicy(graphdef, nnx.to_pure_dict(variables))


def probabilities(policy: Policy, params: Params, environment: Environment, observations: Any) -> jax.Array:
    """[batch, items] float32: of items 1.., in the first slot, given observations [batch, ...]."""
    features = jax.vmap(environment.features)(observations)
    allowed = jax.vmap(environment.recommendable)(observations)
    return jax.nn.softmax(policy.logits(params, features, allowed))[:, 1:]
