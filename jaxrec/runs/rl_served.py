"""`jaxrec rl served RUN --log EVENTS`: improves the policy in use from a server's event store, or says why not."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jaxrec.errors import DataError
from jaxrec.files import write_text
from jaxrec.rl.config import ServedConfig
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.served.evaluate import own_versions
from jaxrec.rl.served.event_store import DETERMINISTIC, ServedLog, read_arrived_events, read_served_log
from jaxrec.rl.served.states import served_states
from jaxrec.rl.served.train import split_users, train_served
from jaxrec.rl.served.trends import served_trends
from jaxrec.runs.directory import SERVED_OUTCOME_FILE
from jaxrec.runs.policy import LoadedRun, digest_in_use, policy_in_use, require_in_use, write_policy
from jaxrec.training.stopping import StopRequested, never

SERVED_METHOD = "served"


def run_served(
    loaded: LoadedRun, log: Path, config: ServedConfig = ServedConfig(), stop: StopRequested = never
) -> PolicyOutcome:
    """Trains from the policy in use on what the event store `log` holds, and replaces it only if the gate agrees.

    The gate's decision and the doubly robust gain are also written to RUN/policy_from_log.json.
    Raises DataError where the store cannot be read or holds nothing usable, or another training has replaced the policy
    in use meanwhile; TrainingError where a metric is not finite; TrainingStopped where `stop()` was true. The policy in
    use stays in all of these.
    """
    run, data, supervised = loaded
    # The digest first: a policy that is written between the two is noticed before it is replaced.
    compared_with, base = digest_in_use(run), policy_in_use(run, supervised, config.seed)
    served = read_served_log(log, data.catalog, config.attribution_window)
    if not served.recommendations:
        hint = "; is the server run with --explore?" if DETERMINISTIC in served.skipped else ""
        raise DataError(f"{log}: nothing to learn from: {_counts(served)}{hint}")
    if not (served.recommendations.with_response() or config.rewards.novelty or config.rewards.diversity):
        raise DataError(
            f"{log}: nothing to learn from: {_counts(served)}; do clients send the recommendation_id with the events "
            "that respond to it?"
        )
    scoring, span = frozen_scoring(supervised, fit_reward_tables(data)), 0
    if supervised.trend.adds and served.moments:
        arrived = read_arrived_events(log, data.catalog)
        trends, span = served_trends(supervised, data, served.moments, *arrived)
        scoring = scoring._replace(trends=trends)
    scoring = jax.device_put(scoring, jax.devices()[0])
    states = served_states(supervised, served.recommendations, data.config.rating_scale, scoring)
    in_use = own_versions(base.graphdef, base.variables, scoring, states, len(served.versions))
    version = np.asarray(states.version)
    summary = _summary(log, served, version, in_use, span)
    try:
        rows = split_users(np.asarray(states.user), served.users, in_use[version])
    except DataError as error:
        raise DataError(f"{summary} {error}") from error
    trained, evaluation = train_served(base.graphdef, base.variables, scoring, states, rows, config, stop)
    outcome = dataclasses.replace(trained.outcome, summary=summary)
    if outcome.used:
        require_in_use(run, compared_with)
        write_policy(run, supervised, trained._replace(outcome=outcome), config, SERVED_METHOD)
    record = {
        "used": outcome.used,
        "log": str(log),
        "summary": summary,
        "gate": dataclasses.asdict(evaluation.decision),
        "doubly_robust_gain": evaluation.doubly_robust and dataclasses.asdict(evaluation.doubly_robust),
    }
    write_text(run.folder / SERVED_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    return outcome


def _summary(log: Path, served: ServedLog, version: np.ndarray, in_use: np.ndarray, span: int) -> str:
    counts = np.bincount(version, minlength=len(served.versions))
    versions = ", ".join(
        f"{count} by {name}{' (the policy in use)' if own else ''}"
        for name, count, own in zip(served.versions, counts, in_use, strict=True)
    )
    none = "" if in_use.any() else "; none is the policy in use"
    shared = f"; recommendations of {span} s share a trend, which memory limits" if span else ""
    return f"{log}: {_counts(served)}; {versions}{none}; attribution window {served.attribution_window} s{shared}."


def _counts(served: ServedLog) -> str:
    skipped = "".join(f", {count} left out {reason}" for reason, count in sorted(served.skipped.items()))
    return (
        f"{served.shown} recommendations shown, {len(served.recommendations)} to {len(served.users)} users are usable, "
        f"{served.recommendations.with_response()} of them have a response{skipped}"
    )
