"""`jaxrec rl RUN --log EVENTS`: improves the policy in use from a server's event store, or says why not."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxrec.config import LOG_RL, RLConfig
from jaxrec.errors import DataError
from jaxrec.files import write_text
from jaxrec.rl.logged.train import PolicyOutcome
from jaxrec.rl.ope.gate import MINIMUM_EFFECTIVE
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.served.evaluate import own_versions
from jaxrec.rl.served.event_store import DETERMINISTIC, ServedLog, read_served_log
from jaxrec.rl.served.states import log_states
from jaxrec.rl.served.train import FromLog, split_users, train_from_log
from jaxrec.runs.directory import SERVED_OUTCOME_FILE, load_supervised, open_run
from jaxrec.runs.policy import GateOutcome, policy_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never

METHOD = "log"


def rl_log_run(
    folder: Path,
    log: Path,
    config: RLConfig = LOG_RL,
    answers_within: int | None = None,
    minimum_effective: float = MINIMUM_EFFECTIVE,
    stop: StopRequested = never,
) -> GateOutcome:
    """Trains from the policy that is in use on what the event store `log` holds, and replaces it only if the gate says
    so. What the gate said, and the doubly robust gain, are also left in RUN/policy_from_log.json.

    `answers_within`: so many seconds after a recommendation its answers count, see `read_served_log`.
    Raises DataError where the run or the store cannot be read, or nothing in it can be used, TrainingError where a
    figure is not finite, TrainingStopped where `stop()` became true. The policy in use stays in all of these.
    """
    run = open_run(folder)
    data = run.read_data()
    supervised = load_supervised(run, data)
    base = policy_in_use(run, supervised, config)
    config = dataclasses.replace(config, policy_width=base.config.policy_width)
    served = read_served_log(log, data.catalog, answers_within)
    if not served.recommendations:
        hint = "; is the server run with --explore?" if DETERMINISTIC in served.skipped else ""
        raise DataError(f"{log}: nothing to learn from: {_counts(served)}{hint}")
    if not (_answered(served) or config.rewards.novelty or config.rewards.diversity):
        raise DataError(
            f"{log}: nothing to learn from: {_counts(served)}; do clients send the recommendation_id with the events "
            "that answer it?"
        )
    scoring = jax.device_put(frozen_scoring(supervised, fit_reward_tables(data)), jax.devices()[0])
    states = log_states(supervised, served.recommendations, data.config.rating_scale, scoring.tables)
    in_use = own_versions(base.graphdef, base.variables, scoring, states, len(served.versions))
    version = np.asarray(states.version)
    told = _told(log, served, version, in_use)
    try:
        rows = split_users(np.asarray(states.user), served.users, in_use[version])
    except DataError as error:
        raise DataError(f"{told} {error}") from error
    result = train_from_log(base.graphdef, base.variables, scoring, states, rows, config, minimum_effective, stop)
    decision, doubly_robust = result.judgement
    record = {
        "used": decision.used,
        "log": str(log),
        "told": told,
        "gate": dataclasses.asdict(decision),
        "doubly_robust_gain": None if doubly_robust is None else dataclasses.asdict(doubly_robust),
    }
    if decision.used:
        outcome = _outcome(result, config.steps)
        write_policy(run, supervised, outcome, config, METHOD, result.variables, result.steps, [])
    write_text(folder / SERVED_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    return GateOutcome(decision.used, decision.reason, told)


def _told(log: Path, served: ServedLog, version: np.ndarray, in_use: np.ndarray) -> str:
    counts = np.bincount(version, minlength=len(served.versions))
    versions = ", ".join(
        f"{count} by {name}{' (the policy in use)' if own else ''}"
        for name, count, own in zip(served.versions, counts, in_use, strict=True)
    )
    none = "" if in_use.any() else "; none is the policy in use"
    return f"{log}: {_counts(served)}; {versions}{none}; answers count within {served.horizon} s."


def _counts(served: ServedLog) -> str:
    skipped = "".join(f", {count} left out {reason}" for reason, count in sorted(served.skipped.items()))
    usable = len(served.recommendations)
    return (
        f"{served.shown} recommendations shown, {usable} to {len(served.users)} users can be learned from, "
        f"{_answered(served)} of them were answered{skipped}"
    )


def _answered(served: ServedLog) -> int:
    return sum(len(one.answers) > 0 for one in served.recommendations)


def _outcome(result: FromLog, steps: int) -> PolicyOutcome:
    decision = result.judgement.decision
    parts = {"policy": decision.new, "logged": decision.logged}
    figures = {name: {"value": value.value} for name, value in parts.items() if value is not None}
    gain = decision.gain
    differences = {} if gain is None else {"value": {"mean": gain.value, "low": gain.low, "high": gain.high}}
    return PolicyOutcome(True, decision.reason, steps, figures, differences)
