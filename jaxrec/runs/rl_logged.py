"""`jaxrec rl logged RUN`: trains a policy on the run's own log."""

import dataclasses

from jaxrec.config import to_json
from jaxrec.errors import DataError
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.methods import METHODS, REINFORCE, Method
from jaxrec.rl.logged.train import train_logged
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.runs.directory import POLICY_FOLDER, POLICY_PARTIAL_FOLDER, POLICY_REFUSED_FOLDER
from jaxrec.runs.policy import LoadedRun, digest_in_use, load_policy, require_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never


def run_logged(
    loaded: LoadedRun,
    config: LoggedConfig = LoggedConfig(),
    method: Method = REINFORCE,
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome:
    """Trains a policy for the run, compares it with the supervised models and with the policy in use, whichever command
    trained that, and writes RUN/policy/, wholly or not at all.

    With `resume` an interrupted training continues, with the configuration and the method that it started with. A
    policy that is not to be used goes to RUN/policy.refused/ if another one is in use. A policy that cannot be read, or
    belongs to other weights than the models have now, is not in use: nothing is compared with it, the summary says so.
    Raises DataError where there is nothing to learn from or to resume, or another training has replaced the policy in
    use meanwhile; TrainingError where a metric is not finite; TrainingStopped where `stop()` was true:
    RUN/policy.partial/ can be resumed then.
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
    compared_with = digest_in_use(run)
    in_use, summary = _in_use(loaded)
    trained = train_logged(supervised, data, config, method, checkpoint, stop, in_use)
    outcome, into = dataclasses.replace(trained.outcome, summary=summary), POLICY_FOLDER
    if not outcome.used and in_use is not None:
        into = POLICY_REFUSED_FOLDER
        outcome = dataclasses.replace(outcome, reason=f"{outcome.reason}; the new policy is in {run.folder / into}")
    else:
        require_in_use(run, compared_with)
    write_policy(run, supervised, trained._replace(outcome=outcome), config, method.name, into)
    checkpoint.remove()
    return outcome


def _in_use(loaded: LoadedRun) -> tuple[PolicyHead | None, str]:
    """The policy in use, and why there is none that could be compared with; empty: there is one, or never was."""
    try:
        policy = load_policy(loaded.run, loaded.supervised)
    except DataError as error:
        return None, f"The policy before cannot be used and was not compared with the new one: {error}."
    return None if policy is None else policy.policy, ""
