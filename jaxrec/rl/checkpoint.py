"""The checkpoint of a policy's training under way (Orbax), which an exact resumption starts from.

FOLDER/started.json   what the training was started with: configuration, and digests of what it depends on
FOLDER/STEP/          the latest checkpoint: `arrays`, and `progress` (records so far) as JSON

A checkpoint is renamed into its place when it is whole, and the one before is deleted after that.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxrec.config import Config, from_json
from jaxrec.errors import DataError
from jaxrec.files import read_json, write_text
from jaxrec.models.hybrid import Hybrid

STARTED_FILE = "started.json"
AGAIN = "start again without --resume"


def models_digest(supervised: Hybrid) -> str:
    """SHA-256 of all weights under a policy: both models, their mix, and the co-occurrence."""
    return arrays_digest(nnx.state(supervised.with_policy(None)))


def arrays_digest(arrays: Any) -> str:
    """SHA-256 of the arrays of a pytree, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for path, value in jax.tree.leaves_with_path(arrays):
        array = np.ascontiguousarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()


class PolicyCheckpoint:
    """The checkpoint of one training, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def started_with(self) -> dict[str, Any]:
        """What `open` wrote. Raises DataError where no training was started."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no interrupted training to resume; {AGAIN}")
        return dict(read_json(self.folder / STARTED_FILE, AGAIN))

    def configuration(self, kind: type[Config]) -> Config:
        """The configuration that the training was started with. Raises DataError where it is none of this kind."""
        try:
            return from_json(kind, self.started_with()["configuration"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.folder / STARTED_FILE}: cannot be resumed ({error}); {AGAIN}") from error

    def open(self, started: Mapping[str, Any]) -> None:
        """Begins a training that is `started` with these JSON values, by name, or resumes the one in the folder.

        Raises DataError where that one was started with others.
        """
        if not self.folder.is_dir():
            write_text(self.folder / STARTED_FILE, json.dumps(started, indent=2) + "\n")
        before = self.started_with()
        changed = [name for name in {**before, **started} if before.get(name) != started.get(name)]
        if changed:
            raise DataError(f"{self.folder}: was started with other {' and '.join(changed)} than now; {AGAIN}")

    def write(self, step: int, arrays: Any, progress: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by that of update `step`, a number above the one before."""
        arguments = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(dict(progress)))
        with self._manager() as manager:
            manager.save(step, args=arguments, force=True)

    def progress(self) -> dict[str, Any] | None:
        """The progress of the latest checkpoint; None before there is one."""
        restored = self._restore(progress=ocp.args.JsonRestore())
        return None if restored is None else restored["progress"]

    def arrays(self, like: Any) -> Any:
        """The arrays of the latest checkpoint, with the shapes of `like`. Raises DataError where they do not fit."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._restore(arrays=ocp.args.StandardRestore(abstract))
        return None if restored is None else restored["arrays"]

    def remove(self) -> None:
        """Deletes the checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def _restore(self, **arguments: Any) -> Any:
        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            try:
                return manager.restore(step, args=ocp.args.Composite(**arguments))
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self.folder / str(step)}: damaged ({str(error)[:200]}); {AGAIN}") from error
