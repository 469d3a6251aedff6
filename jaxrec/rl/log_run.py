"""`jaxrec rl RUN --log EVENTS`: improves the policy in use from a server's event store, or says why not."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import LOG_RL, RLConfig
from jaxrec.files import write_text
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from jaxrec.rl.log_states import LogStates, log_states
from jaxrec.rl.offline_evaluation.gating import MINIMUM_EFFECTIVE
from jaxrec.rl.policy_run import GateOutcome, PolicyInUse, policy_in_use, write_policy
from jaxrec.rl.rewards import reward_tables
from jaxrec.rl.scoring import Scoring, frozen_scoring
from jaxrec.rl.served_policy import Fit
from jaxrec.rl.train_from_log import FromLog, fit_log, train_from_log
from jaxrec.rl.train_policy import PolicyOutcome
from jaxrec.runs import load_supervised, open_run
from jaxrec.schema import DataError
from jaxrec.served_log import ServedLog, read_served_log
from jaxrec.stopping import StopRequested, never

LOG_OUTCOME_FILE = "policy_from_log.json"
METHOD = "log"


def rl_log_run(
    folder: Path,
    log: Path,
    config: RLConfig = LOG_RL,
    temperature: float | None = None,
    minimum_effective: float = MINIMUM_EFFECTIVE,
    stop: StopRequested = never,
) -> GateOutcome:
    """Trains from the policy that is in use on what the event store `log` holds, and replaces it only if the gate says
    so. What the gate said is also left in RUN/policy_from_log.json.

    `temperature`: of the server's `--explore`; None: the one that explains the log's propensities best.
    Raises DataError where the run or the store cannot be read, or nothing in it can be used, TrainingError where a
    figure is not finite, TrainingStopped where `stop()` became true. The policy in use stays in all of these.
    """
    run = open_run(folder)
    data = run.read_data()
    supervised = load_supervised(run, data)
    base = policy_in_use(run, supervised, config)
    config = dataclasses.replace(config, policy_width=base.config.policy_width)
    served = read_served_log(log, data.catalog)
    if not served.recommendations:
        raise DataError(f"{log}: nothing to learn from: {_counts(served)}; is the server run with --explore?")
    scoring = jax.device_put(frozen_scoring(supervised, reward_tables(data)), jax.devices()[0])
    states, fit, told_time = _explained(supervised, data, base, scoring, served, temperature)
    told = _told(log, served, fit, told_time, given=temperature is not None)
    result = train_from_log(
        base.graphdef, base.variables, scoring, states, served.users, config, fit, minimum_effective, stop
    )
    decision = result.decision
    record = {"used": decision.used, "log": str(log), "told": told, "gate": dataclasses.asdict(decision)}
    if decision.used:
        outcome = _outcome(result, config.steps)
        write_policy(run, supervised, outcome, config, METHOD, result.variables, result.steps, [])
    write_text(folder / LOG_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    return GateOutcome(decision.used, decision.reason, told)


def _explained(
    supervised: Hybrid,
    data: PreparedData,
    base: PolicyInUse,
    scoring: Scoring,
    served: ServedLog,
    temperature: float | None,
) -> tuple[LogStates, Fit, bool]:
    """The states, the temperature, and whether requests told their time: the store notes neither, so both are what the
    policy in use explains the propensities with best."""
    both = log_states(supervised, served.recommendations, data.config.rating_scale, scoring.tables)
    times = np.array([one.time for one in served.recommendations])
    found = [
        (states, fit_log(base.graphdef, base.variables, scoring, states, times, temperature), told_time)
        for states, told_time in zip(both, (False, True), strict=True)
    ]
    return min(found, key=lambda one: one[1].error)


def _told(log: Path, served: ServedLog, fit: Fit, told_time: bool, given: bool) -> str:
    time = "told" if told_time else "not told"
    source = "as given" if given else "as fitted"
    return (
        f"{log}: {_counts(served)}; temperature {fit.temperature:.4g} {source}, request time {time}; "
        f"{fit.own_share:.0%} of it was shown by the policy in use."
    )


def _counts(served: ServedLog) -> str:
    skipped = "".join(f", {count} left out {reason}" for reason, count in sorted(served.skipped.items()))
    usable = len(served.recommendations)
    answered = sum(len(one.answers) > 0 for one in served.recommendations)
    return (
        f"{served.shown} recommendations shown, {usable} to {len(served.users)} users can be learned from, "
        f"{answered} of them were answered{skipped}"
    )


def _outcome(result: FromLog, steps: int) -> PolicyOutcome:
    decision = result.decision
    parts = {"policy": decision.new, "logged": decision.logged}
    figures = {name: {"value": value.value} for name, value in parts.items() if value is not None}
    gain = decision.gain
    differences = {} if gain is None else {"value": {"mean": gain.value, "low": gain.low, "high": gain.high}}
    return PolicyOutcome(True, decision.reason, steps, figures, differences)
