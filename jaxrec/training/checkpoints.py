"""Checkpoints of a training run (Orbax): the latest, to resume from, and the best epoch's, to use.

Checkpoints are numbered in the order in which they were saved. One is written in the background under a temporary
name and renamed at the end, and an older one is deleted only after that. So a whole one is left whenever the process
dies, or none yet, and the run then starts again from its seed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrec.errors import DataError, ProcessLost
from jaxrec.training.step import TrainState

METRIC = "validation_ndcg_10"


@dataclasses.dataclass
class TrainProgress:
    """Where a run stands, beside its arrays; all that an exact resumption needs.

    `step`: updates so far. `epoch_steps`: those of the epoch under way, with the sum of their losses and the seconds
    that they took and waited for batches. `epochs`: the records of all finished epochs, each with the number of its
    checkpoint. `items`, `genres`: the catalogue that the arrays belong to; `item_rows`: rows of its tables, which
    are more than items + 1 where they are split over devices. `data_version`: how often the run went on with other
    data; `first_step`: the first step on the present data.
    """

    items: int
    item_rows: int
    genres: list[str]
    data_version: int = 0
    first_step: int = 0
    step: int = 0
    epoch_steps: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def current_epochs(self) -> list[dict[str, Any]]:
        """The records of the epochs on the present data."""
        return [record for record in self.epochs if record["data_version"] == self.data_version]

    def best_epoch(self) -> dict[str, Any] | None:
        """The record of the epoch with the highest metric on the present data; None before one has ended."""
        return max(self.current_epochs(), key=lambda record: record[METRIC], default=None)


class _LatestAndBest:
    """Which checkpoints Orbax keeps: the last `latest`, and the one numbered `best`."""

    def __init__(self, latest: int) -> None:
        self.latest, self.best = latest, -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        oldest = len(checkpoints) - self.latest
        return [i >= oldest or info.step == self.best for i, info in enumerate(checkpoints)]


class Checkpoints:
    """One folder of checkpoints: the `keep_latest` last ones, and the best epoch's on the newest data."""

    def __init__(self, folder: Path, keep_latest: int = 2) -> None:
        self._policy = _LatestAndBest(keep_latest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def next_number(self) -> int:
        """The number that the next checkpoint gets."""
        latest = self.latest()
        return 0 if latest is None else latest + 1

    def save(self, state: TrainState, progress: TrainProgress) -> None:
        """Saves in the background, after the one before is whole. The best epoch may be the one that is saved."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
        )
        best = progress.best_epoch()
        self._policy.best = -1 if best is None else best["checkpoint"]
        self._manager.save(self.next_number(), args=arguments, force=True)

    def latest(self) -> int | None:
        """The number of the last checkpoint that is whole or being written, or None."""
        return self._manager.latest_step()

    def read_progress(self, number: int) -> TrainProgress:
        """The progress record of a checkpoint. Raises DataError where another version of jaxrec wrote it."""
        restored = self._manager.restore(number, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        try:
            return TrainProgress(**restored["progress"])
        except TypeError as error:
            raise DataError(f"{self._manager.directory}: written by another version of jaxrec ({error})") from error

    def restore(self, number: int, like: TrainState, exact: bool = True) -> TrainState:
        """The state of a checkpoint, with the shapes and the sharding of `like` (arrays or shapes).

        Where not `exact`, an array whose shape differs is cut, or filled with zeros.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract, strict=exact))
        return self._manager.restore(number, args=arguments)["state"]

    def wait(self) -> None:
        """Returns when everything that was saved is on the disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(value, ProcessLost):  # there is no process left to finish with
            self._manager.wait_until_finished()
            self._manager.close()
