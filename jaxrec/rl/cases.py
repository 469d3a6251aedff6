"""A policy of a run on logged cases: the ranks of what came next, and the rewards of its slates."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, hit_rate, ndcg, rank_of_target
from jaxrec.evaluation.ranking import TOP
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.models.masks import exclude_items
from jaxrec.rl.config import RewardWeights
from jaxrec.rl.policy import greedy_slates, kl_divergence, recommendable
from jaxrec.rl.reward_tables import rating_or_mean, running_user_means
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits, returns, supervised_logits
from jaxrec.rl.states import PolicyState, by_batches, policy_states

MAX_EVALUATED_CASES = 10_000
CASES_PER_BATCH = 64


class CaseStates(NamedTuple):
    """Logged cases [cases]: the `states` before each without and with the request time, the items of the history
    `exclude` [cases, width] int32 (0 = none), the `target` [cases] int32 with its unit rating (its mean where it has
    none) `target_rating` [cases] float32, and the mean of the user's ratings before, `user_mean` [cases] float32."""

    cases: Cases
    states: tuple[PolicyState, PolicyState]
    exclude: np.ndarray
    target: np.ndarray
    target_rating: np.ndarray
    user_mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class CaseResults:
    """Per case, each [2, cases] without and with the request time: `rank` of the target, the discounted reward of the
    greedy top 10 and its terms, `kl` to the supervised policy; `top` [2, cases, 10] int32 that top; `weight` [cases]:
    the target's unit rating; `item_count`: the catalogue's; `users` [cases]: whose
    case it is."""

    rank: np.ndarray
    reward: np.ndarray
    terms: dict[str, np.ndarray]
    kl: np.ndarray
    weight: np.ndarray
    top: np.ndarray
    item_count: int
    users: np.ndarray

    def reward_weighted_ndcg(self) -> np.ndarray:
        """[cases], scaled so that their mean is sum(weight * NDCG@10) / sum(weight)."""
        return ndcg(self.rank, TOP).mean(axis=0) * self.weight / max(self.weight.mean(), 1e-12)

    def figures(self) -> dict[str, float]:
        """Means over the cases, and over with and without the request time."""
        figures = {
            "reward": self.reward.mean(),
            **{f"reward_{name}": term.mean() for name, term in self.terms.items()},
            "reward_weighted_ndcg_10": self.reward_weighted_ndcg().mean(),
            "ndcg_10": ndcg(self.rank, TOP).mean(),
            "hit_rate_10": hit_rate(self.rank, TOP).mean(),
            "coverage_10": np.mean([coverage(top, self.item_count) for top in self.top]),
            "kl": self.kl.mean(),
        }
        return {name: float(value) for name, value in figures.items()}


def compare(policy: CaseResults, other: CaseResults, seed: int = 0) -> dict[str, Estimate]:
    """Gains of the policy over another on the same cases: paired differences with 95 % bootstrap intervals."""
    columns = {
        "reward": (policy.reward - other.reward).mean(axis=0),
        "reward_weighted_ndcg_10": policy.reward_weighted_ndcg() - other.reward_weighted_ndcg(),
        "ndcg_10": (ndcg(policy.rank, TOP) - ndcg(other.rank, TOP)).mean(axis=0),
    }
    resamples = resample(policy.users, seed=seed)
    return {name: bootstrap(values, resamples) for name, values in columns.items()}


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def case_states(hybrid: Hybrid, data: PreparedData, cases: Cases, item_ratings: np.ndarray) -> CaseStates:
    """The cases as a policy on top of `hybrid` sees them; of more than MAX_EVALUATED_CASES, evenly spaced ones."""
    cases = cases.at_most(MAX_EVALUATED_CASES)
    without, exclude = policy_states(hybrid, data, cases, np.zeros(len(cases), bool))
    with_time, _ = policy_states(hybrid, data, cases, np.ones(len(cases), bool))
    ratings, items = data.unit_ratings()[cases.rows], data.histories.items[cases.rows]
    user_means = running_user_means(data.histories.offsets, data.unit_ratings(), float(item_ratings[0]))
    return CaseStates(
        cases,
        (without, with_time),
        exclude,
        items.astype(np.int32),
        rating_or_mean(ratings, items, item_ratings),
        user_means[cases.rows],
    )


def case_evaluator(
    graphdef: nnx.GraphDef[PolicyHead], scoring: Scoring, cases: CaseStates, weights: RewardWeights
) -> Callable[[Any], CaseResults]:
    """evaluate(variables of a PolicyHead) -> the policy's results on the cases."""
    item_count = len(scoring.item_bias) - 1

    @jax.jit
    def of_batch(
        head: Any,
        scoring: Scoring,
        state: PolicyState,
        logged: tuple[jax.Array, jax.Array, jax.Array],
        exclude: jax.Array,
    ) -> dict[str, jax.Array]:
        logits = policy_logits(nnx.merge(graphdef, head), state, scoring)
        allowed = exclude_items(logits, exclude)
        slates = greedy_slates(allowed, min(TOP, item_count))
        where = recommendable(jnp.take_along_axis(allowed, slates, axis=-1))
        terms = slate_reward_terms(slates, *logged, scoring.tables)
        rewards = {"reward": total_reward(terms, weights), **terms._asdict()}
        return {
            "rank": rank_of_target(logits, logged[0], exclude),
            "top": jnp.where(where, slates, 0),
            "kl": kl_divergence(allowed, exclude_items(supervised_logits(state, scoring), exclude)),
            **{name: returns(jnp.where(where, reward, 0.0))[:, 0] for name, reward in rewards.items()},
        }

    def evaluate(head: Any) -> CaseResults:
        def at(state: PolicyState, rows: np.ndarray) -> dict[str, jax.Array]:
            inputs = state, (cases.target, cases.target_rating, cases.user_mean), cases.exclude
            return of_batch(head, scoring, *jax.tree.map(lambda column: jnp.asarray(column[rows]), inputs))

        of_both = [
            by_batches(functools.partial(at, state), len(cases.target), CASES_PER_BATCH) for state in cases.states
        ]
        columns = jax.tree.map(lambda *both: np.stack(both), *of_both)
        rank, reward, kl, top = (columns.pop(name) for name in ("rank", "reward", "kl", "top"))
        return CaseResults(rank, reward, columns, kl, cases.target_rating, top, item_count, cases.cases.users)

    return evaluate
