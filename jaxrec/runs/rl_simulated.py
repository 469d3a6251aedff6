"""`jaxrec rl RUN --simulator RATINGS`: improves the policy in use by playing simulated users, or says why not."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxrec.config import SIMULATOR_RL, RewardWeights, RLConfig, from_json, to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.rules import IdKind
from jaxrec.errors import DataError
from jaxrec.files import read_json, write_text
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.checkpoint import models_digest
from jaxrec.rl.logged.evaluate import case_states, make_judge
from jaxrec.rl.logged.states import training_states
from jaxrec.rl.logged.train import Judge, PolicyOutcome
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.evaluate import Measured, Play, decide, make_play
from jaxrec.rl.simulated.policy import TEMPERATURE, RecommenderPolicy, logged_leash, recommender_policy
from jaxrec.rl.simulated.recommender import every_user, recommender_environment, recommender_of, start_states
from jaxrec.rl.simulated.split_people import TwoSimulators, two_simulators
from jaxrec.rl.simulated.train import Anchor, OnPolicyConfig, Trained, train_on_policy
from jaxrec.runs.directory import SIMULATED_OUTCOME_FILE, SIMULATOR_PARTIAL_FOLDER, load_supervised, open_run
from jaxrec.runs.policy import GateOutcome, PolicyInUse, policy_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never

STARTED_FILE = "started.json"
METHOD = "simulator"


class Problem(NamedTuple):
    """The users that train, the policy as it starts, and its leash in the run's own log; `play` by the users that
    judge, `play_drawn` the same with slates that are drawn; `judge` (variables of PolicyHead) on validation."""

    environment: Environment
    policy: RecommenderPolicy
    leash: Anchor
    play: Play
    play_drawn: Play
    judge: Judge


def rl_simulator_run(
    folder: Path,
    ratings: Path,
    config: RLConfig = SIMULATOR_RL,
    temperature: float = TEMPERATURE,
    resume: bool = False,
    stop: StopRequested = never,
) -> GateOutcome:
    """Trains from the policy that is in use, with simulated users of the log `ratings`, and replaces it only if
    `jaxrec.rl.simulated.evaluate.decide` says so. What it said is also left in RUN/policy_from_simulator.json.

    With `resume` an interrupted training goes on, with the configuration and the temperature that it started with.
    Raises DataError where the run or the log cannot be read, the log has too few other users, or there is nothing to go
    on with; TrainingError where a figure is not finite; TrainingStopped where `stop()` became true: it is saved then.
    The policy in use stays in all of these.
    """
    run = open_run(folder)
    partial = folder / SIMULATOR_PARTIAL_FOLDER
    if resume:
        config, temperature = _started_with(partial)
    data = run.read_data()
    refuse_unplayable(data, config.slate_size)
    supervised = load_supervised(run, data)
    base = policy_in_use(run, supervised, config)
    config = dataclasses.replace(config, policy_width=base.config.policy_width)
    simulators = two_simulators(read_like(ratings, data), data, config.seed)
    problem = new_problem(supervised, data, base, simulators, config, temperature)
    _start(partial, config, temperature, _digest(supervised, base, simulators), resume)
    trained = train(problem, config, partial, stop=stop)
    new, before = (Measured(problem.play(p), problem.judge(p.head)) for p in (trained.params, problem.policy.start))
    supervised_logged = problem.judge(supervised_head(problem.policy))
    decision = decide(new, before, supervised_logged)
    if decision.used:
        of_supervised = {"ndcg_10": supervised_logged.figures()["ndcg_10"]}
        figures = {"policy": new.figures(), "before": before.figures(), "supervised": of_supervised}
        differences = {name: dataclasses.asdict(estimate) for name, estimate in decision.differences.items()}
        outcome = PolicyOutcome(True, decision.reason, config.steps, figures, differences)
        variables = jax.tree.map(np.array, trained.params.head)
        write_policy(run, supervised, outcome, config, METHOD, variables, trained.log, [])
    told = f"{ratings}: {simulators.told}."
    record = {"used": decision.used, "simulator": str(ratings), "told": told, "reason": decision.reason}
    write_text(folder / SIMULATED_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(partial)
    return GateOutcome(decision.used, decision.reason, told)


def refuse_unplayable(data: PreparedData, slate_size: int) -> None:
    """Raises DataError where slates of the size cannot be shown, or no validation case is there."""
    items = len(data.catalog)
    if not 2 <= slate_size <= items:
        raise DataError(f"slates of {slate_size}, expected 2 to {items} (the items of the run)")
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to judge a policy")


def read_like(ratings: Path, data: PreparedData) -> pd.DataFrame:
    """A log in any known format, on the rating scale of `data` and with item ids of its kind."""
    kind = IdKind.INTEGER if data.catalog.ids.raw_ids.dtype == np.int64 else IdKind.TEXT
    return read_ratings(ratings, data.config.rating_scale, ReadOptions(items=kind))[0]


def new_problem(
    supervised: Hybrid,
    data: PreparedData,
    base: PolicyInUse,
    simulators: TwoSimulators,
    config: RLConfig,
    temperature: float,
) -> Problem:
    """Of data that `refuse_unplayable` lets pass."""
    recommender = recommender_of(supervised, data)
    scoring = jax.device_put(frozen_scoring(supervised, fit_reward_tables(data)), jax.devices()[0])
    policy = recommender_policy(base.graphdef, base.variables, scoring, temperature)
    training, judging = simulators.training.params, simulators.judging.params
    environment = recommender_environment(recommender, training, start_states(recommender, training), config.slate_size)
    starts = start_states(recommender, judging)
    others = recommender_environment(recommender, judging, starts, config.slate_size)
    first = every_user(judging, starts)
    item_ratings = np.asarray(scoring.tables.item_ratings)
    states = training_states(supervised, data, item_ratings, config.seed)
    cases = case_states(supervised, data, data.split.validation, item_ratings)
    return Problem(
        environment,
        policy,
        logged_leash(policy, states, config.anchor, config.batch_size),
        make_play(others, first, policy, config.seed),
        make_play(others, first, policy, config.seed, drawn=True),
        make_judge(base.graphdef, scoring, cases, data, supervised.lstm.config.max_length, RewardWeights()),
    )


def supervised_head(policy: RecommenderPolicy) -> Any:
    """Variables of PolicyHead that change nothing."""
    return jax.tree.map(jnp.zeros_like, policy.start.head)


def train(
    problem: Problem,
    config: RLConfig,
    partial: Path | None = None,
    permuted: bool = False,
    stop: StopRequested = never,
) -> Trained:
    """`jaxrec.rl.simulated.train.train_on_policy` from the policy as it starts."""
    learning, policy, leash = on_policy_config(config), problem.policy, problem.leash
    return train_on_policy(problem.environment, learning, partial, None, policy, permuted, leash, stop)


def on_policy_config(config: RLConfig) -> OnPolicyConfig:
    """Short rollouts of many users; the leash keeps the spread of the policy, so that entropy needs no bonus."""
    return OnPolicyConfig(
        seed=config.seed,
        users=config.batch_size,
        steps=8,
        updates=config.steps,
        discount=config.discount,
        learning_rate=config.learning_rate,
        entropy_weight=0.0,
        kl_target=config.kl_target,
        updates_per_record=10,
    )


def _digest(supervised: Hybrid, base: PolicyInUse, simulators: TwoSimulators) -> str:
    """Of all that a training hangs on beside its configuration."""
    digest = hashlib.sha256(f"{models_digest(supervised)} {simulators.digest}".encode())
    for leaf in jax.tree.leaves(base.variables):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _started_with(partial: Path) -> tuple[RLConfig, float]:
    """Configuration and temperature of the training that is to go on."""
    path = partial / STARTED_FILE
    if not path.is_file():
        raise DataError(f"{partial.parent}: no interrupted training with simulated users to go on with")
    content = read_json(path, "start anew without --resume")
    try:
        return from_json(RLConfig, content["config"]), float(content["temperature"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be gone on with ({error}); start anew without --resume") from error


def _start(partial: Path, config: RLConfig, temperature: float, digest: str, resume: bool) -> None:
    """Notes what a new training starts from, in place of what an earlier one left; one that is to go on must have
    started from the same. Raises DataError where it has not."""
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
        content = {"config": to_json(config), "temperature": temperature, "digest": digest}
        write_text(partial / STARTED_FILE, json.dumps(content, indent=2) + "\n")
    elif read_json(partial / STARTED_FILE, "start anew without --resume").get("digest") != digest:
        raise DataError(
            f"{partial}: was begun with other models, another policy in use or other users; start anew without --resume"
        )
