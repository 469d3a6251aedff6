"""The run's policy as a policy for its simulated users: PolicyHead on top of the frozen models, and a critic.

It draws as a server with `--explore TEMPERATURE` does, from the logits divided by the temperature, but from the whole
catalogue, not from a pool of the best: so an item outside of the pool can be learned, and the leash is exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.evaluation.metrics import exclude_items
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER
from jaxrec.rl.logged.methods import Linear
from jaxrec.rl.logged.states import States
from jaxrec.rl.policy import kl_divergence
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.simulated.recommender import Features
from jaxrec.rl.simulated.train import Anchor

TEMPERATURE = 0.5
CRITIC_SCALE = 30.0


class RecommenderParams(NamedTuple):
    """`head`: the variables of PolicyHead; `critic`: from the query to what is expected, in CRITIC_SCALE."""

    head: Any
    critic: Linear


class RecommenderPolicy(NamedTuple):
    """`start` is the policy that training starts from, with a critic that expects nothing. A
    `jaxrec.rl.simulated.environment_policy.Policy`."""

    graphdef: nnx.GraphDef[PolicyHead]
    scoring: Scoring
    temperature: float
    start: RecommenderParams

    def logits(self, params: RecommenderParams, features: Features, recommendable: jax.Array) -> jax.Array:
        """[..., items + 1], divided by the temperature; NEVER where `recommendable` is off."""
        query, recent = (x.reshape(-1, x.shape[-1]) for x in features)
        logits = policy_logits(nnx.merge(self.graphdef, params.head), query, recent, self.scoring)
        return jnp.where(recommendable, logits.reshape(recommendable.shape) / self.temperature, NEVER)

    def value(self, params: RecommenderParams, features: Features) -> jax.Array:
        """[...]. Adam moves every weight by about the learning rate, whatever its gradient: the scale lets the critic
        learn as many times faster than the policy."""
        return CRITIC_SCALE * params.critic(features.query)[..., 0]


def recommender_policy(
    graphdef: nnx.GraphDef[PolicyHead], variables: Any, scoring: Scoring, temperature: float = TEMPERATURE
) -> RecommenderPolicy:
    """The policy that starts as PolicyHead with these variables."""
    critic = Linear(jnp.zeros((scoring.item_vectors.shape[1], 1)), jnp.zeros(1))
    head = jax.tree.map(jnp.asarray, variables)
    return RecommenderPolicy(graphdef, scoring, temperature, RecommenderParams(head, critic))


def logged_leash(policy: RecommenderPolicy, states: States, weight: float, batch_size: int) -> Anchor:
    """`weight` times the KL, in nats, to the policy as it starts, in `batch_size` of the run's own logged `states`.

    The leash of `jaxrec.rl.simulated.train` sees only where simulated users get to; what pleases them there must not be
    paid by real users in other states. (The cross-entropy of the logged items is no substitute: the models have learned
    these items already, and the policy would learn them by heart.)
    """

    def leash(params: RecommenderParams, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(states.target))
        query, recent, exclude = jnp.asarray(states.query)[rows], states.recent(rows), states.histories(rows)
        now, before = (
            exclude_items(policy_logits(nnx.merge(policy.graphdef, head), query, recent, policy.scoring), exclude)
            for head in (params.head, policy.start.head)
        )
        return weight * jnp.mean(kl_divergence(now, before))

    return leash
