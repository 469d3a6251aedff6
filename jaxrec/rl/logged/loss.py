"""The loss of one update on logged decisions: what every method shares.

The state is the supervised query vector with the most recent items, by which co-occurrence adds to the logits; the
action is a slate drawn from the policy. Its reward is the discounted mean of its items' rewards, sum_i d_i r_i with
DCG's discounts d (`jaxrec.rl.rewards.rank_discounts`). A slot only affects the slots from it on, so that its return is
G_i = sum_(j >= i) d_j r_j (Sutton et al. 2000, theorem 1, for an episode of one slate). `jaxrec.rl.logged.methods` make
a loss of that.

Three terms are added. The KL penalty is coefficient * KL(policy || supervised policy), exact over the catalogue; its
coefficient is controlled to a target (Ziegler et al. 2019, section 2.2). The imitation loss is the cross-entropy of the
logged item, weighted by its rating: hits are rare among sampled slates, and without it the denser genre and rating
rewards buy their gains with hits (5 % of NDCG@10 on ML-100K's validation cases). The floors are those of
`jaxrec.rl.constraints`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import exclude_items
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.constraints import floor_penalty, slate_coverage
from jaxrec.rl.logged.methods import Method, Transitions
from jaxrec.rl.logged.states import States
from jaxrec.rl.losses.imitation import imitation_loss
from jaxrec.rl.policy import kl_divergence, recommendable, sample_slates, slate_logprobs
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import PolicyParams, Scoring, new_head, policy_logits, returns, supervised_logits
from jaxrec.rl.updates import Learner, Loss

Data = tuple[Scoring, States, float, bool]
"""The frozen side of the logits, the logged decisions, and the two settings of a control: the share of their rewards
that decisions get, and whether they get those of another decision of the batch, drawn at random."""


def start_params(
    width: int, item_count: int, config: LoggedConfig, method: Method
) -> tuple[nnx.GraphDef[PolicyHead], PolicyParams]:
    """The structure of the policy head, and parameters of a policy that equals the supervised one."""
    graphdef, head = new_head(width, item_count, config.policy_width, config.seed)
    return graphdef, PolicyParams(head, method.new_critic(width, item_count, config))


def logged_loss(graphdef: nnx.GraphDef[PolicyHead], config: LoggedConfig, method: Method) -> Loss:
    """The loss of PolicyParams for `jaxrec.rl.updates`; its data are `Data`."""

    def loss(
        params: PolicyParams, learner: Learner, data: Data, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        scoring, states, reward_share, permuted = data
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
        order = jnp.where(permuted, jax.random.permutation(order_key, order), order)

        logits = exclude_items(policy_logits(nnx.merge(graphdef, params.head), query, recent, scoring), exclude)
        # Two axes, because of three the CPU would sort all items instead of picking the best k.
        repeated = jnp.tile(jax.lax.stop_gradient(logits), (config.samples, 1))
        slates = sample_slates(slate_key, repeated, config.slate_size).reshape(config.samples, len(rows), -1)
        where = recommendable(jnp.take_along_axis(logits[None], slates, axis=-1))
        terms = slate_reward_terms(slates, target, target_rating, user_mean, scoring.tables)
        by_term = {name: returns(jnp.where(where, term, 0.0)) for name, term in terms._asdict().items()}
        achieved = returns(jnp.where(where, total_reward(terms, config.rewards), 0.0))
        of_target = slate_reward_terms(target[:, None], target, target_rating, user_mean, scoring.tables)
        transitions = Transitions(
            query=query,
            logits=logits,
            target=target,
            logprobs=slate_logprobs(jnp.broadcast_to(logits, (config.samples, *logits.shape)), slates),
            returns=reward_share * achieved[:, order],
            where=where,
            reward=reward_share * total_reward(of_target, config.rewards)[order, 0],
            logprob_beta=logprob_beta,
            next_query=next_query,
            has_next=has_next,
            progress=learner.step / config.updates,
        )
        method_loss, measured = method.loss(transitions, params.critic, scoring.item_vectors, method_key, config)
        imitation = imitation_loss(logits, target, target_rating)
        kl = jnp.mean(kl_divergence(logits, reference))
        penalty, spread = floor_penalty(logits, reference, config.entropy_floor, config.coverage_floor)
        metrics = {
            "reward": jnp.mean(achieved[..., 0]),
            **{f"reward_{name}": jnp.mean(of_term[..., 0]) for name, of_term in by_term.items()},
            "kl": kl,
            "ess_share": jnp.float32(1.0),  # of slates drawn by the policy itself
            "clipped_share": jnp.float32(0.0),
            "coverage": slate_coverage(slates, logits.shape[1]),
            "imitation_loss": imitation,
            **spread,
            **measured,
        }
        total = method_loss + learner.kl_coefficient * kl + config.imitation_weight * imitation + penalty
        return total, (metrics, ())

    return loss
