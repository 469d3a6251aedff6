"""`jaxrec rl logged RUN`: trains a policy on the run's own log."""

import dataclasses

from jaxrec.config import to_json
from jaxrec.rl.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.methods import METHODS, REINFORCE, Method
from jaxrec.rl.logged.train import train_logged
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.runs.directory import POLICY_FOLDER, POLICY_PARTIAL_FOLDER, POLICY_REFUSED_FOLDER
from jaxrec.runs.policy import LoadedRun, is_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never


def run_logged(
    loaded: LoadedRun,
    config: LoggedConfig = LoggedConfig(),
    method: Method = REINFORCE,
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome:
    """Trains a policy for the run and writes RUN/policy/, wholly or not at all.

    With `resume` an interrupted training continues, with the configuration and the method that it started with. A
    policy that is not to be used goes to RUN/policy.refused/ if another one is in use.
    Raises DataError where there is nothing to learn from or to resume, TrainingError where a metric is not finite,
    TrainingStopped where `stop()` was true: RUN/policy.partial/ can be resumed then.
    """
    run, data, supervised = loaded
    checkpoint = PolicyCheckpoint(run.folder / POLICY_PARTIAL_FOLDER)
    if resume:
        config = checkpoint.configuration(LoggedConfig)
        method = METHODS.get(checkpoint.started_with().get("method", ""), method)
    else:
        checkpoint.remove()
    digest = models_digest(supervised)
    checkpoint.open({"configuration": to_json(config), "method": method.name, "models": digest})
    trained = train_logged(supervised, data, config, method, checkpoint, stop)
    into = POLICY_FOLDER
    if not trained.outcome.used and is_in_use(run):
        into = POLICY_REFUSED_FOLDER
        reason = f"{trained.outcome.reason}; the policy in use stays, the new one is in {run.folder / into}"
        trained = trained._replace(outcome=dataclasses.replace(trained.outcome, reason=reason))
    write_policy(run, supervised, trained, config, method.name, into)
    checkpoint.remove()
    return trained.outcome
