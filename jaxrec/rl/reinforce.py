"""REINFORCE on slates (Williams 1992) with a learned baseline and a leash to the supervised policy.

The state is the supervised query vector with the most recent items, by which co-occurrence adds to the logits; the
action a slate drawn from the policy, its reward the discounted mean of its items' rewards, sum_i d_i r_i with DCG's
discounts d (`jaxrec.rl.rewards.discounts`), because the top of a list is judged that way. Slot i is answerable for the
slots from i on only, so with the return G_i = sum_(j >= i) d_j r_j

    gradient = E[ sum_i grad log p(slot i | slots before it) * (G_i - b_i(state)) ]

(Williams 1992, theorem 1, with a baseline; the reward-to-go form is Sutton et al. 2000, theorem 1, for an episode of
one slate). b is linear in the query vector. The leash adds coefficient * KL(policy || supervised), exact over the
catalogue; the coefficient follows the KL to its target (Ziegler et al. 2019, section 2.2). The anchor adds the
cross-entropy of the logged item, weighted by its rating: hits are rare among sampled slates, and without it the denser
genre and rating rewards buy their gains with hits (5 % of NDCG@10 on ML-100K's validation cases).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxrec.config import RLConfig
from jaxrec.metrics import exclude_items
from jaxrec.models.cooccurrence import neighbour_scores
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.objectives.anchors import anchor_loss, next_kl_coefficient
from jaxrec.rl.objectives.policy_gradient import baseline_loss, reinforce_loss
from jaxrec.rl.policy import entropy, kl_divergence, recommendable, sample_slates, slate_logprobs
from jaxrec.rl.rewards import RewardTables, discounts, reward_terms, total_reward
from jaxrec.rl.states import States

KL_COEFFICIENT_START = 1.0
BASELINE_LEARNING_RATE = 1e-2
WARMUP_FRACTION = 0.1  # of the steps; the baseline learns its level before the policy moves


class Scoring(NamedTuple):
    """The frozen side of the logits: `item_vectors` [items + 1, width] and `item_bias` [items + 1] of the supervised
    hybrid, the neighbours and their weights (both [items + 1, neighbours]) of its co-occurrence, scaled as it adds them
    to the logits, and what the rewards look up."""

    item_vectors: jax.Array
    item_bias: jax.Array
    neighbour_item: jax.Array
    neighbour_weight: jax.Array
    tables: RewardTables


class Baseline(NamedTuple):
    """b_i(state) = query @ kernel[:, i] + bias[i]; `kernel` [width, slots], `bias` [slots]."""

    kernel: jax.Array
    bias: jax.Array


class Learner(NamedTuple):
    """All that an update changes: `head` (the variables of PolicyHead), `baseline`, the optimizer's state, the weight
    of the leash and the number of updates so far."""

    head: Any
    baseline: Baseline
    optimizer: optax.OptState
    kl_coefficient: jax.Array
    step: jax.Array


Updates = Callable[[Learner, Scoring, States, jax.Array, int], tuple[Learner, dict[str, jax.Array]]]


def new_learner(width: int, item_count: int, config: RLConfig) -> tuple[nnx.GraphDef[PolicyHead], Learner]:
    """The structure of the policy head, and a learner whose policy is the supervised one."""
    head = PolicyHead(width, config.policy_width, item_count, rngs=nnx.Rngs(config.seed))
    graphdef, variables = nnx.split(head)
    params = nnx.to_pure_dict(variables)
    baseline = Baseline(jnp.zeros((width, config.slate_size)), jnp.zeros(config.slate_size))
    return graphdef, Learner(
        head=params,
        baseline=baseline,
        optimizer=_optimizer(config).init((params, baseline)),
        kl_coefficient=jnp.float32(KL_COEFFICIENT_START),
        step=jnp.zeros((), jnp.int32),
    )


def frozen_scoring(supervised: Hybrid, tables: RewardTables) -> Scoring:
    """What a policy on top of `supervised` (a hybrid without a policy) scores with."""
    near = supervised.cooccurrence
    weight = supervised.cooccurrence_weight[...] * near.neighbour_weight[...]
    return Scoring(supervised.item_vectors(), supervised.item_bias(), near.neighbour_item[...], weight, tables)


def supervised_logits(query: jax.Array, recent: jax.Array, scoring: Scoring) -> jax.Array:
    """query [batch, width], recent [batch, RECENT] int32 -> [batch, items + 1]."""
    of_neighbours = neighbour_scores(scoring.neighbour_item, scoring.neighbour_weight, recent)
    return query @ scoring.item_vectors.T + scoring.item_bias + of_neighbours


def policy_logits(head: PolicyHead, query: jax.Array, recent: jax.Array, scoring: Scoring) -> jax.Array:
    """Supervised query [batch, width], recent [batch, RECENT] int32 -> the policy's logits [batch, items + 1]."""
    return supervised_logits(head(query), recent, scoring) + head.item_bias[...]


def returns(rewards: jax.Array) -> jax.Array:
    """rewards [..., k] of the slots -> G [..., k], the discounted rewards from each slot on; the first: the slate's."""
    return jax.lax.cumsum(rewards * discounts(rewards.shape[-1]), axis=rewards.ndim - 1, reverse=True)


def make_updates(graphdef: nnx.GraphDef[PolicyHead], config: RLConfig) -> Updates:
    """updates(learner, scoring, states, key, count) -> (learner, metrics [count] each), in one compiled scan.

    The learner is donated. The key is the run's; the number of the update is folded in.
    """
    optimizer = _optimizer(config)

    def update(
        scoring: Scoring, states: States, key: jax.Array, learner: Learner
    ) -> tuple[Learner, dict[str, jax.Array]]:
        row_key, slate_key = jax.random.split(jax.random.fold_in(key, learner.step))
        rows = jax.random.randint(row_key, (config.batch_size,), 0, len(states.target))
        query, recent, exclude = jnp.asarray(states.query)[rows], states.recent(rows), states.histories(rows)
        target, target_rating = jnp.asarray(states.target)[rows], jnp.asarray(states.target_rating)[rows]
        reference = exclude_items(supervised_logits(query, recent, scoring), exclude)

        def loss_of(trained: tuple[Any, Baseline]) -> tuple[jax.Array, dict[str, jax.Array]]:
            params, baseline = trained
            logits = exclude_items(policy_logits(nnx.merge(graphdef, params), query, recent, scoring), exclude)
            slates = jax.lax.stop_gradient(sample_slates(slate_key, logits, config.slate_size))
            where = recommendable(jnp.take_along_axis(logits, slates, axis=-1))
            terms = reward_terms(slates, target, target_rating, scoring.tables)
            achieved = returns(jnp.where(where, total_reward(terms, config.rewards), 0.0))
            values = query @ baseline.kernel + baseline.bias
            policy_loss = reinforce_loss(slate_logprobs(logits, slates), achieved, values, where)
            value_loss = baseline_loss(values, achieved, where)
            anchor = anchor_loss(logits, target, target_rating)
            kl = jnp.mean(kl_divergence(logits, reference))
            metrics = {
                "reward": jnp.mean(achieved[:, 0]),
                **{
                    f"reward_{name}": jnp.mean(returns(jnp.where(where, term, 0.0))[:, 0])
                    for name, term in terms._asdict().items()
                },
                "kl": kl,
                "kl_coefficient": learner.kl_coefficient,
                "entropy": jnp.mean(entropy(logits)),
                "baseline_loss": value_loss,
                "anchor_loss": anchor,
            }
            leash = learner.kl_coefficient * kl
            return policy_loss + leash + config.anchor * anchor + value_loss, metrics

        trained = (learner.head, learner.baseline)
        gradients, metrics = jax.grad(loss_of, has_aux=True)(trained)
        changes, optimizer_state = optimizer.update(gradients, learner.optimizer, trained)
        head, baseline = optax.apply_updates(trained, changes)
        coefficient = next_kl_coefficient(learner.kl_coefficient, metrics["kl"], config.kl_target)
        return Learner(head, baseline, optimizer_state, coefficient, learner.step + 1), metrics

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def updates(
        learner: Learner, scoring: Scoring, states: States, key: jax.Array, count: int
    ) -> tuple[Learner, dict[str, jax.Array]]:
        return jax.lax.scan(lambda carry, _: update(scoring, states, key, carry), learner, length=count)

    return updates


def _optimizer(config: RLConfig) -> optax.GradientTransformation:
    """Adam for both parts of (head, baseline). The head's rate warms up, then follows a cosine down to 0; the baseline,
    whose error biases nothing, learns faster."""
    warmup = max(1, int(WARMUP_FRACTION * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))
    return optax.multi_transform(
        {"head": optax.adam(schedule), "baseline": optax.adam(BASELINE_LEARNING_RATE)}, ("head", "baseline")
    )
