"""The policy of a run directory: what `jaxrec rl` leaves there, and how later stages read it.

RUN/policy/policy.json   whether the policy is used and why, the figures, the configuration, what models it belongs to
RUN/policy/policy.npz    the variables of PolicyHead, after the last update
RUN/policy/steps.jsonl   one record per update; of a policy from a simulator, one per 10 updates
RUN/policy/log.jsonl     one record per evaluation; empty for a policy from a server's log or a simulator
RUN/policy/training.png  both, as a plot
RUN/policy.previous/     the policy that was in use before, where there was one
RUN/policy.partial/      where an interrupted training stands (`jaxrec.rl.logged.checkpoint`)
RUN/policy.simulator.partial/  the same of one in a simulator (`jaxrec.runs.rl_simulated`)
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrec.config import RLConfig, from_json, to_json
from jaxrec.files import new_directory, read_json, sha256
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.logged.learner import new_head
from jaxrec.rl.logged.methods import METHODS, REINFORCE, Method
from jaxrec.rl.logged.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.logged.train import PolicyOutcome, train_policy
from jaxrec.runs.train import EVALUATION_FILE, POLICY_FOLDER, Run, load_supervised, open_run
from jaxrec.errors import DataError
from jaxrec.training.stopping import StopRequested, never

SCHEMA_VERSION = 2
POLICY_FILE = "policy.json"
VARIABLES_FILE = "policy.npz"
STEPS_FILE = "steps.jsonl"
LOG_FILE = "log.jsonl"
PLOT_FILE = "training.png"
PREVIOUS_FOLDER = "policy.previous"
REFUSED_FOLDER = "policy.refused"
POLICY, SUPERVISED = "reinforce", "supervised"  # the names that serving knows


@dataclasses.dataclass(frozen=True)
class PolicyRecord:
    """policy.json: `method` is the name of what trained it, `models_sha256` of what lies under it
    (`jaxrec.rl.logged.checkpoint.models_digest`), `sha256` of the variables' file."""

    outcome: PolicyOutcome
    config: RLConfig
    method: str
    models_sha256: str
    sha256: str


class PolicyInUse(NamedTuple):
    """The structure and the variables of the head of the policy that is in use, and what it was trained with."""

    graphdef: nnx.GraphDef[PolicyHead]
    variables: Any
    config: RLConfig


@dataclasses.dataclass(frozen=True)
class GateOutcome:
    """`used`: whether the new policy replaced the one that was in use, and `reason` why, with the figures. `told`: what
    was read, how much of it could not be used and why, and what it is taken to be."""

    used: bool
    reason: str
    told: str


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
    if not outcome.used and _is_in_use(run):
        into = REFUSED_FOLDER
        stays = f"the policy that was in use before stays, this one is in {folder / into}"
        outcome = dataclasses.replace(outcome, reason=f"{outcome.reason}; {stays}")
    write_policy(run, supervised, outcome, config, method.name, trained.variables, trained.steps, trained.log, into)
    checkpoint.remove()
    return outcome


def write_policy(
    run: Run,
    supervised: Hybrid,
    outcome: PolicyOutcome,
    config: RLConfig,
    method: str,
    variables: Any,
    steps: Sequence[Mapping[str, float]],
    log: Sequence[Mapping[str, Any]],
    into: str = POLICY_FOLDER,
) -> None:
    """Replaces RUN/policy/ as a whole. The one before stays as RUN/policy.previous/ where it was in use.

    With REFUSED_FOLDER as `into` it is only kept to be looked at.
    """
    from jaxrec.evaluation.plots import plot_rl

    if into == POLICY_FOLDER:
        keep_previous(run)
    with new_directory(run.folder / into, POLICY_FILE) as new:
        np.savez(new / VARIABLES_FILE, **flatten_dict(variables, sep="/"))
        digest = sha256(new / VARIABLES_FILE)
        record = PolicyRecord(outcome, config, method, models_digest(supervised), digest)
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(record), "config": to_json(config)}
        (new / POLICY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, records in ((STEPS_FILE, steps), (LOG_FILE, log)):
            (new / name).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        plot_rl(steps, log, new / PLOT_FILE)
    if into == POLICY_FOLDER:
        (run.folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the earlier policy


def keep_previous(run: Run) -> None:
    """Copies a policy that is in use to RUN/policy.previous/, so that it is whole whatever happens to the original."""
    if _is_in_use(run):
        with new_directory(run.folder / PREVIOUS_FOLDER, POLICY_FILE) as copy:
            shutil.copytree(run.folder / POLICY_FOLDER, copy, dirs_exist_ok=True)


def _is_in_use(run: Run) -> bool:
    """Whether RUN/policy/ can be read and is used."""
    try:
        record = read_record(run)
    except DataError:
        return False
    return record is not None and record.outcome.used


def read_outcome(run: Run) -> PolicyOutcome | None:
    """What `jaxrec rl` found for the run; None before it ran. Raises DataError on damaged files."""
    record = read_record(run)
    return None if record is None else record.outcome


def policy_name(run: Run) -> str:
    """Which policy the run's evaluation and serving use: POLICY, whatever trained it, or SUPERVISED. Raises DataError
    on damaged files."""
    outcome = read_outcome(run)
    return POLICY if outcome is not None and outcome.used else SUPERVISED


def load_policy(run: Run, supervised: Hybrid, only_if_used: bool = True) -> Hybrid | None:
    """The run's policy on top of its supervised hybrid; None where there is none, or where it is not used.

    Raises DataError where the policy's files are damaged, or it was trained on top of other models.
    """
    record = read_record(run)
    if record is None or (only_if_used and not record.outcome.used):
        return None
    path = run.folder / POLICY_FOLDER / VARIABLES_FILE
    if not path.is_file() or sha256(path) != record.sha256:
        raise DataError(f"{path}: missing or damaged (its SHA-256 differs); run `jaxrec rl` again")
    if models_digest(supervised) != record.models_sha256:
        raise DataError(
            f"{run.folder / POLICY_FOLDER}: the policy was trained on top of other weights than the models of "
            f"{run.folder} have now; run `jaxrec rl` again"
        )
    with np.load(path, allow_pickle=False) as arrays:
        variables = unflatten_dict(dict(arrays), sep="/")
    item_vectors = supervised.item_vectors()
    graphdef, fresh = new_head(item_vectors.shape[1], len(item_vectors) - 1, record.config)
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, fresh):
        raise DataError(f"{path}: its arrays do not fit the models of {run.folder}; run `jaxrec rl` again")
    return supervised.with_policy(nnx.merge(graphdef, jax.tree.map(jnp.asarray, variables)))


def policy_in_use(run: Run, supervised: Hybrid, config: RLConfig) -> PolicyInUse:
    """The run's policy where it is used, else one that changes nothing. Raises DataError where its files are damaged or
    belong to other models."""
    policy, record = load_policy(run, supervised), read_record(run)
    if policy is not None and policy.policy is not None and record is not None:
        graphdef, variables = nnx.split(policy.policy)
        return PolicyInUse(graphdef, nnx.to_pure_dict(variables), record.config)
    vectors = supervised.item_vectors()
    return PolicyInUse(*new_head(vectors.shape[1], len(vectors) - 1, config), config)


def load_served(run: Run, supervised: Hybrid) -> Hybrid:
    """What is evaluated as the run's recommender and exported: the policy where it is used, else `supervised`."""
    policy = load_policy(run, supervised)
    return supervised if policy is None else policy


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/policy/log.jsonl. Raises DataError where there are none."""
    return _read_lines(folder / POLICY_FOLDER / LOG_FILE)


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/policy/steps.jsonl. Raises DataError where there are none."""
    return _read_lines(folder / POLICY_FOLDER / STEPS_FILE)


def read_record(run: Run) -> PolicyRecord | None:
    """policy.json; None before `jaxrec rl` ran. Raises DataError where it is damaged or of another version."""
    if not (run.folder / POLICY_FOLDER).exists():
        return None
    path = run.folder / POLICY_FOLDER / POLICY_FILE
    content = read_json(path, "run `jaxrec rl` again")
    try:
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}, expected {SCHEMA_VERSION}")
        outcome, config = PolicyOutcome(**content["outcome"]), from_json(RLConfig, content["config"])
        return PolicyRecord(outcome, config, *(content[name] for name in ("method", "models_sha256", "sha256")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a policy that this version can read ({error}); run `jaxrec rl` again") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
