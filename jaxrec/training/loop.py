"""Trains one sequence model: epochs, validation, early stopping, checkpoints, exact resumption from any step."""

import dataclasses
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.config import CheckpointConfig, TrainConfig
from jaxrec.data.batches import TrainBatch, TrainingData, prefetch
from jaxrec.data.content import model_feature_names
from jaxrec.data.prepared import PreparedData
from jaxrec.data.shares import TrainingShare, share_of
from jaxrec.errors import DataError, TrainingError, TrainingStopped
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import ranks_by_request_time
from jaxrec.training.checkpoints import METRIC, Checkpoints, TrainProgress
from jaxrec.training.log import Track, TrainingLog, read_epochs
from jaxrec.training.processes import any_process, is_first, noticing_loss, sum_of_all
from jaxrec.training.resize import restored_state
from jaxrec.training.sharding import (
    DATA_AXIS,
    data_mesh,
    item_rows,
    local_view,
    put,
    put_batch,
    state_sharding,
    with_item_rows,
)
from jaxrec.training.step import (
    SequenceModel,
    TrainState,
    initial_state,
    learning_rate,
    make_optimizer,
    make_train_step,
)
from jaxrec.training.stopping import StopRequested, never

CHECKPOINT_FOLDER = "checkpoints"
AGREE_STEPS = 10  # several processes ask each other that often whether to save or to stop


@dataclasses.dataclass(frozen=True)
class TrainedModel(Generic[SequenceModel]):
    """The model of the best epoch, and one record per epoch: epoch, loss, speed, validation metrics."""

    model: SequenceModel
    epochs: list[dict[str, Any]]


def train_model(
    model: SequenceModel,
    data: PreparedData | TrainingShare,
    config: TrainConfig,
    folder: Path,
    name: str,
    mesh: Mesh | None = None,
    checkpoint_config: CheckpointConfig = CheckpointConfig(),
    data_version: int = 0,
    stop: StopRequested = never,
    track: Track | None = None,
) -> TrainedModel[SequenceModel]:
    """Trains `model` and returns it as it was after its best epoch.

    `data`: of several processes each gives all of it, or its own share. `folder` receives checkpoints and logs; where
    it holds checkpoints of an earlier call with the same arguments, training resumes from the latest and ends with the
    same result as if it had never stopped. If `data_version` is newer than theirs, training restarts its schedule from
    their best epoch on data that extends theirs, with embeddings added for new items.
    Raises DataError where there is nothing to train on, TrainingError when a loss is not finite, TrainingStopped when
    `stop()` became true: everything is saved then.
    """
    share = known_share(data)
    require_trainable(share)
    with Checkpoints(folder / CHECKPOINT_FOLDER, checkpoint_config.keep) as checkpoints:
        training = _Training(model, share, config, mesh or data_mesh(), checkpoints, checkpoint_config, stop, name)
        training.restore(data_version)
        log = TrainingLog(folder, name, training.progress.step, training.last_step(), is_first(), track)
        with log, noticing_loss():
            training.run(log)
        return TrainedModel(training.best_model(), training.progress.epochs)


def steps_key(seed: int, name: str) -> jax.Array:
    """The key of a model's steps, into which the number of the step is folded.

    Folding in the name gives each model of a run another key, and none that the initialization with the same seed used
    (`nnx.Rngs` folds in counts from 0).
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def known_share(data: PreparedData | TrainingShare) -> TrainingShare:
    """This process' share of all the data, or the given one, with the popularity of all. All processes have to call
    this."""
    share = data
    if isinstance(share, PreparedData):
        share = share_of(share, jax.process_index(), jax.process_count())
    if share.parts[0].popularity is not None:
        return share
    return share.with_popularity(sum_of_all(share.own_popularity()))


def require_trainable(share: TrainingShare) -> None:
    """Raises DataError where there is nothing to learn from, or nothing that tells when to stop. All processes have to
    call this."""
    if not (share.train_counts > 1).any():
        raise DataError("no user has two training events; there is nothing to learn from")
    if not sum_of_all(np.array([sum(len(part.split.validation) for part in share.parts)])).any():
        raise DataError("no validation case is left; the log is too short to tell when to stop")


def load_trained(model: SequenceModel, config: TrainConfig, folder: Path) -> TrainedModel[SequenceModel]:
    """The best epoch of a run that `train_model` made in `folder`; `model` gives the structure."""
    epochs = read_epochs(folder)
    with Checkpoints(folder / CHECKPOINT_FOLDER) as checkpoints:
        latest = checkpoints.latest()
        best = None if latest is None else checkpoints.read_progress(latest).best_epoch()
        if best is None:
            raise DataError(f"{folder}: no checkpoint of a finished epoch; train on")
        rows = checkpoints.read_progress(best["checkpoint"]).item_rows
        graphdef, state = initial_state(model, make_optimizer(config, 1), rows)
        state = checkpoints.restore(best["checkpoint"], state)
    return TrainedModel(_plain_model(graphdef, state, model), epochs)


def _plain_model(graphdef: nnx.GraphDef[SequenceModel], state: TrainState, like: SequenceModel) -> SequenceModel:
    """The model of a state on one device, with as many rows in its item tables as `like` has."""
    variables = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (state.params, state.fixed))
    params, fixed = with_item_rows(variables, like.item_embedding.shape[0])
    return nnx.merge(graphdef, params, fixed)


class _Training(Generic[SequenceModel]):
    """One model's training under way: its arrays, its progress, and what they are made with."""

    def __init__(
        self,
        model: SequenceModel,
        data: TrainingShare,
        config: TrainConfig,
        mesh: Mesh,
        checkpoints: Checkpoints,
        checkpoint_config: CheckpointConfig,
        stop: StopRequested,
        name: str,
    ) -> None:
        self.model, self.data, self.config, self.mesh = model, data, config, mesh
        self.checkpoints, self.checkpoint_config, self.stop = checkpoints, checkpoint_config, stop
        self.batches = TrainingData(data, model.config.max_length, config.batch_tokens, mesh.shape[DATA_AXIS])
        total_steps = self.batches.steps_per_epoch * config.max_epochs
        self.learning_rates = np.asarray(learning_rate(config, total_steps)(np.arange(total_steps)))
        optimizer = make_optimizer(config, total_steps)
        rows = item_rows(len(data.catalog), mesh)
        self.graphdef, state = initial_state(model, optimizer, rows)
        self.state = put(state, state_sharding(state, mesh))
        trained_items = data.train_popularity() > 0
        rest = (config.request_gap_dropout, config.sampled_items, trained_items, config.excludes_seen)
        self.step = make_train_step(self.graphdef, optimizer, mesh, *rest)
        self.compiled: Any = None
        self.compile_seconds = 0.0
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.key = jax.jit(lambda: steps_key(config.seed, name), out_shardings=self.replicated)()
        self.progress = TrainProgress(len(data.catalog), rows, model_feature_names(data.parts[0]))
        self.pending: dict[str, jax.Array] | None = None  # measured by the last step, not read yet
        self.saved_at, self.saved_step = time.monotonic(), 0

    def restore(self, data_version: int) -> None:
        """Goes on from the latest checkpoint, if there is one."""
        self.progress.data_version = data_version
        number, now = self.checkpoints.latest(), self.progress
        if number is None:
            return
        saved = self.checkpoints.read_progress(number)
        if saved.data_version == data_version:
            self.state = restored_state(self.checkpoints, number, saved, self.state, now)
            self.progress = dataclasses.replace(saved, item_rows=now.item_rows)
        else:
            best = saved.best_epoch()
            number = number if best is None else best["checkpoint"]
            state = restored_state(self.checkpoints, number, saved, self.state, now)
            self.state = state._replace(step=put(np.int32(saved.step), self.replicated))
            self.progress = dataclasses.replace(now, step=saved.step, first_step=saved.step, epochs=saved.epochs)
        self.saved_step = saved.step

    def last_step(self) -> int:
        """The number of steps at the end of the last epoch that there may be."""
        return self.progress.first_step + self.batches.steps_per_epoch * self.config.max_epochs

    def run(self, log: TrainingLog) -> None:
        """All epochs that are left."""
        log.epochs(self.progress.epochs, self.progress.step)  # a crash can come between a checkpoint and its log
        while not self._finished():
            self._save_where_asked(log)
            with jax.transfer_guard("disallow"):
                self._run_epoch(log)
            validation = self._validate(log)
            self._end_epoch(validation, log)
        log.bar.total = log.bar.n
        log.bar.refresh()

    def best_model(self) -> SequenceModel:
        """The model of the best epoch, on one device of this process."""
        best = self.progress.best_epoch()
        assert best is not None
        number, state = best["checkpoint"], self.state
        if number != self.checkpoints.latest():
            saved = self.checkpoints.read_progress(number)
            state = restored_state(self.checkpoints, number, saved, state, self.progress)
        return _plain_model(self.graphdef, local_view(state, self.mesh), self.model)

    def _finished(self) -> bool:
        epochs = self.progress.current_epochs()
        return len(epochs) >= self.config.max_epochs or _out_of_patience(epochs, self.config.patience)

    def _run_epoch(self, log: TrainingLog) -> None:
        """The steps that are left of the epoch under way. Each loss is read a step late: the device stays busy."""
        asked = time.perf_counter()
        for batch in self._batches_on_device():
            ready = time.perf_counter()
            if self.compiled is None:
                self.compiled = self.step.lower(self.state, batch, self.key).compile()
                self.compile_seconds = time.perf_counter() - ready
                asked, ready = asked + self.compile_seconds, time.perf_counter()
            self.state, metrics = self.compiled(self.state, batch, self.key)
            self._read_pending(log)
            self.pending = metrics
            self._save_where_asked(log)
            now = time.perf_counter()
            self.progress.waited += ready - asked
            self.progress.seconds += now - asked
            asked = now
        self._read_pending(log)
        self.progress.seconds += time.perf_counter() - asked

    def _batches_on_device(self) -> Iterator[TrainBatch]:
        epoch = len(self.progress.epochs)
        batches = self.batches.epoch(self.config.seed, epoch, self.progress.epoch_steps)
        return prefetch(put_batch(batch, self.mesh) for batch in batches)

    def _read_pending(self, log: TrainingLog) -> None:
        """Takes the last step's loss into the progress and the log. Raises TrainingError where it is not finite."""
        if self.pending is None:
            return
        metrics = {name: float(value) for name, value in jax.device_get(self.pending).items()}
        self.pending = None
        progress = self.progress
        record = {
            "step": progress.step,
            "epoch": len(progress.epochs),
            "loss": metrics["loss"],
            "gradient_norm": metrics["gradient_norm"],
            "learning_rate": float(self.learning_rates[progress.step - progress.first_step]),
        }
        if not all(np.isfinite(value) for value in metrics.values()):
            raise TrainingError(self._not_finite("loss or its gradient is"))
        progress.step += 1
        progress.epoch_steps += 1
        progress.loss_sum += metrics["loss"]
        log.step(record)

    def _not_finite(self, what: str) -> str:
        kept = f"the checkpoint of step {self.saved_step} is good" if self.saved_step else "no checkpoint was made yet"
        return (
            f"the {what} not finite at step {self.progress.step} (epoch {len(self.progress.epochs)}); {kept}, "
            f"lost are the steps {self.saved_step}..{self.progress.step}"
        )

    def _save_where_asked(self, log: TrainingLog) -> None:
        """Saves when it is time to, and stops where that was asked for; processes do so together."""
        due = time.monotonic() - self.saved_at >= self.checkpoint_config.seconds
        if jax.process_count() == 1:
            stop = self.stop()
        else:
            done = self.progress.epoch_steps + (self.pending is not None)
            if done % AGREE_STEPS and done != self.batches.steps_per_epoch:
                return
            self._read_pending(log)  # the devices are idle then, and the processes' question does not cross a step
            stop, due = any_process(self.stop(), due)
        if stop or due:
            self._save(log)
        if stop:
            self._stop()

    def _save(self, log: TrainingLog) -> None:
        """Saves a state that is good: every loss until here was finite, and every weight is."""
        self._read_pending(log)
        if not bool(jax.device_get(_all_finite(self.state.params))):
            raise TrainingError(self._not_finite("weights are"))
        log.sync()
        self.checkpoints.save(self.state, self.progress)
        self.saved_at, self.saved_step = time.monotonic(), self.progress.step

    def _stop(self) -> None:
        self.checkpoints.wait()
        epoch, steps = len(self.progress.epochs), self.batches.steps_per_epoch
        raise TrainingStopped(
            f"stopped and saved after step {self.progress.step} (epoch {epoch}, {self.progress.epoch_steps} of its "
            f"{steps} steps)"
        )

    def _validate(self, log: TrainingLog) -> dict[str, float]:
        """Validation NDCG@10 with and without the request time, their mean, and the seconds that it took."""
        started = time.perf_counter()
        params, fixed = local_view((self.state.params, self.state.fixed), self.mesh)
        model = nnx.merge(self.graphdef, params, fixed)

        def before_batch() -> None:
            if jax.process_count() == 1 and self.stop():
                self._save(log)
                self._stop()

        sums = np.zeros(3)
        for part in self.data.parts:
            cases = part.split.validation
            ranks = ranks_by_request_time(model, part, cases, before_batch, self.config.excludes_seen)
            sums += [*ndcg(ranks, 10).sum(axis=1), len(cases)]
        without, with_time, count = sum_of_all(sums).tolist()
        return {
            METRIC: (without + with_time) / count / 2,
            f"{METRIC}_without_request_time": without / count,
            f"{METRIC}_with_request_time": with_time / count,
            "validation_seconds": time.perf_counter() - started,
        }

    def _end_epoch(self, validation: dict[str, float], log: TrainingLog) -> None:
        progress = self.progress
        record = {
            "epoch": len(progress.epochs),
            "loss": progress.loss_sum / progress.epoch_steps,
            "targets_per_second": self.batches.target_count / progress.seconds,
            "wait_share": progress.waited / progress.seconds,
            "seconds": progress.seconds,
            "compile_seconds": self.compile_seconds,
            **validation,
            "data_version": progress.data_version,
            "checkpoint": self.checkpoints.next_number(),
        }
        self.compile_seconds = 0.0
        self.progress = dataclasses.replace(
            progress, epochs=[*progress.epochs, record], epoch_steps=0, loss_sum=0.0, seconds=0.0, waited=0.0
        )
        self._save(log)
        log.epochs(self.progress.epochs, self.progress.step)


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def _out_of_patience(epochs: list[dict[str, Any]], patience: int) -> bool:
    if not epochs:
        return False
    best = max(epochs, key=lambda record: record[METRIC])
    return epochs[-1]["epoch"] - best["epoch"] >= patience
