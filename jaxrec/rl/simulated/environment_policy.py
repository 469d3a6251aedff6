"""What a policy for environments is, and one of them: a small network from an observation's features to logits of all
items, and to a value."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.masks import NEVER
from jaxrec.rl.policy import sample_slates, slate_logprobs
from jaxrec.rl.simulated.environment import Environment

Params = Any


class Policy(Protocol):
    """What `jaxrec.rl.simulated.train` trains. `features` is the pytree that the environment makes of its observations,
    with any leading axes [...]."""

    @property
    def start(self) -> Params:
        """The parameters before any training."""

    def logits(self, params: Params, features: Any, recommendable: jax.Array) -> jax.Array:
        """[..., items + 1], NEVER where `recommendable` [..., items + 1] is off."""

    def value(self, params: Params, features: Any) -> jax.Array:
        """[...]: the discounted rewards that are expected from here on."""


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


def new_policy(environment: Environment, hidden: int, seed: int) -> EnvironmentPolicy:
    """A nearly uniform policy."""
    network = PolicyNetwork(environment.feature_count, hidden, environment.item_count, rngs=nnx.Rngs(seed))
    graphdef, variables = nnx.split(network)
    return EnvironmentPolicy(graphdef, nnx.to_pure_dict(variables))


def act(environment: Environment, key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(slates [..., slate_size] int32, the same as the environment's actions) drawn from the logits."""
    if environment.slate_size == 1:  # the same distribution from one random number each, and without a sort
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        up_to = weights @ jnp.triu(jnp.ones((logits.shape[-1],) * 2))  # a sum over the items before, faster than cumsum
        drawn = jax.random.uniform(key, logits.shape[:-1]) * up_to[..., -1]
        actions = jnp.sum(up_to <= drawn[..., None], axis=-1, dtype=jnp.int32)
        return actions[..., None], actions
    slates = sample_slates(key, logits, environment.slate_size)
    return slates, slates


def action_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """[..., k]: as `jaxrec.rl.policy.slate_logprobs`, which for one slot is the softmax."""
    if slates.shape[-1] == 1:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), slates, axis=-1)
    return slate_logprobs(logits, slates)


def probabilities(policy: Policy, params: Params, environment: Environment, observations: Any) -> jax.Array:
    """[batch, items] float32: of items 1.., in the first slot, given observations [batch, ...]."""
    features = jax.vmap(environment.features)(observations)
    allowed = jax.vmap(environment.recommendable)(observations)
    return jax.nn.softmax(policy.logits(params, features, allowed))[:, 1:]
