"""The policy of a run directory: what `jaxrec rl` leaves there, and how later stages read it.

RUN/policy/policy.json   whether the policy is used and why, the validation figures of both, the configuration
RUN/policy/policy.npz    the variables of PolicyHead, in the state that was judged best
RUN/policy/log.jsonl     one record per evaluation
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrec.config import RLConfig, from_json, to_json
from jaxrec.files import new_directory, read_json, sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.reinforce import new_learner
from jaxrec.rl.train_policy import PolicyOutcome, train_policy
from jaxrec.runs import EVALUATION_FILE, POLICY_FOLDER, Run, load_supervised, open_run
from jaxrec.schema import DataError

SCHEMA_VERSION = 1
POLICY_FILE = "policy.json"
VARIABLES_FILE = "policy.npz"
LOG_FILE = "log.jsonl"
REINFORCE, SUPERVISED = "reinforce", "supervised"


def rl_run(folder: Path, config: RLConfig = RLConfig()) -> PolicyOutcome:
    """Trains a policy for the run in `folder` and writes RUN/policy/, wholly or not at all.

    Raises DataError where the run or its data cannot be read, TrainingError when a figure is not finite.
    """
    run = open_run(folder)
    data = run.read_data()
    trained = train_policy(load_supervised(run, data), data, config)
    with new_directory(folder / POLICY_FOLDER, POLICY_FILE) as new:
        np.savez(new / VARIABLES_FILE, **flatten_dict(trained.variables, sep="/"))
        record = {
            "schema_version": SCHEMA_VERSION,
            "outcome": dataclasses.asdict(trained.outcome),
            "config": to_json(config),
            "sha256": {VARIABLES_FILE: sha256(new / VARIABLES_FILE)},
        }
        (new / POLICY_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        lines = "".join(json.dumps(line) + "\n" for line in trained.log)
        (new / LOG_FILE).write_text(lines, encoding="utf-8")
    (folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the earlier policy
    return trained.outcome


def read_outcome(run: Run) -> PolicyOutcome | None:
    """What `jaxrec rl` found for the run; None before it ran. Raises DataError on damaged files."""
    if not (run.folder / POLICY_FOLDER).exists():
        return None
    outcome, _, _ = _read_record(run)
    return outcome


def policy_name(run: Run) -> str:
    """Which policy the run's evaluation and serving use: REINFORCE or SUPERVISED. Raises DataError on damaged files."""
    outcome = read_outcome(run)
    return REINFORCE if outcome is not None and outcome.used else SUPERVISED


def load_policy(run: Run, supervised: Hybrid, only_if_used: bool = True) -> Hybrid | None:
    """The run's policy on top of its supervised hybrid; None where there is none, or where it is not used.

    Raises DataError where the policy's files are damaged, or do not fit the models.
    """
    outcome = read_outcome(run)
    if outcome is None or (only_if_used and not outcome.used):
        return None
    _, config, digest = _read_record(run)
    path = run.folder / POLICY_FOLDER / VARIABLES_FILE
    if not path.is_file() or sha256(path) != digest:
        raise DataError(f"{path}: missing or damaged (its SHA-256 differs); run `jaxrec rl` again")
    with np.load(path, allow_pickle=False) as arrays:
        variables = unflatten_dict(dict(arrays), sep="/")
    item_vectors = supervised.item_vectors()
    graphdef, learner = new_learner(item_vectors.shape[1], len(item_vectors) - 1, config)
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, learner.head):
        raise DataError(f"{path}: its arrays do not fit the models of {run.folder}; run `jaxrec rl` again")
    head = nnx.merge(graphdef, jax.tree.map(jnp.asarray, variables))
    return supervised.with_policy(head)


def load_served(run: Run, supervised: Hybrid) -> Hybrid:
    """What is evaluated as the run's recommender and exported: the policy where it is used, else `supervised`."""
    policy = load_policy(run, supervised)
    return supervised if policy is None else policy


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/policy/log.jsonl. Raises DataError where there are none."""
    path = folder / POLICY_FOLDER / LOG_FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_record(run: Run) -> tuple[PolicyOutcome, RLConfig, str]:
    """policy.json: outcome, configuration, and the SHA-256 of the variables."""
    path = run.folder / POLICY_FOLDER / POLICY_FILE
    record = read_json(path, "run `jaxrec rl` again")
    try:
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {record['schema_version']}, expected {SCHEMA_VERSION}")
        outcome = PolicyOutcome(**record["outcome"])
        return outcome, from_json(RLConfig, record["config"]), record["sha256"][VARIABLES_FILE]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a policy that this version can read ({error}); run `jaxrec rl` again") from error
