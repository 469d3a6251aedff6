"""Where an interrupted training of a policy stands: RUN/policy.partial/, replaced as a whole at each evaluation.

progress.json   configuration, method, the models' checksum, and the records so far
arrays.npz      the learner under way, and the heads of the phases that are over
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import RLConfig, from_json, to_json
from jaxrec.errors import DataError
from jaxrec.files import new_directory, read_json
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged.train import Problem, Progress
from jaxrec.runs.directory import POLICY_PARTIAL_FOLDER

PROGRESS_FILE = "progress.json"
ARRAYS_FILE = "arrays.npz"
SCHEMA_VERSION = 1


def models_digest(supervised: Hybrid) -> str:
    """SHA-256 of all weights under a policy: both models, their mix, and the co-occurrence."""
    digest = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(nnx.state(supervised.with_policy(None))):
        array = np.ascontiguousarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


class PolicyCheckpoint:
    """The checkpoint of one run, for a policy on top of the models with the checksum `models_sha256`."""

    def __init__(self, run: Path, models_sha256: str) -> None:
        self._run, self._models_sha256 = run, models_sha256
        self._folder = run / POLICY_PARTIAL_FOLDER
        self._started: dict[str, Any] = {}

    def start(self, config: RLConfig, method: str) -> None:
        """A training from the beginning; what an earlier one left is removed."""
        self.remove()
        self._started = {
            "schema_version": SCHEMA_VERSION,
            "config": to_json(config),
            "method": method,
            "models_sha256": self._models_sha256,
        }

    def started_with(self) -> tuple[RLConfig, str]:
        """Configuration and method of the training that is to go on. Raises DataError where there is none, or where it
        was on top of other weights."""
        path = self._folder / PROGRESS_FILE
        if not self._folder.is_dir():
            raise DataError(
                f"{self._run}: no interrupted training of a policy to go on with; start one without --resume"
            )
        content = read_json(path, "start anew without --resume")
        try:
            if content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {content['schema_version']}, expected {SCHEMA_VERSION}")
            self._started = {name: content[name] for name in ("schema_version", "config", "method", "models_sha256")}
            config = from_json(RLConfig, content["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: cannot be gone on with ({error}); start anew without --resume") from error
        if self._started["models_sha256"] != self._models_sha256:
            raise DataError(
                f"{self._folder}: was begun on top of other weights than the models of {self._run} have now; "
                "start anew without --resume"
            )
        return config, self._started["method"]

    def write(self, progress: Progress) -> None:
        """Replaces the checkpoint."""
        arrays: dict[str, Any] = {
            f"learner/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(progress.learner))
        }
        for number, head in enumerate(progress.heads):
            arrays |= {f"head/{number}/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(head))}
        content = {**self._started, "heads": len(progress.heads), "steps": progress.steps, "log": progress.log}
        with new_directory(self._folder, PROGRESS_FILE) as new:
            np.savez(new / ARRAYS_FILE, **arrays)
            (new / PROGRESS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def read(self, problem: Problem) -> Progress | None:
        """The progress that was written last; None where there is none. Raises DataError where it is damaged."""
        if not self._folder.is_dir():
            return None
        content = read_json(self._folder / PROGRESS_FILE, "start anew without --resume")
        learner = problem.new_learner()
        try:
            with np.load(self._folder / ARRAYS_FILE, allow_pickle=False) as arrays:
                heads = [_filled(learner.head, arrays, f"head/{number}") for number in range(content["heads"])]
                learner = _filled(learner, arrays, "learner")
        except (OSError, EOFError, KeyError, ValueError) as error:
            path = self._folder / ARRAYS_FILE
            raise DataError(f"{path}: damaged ({error}); start anew without --resume") from error
        heads = [jax.tree.map(np.asarray, head) for head in heads]
        return Progress(jax.device_put(learner, jax.devices()[0]), heads, content["steps"], content["log"])

    def remove(self) -> None:
        """Nothing is left to go on with."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _filled(like: Any, arrays: Any, prefix: str) -> Any:
    """The pytree `like` with the arrays `prefix`/0, `prefix`/1, ... as its leaves."""
    leaves, structure = jax.tree.flatten(like)
    found = [arrays[f"{prefix}/{i}"] for i in range(len(leaves))]
    for leaf, array in zip(leaves, found, strict=True):
        if np.shape(leaf) != array.shape:
            raise ValueError(f"an array is {array.shape}, expected {np.shape(leaf)}")
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in found])
