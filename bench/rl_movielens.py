"""Policies beside the supervised hybrid on MovieLens, for bench/rl_movielens.md.

    python -m bench.rl_movielens --runs FOLDER --work FOLDER ml-100k ml-latest-small

FOLDER/NAME-leave-one-out-file/run-SEED are runs of `bench.quality`, which are read only. Of each the test cases are
ranked, with and without the request time, by the supervised hybrid and by policies on top of it:

- the policy: the defaults of `jaxrec rl`, as it is after its last update; nothing is chosen on test, and one table says
  what validation decided;
- greedy one-step reward: each item's expected reward under the supervised model's next-item distribution;
- reward-weighted cross-entropy: the imitation loss alone, without a KL penalty;
- imitation only and permuted rewards: the controls of `jaxrec rl` (the second is the shuffled-reward control);
- recent popularity, with the windows that are best on validation, with and without the request time.

Before that, on validation and without any training: what knowing ratings could add at most. The supervised scores are
shifted by the logarithm of a predicted rating, or of the target's true one, which nobody knows.

Figures are means over the seeds; gains over the supervised hybrid of the same seed are averaged over seeds for each
case, and intervals are 95 % bootstrap intervals over the cases. What is finished stays in the work folder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from jaxrec.rl.logged.evaluate import (
    TOP,
    CaseResults,
    CaseStates,
    case_evaluator,
    case_states,
    logged_outcome,
    over_cases,
)
from jaxrec.rl.logged.methods import METHODS
from jaxrec.rl.logged.train import PHASES, LoggedTraining, logged_training

from bench.publish import Page, less, origin, publish_option, read_figures, write_arrays, write_figures
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.baselines import best_half_life, recent_popularity_scorer
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, ndcg, rank_of_target
from jaxrec.evaluation.ranking import Ranked, rank_cases
from jaxrec.models.masks import exclude_items
from jaxrec.rl.config import LoggedConfig, RewardWeights
from jaxrec.rl.policy import greedy_slates
from jaxrec.rl.rewards import slate_reward_terms, total_reward
from jaxrec.rl.scoring import Scoring, returns, supervised_logits
from jaxrec.runs.policy import load_run

LOGS, SEEDS = ("ml-100k", "ml-latest-small"), 5  # of the page
SUPERVISED, POLICY, GREEDY, CROSS_ENTROPY = (
    "supervised hybrid",
    "policy",
    "greedy one-step reward",
    "reward-weighted CE",
)
IMITATION_ONLY, PERMUTED, RECENT = "imitation only", "permuted rewards", "recent popularity"
HITS = RewardWeights(hit=1.0, genre=0.0, rating=0.0)
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "plackett-luce": ("plackett-luce", {}),
    "top-k": ("top-k", {}),
    "actor-critic": ("actor-critic", {}),
    "reinforce, KL target of 0.05 nats": ("reinforce", {"kl_target": 0.05}),
    "reinforce, KL target of 0.5 nats": ("reinforce", {"kl_target": 0.5, "learning_rate": 1e-3}),
    "reinforce, hits alone": ("reinforce", {"kl_target": 0.05, "rewards": HITS}),
    "reinforce, hits alone, no imitation": ("reinforce", {"kl_target": 0.05, "rewards": HITS, "imitation_weight": 0.0}),
    "plackett-luce, hits alone, 16 samples": ("plackett-luce", {"kl_target": 0.05, "rewards": HITS, "samples": 16}),
}
SHIFTS = (0.5, 1.0, 2.0)


@click.command()
@click.option("--runs", type=click.Path(path_type=Path), required=True, help="The work folder of bench.quality.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Results stay here.")
@click.option("--seeds", default=SEEDS, show_default=True)
@click.option("--steps", default=LoggedConfig.updates, show_default=True)
@publish_option
@click.argument("names", nargs=-1, required=True)
def main(runs: Path, work: Path, seeds: int, steps: int, publish: bool, names: tuple[str, ...]) -> None:
    """Measures what is not there yet, then writes the tables of all that was asked for."""
    asked = less(logs=(names, LOGS), seeds=(seeds, SEEDS), steps=(steps, LoggedConfig.updates))
    page = Page("rl_movielens", "Policies on MovieLens", publish, work, asked)
    body = [
        f"{steps} updates for each policy, seeds 0 to {seeds - 1}.\n",
        (__doc__ or "").split("\n\n", 2)[2].strip() + "\n",
    ]
    results = []
    for name in names:
        folders = [runs / f"{name}-leave-one-out-file" / f"run-{seed}" for seed in range(seeds)]
        files = [work / name / f"{seed}.npz" for seed in range(seeds)]
        for seed, (folder, file) in enumerate(zip(folders, files, strict=True)):
            measure(folder, file, dataclasses.replace(LoggedConfig(), seed=seed, updates=steps))
        methods = work / name / "methods.json"
        measure_methods(folders[0], methods, dataclasses.replace(LoggedConfig(), updates=steps))
        trained_at = {origin(folder.with_name(f"ranks-{seed}.json")).commit for seed, folder in enumerate(folders)}
        body += table(name, sorted(trained_at), [dict(np.load(file)) for file in files], read_figures(methods))
        results += [*files, methods]
    page.write(body, results)


def measure(folder: Path, out: Path, config: LoggedConfig) -> None:
    """Leaves what every policy of one run does on the test cases, and what validation said of it."""
    if out.is_file():
        return
    run, data, supervised = load_run(folder)
    training = logged_training(supervised, data, config)
    scoring = training.scoring
    tested = case_states(supervised, data, data.split.test, np.asarray(scoring.tables.item_ratings))
    max_length = run.model_config.max_length
    evaluate = case_evaluator(training.graphdef, scoring, tested, data, max_length, config.rewards)
    free = dataclasses.replace(config, imitation_weight=1.0, kl_target=1e3)
    heads = {SUPERVISED: training.start.head}
    for name in PHASES:
        heads[name] = trained(training, name)
    heads[CROSS_ENTROPY] = trained(logged_training(supervised, data, free), IMITATION_ONLY)
    found = {name: evaluate(head) for name, head in heads.items()}
    found[GREEDY] = evaluate_scores(greedy_scores(scoring, config), scoring, tested, data, max_length, config)
    zeros = np.zeros((2, len(data.split.test)))
    recent = [ranked_by_recent_popularity(data, max_length, request_time) for request_time in (False, True)]
    ranks, tops = (np.stack(columns) for columns in zip(*recent, strict=True))
    found[RECENT] = CaseResults(
        ranks, zeros, {}, zeros, tested.target_rating, tops, len(data.catalog), data.split.test.users
    )
    validated = {name: training.evaluate(heads[name]) for name in (POLICY, SUPERVISED, IMITATION_ONLY, PERMUTED)}
    decision = logged_outcome(*validated.values())
    arrays: dict[str, Any] = {"decision": decision.reason, "used": decision.used}
    for name, results in found.items():
        arrays |= {f"{name}|rank": results.rank, f"{name}|reward": results.reward, f"{name}|kl": results.kl}
        arrays |= {f"{name}|coverage": [coverage(top, results.item_count) for top in results.top]}
    arrays |= {f"validation|{name}|rank": results.rank for name, results in validated.items()}
    if config.seed == 0:
        arrays["bound"] = json.dumps(rating_bound(training, supervised, data, max_length))
    write_arrays(out, {"weight": tested.target_rating, **arrays})


def ranked_by_recent_popularity(data: PreparedData, max_length: int, request_time: bool) -> Ranked:
    """The test cases, with the half-life that is best on validation."""
    counts = DecayedCounts.of(data)
    scorer = recent_popularity_scorer(data, counts, best_half_life(data, counts, max_length))
    return rank_cases(scorer, data, data.split.test, max_length, request_time)


def trained(training: LoggedTraining, phase: str) -> Any:
    """The head after the last update."""
    config, data = training.config, (training.scoring, training.states, *PHASES[phase])
    learner, _ = training.updates(training.new_learner(), data, jax.random.key(config.seed), config.updates)
    return jax.tree.map(np.array, learner.params.head)


def measure_methods(folder: Path, out: Path, config: LoggedConfig) -> None:
    """Other objectives and settings on validation, as gains over the supervised hybrid."""
    if out.is_file():
        return
    _, data, supervised = load_run(folder)
    lines = {}
    for name, (objective, changes) in TRIED.items():
        training = logged_training(supervised, data, dataclasses.replace(config, **changes), METHODS[objective])
        before = training.evaluate(training.start.head)
        after = training.evaluate(trained(training, POLICY))
        gain = after.reward_weighted_ndcg() - before.reward_weighted_ndcg()
        plain = (ndcg(after.rank, TOP) - ndcg(before.rank, TOP)).mean(axis=0)
        lines[name] = [
            shown(over_users(gain)),
            shown(over_users(plain)),
            shown(over_users((after.reward - before.reward).mean(axis=0))),
            f"{after.figures()['kl']:.3f}",
        ]
    write_figures(out, lines)


def greedy_scores(scoring: Scoring, config: LoggedConfig) -> Any:
    """(logits [batch, items + 1]) -> each item's expected reward, the next item being drawn from softmax(logits).

    In closed form: an item hits with its own probability, and its genre cosine is with the expected genre vector.
    """
    tables, weights = scoring.tables, config.rewards

    def scores(logits: jax.Array) -> jax.Array:
        probability = jax.nn.softmax(logits)
        genre = (probability @ tables.genre_directions) @ tables.genre_directions.T
        return weights.hit * probability + weights.genre * genre + weights.rating * tables.item_ratings

    return scores


def evaluate_scores(
    scores: Any, scoring: Scoring, states: CaseStates, data: PreparedData, max_length: int, config: LoggedConfig
) -> CaseResults:
    """What recommending by scores(supervised logits) does on the cases."""

    @jax.jit
    def evaluate(
        query: jax.Array, recent: jax.Array, logged: tuple[jax.Array, ...], exclude: jax.Array, scoring: Scoring
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        ranked = scores(exclude_items(supervised_logits(query, recent, scoring), exclude))
        slates = greedy_slates(exclude_items(ranked, exclude), TOP)
        terms = slate_reward_terms(slates, *logged, scoring.tables)
        reward = returns(total_reward(terms, config.rewards))[:, 0]
        return rank_of_target(ranked, logged[0], exclude), reward, slates

    rank, reward, top = over_cases(lambda *inputs: evaluate(*inputs[:-1], scoring), states, data, max_length)
    nothing = np.full(rank.shape, np.nan)
    return CaseResults(rank, reward, {}, nothing, states.target_rating, top, len(data.catalog), states.cases.users)


def rating_bound(
    training: LoggedTraining, supervised: Any, data: PreparedData, max_length: int
) -> dict[str, list[str]]:
    """On validation: reward-weighted and plain NDCG@10 gained by scores + a * log(rating), for each rating and a."""
    cases, tables = data.split.validation, training.scoring.tables
    states = case_states(supervised, data, cases, np.asarray(tables.item_ratings))
    target = data.histories.items[cases.rows]
    known = np.broadcast_to(np.asarray(tables.item_ratings), (len(cases), len(data.catalog) + 1))
    true = known.copy()
    true[np.arange(len(cases)), target] = states.target_rating
    ratings = {
        "mean rating of the item": known,
        "factorization of training ratings": predicted_ratings(data)[cases.users],
        "mean, and the target's true rating": true,
    }
    before = training.evaluate(training.start.head)
    lines = {}
    for name, rating in ratings.items():
        for share in SHIFTS:
            shift = share * np.log(np.clip(rating, 0.02, 1.0)).astype(np.float32)
            ranks = shifted_ranks(training, states, data, max_length, shift)
            gain = (ndcg(ranks, TOP) - ndcg(before.rank, TOP)).mean(axis=0)
            weighted = gain * states.target_rating / states.target_rating.mean()
            base = before.figures()
            lines[f"{name}, a = {share:g}"] = [
                percent(weighted, base["reward_weighted_ndcg_10"]),
                percent(gain, base["ndcg_10"]),
            ]
    return lines


def shifted_ranks(
    training: LoggedTraining, states: CaseStates, data: PreparedData, max_length: int, shift: np.ndarray
) -> np.ndarray:
    """[2, cases]: ranks of the targets by supervised logits + shift [cases, items + 1]."""

    @jax.jit
    def rank(
        query: jax.Array, recent: jax.Array, logged: tuple[jax.Array, ...], exclude: jax.Array, of_case: jax.Array
    ) -> jax.Array:
        return rank_of_target(supervised_logits(query, recent, training.scoring) + of_case, logged[0], exclude)

    return over_cases(lambda *inputs: rank(*inputs[:-1], shift[inputs[-1]]), states, data, max_length)


def predicted_ratings(data: PreparedData, width: int = 20, penalty: float = 1.6, rounds: int = 12) -> np.ndarray:
    """[users, items + 1]: unit ratings by biases and a factorization of what they leave, by alternating least squares
    on training ratings (Koren et al. 2009, "Matrix Factorization Techniques", equations 4 and 5)."""
    rows = data.split.train_rows(data.histories)
    ratings = data.unit_ratings()[rows].astype(np.float64)
    items, users = data.histories.items[rows], data.histories.users()[rows]
    items, users, ratings = items[ratings >= 0], users[ratings >= 0], ratings[ratings >= 0]
    shape = data.histories.user_count, len(data.catalog) + 1
    mean, of_user, of_item = ratings.mean(), np.zeros(shape[0]), np.zeros(shape[1])
    for _ in range(10):
        of_item = np.bincount(items, ratings - mean - of_user[users], shape[1]) / (
            np.bincount(items, minlength=shape[1]) + 10
        )
        of_user = np.bincount(users, ratings - mean - of_item[items], shape[0]) / (
            np.bincount(users, minlength=shape[0]) + 10
        )
    left = ratings - mean - of_user[users] - of_item[items]
    rng = np.random.default_rng(0)
    user_vectors, item_vectors = (rng.normal(0, 0.05, (size, width)) for size in shape)
    for _ in range(rounds):
        solve(user_vectors, item_vectors, users, items, left, penalty)
        solve(item_vectors, user_vectors, items, users, left, penalty)
    return mean + of_user[:, None] + of_item + user_vectors @ item_vectors.T


def solve(
    vectors: np.ndarray, others: np.ndarray, index: np.ndarray, other: np.ndarray, left: np.ndarray, penalty: float
) -> None:
    """Least squares of each row of `vectors`, in place."""
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(len(vectors) + 1))
    for row in range(len(vectors)):
        chosen = order[bounds[row] : bounds[row + 1]]
        features = others[other[chosen]]
        vectors[row] = np.linalg.solve(
            features.T @ features + penalty * np.eye(features.shape[1]), features.T @ left[chosen]
        )


def table(
    name: str, trained_at: list[str], seeds: list[dict[str, np.ndarray]], methods: dict[str, list[str]]
) -> list[str]:
    """The tables of one data set."""
    weight = seeds[0]["weight"]
    own = {
        policy: np.stack([ndcg(seed[f"{policy}|rank"], TOP).mean(axis=0) for seed in seeds]).mean(axis=0)
        for policy in (SUPERVISED, POLICY, GREEDY, CROSS_ENTROPY, IMITATION_ONLY, PERMUTED, RECENT)
    }
    base, imitated = own[SUPERVISED], own[IMITATION_ONLY]
    weighted_base = float((weight * base).mean() / weight.mean())
    lines = [
        f"\n## {name}, leave-one-out: {len(weight)} test cases, {len(seeds)} seed(s)\n",
        f"The runs were trained at {', '.join(trained_at)}.\n",
        "| | reward-weighted NDCG@10 | gain | NDCG@10 | gain | coverage@10 | KL (nats) | reward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for policy, values in own.items():
        cells = [
            policy,
            f"{float((weight * values).mean() / weight.mean()):.4f}",
            percent(weight * (values - base) / weight.mean(), weighted_base),
            f"{values.mean():.4f}",
            percent(values - base, float(base.mean())),
            f"{np.mean([seed[f'{policy}|coverage'] for seed in seeds]):.3f}",
            f"{np.mean([seed[f'{policy}|kl'] for seed in seeds]):.3f}" if policy not in (GREEDY, RECENT) else "",
            f"{np.mean([seed[f'{policy}|reward'] for seed in seeds]):.4f}" if policy != RECENT else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    of_imitation = float((weight * imitated).mean() / weight.mean())
    control, beyond = (
        percent(weight * (own[policy] - imitated) / weight.mean(), of_imitation) for policy in (PERMUTED, POLICY)
    )
    used = sum(bool(seed["used"]) for seed in seeds)
    lines += [
        f"\nIn reward-weighted NDCG@10 beyond imitation alone: the policy {beyond}, permuted rewards {control}. "
        f"Validation let {used} of {len(seeds)} policies be used. The first seed's decision: "
        f"{seeds[0]['decision']}",
    ]
    if "bound" in seeds[0]:
        lines += [
            "\nWhat ratings could add, on validation (first seed, no training):\n",
            "| scores + a log(rating) | reward-weighted NDCG@10 | NDCG@10 |",
            "|---|---|---|",
        ]
        bound = json.loads(str(seeds[0]["bound"]))
        lines += [f"| {label} | {weighted} | {plain} |" for label, (weighted, plain) in bound.items()]
    return [
        *lines,
        "\nWhat else was tried, on validation (first seed), as differences from the supervised hybrid; the reward "
        "is that of the default weights unless hits alone count:\n",
        "| | reward-weighted NDCG@10 | NDCG@10 | reward | KL (nats) |",
        "|---|---|---|---|---|",
        *(f"| {label} | {' | '.join(cells)} |" for label, cells in methods.items()),
    ]


def over_users(values: np.ndarray) -> Estimate:
    """The mean of values [cases] with its interval. Each user has one case (leave-one-out)."""
    return bootstrap(values, resample(np.arange(len(values))))


def percent(values: np.ndarray, base: float) -> str:
    """The mean of values [cases] with its interval, as shares of `base`."""
    estimate = over_users(values)
    mean, low, high = (100 * bound / base for bound in (estimate.mean, estimate.low, estimate.high))
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"


def shown(estimate: Estimate) -> str:
    return f"{estimate.mean:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


if __name__ == "__main__":
    main()
