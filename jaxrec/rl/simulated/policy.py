"""Policies for environments: what one is, and that of a run for its simulated users.

The latter is PolicyHead on top of the frozen models, and a critic. It draws as a server with `--explore TEMPERATURE`
does, from the logits divided by the temperature, but from the whole catalogue instead of a pool of the best items.
Thus it can learn an item outside of the pool, and the KL is exact.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.features import Array
from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.policy import kl_divergence, sample_slates, slate_logprobs
from jaxrec.rl.scoring import OF_RERANKER, PolicyParams, Scoring, policy_logits, zero_critic
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.states import PolicyState, by_batches

CRITIC_SCALE = 30.0
Params = Any
Anchor = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
"""anchor(parameters, key of the update) -> (KL to the policy at the start, log-likelihood that is lost) at real events,
[] nats each."""


class Policy(Protocol):
    """What `jaxrec.rl.simulated.train` trains. `features` is the pytree that the environment makes of its observations,
    with any leading axes [...]."""

    @property
    def start(self) -> Params:
        """The parameters before any training."""

    def logits(self, params: Params, features: Any, recommendable: jax.Array) -> jax.Array:
        """[..., items + 1], NEVER where `recommendable` [..., items + 1] is off."""

    def value(self, params: Params, features: Any) -> jax.Array:
        """[...]: the expected discounted rewards from here on."""


class RecommenderPolicy(NamedTuple):
    """A `Policy`; `start` has a critic that expects nothing."""

    graphdef: nnx.GraphDef[PolicyHead]
    scoring: Scoring
    temperature: float
    start: PolicyParams

    def head(self, params: PolicyParams) -> PolicyHead:
        """With these parameters. The shift of the reranker's weights has no gradient: servers' logs train it."""
        fixed = {name: jax.lax.stop_gradient(x) for name, x in params.head.items() if name in OF_RERANKER}
        return nnx.merge(self.graphdef, {**params.head, **fixed})

    def logits(self, params: PolicyParams, features: PolicyState, recommendable: jax.Array) -> jax.Array:
        """[..., items + 1], divided by the temperature; NEVER where `recommendable` is off."""
        leading = recommendable.ndim - 1
        state = jax.tree.map(lambda x: x.reshape(-1, *x.shape[leading:]), features)
        logits = policy_logits(self.head(params), state, self.scoring)
        return jnp.where(recommendable, logits.reshape(recommendable.shape) / self.temperature, NEVER)

    def value(self, params: PolicyParams, features: PolicyState) -> jax.Array:
        """[...]. Adam moves every weight by about the learning rate, whatever its gradient: the scale lets the critic
        learn CRITIC_SCALE times faster than the policy."""
        return CRITIC_SCALE * params.critic(features.query)[..., 0]


def recommender_policy(
    graphdef: nnx.GraphDef[PolicyHead],
    variables: Any,
    scoring: Scoring,
    temperature: float = SimulatedConfig.temperature,
) -> RecommenderPolicy:
    """The policy that starts as PolicyHead with these variables."""
    critic = zero_critic(scoring.item_vectors.shape[1], 1)
    return RecommenderPolicy(graphdef, scoring, temperature, PolicyParams(jax.tree.map(jnp.asarray, variables), critic))


class RealEvents(NamedTuple):
    """Real events of people whom the models do not know, at which a policy is compared with its start.

    Rewards of simulated users may be gained at the expense of real ones, in states that no simulated user reaches and
    for events that the simulator does not predict. The KL keeps the policy near its start; what the real events lose in
    likelihood says how near it has to be. The likelihood has no gradient: by it the policy would memorize these few
    events, and then nothing would tell what others lose. Events of the run's own users tell nothing, since the models
    know them by heart.

    Attributes:
        policy: With its start.
        states: [events], before each, by `jaxrec.rl.states.policy_states`.
        histories: [events, width] int32, the items before, which are not recommended; 0 = none.
        targets: [events] int32, the item that came next, which is none of them.
        batch_size: Events that are looked at together.
    """

    policy: RecommenderPolicy
    states: PolicyState
    histories: Array
    targets: Array
    batch_size: int

    def compared(self, params: PolicyParams, rows: Array) -> tuple[jax.Array, jax.Array]:
        """The KL to the start, in nats, and the log-likelihood that is lost, [rows] each, at some of the events."""
        state = jax.tree.map(lambda column: jnp.asarray(column)[rows], self.states)
        exclude, target = jnp.asarray(self.histories)[rows], jnp.asarray(self.targets)[rows]
        now, before = (
            exclude_items(policy_logits(self.policy.head(of), state, self.policy.scoring), exclude)
            for of in (params, self.policy.start)
        )
        likely_now, likely_before = (
            jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1)[:, 0] for logits in (now, before)
        )
        return kl_divergence(now, before), jax.lax.stop_gradient(likely_before - likely_now)

    def anchor(self, params: PolicyParams, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """An `Anchor`: the means over a batch that is drawn with replacement."""
        rows = jax.random.randint(key, (self.batch_size,), 0, len(self.targets))
        kl, lost = self.compared(params, rows)
        return jnp.mean(kl), jnp.mean(lost)

    def lost(self, params: PolicyParams) -> float:
        """The log-likelihood that all events lose on average, in nats; below 0 if they gain."""
        compared = jax.jit(self.compared)
        _, lost = by_batches(lambda rows: compared(params, jnp.asarray(rows)), len(self.targets), self.batch_size)
        return float(np.mean(lost))


def draw_actions(environment: Environment, key: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(slates [..., slate_size] int32, the same as the environment's actions) drawn from the logits."""
    if environment.slate_size == 1:  # the same distribution from one random number each, and without a sort
        weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        up_to = weights @ jnp.triu(jnp.ones((logits.shape[-1],) * 2))  # a sum over the items before, faster than cumsum
        drawn = jax.random.uniform(key, logits.shape[:-1]) * up_to[..., -1]
        actions = jnp.sum(up_to <= drawn[..., None], axis=-1, dtype=jnp.int32)
        return actions[..., None], actions
    slates = sample_slates(key, logits, environment.slate_size)
    return slates, slates


def drawn_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """[..., k]: as `jaxrec.rl.policy.slate_logprobs`, which for one slot is the softmax."""
    if slates.shape[-1] == 1:
        return jnp.take_along_axis(jax.nn.log_softmax(logits), slates, axis=-1)
    return slate_logprobs(logits, slates)
