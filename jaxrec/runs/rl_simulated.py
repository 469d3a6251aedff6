"""`jaxrec rl simulated RUN --simulator RATINGS`: improves the policy in use with simulated users, or says why not."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxrec.config import to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.split import Cases
from jaxrec.errors import DataError
from jaxrec.evaluation.plots import policy_figure, save_plot
from jaxrec.files import write_text
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.cases import CaseResults, case_evaluator, case_states
from jaxrec.rl.checkpoint import PolicyCheckpoint, arrays_digest, models_digest
from jaxrec.rl.config import RewardWeights, SimulatedConfig
from jaxrec.rl.logged.folds import last_events
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import PolicyParams, frozen_scoring
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.evaluate import RolloutResults, SimulatedResults, rollout_evaluator, simulated_outcome
from jaxrec.rl.simulated.policy import RealEvents, RecommenderPolicy, recommender_policy
from jaxrec.rl.simulated.recommender import every_user, recommender_environment, recommender_of, start_states
from jaxrec.rl.simulated.split_people import TwoSimulators, two_simulators
from jaxrec.rl.simulated.train import train_simulated
from jaxrec.rl.states import policy_states
from jaxrec.runs.directory import (
    POLICY_FOLDER,
    POLICY_PLOT_FILE,
    SIMULATED_OUTCOME_FILE,
    SIMULATED_PLOT_FILE,
    SIMULATOR_PARTIAL_FOLDER,
)
from jaxrec.runs.policy import LoadedRun, PolicyInUse, digest_in_use, policy_in_use, require_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never

SIMULATED_METHOD = "simulated"
EVENTS_OF_EACH, EVENTS_IN_ALL = 40, 10_000  # real events, at most, that the policy is compared with its start at


class SimulatedTraining(NamedTuple):
    """The users that train, the policy as it starts, and the real events that anchor it. `rollouts` are by the users
    that evaluate, `drawn_rollouts` the same with drawn slates; `on_cases(head)`: on validation."""

    environment: Environment
    policy: RecommenderPolicy
    real_events: RealEvents
    rollouts: Callable[[PolicyParams], RolloutResults]
    drawn_rollouts: Callable[[PolicyParams], RolloutResults]
    on_cases: Callable[[object], CaseResults]

    def evaluate(self, params: PolicyParams) -> SimulatedResults:
        """The results of the policy with these parameters."""
        return SimulatedResults(self.rollouts(params), self.on_cases(params.head))

    def supervised(self) -> CaseResults:
        """The results of the supervised models: of a head that changes nothing."""
        return self.on_cases(jax.tree.map(jnp.zeros_like, self.policy.start.head))


def run_simulated(
    loaded: LoadedRun,
    ratings: Path,
    config: SimulatedConfig = SimulatedConfig(),
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome:
    """Trains from the policy in use with simulated users of the log `ratings`, and replaces it only if
    `jaxrec.rl.simulated.evaluate.simulated_outcome` agrees. Its decision is also written to
    RUN/policy_from_simulator.json, and its course is plotted in RUN/policy_from_simulator.png.

    With `resume` an interrupted training continues, with the configuration that it started with.
    Raises DataError where the log cannot be read or has too few other users, there is nothing to resume, or another
    training has replaced the policy in use meanwhile; TrainingError where a metric is not finite; TrainingStopped where
    `stop()` was true: it can be resumed then. The policy in use stays in all of these.
    """
    run, data, supervised = loaded
    checkpoint = PolicyCheckpoint(run.folder / SIMULATOR_PARTIAL_FOLDER)
    if resume:
        config = checkpoint.configuration(SimulatedConfig)
    require_slates(data, config.slate_size)
    # The digest first: a policy that is written between the two is noticed before it is replaced.
    compared_with, base = digest_in_use(run), policy_in_use(run, supervised, config.seed)
    simulators = two_simulators(read_like(ratings, data), data, config.seed)
    training = simulated_training(supervised, data, base, simulators, config)
    if not resume:
        checkpoint.remove()
    checkpoint.open(
        {
            "configuration": to_json(config),
            "models": models_digest(supervised),
            "policy in use": arrays_digest(base.variables),
            "users": simulators.digest,
        }
    )
    params, records = train_simulated(
        training.environment, training.policy, config, checkpoint, anchor=training.real_events.anchor, stop=stop
    )
    new, before = training.evaluate(params), training.evaluate(training.policy.start)
    outcome = simulated_outcome(new, before, training.supervised())
    lost, count = training.real_events.lost(params), len(training.real_events.targets)
    summary = (
        f"{ratings}: {simulators.summary}. {count} real events lost {lost:.4f} nats of log-likelihood each (budget "
        f"{config.likelihood_budget:g}); the KL penalty had a weight of {records[-1]['kl_coefficient']:.2f} at the end."
    )
    outcome = dataclasses.replace(outcome, summary=summary)
    if outcome.used:
        require_in_use(run, compared_with)
        head = jax.tree.map(np.array, params.head)
        write_policy(run, supervised, TrainedPolicy(outcome, head, records), config, SIMULATED_METHOD)
    record = {
        "used": outcome.used,
        "simulator": str(ratings),
        "summary": outcome.summary,
        "reason": outcome.reason,
    }
    write_text(run.folder / SIMULATED_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    checkpoint.remove()
    if outcome.used:  # `write_policy` has made the picture
        shutil.copyfile(run.folder / POLICY_FOLDER / POLICY_PLOT_FILE, run.folder / SIMULATED_PLOT_FILE)
    else:
        save_plot(policy_figure(records), run.folder / SIMULATED_PLOT_FILE)
    return outcome


def require_slates(data: PreparedData, slate_size: int) -> None:
    """Raises DataError where slates of the size cannot be shown, or no validation case is there."""
    items = len(data.catalog)
    if not 2 <= slate_size <= items:
        raise DataError(f"slates of {slate_size}, expected 2 to {items} (the items of the run)")
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to evaluate a policy")


def read_like(ratings: Path, data: PreparedData) -> pd.DataFrame:
    """A log in any known format, on the rating scale of `data` and with item ids of its kind."""
    kind = IdKind.INTEGER if data.catalog.ids.raw_ids.dtype == np.int64 else IdKind.TEXT
    return read_ratings(ratings, data.config.rating_scale, ReadOptions(items=kind))[0]


def simulated_training(
    supervised: Hybrid, data: PreparedData, base: PolicyInUse, simulators: TwoSimulators, config: SimulatedConfig
) -> SimulatedTraining:
    """Of data that `require_slates` accepts."""
    recommender = recommender_of(supervised, data)
    scoring = jax.device_put(frozen_scoring(supervised, fit_reward_tables(data)), jax.devices()[0])
    policy = recommender_policy(base.graphdef, base.variables, scoring, config.temperature)
    training, evaluation = simulators.training.params, simulators.evaluation.params
    environment = recommender_environment(recommender, training, start_states(recommender, training), config.slate_size)
    starts = start_states(recommender, evaluation)
    others = recommender_environment(recommender, evaluation, starts, config.slate_size)
    first = every_user(evaluation, starts)
    item_ratings = np.asarray(scoring.tables.item_ratings)
    real_events = real_events_of(simulators, supervised, data, policy, config.users)
    cases = case_states(supervised, data, data.split.validation, item_ratings)
    return SimulatedTraining(
        environment,
        policy,
        real_events,
        rollout_evaluator(others, first, policy, config.seed),
        rollout_evaluator(others, first, policy, config.seed, drawn=True),
        case_evaluator(base.graphdef, scoring, cases, RewardWeights()),
    )


def real_events_of(
    simulators: TwoSimulators, supervised: Hybrid, data: PreparedData, policy: RecommenderPolicy, batch_size: int
) -> RealEvents:
    """The last events of the people whose simulated copies train, as far as their taste was not fitted to them.

    Events on an item of the history are left out: it is never recommended again.
    """
    real = simulators.training_histories
    counts = np.where(simulators.training.without_taste, np.diff(real.offsets), 0)
    events = last_events(real, counts, EVENTS_OF_EACH, EVENTS_IN_ALL)
    new = ~events.repeated(real)
    events = Cases(events.users[new], events.rows[new])
    if not len(events):
        raise DataError("the log of the simulated users has no event left that could show what a policy costs them")
    # The states of other people are read as those of the run's users are.
    others = dataclasses.replace(data, histories=real)
    states = policy_states(supervised, others, events, np.arange(len(events)) % 2 == 0)
    return RealEvents(policy, *states, np.asarray(real.items)[events.rows], batch_size)
