"""Checkpoints of a training run (Orbax): the latest, to resume from, and the best, to use."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxrec.schema import DataError
from jaxrec.steps import TrainState


class Checkpoints:
    """One folder of checkpoints, numbered by epoch. A half-written one is never seen: Orbax renames it at the end."""

    def __init__(self, folder: Path, metric: str) -> None:
        policy = keep.AnyPreservationPolicy(
            [keep.LatestN(n=1), keep.BestN(get_metric_fn=lambda metrics: metrics[metric], n=1)]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        self._metric = metric

    def save(self, epoch: int, state: TrainState, progress: dict[str, Any], metrics: dict[str, float]) -> None:
        """Saves in the background; `progress` is JSON that a resumed run needs."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._manager.save(epoch, args=arguments, metrics=metrics)

    def latest_epoch(self) -> int | None:
        """The last epoch that was saved whole, or None."""
        return self._manager.latest_step()

    def best_epoch(self, epochs: list[dict[str, Any]]) -> int:
        """The kept epoch with the highest metric among the records of `epochs` ({epoch, <metric>})."""
        kept = set(self._manager.all_steps())
        candidates = [record for record in epochs if record["epoch"] in kept]
        if not candidates:
            raise DataError(f"{self._manager.directory}: no checkpoint")
        return max(candidates, key=lambda record: record[self._metric])["epoch"]

    def restore(self, epoch: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of an epoch, with the shapes and the sharding of `like`, and its progress record."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(epoch, args=arguments)
        return restored["state"], restored["progress"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
