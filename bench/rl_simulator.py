"""Trains a run's policy with simulated users, and evaluates it by others, for bench/rl_simulator.md.

    python -m bench.rl_simulator --work FOLDER ml-100k=PATH/ratings.csv ml-latest-small=PATH/ratings.csv

A movies.csv lies beside each ratings.csv. Half of a log's users train a run (`jaxrec train`, defaults). The others,
whom it never sees, make two simulators (`jaxrec.rl.simulated.split_people`): half of them train the policy (taste by
nearest neighbours), the other half evaluate it (taste by EASE). The training is that of `jaxrec rl simulated`, from the
supervised policy on.

Evaluated are slates of the best items, as a server shows them, and slates drawn at the temperature of the training.
Every user has 5 episodes of 10 requests, with the same random numbers for all policies. The reward is half for taking
and half for the rating (0..1) of what was taken. The control is trained with rewards that are permuted among the users
of each step, and has nothing to learn. The learning rate and the discount were chosen by trials on the training half of
ML-100K's people. That the weight of the KL penalty follows what real events lose was chosen by some trainings of one
seed, looked at with the evaluation halves of both logs.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from bench.logs import logs_argument
from bench.publish import Page, less, publish_option, read_figures, spread, write_figures
from bench.rl_loop import interval, trained_half
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import TOP
from jaxrec.rl.cases import CaseResults
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.scoring import PolicyParams
from jaxrec.rl.simulated.evaluate import SimulatedResults, simulated_outcome
from jaxrec.rl.simulated.fit import SimulatorFit
from jaxrec.rl.simulated.split_people import TwoSimulators, two_simulators
from jaxrec.rl.simulated.train import first_learner, roll_out, simulated_updates, train_simulated
from jaxrec.runs.policy import load_run, policy_in_use
from jaxrec.runs.rl_simulated import SimulatedTraining, simulated_training

LOGS, SEEDS = ("ml-100k", "ml-latest-small"), 3  # of the page
SUPERVISED, TRAINED, PERMUTED = "supervised", "on-policy", "permuted rewards"
REPEATS, COUNT = 3, 10  # of the measurement of speed


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Data, run and figures stay here.")
@click.option("--seeds", default=SEEDS, show_default=True, help="Of the training; the simulators are the same for all.")
@click.option("--updates", default=SimulatedConfig.updates, show_default=True)
@publish_option
@logs_argument
def main(work: Path, seeds: int, updates: int, publish: bool, logs: dict[str, Path]) -> None:
    """Plays what is not there yet, then writes the tables."""
    asked = less(logs=(logs, LOGS), seeds=(seeds, SEEDS), updates=(updates, SimulatedConfig.updates))
    page = Page("rl_simulator", "The policy in a simulator", publish, work, asked)
    body = [" ".join(paragraph.split()) + "\n" for paragraph in (__doc__ or "").split("\n\n")[2:]]
    files = []
    for name, path in logs.items():
        of_log, measured = measure(work / name, path, seeds, updates)
        body += [f"\n## {name}\n", *of_log]
        files += measured
    page.write(body, files)


def measure(work: Path, ratings: Path, seeds: int, updates: int) -> tuple[list[str], list[Path]]:
    """The tables of one log, and the files that they are made of."""
    folder, data, others = trained_half(work, ratings)
    config = SimulatedConfig(updates=updates)
    run, data, supervised = load_run(folder)
    simulators = two_simulators(others, data, config.seed)
    training = simulated_training(supervised, data, policy_in_use(run, supervised), simulators, config)
    before = training.evaluate(training.policy.start)
    played = {SUPERVISED: [work / f"{SUPERVISED}.json"], TRAINED: [], PERMUTED: []}
    write_figures(played[SUPERVISED][0], figures(training, training.policy.start, before))
    rates = work / "speed.json"
    if not rates.is_file():
        write_figures(rates, speed(training, config))
    for seed in range(seeds):
        for arm in (TRAINED, PERMUTED):
            path = work / f"{arm}-{updates}-{seed}.json"
            played[arm].append(path)
            if path.is_file():
                continue
            started = time.perf_counter()
            params, records = train_simulated(
                training.environment,
                training.policy,
                dataclasses.replace(config, seed=seed),
                permuted=arm == PERMUTED,
                anchor=training.real_events.anchor,
            )
            seconds = time.perf_counter() - started
            after = training.evaluate(params)
            reason = simulated_outcome(after, before, before.logged).reason
            print(f"{work.name}, seed {seed}, {arm}, {seconds:.0f} s: {reason}", flush=True)
            found = {**figures(training, params, after), "reason": reason, "seconds": seconds}
            last = {name: records[-1][name] for name in ("kl", "kl_coefficient")}
            write_figures(path, {**found, **last, "lost": training.real_events.lost(params)})
    found = {arm: [read_figures(path) for path in paths] for arm, paths in played.items()}
    body = table(found, read_figures(rates), config, simulators, len(data.users))
    return body, [work / "begun.json", rates, *itertools.chain.from_iterable(played.values())]


def figures(training: SimulatedTraining, params: PolicyParams, of_policy: SimulatedResults) -> dict[str, Any]:
    """As JSON values: rewards by user of the best and of drawn slates, and NDCG@10 by validation case."""
    ways = {"best": of_policy.rollouts, "drawn": training.drawn_rollouts(params)}
    by_way = {
        name: {term: np.asarray(column).tolist() for term, column in rollouts._asdict().items()}
        for name, rollouts in ways.items()
    }
    return {**by_way, "ndcg_10": by_case(of_policy.logged).tolist()}


def by_case(results: CaseResults) -> np.ndarray:
    """[cases]: NDCG@10, the mean over with and without the request time."""
    return ndcg(results.rank, TOP).mean(axis=0)


def speed(training: SimulatedTraining, config: SimulatedConfig) -> dict[str, list[float]]:
    """Requests (environment steps) per second, in each repeat: rollout and update, and the rollout alone."""
    environment, policy, key = training.environment, training.policy, jax.random.key(0)
    updates = simulated_updates(environment, policy, config, anchor=training.real_events.anchor)
    learner = first_learner(environment, policy, config)

    @jax.jit
    def rollouts(state: Any, observation: Any, key: jax.Array) -> Any:
        at, rollout = roll_out(environment, policy, policy.start, state, observation, key, COUNT * config.steps)
        return *at, rollout.reward.mean()

    steps = COUNT * config.steps * config.users
    state, observation = learner.users
    seconds: dict[str, list[float]] = {"rollout and update": [], "rollout alone": []}
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        state, observation, reward = rollouts(state, observation, key)
        reward.block_until_ready()
        seconds["rollout alone"].append(time.perf_counter() - started)
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        learner, metrics = updates(learner, policy.start, key, COUNT)
        jax.block_until_ready(metrics)
        seconds["rollout and update"].append(time.perf_counter() - started)
    return {name: [steps / one for one in of_one[1:]] for name, of_one in seconds.items()}  # the first one compiles


def table(
    found: dict[str, list[dict[str, Any]]],
    rates: dict[str, list[float]],
    config: SimulatedConfig,
    simulators: TwoSimulators,
    trained_on: int,
) -> list[str]:
    """All that was played; intervals are over users (or cases), whose seeds are averaged."""
    seeds = len(found[TRAINED])
    lines = [
        f"{trained_on} users trained the run. The others: {simulators.summary}. NDCG@10 of these, training: "
        f"{fitted(simulators.training)}; evaluation: {fitted(simulators.evaluation)}.\n",
        f"{config.users} users at once, {config.steps} requests each per update, slates of "
        f"{config.slate_size}, discount {config.discount:g}, learning rate {config.learning_rate:g}, likelihood budget "
        f"{config.likelihood_budget:g}, temperature {config.temperature:g}. {seeds} seeds; 95 % intervals over users "
        "(Student), each the mean of its seeds; differences from the supervised policy are paired.\n",
        "| policy | reward, best items | difference | reward, drawn | difference | taken | rating of the taken | "
        "coverage | NDCG@10 on validation | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, of_seeds in found.items():
        cells = []
        for way in ("best", "drawn"):
            reward, start = (mean_by_user(of_arm, way, "reward") for of_arm in (of_seeds, found[SUPERVISED]))
            cells += [interval(reward), "" if arm == SUPERVISED else interval(reward - start)]
        taken, rating = (mean_by_user(of_seeds, "best", term).mean() for term in ("taken", "rating"))
        covered = np.mean([one["best"]["coverage"] for one in of_seeds])
        cases, at_start = (np.mean([one["ndcg_10"] for one in of], axis=0) for of in (of_seeds, found[SUPERVISED]))
        cells += [f"{taken:.3f}", f"{rating / taken:.3f}", f"{covered:.3f}", f"{cases.mean():.4f}"]
        cells.append("" if arm == SUPERVISED else interval(cases - at_start))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        f"\nRequests per second: median of {REPEATS} repeats (lowest to highest): "
        f"{spread(rates['rollout and update'], 0)} with the update, "
        f"{spread(rates['rollout alone'], 0)} in the rollout alone. A training took "
        f"{spread([one['seconds'] for one in found[TRAINED]], 0)} s with compilation.\n",
        "The gate, by seed:\n",
        *(
            f"- {arm}, seed {seed} (real events: {one['lost']:+.4f} nats lost, KL {one['kl']:.4f}, its weight "
            f"{one['kl_coefficient']:.1f} at the end): {one['reason']}"
            for arm in (TRAINED, PERMUTED)
            for seed, one in enumerate(found[arm])
        ),
    ]
    return lines


def mean_by_user(of_seeds: list[dict[str, Any]], way: str, term: str) -> np.ndarray:
    """[users]: the mean over the seeds."""
    return np.mean([one[way][term] for one in of_seeds], axis=0)


def fitted(fit: SimulatorFit) -> str:
    return f"{fit.ndcg_10:.3f} (popularity alone {fit.popularity_ndcg_10:.3f})"


if __name__ == "__main__":
    main()
