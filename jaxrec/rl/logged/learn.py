"""Learns a reranker from held-out decisions, beside its controls, and decides by other held-out users if it is used.

Each fold's decisions are ranked by weights that were fitted to the other folds, so neither the models nor the weights
were trained on the users that evaluate them. Three fits are compared with the mix: imitation alone (what stacking
gives), imitation and rewards, and the same with permuted rewards, a control that should gain nothing. The
control does not enter the decision.

Fits with several weights of the rewards trace the frontier of reward and NDCG@10: the weight is the multiplier of a
Lagrangian that trades one for the other. A budget of NDCG@10 chooses the weight that earns most within it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import TrainingError
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.models.masks import NEVER
from jaxrec.rl.cases import signed
from jaxrec.rl.config import BUDGET_WEIGHTS, LoggedConfig
from jaxrec.rl.logged.decisions import Decisions
from jaxrec.rl.logged.fit import UPDATES_PER_CHUNK, Fitted, fit_reranker, reranked_scores, scores_along
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.reward_tables import fit_reward_tables, rating_or_mean, running_user_means
from jaxrec.rl.rewards import RewardTables, rank_discounts, slate_reward_terms, total_reward
from jaxrec.rl.states import by_batches
from jaxrec.training.stopping import StopRequested, never

MIX, IMITATION, RERANKED, PERMUTED = "mix", "imitation only", "imitation and rewards", "permuted rewards"
ROWS = 2048  # decisions whose rewards are computed at once


class Results(NamedTuple):
    """Of one way to rank, each [decisions]: the target's NDCG@10, the same weighted by its rating with mean weight 1,
    and the reward of the best `slate_size` candidates."""

    ndcg: np.ndarray
    reward_weighted_ndcg: np.ndarray
    reward: np.ndarray


class Point(NamedTuple):
    """Mean gains out of fold of the fit `name` over the mix after `step` updates, with rewards of the weight
    `reward_weight`."""

    name: str
    step: int
    reward_weight: float
    ndcg: float
    reward: float


class Learned(NamedTuple):
    """`policy` and `stacked` (imitation alone), fitted to all folds, the `outcome`, the weight of the rewards that was
    used, the `curves` of the fits that are compared, and the `frontier`, from no rewards to the largest weight."""

    policy: Fitted
    stacked: Fitted
    outcome: PolicyOutcome
    reward_weight: float
    curves: list[Point]
    frontier: list[Point]


def learn_reranker(
    folds: list[Decisions],
    validation: Decisions,
    data: PreparedData,
    config: LoggedConfig,
    stop: StopRequested = never,
    in_use: Fitted | None = None,
) -> Learned:
    """Fits the weights to the decisions of all folds, and says whether they are to be used.

    Args:
        folds: The decisions of each fold.
        validation: Decisions on the run's validation cases by the run's own models.
        data: That all of them are of.
        config: Of rewards and fits.
        stop: Ends the training.
        in_use: The weights that the run uses now; None: it has no reranker.

    Returns:
        What was fitted, and the outcome.

    Raises:
        TrainingError: A loss is not finite.
        TrainingStopped: `stop()` was true.
    """
    earned, ratings = zip(*(candidate_rewards(fold, data, config) for fold in folds), strict=True)
    rng = np.random.default_rng(config.seed)

    def ranked(
        name: str, config: LoggedConfig, rewards: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    ) -> tuple[Results, list[Point]]:
        """Results out of fold of a fit to `rewards` of what was earned, and its curve."""
        found, curve = [], []
        for held_out, decisions in enumerate(folds):
            others = [fold for at, fold in enumerate(folds) if at != held_out]
            of_others = np.concatenate([rows for at, rows in enumerate(earned) if at != held_out])
            fitted = fit_reranker(Decisions.joined(others), rewards(of_others), config, stop)
            of_fold = earned[held_out], ratings[held_out], config
            along = [results(decisions, scores, *of_fold) for scores in scores_along(fitted, decisions)]
            found.append(along[-1])
            curve.append([(each.ndcg - mix[held_out].ndcg, each.reward - mix[held_out].reward) for each in along])
        points = []
        for place, of_folds in enumerate(zip(*curve, strict=True)):
            of_ndcg, of_reward = (float(np.concatenate(column).mean()) for column in zip(*of_folds, strict=True))
            step = min((place + 1) * UPDATES_PER_CHUNK, config.updates)
            points.append(Point(name, step, config.reward_weight, of_ndcg, of_reward))
        return joined(found), points

    mix = [
        results(fold, fold.mix, rewards, rating, config)
        for fold, rewards, rating in zip(folds, earned, ratings, strict=True)
    ]
    imitation = dataclasses.replace(config, reward_weight=0.0)
    weighted = {0.0: ranked(IMITATION, imitation)}
    for weight in (config.reward_weight,) if config.ndcg_budget is None else BUDGET_WEIGHTS:
        if weight:
            try:
                weighted[weight] = ranked(RERANKED, dataclasses.replace(config, reward_weight=weight))
            except TrainingError as error:
                raise TrainingError(f"with rewards of weight {weight:g}: {error}") from error
    frontier = [curve[-1] for _, curve in weighted.values()]
    if config.ndcg_budget is not None:
        floor = frontier[0].ndcg - config.ndcg_budget * float(weighted[0.0][0].ndcg.mean())
        chosen = max((point for point in frontier if point.ndcg >= floor), key=lambda point: point.reward)
        config = dataclasses.replace(config, reward_weight=chosen.reward_weight)

    def permuted(rows: np.ndarray) -> np.ndarray:
        """Rewards of other decisions, in another order: neither the next item nor the place says anything of them."""
        return rng.permuted(rng.permutation(rows), axis=1)

    fits = {
        IMITATION: weighted[0.0],
        RERANKED: weighted[config.reward_weight],
        PERMUTED: ranked(PERMUTED, config, permuted),
    }
    found = {MIX: joined(mix), **{name: of_fit for name, (of_fit, _) in fits.items()}}
    curves = [point._replace(name=name) for name, (_, curve) in fits.items() for point in curve]
    everything, all_rewards = Decisions.joined(folds), np.concatenate(earned)
    policy, stacked = (fit_reranker(everything, all_rewards, each, stop) for each in (config, imitation))
    of_validation = *candidate_rewards(validation, data, config), config
    before = validation.mix if in_use is None else reranked_scores(in_use, validation)
    of_policy, of_before = (
        results(validation, scores, *of_validation) for scores in (reranked_scores(policy, validation), before)
    )
    users = np.concatenate([fold.user for fold in folds])
    decided = outcome(found, users, of_policy, of_before, validation.user, config)
    return Learned(policy, stacked, decided, config.reward_weight, curves, frontier)


def joined(parts: list[Results]) -> Results:
    """The results of all folds, fold after fold."""
    return Results(*map(np.concatenate, zip(*parts, strict=True)))


def candidate_rewards(decisions: Decisions, data: PreparedData, config: LoggedConfig) -> tuple[np.ndarray, np.ndarray]:
    """What each candidate would earn on a first place [decisions, candidates] float32, and the unit rating of each
    target [decisions] float32, its item's mean where it has none.
    """
    tables, ratings = fit_reward_tables(data), data.unit_ratings()
    means = running_user_means(data.histories.offsets, ratings, float(tables.item_ratings[0]))[decisions.row]
    items, target, rating = decisions.items, decisions.target, ratings[decisions.row]
    rating = rating_or_mean(rating, target, np.asarray(tables.item_ratings))
    columns = items, target, rating, means.astype(np.float32)

    @jax.jit
    def of_rows(
        items: jax.Array, target: jax.Array, rating: jax.Array, means: jax.Array, tables: RewardTables
    ) -> jax.Array:
        return total_reward(slate_reward_terms(items, target, rating, means, tables), config.rewards)

    found = by_batches(lambda rows: of_rows(*(column[rows] for column in columns), tables), decisions.size, ROWS)
    return found, rating


def results(
    decisions: Decisions, scores: np.ndarray, rewards: np.ndarray, rating: np.ndarray, config: LoggedConfig
) -> Results:
    """Results of ranking the candidates by `scores` [decisions, candidates]; ties count against the target.

    Candidates count as ranked above all other items. A server may rank one below its hundred-and-first item, which
    matters for deep ranks only.
    """
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
    found: dict[str, Results],
    users: np.ndarray,
    validation: Results,
    before: Results,
    validation_users: np.ndarray,
    config: LoggedConfig,
) -> PolicyOutcome:
    """Whether a reranker is used.

    It is used if, out of fold, the 95 % intervals (by user) of its gains over the mix in NDCG@10 and in slate reward
    lie above 0, and its validation NDCG@10 is not significantly lower than that of what the run uses now.

    Args:
        found: Results out of fold by name.
        users: [decisions], whose they are.
        validation: Results of the reranker on validation.
        before: Results of what the run uses now on validation: the mix, or an earlier reranker.
        validation_users: [cases], whose these are.
        config: Of the fit, with the weight of the rewards that was chosen.
    """
    over_mix = gains(found[RERANKED], found[MIX], users)
    stacking = gains(found[IMITATION], found[MIX], users)
    by_reward = gains(found[RERANKED], found[IMITATION], users)
    by_permuted = gains(found[PERMUTED], found[IMITATION], users)
    on_validation = gains(validation, before, validation_users)
    failed = [
        label
        for label, holds in {
            "NDCG@10 did not improve significantly for held-out users": over_mix["ndcg"].low > 0,
            "the slate reward did not improve significantly for held-out users": over_mix["reward"].low > 0,
            "NDCG@10 fell significantly on validation": on_validation["ndcg"].high >= 0,
        }.items()
        if not holds
    ]
    verdict = f"what ranks now stays: {', and '.join(failed)}" if failed else "the new policy is used"
    of_mix = {name: getattr(found[MIX], name).mean() for name in Results._fields}
    budget = ""
    if config.ndcg_budget is not None:
        budget = f" (weight {config.reward_weight:g}, chosen for a budget of {config.ndcg_budget:.2%} of NDCG@10)"
    reason = (
        f"{verdict}: for users that neither the models nor the policy know, NDCG@10 is "
        f"{_relative(over_mix['ndcg'], of_mix['ndcg'])} and the slate reward "
        f"{_relative(over_mix['reward'], of_mix['reward'])}. Stacking, which imitates what users chose next, gives "
        f"{_relative(stacking['ndcg'], of_mix['ndcg'])} NDCG@10 and {_relative(stacking['reward'], of_mix['reward'])} "
        f"reward of that; the rewards{budget} give {_relative(by_reward['ndcg'], of_mix['ndcg'])} and "
        f"{_relative(by_reward['reward'], of_mix['reward'])}; permuted rewards, a control, "
        f"{_relative(by_permuted['reward'], of_mix['reward'])} reward. On validation NDCG@10 changes by "
        f"{signed(on_validation['ndcg'])}."
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


def _relative(gain: Estimate, base: float) -> str:
    """A gain with its interval, in percent of `base`."""
    mean, low, high = (100 * value / max(base, 1e-12) for value in (gain.mean, gain.low, gain.high))
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"
