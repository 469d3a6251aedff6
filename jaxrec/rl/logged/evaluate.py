"""Judges a policy beside the supervised one on logged cases, and decides which of the two is used."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import RewardWeights
from jaxrec.data.batches import case_batches
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, exclude_items, hit_rate, ndcg, rank_of_target
from jaxrec.models.cooccurrence import recent_items
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.logged.states import rating_or_mean
from jaxrec.rl.policy import greedy_slates, kl_divergence, recommendable
from jaxrec.rl.reward_tables import running_user_means
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import Scoring, policy_logits, returns, supervised_logits

TOP = 10
MAX_CASES = 10_000
CASES_PER_BATCH = 64
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
class Judged:
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


class Decision(NamedTuple):
    """`differences`: what was compared, as paired means over the cases with their 95 % intervals."""

    used: bool
    reason: str
    differences: dict[str, Estimate]


def compare(policy: Judged, other: Judged, seed: int = 0) -> dict[str, Estimate]:
    """What the policy has over another on the same cases: paired differences with 95 % bootstrap intervals."""
    columns = {
        "reward": (policy.reward - other.reward).mean(axis=0),
        "reward_weighted_ndcg_10": policy.reward_weighted_ndcg() - other.reward_weighted_ndcg(),
        "ndcg_10": (ndcg(policy.rank, TOP) - ndcg(other.rank, TOP)).mean(axis=0),
    }
    resamples = resample(policy.users, seed=seed)
    return {name: bootstrap(values, resamples) for name, values in columns.items()}


def decide(policy: Judged, supervised: Judged, anchor_only: Judged, permuted: Judged) -> Decision:
    """Whether the policy is used instead of the supervised one, given what all did on the same validation cases.

    It is used if and only if the 95 % intervals of its paired gains in mean slate reward and in reward-weighted NDCG@10
    lie above 0, its NDCG@10 is not lower, and the control whose rewards were permuted has no such gain over the control
    without rewards: if that had one, the judgement would find gains where there is nothing to learn. `anchor_only` is
    what the anchor does by itself; what the policy gains beyond it is the rewards' work, and the reason says it.
    Validation was used to choose the models, but no policy: each is judged once, as it was after its last update.
    """
    gains, control = compare(policy, supervised), compare(permuted, anchor_only)
    held = {
        "a higher slate reward": gains["reward"].low > 0,
        "a higher reward-weighted NDCG@10": gains["reward_weighted_ndcg_10"].low > 0,
        "an NDCG@10 that is not lower": gains["ndcg_10"].mean >= 0,
        "a control with permuted rewards that gains nothing": control["reward_weighted_ndcg_10"].low <= 0,
    }
    used = all(held.values())
    figures = {name: (policy.figures()[name], supervised.figures()[name]) for name in gains}
    told = "; ".join(
        f"{label} {figures[name][0]:.4f} against {figures[name][1]:.4f}, {signed(gains[name])}"
        for name, label in LABELS.items()
    )
    of_anchor, of_reward = (
        signed(compare(a, b)["reward_weighted_ndcg_10"]) for a, b in ((anchor_only, supervised), (policy, anchor_only))
    )
    controls = (
        f"Controls, in reward-weighted NDCG@10: the anchor without rewards {of_anchor}; the policy beyond that "
        f"{of_reward}; permuted rewards beyond it {signed(control['reward_weighted_ndcg_10'])}."
    )
    if used:
        return Decision(True, f"the policy is used; on validation: {told}. {controls}", gains)
    failed = " and ".join(label for label, kept in held.items() if not kept)
    reason = f"the supervised policy stays in use: not shown on validation is {failed}: {told}. {controls}"
    return Decision(False, reason, gains)


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def case_states(hybrid: Hybrid, data: PreparedData, cases: Cases, item_ratings: np.ndarray) -> CaseStates:
    """Encodes the cases once; of more than MAX_CASES, evenly spaced ones are taken."""
    cases = cases.at_most(MAX_CASES)
    graphdef, variables = nnx.split(hybrid)

    @jax.jit
    def queries(variables: nnx.State, events: Events, request_gap: Array) -> jax.Array:
        model = nnx.merge(graphdef, variables)
        _, state = model.encode(events)
        h_lstm, _, h_content, _, _ = model.split_state(state)
        gap = jnp.asarray(request_gap)
        gaps = (jnp.full_like(gap, UNKNOWN_GAP), gap)
        return jnp.stack([model.supervised_query((h_lstm, h_content), gap) for gap in gaps])

    max_length = hybrid.lstm.config.max_length
    batches = case_batches(data, cases, max_length, CASES_PER_BATCH)
    query = np.concatenate([np.asarray(queries(variables, b.events, b.request_gap)) for b in batches], axis=1)
    ratings, items = data.unit_ratings()[cases.rows], data.histories.items[cases.rows]
    user_means = running_user_means(data.histories.offsets, data.unit_ratings(), float(item_ratings[0]))
    return CaseStates(
        cases, query[:, : len(cases)], rating_or_mean(ratings, items, item_ratings), user_means[cases.rows]
    )


def make_judge(
    graphdef: nnx.GraphDef[PolicyHead],
    scoring: Scoring,
    states: CaseStates,
    data: PreparedData,
    max_length: int,
    weights: RewardWeights,
) -> Callable[[Any], Judged]:
    """judge(variables of a PolicyHead) -> what the policy does on the cases."""

    @jax.jit
    def judge_batch(
        head: Any,
        scoring: Scoring,
        query: jax.Array,
        recent: jax.Array,
        target: jax.Array,
        target_rating: jax.Array,
        user_mean: jax.Array,
        exclude: jax.Array,
    ) -> dict[str, jax.Array]:
        logits = policy_logits(nnx.merge(graphdef, head), query, recent, scoring)
        allowed = exclude_items(logits, exclude)
        slates = greedy_slates(allowed, min(TOP, logits.shape[1] - 1))
        where = recommendable(jnp.take_along_axis(allowed, slates, axis=-1))
        terms = slate_reward_terms(slates, target, target_rating, user_mean, scoring.tables)
        rewards = {"reward": total_reward(terms, weights), **terms._asdict()}
        return {
            "rank": rank_of_target(logits, target, exclude),
            "top": jnp.where(where, slates, 0),
            "kl": kl_divergence(allowed, exclude_items(supervised_logits(query, recent, scoring), exclude)),
            **{name: returns(jnp.where(where, reward, 0.0))[:, 0] for name, reward in rewards.items()},
        }

    def judge(head: Any) -> Judged:
        answers: tuple[list[dict[str, np.ndarray]], ...] = ([], [])
        for number, batch in enumerate(case_batches(data, states.cases, max_length, CASES_PER_BATCH)):
            rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(states.cases) - 1)
            recent = recent_items(batch.events.item, batch.events.length)
            of_cases = states.target_rating[rows], states.user_mean[rows]
            logged = jax.device_put((recent, batch.target, *of_cases, batch.exclude))
            for query, answered in zip(states.query, answers, strict=True):
                answered.append(jax.device_get(judge_batch(head, scoring, jnp.asarray(query[rows]), *logged)))
        columns = {
            name: np.stack([np.concatenate([a[name] for a in answered])[: len(states.cases)] for answered in answers])
            for name in answers[0][0]
        }
        return Judged(
            rank=columns.pop("rank"),
            top=columns.pop("top"),
            item_count=len(data.catalog),
            kl=columns.pop("kl"),
            reward=columns.pop("reward"),
            terms=columns,
            weight=states.target_rating,
            users=states.cases.users,
        )

    return judge
