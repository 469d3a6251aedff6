"""The run's policy as a policy for its simulated users: PolicyHead on top of the frozen models, and a critic.

It draws as a server with `--explore TEMPERATURE` does, from the logits divided by the temperature, but from the whole
catalogue, not from a pool of the best: so an item outside of the pool can be learned, and the leash is exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.metrics import exclude_items
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.sequence import NEVER
from jaxrec.rl.environments.recommender import Features
from jaxrec.rl.methods import Linear
from jaxrec.rl.objectives.anchors import anchor_loss
from jaxrec.rl.on_policy import Anchor
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.states import States

TEMPERATURE = 0.5
CRITIC_SCALE = 30.0


class RecommenderParams(NamedTuple):
    """`head`: the variables of PolicyHead; `critic`: from the query to what is expected, in CRITIC_SCALE."""

    head: Any
    critic: Linear


class RecommenderPolicy(NamedTuple):
    """`start` is the policy that training starts from, with a critic that expects nothing. A
    `jaxrec.rl.environment_policy.Policy`."""

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


def logged_anchor(policy: RecommenderPolicy, states: States, weight: float, batch_size: int) -> Anchor:
    """`weight` times the cross-entropy of the items that the run's own users took next, weighted by their rating, in
    `batch_size` of the logged `states`. Without it a policy pleases simulated users at the cost of real ones: the leash
    sees only where the simulated ones get to."""

    def anchor(params: RecommenderParams, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (batch_size,), 0, len(states.target))
        query, target, rating = (jnp.asarray(x)[rows] for x in (states.query, states.target, states.target_rating))
        head = nnx.merge(policy.graphdef, params.head)
        logits = policy_logits(head, query, states.recent(rows), policy.scoring)
        return weight * anchor_loss(exclude_items(logits, states.histories(rows)), target, rating)

    return anchor
