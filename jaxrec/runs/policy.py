"""The policy of a run directory (`jaxrec.runs.directory`): how it is written, and how later stages read it."""

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
from jaxrec.errors import DataError
from jaxrec.files import new_directory, read_json, sha256
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.logged.checkpoint import models_digest
from jaxrec.rl.logged.learner import new_head
from jaxrec.rl.logged.train import PolicyOutcome
from jaxrec.runs.directory import (
    EVALUATION_FILE,
    POLICY_FILE,
    POLICY_FOLDER,
    POLICY_LOG_FILE,
    POLICY_PLOT_FILE,
    POLICY_PREVIOUS_FOLDER,
    POLICY_SCHEMA_VERSION,
    POLICY_STEPS_FILE,
    POLICY_VARIABLES_FILE,
    Run,
)

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

    With POLICY_REFUSED_FOLDER as `into` it is only kept to be looked at.
    """
    from jaxrec.evaluation.plots import plot_rl

    if into == POLICY_FOLDER:
        keep_previous(run)
    with new_directory(run.folder / into, POLICY_FILE) as new:
        np.savez(new / POLICY_VARIABLES_FILE, **flatten_dict(variables, sep="/"))
        digest = sha256(new / POLICY_VARIABLES_FILE)
        record = PolicyRecord(outcome, config, method, models_digest(supervised), digest)
        content = {"schema_version": POLICY_SCHEMA_VERSION, **dataclasses.asdict(record), "config": to_json(config)}
        (new / POLICY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, records in ((POLICY_STEPS_FILE, steps), (POLICY_LOG_FILE, log)):
            (new / name).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        plot_rl(steps, log, new / POLICY_PLOT_FILE)
    if into == POLICY_FOLDER:
        (run.folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the earlier policy


def keep_previous(run: Run) -> None:
    """Copies a policy that is in use to RUN/policy.previous/, so that it is whole whatever happens to the original."""
    if is_in_use(run):
        with new_directory(run.folder / POLICY_PREVIOUS_FOLDER, POLICY_FILE) as copy:
            shutil.copytree(run.folder / POLICY_FOLDER, copy, dirs_exist_ok=True)


def is_in_use(run: Run) -> bool:
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
    path = run.folder / POLICY_FOLDER / POLICY_VARIABLES_FILE
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
    return _read_lines(folder / POLICY_FOLDER / POLICY_LOG_FILE)


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/policy/steps.jsonl. Raises DataError where there are none."""
    return _read_lines(folder / POLICY_FOLDER / POLICY_STEPS_FILE)


def read_record(run: Run) -> PolicyRecord | None:
    """policy.json; None before `jaxrec rl` ran. Raises DataError where it is damaged or of another version."""
    if not (run.folder / POLICY_FOLDER).exists():
        return None
    path = run.folder / POLICY_FOLDER / POLICY_FILE
    content = read_json(path, "run `jaxrec rl` again")
    try:
        if content["schema_version"] != POLICY_SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}, expected {POLICY_SCHEMA_VERSION}")
        outcome, config = PolicyOutcome(**content["outcome"]), from_json(RLConfig, content["config"])
        return PolicyRecord(outcome, config, *(content[name] for name in ("method", "models_sha256", "sha256")))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a policy that this version can read ({error}); run `jaxrec rl` again") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
