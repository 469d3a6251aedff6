"""Evaluates a policy beside the supervised one and the policy in use on logged cases, and decides which is used."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, hit_rate, ndcg, rank_of_target
from jaxrec.evaluation.ranking import TOP
from jaxrec.models.cooccurrence import recent_items
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.models.masks import exclude_items
from jaxrec.rl.config import RewardWeights
from jaxrec.rl.logged.states import rating_or_mean
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.policy import greedy_slates, kl_divergence, recommendable
from jaxrec.rl.reward_tables import running_user_means
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits, returns, supervised_logits
from jaxrec.rl.states import encode_histories

MAX_EVALUATED_CASES = 10_000
CASES_PER_BATCH = 64
SUPERVISED, IN_USE = "supervised models", "policy in use"
LABELS = {
    "reward": "mean slate reward",
    "reward_weighted_ndcg_10": "reward-weighted NDCG@10",
    "ndcg_10": "NDCG@10",
}


class CaseStates(NamedTuple):
    """`query` [2, cases, width] float32: supervised query vectors without and with the request time; `target_rating`
    [cases] float32 the unit rating of the target (its mean where it has none), `user_mean` [cases] float32 the mean of
    the user's ratings before it."""

    cases: Cases
    query: np.ndarray
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


def logged_outcome(
    policy: CaseResults,
    supervised: CaseResults,
    imitation_only: CaseResults,
    permuted: CaseResults,
    in_use: CaseResults | None = None,
) -> PolicyOutcome:
    """Whether the policy is used from now on, given the results of all on the same validation cases.

    It is used if and only if the 95 % intervals of its paired gains in mean slate reward and in reward-weighted NDCG@10
    lie above 0, its NDCG@10 is not lower, and the control with permuted rewards has no such gain over the control
    without rewards. The first three must hold over the supervised models and, where there is one, over the policy
    `in_use`. A gain of that control would mean that the evaluation finds gains where there is nothing to learn. What
    the policy gains beyond `imitation_only` is the effect of the rewards; the reason reports it. Validation was used to
    choose the models, but no policy: each is evaluated once, after its last update.
    """
    others = {SUPERVISED: supervised} if in_use is None else {SUPERVISED: supervised, IN_USE: in_use}
    gains = {other: compare(policy, results) for other, results in others.items()}
    control = compare(permuted, imitation_only)["reward_weighted_ndcg_10"]
    failed = [f"over the {other} {' and '.join(lost)}" for other in others if (lost := _not_better(gains[other]))]
    if control.low > 0:
        failed.append("the control with permuted rewards improved, too")
    shown = "; ".join(
        f"{label} {policy.figures()[name]:.4f} against {results.figures()[name]:.4f} of the {other}, "
        f"{signed(gains[other][name])}"
        for other, results in others.items()
        for name, label in LABELS.items()
    )
    of_imitation, of_reward = (
        signed(compare(a, b)["reward_weighted_ndcg_10"])
        for a, b in ((imitation_only, supervised), (policy, imitation_only))
    )
    controls = (
        f"controls, in reward-weighted NDCG@10: imitation without rewards {of_imitation}; the policy beyond that "
        f"{of_reward}; permuted rewards beyond it {signed(control)}"
    )
    kept = SUPERVISED if in_use is None else IN_USE
    verdict = f"keeping the {kept}: on validation {', and '.join(failed)}" if failed else "the new policy is used"
    differences = {
        name if other == SUPERVISED else f"{name}_over_policy_in_use": dataclasses.asdict(gain)
        for other in others
        for name, gain in gains[other].items()
    }
    return PolicyOutcome(not failed, f"{verdict}: {shown}; {controls}", differences=differences)


def _not_better(gains: dict[str, Estimate]) -> list[str]:
    """What keeps a policy with these gains from being better than another one; empty: it is better."""
    conditions = {
        "the slate reward did not improve significantly": gains["reward"].low > 0,
        "the reward-weighted NDCG@10 did not improve significantly": gains["reward_weighted_ndcg_10"].low > 0,
        "NDCG@10 fell": gains["ndcg_10"].mean >= 0,
    }
    return [label for label, holds in conditions.items() if not holds]


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def case_states(hybrid: Hybrid, data: PreparedData, cases: Cases, item_ratings: np.ndarray) -> CaseStates:
    """Encodes the cases once; of more than MAX_EVALUATED_CASES, evenly spaced ones are used."""
    cases = cases.at_most(MAX_EVALUATED_CASES)
    graphdef, variables = nnx.split(hybrid)
    queries = []
    for batch in case_batches(data, cases, hybrid.lstm.config.max_length, CASES_PER_BATCH):
        gaps = np.stack([np.full_like(batch.request_gap, UNKNOWN_GAP), batch.request_gap])
        queries.append(np.asarray(encode_histories(graphdef, variables, batch.events, gaps)[0]))
    ratings, items = data.unit_ratings()[cases.rows], data.histories.items[cases.rows]
    user_means = running_user_means(data.histories.offsets, data.unit_ratings(), float(item_ratings[0]))
    return CaseStates(
        cases,
        np.concatenate(queries, axis=1)[:, : len(cases)],
        rating_or_mean(ratings, items, item_ratings),
        user_means[cases.rows],
    )


def over_cases(
    compute: Callable[[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array, np.ndarray], Any],
    states: CaseStates,
    data: PreparedData,
    max_length: int,
) -> Any:
    """Arrays [2, cases, ...] of all cases without and with the request time, from those [batch, ...] of a batch.

    `compute` gets the queries [batch, width], the recent items [batch, RECENT], the target, its rating and the mean of
    the user's ratings ([batch] each), the items to exclude [batch, any], and the numbers of the cases [batch].
    """
    variants: tuple[list[Any], ...] = ([], [])
    for number, batch in enumerate(case_batches(data, states.cases, max_length, CASES_PER_BATCH)):
        rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(states.cases) - 1)
        of_cases = batch.target, states.target_rating[rows], states.user_mean[rows]
        recent, exclude = jax.device_put((recent_items(batch.events.item, batch.events.length), batch.exclude))
        logged = jax.device_put(of_cases)
        for query, results in zip(states.query, variants, strict=True):
            results.append(jax.device_get(compute(jnp.asarray(query[rows]), recent, logged, exclude, rows)))
    without_time, with_time = (
        jax.tree.map(lambda *parts: np.concatenate(parts)[: len(states.cases)], *results) for results in variants
    )
    return jax.tree.map(lambda *both: np.stack(both), without_time, with_time)


def case_evaluator(
    graphdef: nnx.GraphDef[PolicyHead],
    scoring: Scoring,
    states: CaseStates,
    data: PreparedData,
    max_length: int,
    weights: RewardWeights,
) -> Callable[[Any], CaseResults]:
    """evaluate(variables of a PolicyHead) -> the policy's results on the cases."""

    @jax.jit
    def of_batch(
        head: Any,
        scoring: Scoring,
        query: jax.Array,
        recent: jax.Array,
        logged: tuple[jax.Array, jax.Array, jax.Array],
        exclude: jax.Array,
    ) -> dict[str, jax.Array]:
        logits = policy_logits(nnx.merge(graphdef, head), query, recent, scoring)
        allowed = exclude_items(logits, exclude)
        slates = greedy_slates(allowed, min(TOP, logits.shape[1] - 1))
        where = recommendable(jnp.take_along_axis(allowed, slates, axis=-1))
        terms = slate_reward_terms(slates, *logged, scoring.tables)
        rewards = {"reward": total_reward(terms, weights), **terms._asdict()}
        return {
            "rank": rank_of_target(logits, logged[0], exclude),
            "top": jnp.where(where, slates, 0),
            "kl": kl_divergence(allowed, exclude_items(supervised_logits(query, recent, scoring), exclude)),
            **{name: returns(jnp.where(where, reward, 0.0))[:, 0] for name, reward in rewards.items()},
        }

    def evaluate(head: Any) -> CaseResults:
        columns = over_cases(lambda *inputs: of_batch(head, scoring, *inputs[:-1]), states, data, max_length)
        rank, reward, kl, top = (columns.pop(name) for name in ("rank", "reward", "kl", "top"))
        return CaseResults(rank, reward, columns, kl, states.target_rating, top, len(data.catalog), states.cases.users)

    return evaluate
