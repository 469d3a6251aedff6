"""The policy of a run directory (`jaxrec.runs.directory`): how it is written, and how later stages read it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrec.config import to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError
from jaxrec.files import new_directory, read_json, sha256, write_json_lines
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.rl.checkpoint import models_digest
from jaxrec.rl.config import POLICY_WIDTH
from jaxrec.rl.outcome import PolicyOutcome, TrainedPolicy
from jaxrec.rl.scoring import OF_RERANKER, new_head
from jaxrec.runs.directory import (
    EVALUATION_FILE,
    POLICY_FILE,
    POLICY_FOLDER,
    POLICY_PLOT_FILE,
    POLICY_PREVIOUS_FOLDER,
    POLICY_SCHEMA_VERSION,
    POLICY_STEPS_FILE,
    POLICY_VARIABLES_FILE,
    POLICY_VERSIONS_READ,
    POLICY_WITHOUT_SHIFT,
    Run,
    load_supervised,
    open_run,
)

AGAIN = "train it again (`jaxrec rl served` or `jaxrec rl simulated`), or move its folder away"


class LoadedRun(NamedTuple):
    """A run, its data and its supervised models."""

    run: Run
    data: PreparedData
    supervised: Hybrid


@dataclasses.dataclass(frozen=True)
class PolicyRecord:
    """policy.json: the outcome, the configuration and the `method` of the training, `models_sha256` of the models under
    the policy (`jaxrec.rl.checkpoint.models_digest`), and `sha256` of the variables' file. `schema_version` is that of
    the format."""

    outcome: PolicyOutcome
    config: dict[str, Any]
    method: str
    models_sha256: str
    sha256: str
    schema_version: int = POLICY_SCHEMA_VERSION


class PolicyInUse(NamedTuple):
    """The structure and the variables of the head of the policy in use."""

    graphdef: nnx.GraphDef[PolicyHead]
    variables: Any


def load_run(folder: Path) -> LoadedRun:
    """Reads a run to train a policy on.

    Args:
        folder: The run's.

    Raises:
        DataError: The run, its data or its models cannot be read, or the run may recommend items of the history again:
            the states of a policy do not hold how many events an item of the history has, and when.
    """
    run = open_run(folder)
    data = run.read_data()
    supervised = load_supervised(run, data)
    if supervised.repeat is not None:
        raise DataError(
            f"{run.folder} may recommend items of the history again, and a policy is trained only for models that "
            "never do: train a run with `jaxrec train --seen exclude`"
        )
    return LoadedRun(run, data, supervised)


def write_policy(run: Run, supervised: Hybrid, trained: TrainedPolicy, config: Any, method: str) -> None:
    """Replaces RUN/policy/ as a whole. The one before stays as RUN/policy.previous/ if it was in use."""
    from jaxrec.evaluation.plots import policy_figure, save_plot

    keep_previous(run)
    with new_directory(run.folder / POLICY_FOLDER, POLICY_FILE) as new:
        np.savez(new / POLICY_VARIABLES_FILE, **flatten_dict(trained.head, sep="/"))
        digest = sha256(new / POLICY_VARIABLES_FILE)
        record = PolicyRecord(trained.outcome, to_json(config), method, models_digest(supervised), digest)
        content = dataclasses.asdict(record)
        (new / POLICY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_json_lines(new / POLICY_STEPS_FILE, trained.updates)
        save_plot(policy_figure(trained.updates), new / POLICY_PLOT_FILE)
    (run.folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the earlier policy


def keep_previous(run: Run) -> None:
    """Copies a policy that is in use to RUN/policy.previous/, so that it is whole whatever happens to the original."""
    if digest_in_use(run) is not None:
        with new_directory(run.folder / POLICY_PREVIOUS_FOLDER, POLICY_FILE) as copy:
            shutil.copytree(run.folder / POLICY_FOLDER, copy, dirs_exist_ok=True)


def digest_in_use(run: Run) -> str | None:
    """SHA-256 of the variables of the policy in use; None where RUN/policy/ is not used or its record is damaged."""
    try:
        record = read_record(run)
    except DataError:
        return None
    return record.sha256 if record is not None and record.outcome.used else None


def require_in_use(run: Run, compared_with: str | None) -> None:
    """Raises DataError where the policy in use is no longer the one that a new policy was compared with
    (`digest_in_use` at that time): the policy that replaced it has not been compared with the new one."""
    if digest_in_use(run) != compared_with:
        raise DataError(
            f"{run.folder / POLICY_FOLDER}: the policy in use is not the one that the new policy was compared with, "
            "another training has replaced it meanwhile; run the command again"
        )


def require_no_policy(run: Run, supervised: Hybrid) -> None:
    """Raises DataError where a policy is in use on top of `supervised`, which a new reranker would replace. A policy
    that is damaged, or of other models, is not in use."""
    try:
        record = read_record(run)
    except DataError:
        return
    if record is not None and record.outcome.used and record.models_sha256 == models_digest(supervised):
        raise DataError(
            f"{run.folder / POLICY_FOLDER}: this policy is in use and was trained on top of the models as they are "
            "now; a new reranker would change them. Move the folder away first, and train that policy again afterwards"
        )


def load_policy(run: Run, supervised: Hybrid, only_if_used: bool = True) -> Hybrid | None:
    """The run's policy on top of its supervised hybrid; None where there is none, or where it is not used.

    Raises DataError where the policy's files are damaged, or it was trained on top of other models.
    """
    record = read_record(run)
    if record is None or (only_if_used and not record.outcome.used):
        return None
    path = run.folder / POLICY_FOLDER / POLICY_VARIABLES_FILE
    if not path.is_file() or sha256(path) != record.sha256:
        raise DataError(f"{path}: missing or damaged (its SHA-256 differs); {AGAIN}")
    if models_digest(supervised) != record.models_sha256:
        raise DataError(
            f"{run.folder / POLICY_FOLDER}: the policy was trained on top of other weights than the models of "
            f"{run.folder} have now; {AGAIN}"
        )
    with np.load(path, allow_pickle=False) as arrays:
        variables = unflatten_dict(dict(arrays), sep="/")
    graphdef, fresh = _head_of(supervised, variables["inner"]["kernel"].shape[1])
    if record.schema_version == POLICY_WITHOUT_SHIFT:
        variables = {name: fresh[name] for name in OF_RERANKER if name in fresh} | variables
    if jax.tree.map(np.shape, variables) != jax.tree.map(np.shape, fresh):
        raise DataError(f"{path}: its arrays do not fit the models of {run.folder}; {AGAIN}")
    return supervised.with_policy(nnx.merge(graphdef, jax.tree.map(jnp.asarray, variables)))


def policy_in_use(run: Run, supervised: Hybrid, seed: int = 0) -> PolicyInUse:
    """The run's policy if it is used, else one from `seed` that changes nothing. Raises DataError where its files are
    damaged or belong to other models."""
    policy = load_policy(run, supervised)
    if policy is None or policy.policy is None:
        return PolicyInUse(*_head_of(supervised, POLICY_WIDTH, seed))
    graphdef, variables = nnx.split(policy.policy)
    return PolicyInUse(graphdef, nnx.to_pure_dict(variables))


def _head_of(supervised: Hybrid, hidden: int, seed: int = 0) -> tuple[nnx.GraphDef[PolicyHead], Any]:
    vectors = supervised.item_vectors()
    return new_head(vectors.shape[1], len(vectors) - 1, hidden, seed, supervised.reranker is not None)


def load_served(run: Run, supervised: Hybrid) -> Hybrid:
    """The recommender to evaluate and to export: the policy if it is used, else `supervised`."""
    policy = load_policy(run, supervised)
    return supervised if policy is None else policy


def read_record(run: Run) -> PolicyRecord | None:
    """policy.json; None before `jaxrec rl` ran. Raises DataError where it is damaged or of another version."""
    if not (run.folder / POLICY_FOLDER).exists():
        return None
    path = run.folder / POLICY_FOLDER / POLICY_FILE
    content = read_json(path, AGAIN)
    try:
        if content["schema_version"] not in POLICY_VERSIONS_READ:
            versions = " or ".join(map(str, POLICY_VERSIONS_READ))
            raise ValueError(f"schema version {content['schema_version']}, expected {versions}")
        outcome = PolicyOutcome(**content.pop("outcome"))
        return PolicyRecord(
            outcome,
            **{name: content[name] for name in ("config", "method", "models_sha256", "sha256", "schema_version")},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a policy that this version can read ({error}); {AGAIN}") from error
