"""What a training run writes while it goes: JSON lines, TensorBoard, a tracking server, and a progress bar.

FOLDER/steps.jsonl    one record per step: step, epoch, loss, gradient_norm, learning_rate
FOLDER/log.jsonl      one record per epoch: loss, speed, seconds of compiling and validating, validation metrics
FOLDER/tensorboard/   the same for TensorBoard: every TENSORBOARD_STEPS-th step, and every epoch

What TensorBoard gets is also handed to a `Track`, if there is one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxrec.files import new_file, read_json_lines, write_json_lines

STEPS_FILE = "steps.jsonl"
LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_STEPS = 10
Track = Callable[[str, float, int], None]
"""Takes the name of a metric, such as `lstm/train/loss`, its value and the step."""
UNTRAINED = "no trained model is there; run `jaxrec train` first"


class TrainingLog:
    """The log of one model from step `first_step` on; what a stopped run logged after it is removed.

    Where `enabled` is off (another process writes), nothing is written, tracked or shown.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        first_step: int,
        total_steps: int,
        enabled: bool = True,
        track: Track | None = None,
    ) -> None:
        self._folder, self._enabled, self._track = folder, enabled, track
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=f"train {name}", unit="step", disable=None if enabled else True
        )
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _cut_steps(folder / STEPS_FILE, first_step)
        self._steps = (folder / STEPS_FILE).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step)

    def step(self, record: dict[str, Any]) -> None:
        """Logs one step; `record` has its number as `step`."""
        self.bar.update()
        if not self._enabled:
            return
        self._steps.write(json.dumps(record) + "\n")
        if record["step"] % TENSORBOARD_STEPS == 0:
            self._scalars("train", record, record["step"])

    def epochs(self, records: list[dict[str, Any]], step: int) -> None:
        """Writes the records of all epochs so far; the last one ended before `step`."""
        if not self._enabled:
            return
        write_json_lines(self._folder / LOG_FILE, records)
        if records:
            last = records[-1]
            self._scalars("epoch", last, step)
            self.bar.set_postfix(
                epoch=last["epoch"] + 1, loss=f"{last['loss']:.3f}", ndcg=f"{last['validation_ndcg_10']:.4f}"
            )

    def sync(self) -> None:
        """Forces the steps to the disk: a checkpoint must not know more than the log."""
        if self._enabled:
            self._steps.flush()
            os.fsync(self._steps.fileno())

    def _scalars(self, group: str, record: dict[str, Any], step: int) -> None:
        for name, value in record.items():
            if name not in ("step", "epoch", "checkpoint", "data_version"):
                self._tensorboard.add_scalar(f"{group}/{name}", value, step)
                if self._track is not None:
                    self._track(f"{self._folder.name}/{group}/{name}", value, step)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self._enabled:
            self._steps.close()
            self._tensorboard.close()


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The records of steps.jsonl, one per step. Raises DataError where there are none."""
    return read_json_lines(folder / STEPS_FILE, UNTRAINED)


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, one per epoch. Raises DataError where there are none."""
    return read_json_lines(folder / LOG_FILE, UNTRAINED)


def _cut_steps(path: Path, first_step: int) -> None:
    """Keeps the records before `first_step`; a killed run may have logged more, and half of a line."""
    if not path.exists():
        return
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as kept, path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] >= first_step:
                break
            kept.write(json.dumps(record) + "\n")
