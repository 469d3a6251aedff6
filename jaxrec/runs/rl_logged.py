"""`jaxrec rl RUN`: trains a policy on the run's own log."""

import dataclasses
from pathlib import Path

from jaxrec.config import RLConfig
from jaxrec.rl.logged.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.logged.methods import METHODS, REINFORCE, Method
from jaxrec.rl.logged.train import PolicyOutcome, train_policy
from jaxrec.runs.directory import POLICY_FOLDER, POLICY_REFUSED_FOLDER, load_supervised, open_run
from jaxrec.runs.policy import is_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never


def rl_run(
    folder: Path,
    config: RLConfig = RLConfig(),
    method: Method = REINFORCE,
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome:
    """Trains a policy for the run in `folder` and writes RUN/policy/, wholly or not at all.

    With `resume` an interrupted training goes on, with the configuration and the method that it started with.
    Raises DataError where the run or its data cannot be read or there is nothing to resume, TrainingError when a figure
    is not finite, TrainingStopped where `stop()` ended it early: it is saved then.
    """
    run = open_run(folder)
    data = run.read_data()
    supervised = load_supervised(run, data)
    checkpoint = PolicyCheckpoint(folder, models_digest(supervised))
    if resume:
        config, name = checkpoint.started_with()
        method = METHODS[name]
    else:
        checkpoint.start(config, method.name)
    trained = train_policy(supervised, data, config, method, checkpoint.read, checkpoint.write, stop)
    outcome, into = trained.outcome, POLICY_FOLDER
    if not outcome.used and is_in_use(run):
        into = POLICY_REFUSED_FOLDER
        stays = f"the policy that was in use before stays, this one is in {folder / into}"
        outcome = dataclasses.replace(outcome, reason=f"{outcome.reason}; {stays}")
    write_policy(run, supervised, outcome, config, method.name, trained.variables, trained.steps, trained.log, into)
    checkpoint.remove()
    return outcome
