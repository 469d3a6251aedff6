"""The update of a policy: what every method shares, and the compiled scan over many updates.

The state is the supervised query vector with the most recent items, by which co-occurrence adds to the logits; the
action is a slate drawn from the policy, its reward the discounted mean of its items' rewards, sum_i d_i r_i with DCG's
discounts d (`jaxrec.rl.rewards.rank_discounts`), because the top of a list is judged that way. Slot i is answerable for
the slots from i on only, so its return is G_i = sum_(j >= i) d_j r_j (Sutton et al. 2000, theorem 1, for an episode of
one slate). What is made of that is the method's (`jaxrec.rl.logged.methods`).

The leash adds coefficient * KL(policy || where it started), exact over the catalogue; the coefficient follows the KL
to its target (Ziegler et al. 2019, section 2.2). The anchor adds the cross-entropy of the logged item, weighted by its
rating: hits are rare among sampled slates, and without it the denser genre and rating rewards buy their gains with
hits (5 % of NDCG@10 on ML-100K's validation cases).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxrec.config import RLConfig
from jaxrec.evaluation.metrics import exclude_items
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.logged.methods import Critic, Decisions, Method
from jaxrec.rl.logged.states import States
from jaxrec.rl.losses.constraints import coverage_floor_loss, entropy_floor_loss
from jaxrec.rl.losses.imitation import imitation_loss
from jaxrec.rl.losses.kl_penalty import next_kl_weight
from jaxrec.rl.policy import entropy, kl_divergence, recommendable, sample_slates, slate_logprobs
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits, returns, supervised_logits

KL_COEFFICIENT_START = 1.0
CRITIC_LEARNING_RATE = 1e-2
WARMUP_FRACTION = 0.1  # of the steps; the critic learns its level before the policy moves


class Learner(NamedTuple):
    """All that an update changes: `head` (the variables of PolicyHead), `critic`, the optimizer's state, the weight of
    the leash and the number of updates so far."""

    head: Any
    critic: Critic
    optimizer: optax.OptState
    kl_coefficient: jax.Array
    step: jax.Array


class Pay(NamedTuple):
    """What decisions are paid: `share` [] float32 of their rewards, and where `permuted` [] bool, of the rewards of
    another decision of the batch, drawn at random: a control, which has nothing to learn."""

    share: jax.Array
    permuted: jax.Array


Updates = Callable[..., tuple[Learner, dict[str, jax.Array]]]


def pay(share: float = 1.0, permuted: bool = False) -> Pay:
    return Pay(jnp.float32(share), jnp.asarray(permuted))


def new_learner(
    width: int, item_count: int, config: RLConfig, method: Method
) -> tuple[nnx.GraphDef[PolicyHead], Learner]:
    """The structure of the policy head, and a learner whose policy is the supervised one."""
    graphdef, params = new_head(width, item_count, config)
    critic = method.new_critic(width, item_count, config)
    return graphdef, Learner(
        head=params,
        critic=critic,
        optimizer=policy_optimizer(config).init((params, critic)),
        kl_coefficient=jnp.float32(KL_COEFFICIENT_START),
        step=jnp.zeros((), jnp.int32),
    )


def new_head(width: int, item_count: int, config: RLConfig) -> tuple[nnx.GraphDef[PolicyHead], Any]:
    """The structure and the variables of a policy head that changes nothing yet."""
    head = PolicyHead(width, config.policy_width, item_count, rngs=nnx.Rngs(config.seed))
    graphdef, variables = nnx.split(head)
    return graphdef, nnx.to_pure_dict(variables)


def make_updates(graphdef: nnx.GraphDef[PolicyHead], config: RLConfig, method: Method) -> Updates:
    """updates(learner, scoring, states, key, count, pay) -> (learner, metrics [count] each), in one compiled scan.

    The learner is donated. The key is the run's; the number of the update is folded in.
    """
    optimizer = policy_optimizer(config)

    def update(
        scoring: Scoring, states: States, key: jax.Array, pay: Pay, learner: Learner
    ) -> tuple[Learner, dict[str, jax.Array]]:
        row_key, slate_key, method_key, order_key = jax.random.split(jax.random.fold_in(key, learner.step), 4)
        rows = jax.random.randint(row_key, (config.batch_size,), 0, len(states.target))
        query, recent, exclude = jnp.asarray(states.query)[rows], states.recent(rows), states.histories(rows)
        target, target_rating, user_mean, logprob_beta = (
            jnp.asarray(column)[rows]
            for column in (states.target, states.target_rating, states.user_mean, states.logprob_beta)
        )
        next_query, has_next = states.following(rows)
        reference = exclude_items(supervised_logits(query, recent, scoring), exclude)
        order = jnp.arange(config.batch_size)
        order = jnp.where(pay.permuted, jax.random.permutation(order_key, order), order)

        def loss_of(trained: tuple[Any, Critic]) -> tuple[jax.Array, dict[str, jax.Array]]:
            params, critic = trained
            logits = exclude_items(policy_logits(nnx.merge(graphdef, params), query, recent, scoring), exclude)
            # Two axes, because of three the CPU would sort all items instead of picking the best k.
            repeated = jnp.tile(jax.lax.stop_gradient(logits), (config.samples, 1))
            slates = sample_slates(slate_key, repeated, config.slate_size).reshape(config.samples, len(rows), -1)
            where = recommendable(jnp.take_along_axis(logits[None], slates, axis=-1))
            terms = slate_reward_terms(slates, target, target_rating, user_mean, scoring.tables)
            earned = {name: returns(jnp.where(where, term, 0.0)) for name, term in terms._asdict().items()}
            achieved = returns(jnp.where(where, total_reward(terms, config.rewards), 0.0))
            of_target = slate_reward_terms(target[:, None], target, target_rating, user_mean, scoring.tables)
            decisions = Decisions(
                query=query,
                logits=logits,
                target=target,
                logprobs=slate_logprobs(jnp.broadcast_to(logits, (config.samples, *logits.shape)), slates),
                returns=pay.share * achieved[:, order],
                where=where,
                reward=pay.share * total_reward(of_target, config.rewards)[order, 0],
                logprob_beta=logprob_beta,
                next_query=next_query,
                has_next=has_next,
                progress=learner.step / config.steps,
            )
            loss, measured = method.loss(decisions, critic, scoring.item_vectors, method_key, config)
            anchor = imitation_loss(logits, target, target_rating)
            kl = jnp.mean(kl_divergence(logits, reference))
            guard, guarded = guards(logits, reference, config)
            metrics = {
                "reward": jnp.mean(achieved[..., 0]),
                **{f"reward_{name}": jnp.mean(of_term[..., 0]) for name, of_term in earned.items()},
                "kl": kl,
                "kl_coefficient": learner.kl_coefficient,
                "ess_share": jnp.float32(1.0),  # of slates drawn by the policy itself
                "clipped_share": jnp.float32(0.0),
                "coverage": slate_coverage(slates, logits.shape[1]),
                "anchor_loss": anchor,
                **guarded,
                **measured,
            }
            return loss + learner.kl_coefficient * kl + config.anchor * anchor + guard, metrics

        return apply_update(loss_of, learner, optimizer, config)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
    def updates(
        learner: Learner, scoring: Scoring, states: States, key: jax.Array, count: int, pay: Pay
    ) -> tuple[Learner, dict[str, jax.Array]]:
        return jax.lax.scan(lambda carry, _: update(scoring, states, key, pay, carry), learner, length=count)

    return updates


def apply_update(
    loss_of: Callable[[tuple[Any, Critic]], tuple[jax.Array, dict[str, jax.Array]]],
    learner: Learner,
    optimizer: optax.GradientTransformation,
    config: RLConfig,
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step down the gradient of `loss_of`, and one of the leash's coefficient by the metric `kl`."""
    trained = (learner.head, learner.critic)
    gradients, metrics = jax.grad(loss_of, has_aux=True)(trained)
    changes, optimizer_state = optimizer.update(gradients, learner.optimizer, trained)
    head, critic = optax.apply_updates(trained, changes)
    coefficient = next_kl_weight(learner.kl_coefficient, metrics["kl"], config.kl_target)
    return Learner(head, critic, optimizer_state, coefficient, learner.step + 1), metrics


def guards(logits: jax.Array, reference: jax.Array, config: RLConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What falling below the floors of entropy and of coverage costs, and both: nats, and items that the batch's
    recommendations are spread over. The floors are shares of what `reference` has; all [batch, items + 1]."""
    everywhere = jnp.ones(len(logits), bool)
    entropies = entropy(logits)
    _, items_before = coverage_floor_loss(reference, 1.0, everywhere)
    of_entropy = entropy_floor_loss(entropies, config.entropy_floor * jnp.mean(entropy(reference)), everywhere)
    of_coverage, items = coverage_floor_loss(logits, config.coverage_floor * items_before, everywhere)
    return of_entropy + of_coverage, {"entropy": jnp.mean(entropies), "effective_items": items}


def slate_coverage(slates: jax.Array, width: int) -> jax.Array:
    """The share of the `width` - 1 items that occur in any of the slates [..., k]."""
    seen = jnp.zeros(width).at[slates.reshape(-1)].set(1.0)
    return jnp.sum(seen[1:]) / (width - 1)


def policy_optimizer(config: RLConfig) -> optax.GradientTransformation:
    """Adam for both parts of (head, critic). The head's rate warms up, then follows a cosine down to 0; the critic,
    whose error biases nothing, learns faster."""
    warmup = max(1, int(WARMUP_FRACTION * config.steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))
    return optax.multi_transform(
        {"head": optax.adam(schedule), "critic": optax.adam(CRITIC_LEARNING_RATE)}, ("head", "critic")
    )
