"""Learns a reranker from held-out decisions, beside its controls, and decides by other held-out users if it is used.

Each fold's decisions are ranked by weights that were fitted to the other folds. What is compared is thus out of fold
twice: neither the models nor the weights know the user. Three fits are compared with the mix: imitation alone (what
stacking gives), imitation and rewards, and the same with rewards of other decisions, from which nothing can be learned.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.models.masks import NEVER
from jaxrec.rl.config import RerankingConfig
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.reranking.decisions import Decisions
from jaxrec.rl.reranking.fit import Fitted, fit_reranker, reranked_scores
from jaxrec.rl.reward_tables import fit_reward_tables, running_user_means
from jaxrec.rl.rewards import rank_discounts, slate_reward_terms, total_reward
from jaxrec.training.stopping import StopRequested, never

MIX, IMITATION, RERANKED, PERMUTED = "mix", "imitation only", "imitation and rewards", "permuted rewards"
ROWS = 4096  # decisions whose rewards are computed at once


class Results(NamedTuple):
    """Of one way to rank, each [decisions]: the target's NDCG@10, the same weighted by its rating with mean weight 1,
    and the reward of the best `slate_size` candidates."""

    ndcg: np.ndarray
    reward_weighted_ndcg: np.ndarray
    reward: np.ndarray


def learn_reranker(
    folds: list[Decisions],
    validation: Decisions,
    data: PreparedData,
    config: RerankingConfig,
    stop: StopRequested = never,
) -> tuple[Fitted, PolicyOutcome]:
    """Fits the weights to the decisions of all folds, and says whether they are to be used.

    Args:
        folds: The decisions of each fold.
        validation: Decisions on the run's validation cases by the run's own models.
        data: That all of them are of.
        config: Of rewards and fits.
        stop: Ends the training.

    Returns:
        What was fitted to all folds, and the outcome.

    Raises:
        TrainingError: A loss is not finite.
        TrainingStopped: `stop()` was true.
    """
    rewards, weights = zip(*(candidate_rewards(fold, data, config) for fold in folds), strict=True)
    rng = np.random.default_rng(config.seed)
    found: dict[str, list[Results]] = {name: [] for name in (MIX, IMITATION, RERANKED, PERMUTED)}
    for held_out, decisions in enumerate(folds):
        others = Decisions.joined([fold for at, fold in enumerate(folds) if at != held_out])
        of_others = np.concatenate([each for at, each in enumerate(rewards) if at != held_out])
        judged = rewards[held_out], weights[held_out], config
        found[MIX].append(results(decisions, decisions.mix, *judged))
        for name, earned, share in (
            (IMITATION, of_others, 0.0),
            (RERANKED, of_others, config.reward_weight),
            (PERMUTED, rng.permutation(of_others), config.reward_weight),
        ):
            fitted = fit_reranker(others, earned, dataclasses.replace(config, reward_weight=share), stop)
            found[name].append(results(decisions, reranked_scores(fitted, decisions), *judged))
    fitted = fit_reranker(Decisions.joined(folds), np.concatenate(rewards), config, stop)
    earned, weight = candidate_rewards(validation, data, config)
    of_reranker, of_mix = (
        results(validation, scores, earned, weight, config)
        for scores in (reranked_scores(fitted, validation), validation.mix)
    )
    joined = {name: Results(*map(np.concatenate, zip(*of_folds, strict=True))) for name, of_folds in found.items()}
    users = np.concatenate([fold.user for fold in folds])
    return fitted, outcome(joined, users, of_reranker, of_mix, validation.user)


def candidate_rewards(
    decisions: Decisions, data: PreparedData, config: RerankingConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What each candidate would earn on a first place [decisions, candidates] float32, and the unit rating of each
    target [decisions] float32, its item's mean where it has none.
    """
    tables, ratings = fit_reward_tables(data), data.unit_ratings()
    means = running_user_means(data.histories.offsets, ratings, float(tables.item_ratings[0]))[decisions.row]
    items, target, rating = decisions.items, decisions.target, ratings[decisions.row]
    rating = np.where(rating >= 0, rating, np.asarray(tables.item_ratings)[target]).astype(np.float32)
    found = [
        np.asarray(
            total_reward(
                slate_reward_terms(
                    jnp.asarray(items[rows]),
                    jnp.asarray(target[rows]),
                    jnp.asarray(rating[rows]),
                    jnp.asarray(means[rows]),
                    tables,
                ),
                config.rewards,
            )
        )
        for rows in np.array_split(np.arange(len(decisions)), max(1, len(decisions) // ROWS))
    ]
    return np.concatenate(found), rating


def results(
    decisions: Decisions, scores: np.ndarray, rewards: np.ndarray, rating: np.ndarray, config: RerankingConfig
) -> Results:
    """Results of ranking the candidates by `scores` [decisions, candidates]; ties count against the target."""
    scores = np.where(decisions.mix > NEVER / 2, scores, NEVER)
    of_target = scores[np.arange(len(scores)), np.maximum(decisions.place, 0)]
    rank = np.where(decisions.place >= 0, (scores >= of_target[:, None]).sum(axis=1), decisions.rank)
    top = np.argsort(-scores, axis=1, kind="stable")[:, : config.slate_size]
    where = np.take_along_axis(scores, top, axis=1) > NEVER / 2
    earned = (
        np.where(where, np.take_along_axis(rewards, top, axis=1), 0.0)
        @ rank_discounts(config.slate_size)[: top.shape[1]]
    )
    gains = ndcg(rank, 10)
    return Results(gains, gains * rating / max(rating.mean(), 1e-12), earned)


def outcome(
    found: dict[str, Results], users: np.ndarray, validation: Results, mix: Results, validation_users: np.ndarray
) -> PolicyOutcome:
    """Whether a reranker is used.

    It is used if, out of fold, the 95 % intervals (by user) of its gains over the mix in NDCG@10 and in slate reward
    lie above 0, and its validation NDCG@10 is not significantly lower.

    Args:
        found: Results out of fold by name.
        users: [decisions], whose they are.
        validation: Results of the reranker on validation, and `mix`: those of the mix.
        mix: See `validation`.
        validation_users: [cases], whose these are.
    """
    over_mix = gains(found[RERANKED], found[MIX], users)
    stacking = gains(found[IMITATION], found[MIX], users)
    by_reward = gains(found[RERANKED], found[IMITATION], users)
    by_permuted = gains(found[PERMUTED], found[IMITATION], users)
    on_validation = gains(validation, mix, validation_users)
    failed = [
        label
        for label, holds in {
            "NDCG@10 did not improve significantly for held-out users": over_mix["ndcg"].low > 0,
            "the slate reward did not improve significantly for held-out users": over_mix["reward"].low > 0,
            "NDCG@10 fell on validation": on_validation["ndcg"].high >= 0,
        }.items()
        if not holds
    ]
    verdict = f"the mix stays: {', and '.join(failed)}" if failed else "the reranker is used"
    reason = (
        f"{verdict}; for held-out users NDCG@10 {_signed(over_mix['ndcg'])} and slate reward "
        f"{_signed(over_mix['reward'])}; of that stacking gives {_signed(stacking['ndcg'])} NDCG@10 and "
        f"{_signed(stacking['reward'])} reward, the rewards {_signed(by_reward['reward'])} reward, and permuted "
        f"rewards {_signed(by_permuted['reward'])}; validation NDCG@10 {_signed(on_validation['ndcg'])}"
    )
    named = {
        "": over_mix,
        "_by_stacking": stacking,
        "_by_rewards": by_reward,
        "_by_permuted_rewards": by_permuted,
        "_on_validation": on_validation,
    }
    return PolicyOutcome(
        not failed,
        reason,
        {name: {field: float(values.mean()) for field, values in one._asdict().items()} for name, one in found.items()},
        {f"{name}{of}": dataclasses.asdict(gain) for of, all_ in named.items() for name, gain in all_.items()},
    )


def gains(one: Results, other: Results, users: np.ndarray) -> dict[str, Estimate]:
    """Paired differences by name, with 95 % bootstrap intervals over the users."""
    resamples = resample(users)
    pairs = zip(Results._fields, one, other, strict=True)
    return {name: bootstrap(new - old, resamples) for name, new, old in pairs}


def _signed(gain: Estimate) -> str:
    return f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
