"""Judges a policy beside the supervised one on logged cases, and decides which of the two is used."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.batches import case_batches
from jaxrec.config import RewardWeights
from jaxrec.metrics import exclude_items, hit_rate, ndcg, rank_of_target
from jaxrec.models.cooccurrence import recent_items
from jaxrec.models.features import Array, Events
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.prepare import PreparedData
from jaxrec.rl.policy import greedy_slates, kl_divergence, recommendable
from jaxrec.rl.reinforce import Scoring, policy_logits, returns, supervised_logits
from jaxrec.rl.rewards import reward_terms, total_reward
from jaxrec.rl.states import rating_or_mean
from jaxrec.schema import UNKNOWN_GAP
from jaxrec.split import Cases

TOP = 10
MAX_CASES = 10_000
CASES_PER_BATCH = 64


class CaseStates(NamedTuple):
    """`query` [2, cases, width] float32: supervised query vectors without and with the request time; `target_rating`
    [cases] float32 the unit rating of the target (its mean where it has none)."""

    cases: Cases
    query: np.ndarray
    target_rating: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judged:
    """Per case, each [2, cases] without and with the request time: `rank` of the target, the discounted reward of the
    greedy top 10 and its terms, `kl` to the supervised policy; `weight` [cases]: the target's unit rating."""

    rank: np.ndarray
    reward: np.ndarray
    terms: dict[str, np.ndarray]
    kl: np.ndarray
    weight: np.ndarray

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
            "kl": self.kl.mean(),
        }
        return {name: float(value) for name, value in figures.items()}


def decide(policy: dict[str, float], supervised: dict[str, float]) -> tuple[bool, str]:
    """Whether the policy is used instead of the supervised one, and why, given the figures of both on validation.

    It is used if and only if its mean slate reward is higher, its reward-weighted NDCG@10 is higher, and its plain
    NDCG@10 is not lower. The best of several states is chosen on the same cases, so the figures that carried the
    decision flatter the policy; only the test cases tell its worth.
    """
    better = {
        "mean slate reward": ("reward", policy["reward"] > supervised["reward"]),
        "reward-weighted NDCG@10": (
            "reward_weighted_ndcg_10",
            policy["reward_weighted_ndcg_10"] > supervised["reward_weighted_ndcg_10"],
        ),
        "NDCG@10": ("ndcg_10", policy["ndcg_10"] >= supervised["ndcg_10"]),
    }
    used = all(kept for _, kept in better.values())
    figures = ", ".join(
        f"{label} {policy[name]:.4f} against {supervised[name]:.4f}" for label, (name, _) in better.items()
    )
    if used:
        return True, f"the policy is used; on validation: {figures}"
    failed = " and ".join(label for label, (_, kept) in better.items() if not kept)
    return False, f"the supervised policy stays in use, because {failed} would fall short on validation: {figures}"


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
    return CaseStates(cases, query[:, : len(cases)], rating_or_mean(ratings, items, item_ratings))


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
        exclude: jax.Array,
    ) -> dict[str, jax.Array]:
        logits = policy_logits(nnx.merge(graphdef, head), query, recent, scoring)
        allowed = exclude_items(logits, exclude)
        slates = greedy_slates(allowed, min(TOP, logits.shape[1] - 1))
        where = recommendable(jnp.take_along_axis(allowed, slates, axis=-1))
        terms = reward_terms(slates, target, target_rating, scoring.tables)
        rewards = {"reward": total_reward(terms, weights), **terms._asdict()}
        return {
            "rank": rank_of_target(logits, target, exclude),
            "kl": kl_divergence(allowed, exclude_items(supervised_logits(query, recent, scoring), exclude)),
            **{name: returns(jnp.where(where, reward, 0.0))[:, 0] for name, reward in rewards.items()},
        }

    def judge(head: Any) -> Judged:
        answers: tuple[list[dict[str, np.ndarray]], ...] = ([], [])
        for number, batch in enumerate(case_batches(data, states.cases, max_length, CASES_PER_BATCH)):
            rows = np.minimum(number * CASES_PER_BATCH + np.arange(CASES_PER_BATCH), len(states.cases) - 1)
            recent = recent_items(batch.events.item, batch.events.length)
            logged = jax.device_put((recent, batch.target, states.target_rating[rows], batch.exclude))
            for query, answered in zip(states.query, answers, strict=True):
                answered.append(jax.device_get(judge_batch(head, scoring, jnp.asarray(query[rows]), *logged)))
        columns = {
            name: np.stack([np.concatenate([a[name] for a in answered])[: len(states.cases)] for answered in answers])
            for name in answers[0][0]
        }
        return Judged(
            rank=columns.pop("rank"),
            kl=columns.pop("kl"),
            reward=columns.pop("reward"),
            terms=columns,
            weight=states.target_rating,
        )

    return judge
