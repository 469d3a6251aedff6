"""Trains one sequence model: epochs, validation, early stopping, checkpoints, exact resumption."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxrec.batches import TrainingData, prefetch
from jaxrec.checkpoint import Checkpoints
from jaxrec.config import TrainConfig
from jaxrec.evaluate import jit_scorer, model_logits, rank_cases
from jaxrec.files import write_text
from jaxrec.metrics import ndcg
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.prepare import PreparedData
from jaxrec.schema import DataError
from jaxrec.steps import (
    DATA_AXIS,
    Model,
    StepFunction,
    TrainState,
    data_mesh,
    initial_state,
    make_optimizer,
    make_train_step,
)

METRIC = "validation_ndcg_10"
LOG_FILE = "log.jsonl"
CHECKPOINT_FOLDER = "checkpoints"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what is kept."""


@dataclasses.dataclass(frozen=True)
class Trained(Generic[Model]):
    """The model of the best epoch, and one record per epoch: epoch, loss, speed, validation metrics."""

    model: Model
    epochs: list[dict[str, Any]]


def train_model(
    model: Model, data: PreparedData, config: TrainConfig, folder: Path, name: str, mesh: Mesh | None = None
) -> Trained[Model]:
    """Trains `model` and returns it as it was after its best epoch.

    `folder` receives checkpoints and log.jsonl; where it holds checkpoints of an earlier call with the same
    arguments, training goes on from the latest and ends with the same result as if it had never stopped.
    Raises DataError where there is nothing to train on, TrainingError when the loss is not finite.
    """
    mesh = mesh or data_mesh()
    batches = TrainingData(data, model.config.max_length, config.batch_tokens, mesh.size)
    require_trainable(data)
    steps = batches.steps_per_epoch
    optimizer = make_optimizer(config, steps * config.max_epochs)
    graphdef, state = initial_state(model, optimizer)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = make_train_step(graphdef, optimizer, mesh, config.request_gap_dropout, config.sampled_items)
    epochs: list[dict[str, Any]] = []
    with Checkpoints(folder / CHECKPOINT_FOLDER, METRIC) as checkpoints:
        latest = checkpoints.latest_epoch()
        if latest is not None:
            state, progress = checkpoints.restore(latest, state)
            epochs = progress["epochs"]
            _write_log(epochs, folder)  # a crash can come between the checkpoint and its log
        total = steps * config.max_epochs
        with tqdm(total=total, initial=steps * len(epochs), desc=f"train {name}", unit="step") as bar:
            while len(epochs) < config.max_epochs and not _out_of_patience(epochs, config.patience):
                state, trained = _run_epoch(step, state, batches, config.seed, len(epochs), mesh, bar)
                validation = _validate(nnx.merge(graphdef, state.params, state.fixed), data)
                epochs.append({"epoch": len(epochs), **trained, **validation})
                checkpoints.save(len(epochs) - 1, state, {"epochs": epochs}, {METRIC: validation[METRIC]})
                _write_log(epochs, folder)
                bar.set_postfix(epoch=len(epochs), loss=f"{trained['loss']:.3f}", ndcg=f"{validation[METRIC]:.4f}")
            bar.total = bar.n
            bar.refresh()
        state, _ = checkpoints.restore(checkpoints.best_epoch(epochs), state)
    return Trained(nnx.merge(graphdef, state.params, state.fixed), epochs)


def require_trainable(data: PreparedData) -> None:
    """Raises DataError where there is nothing to learn from, or nothing that tells when to stop."""
    if not (data.split.train_counts > 1).any():
        raise DataError("no user has two training events; there is nothing to learn from")
    if not len(data.split.validation):
        raise DataError("no validation case is left; the log is too short to tell when to stop")


def load_trained(model: Model, config: TrainConfig, folder: Path) -> Trained[Model]:
    """The best epoch of a run that `train_model` made in `folder`; `model` gives the structure."""
    graphdef, state = initial_state(model, make_optimizer(config, 1))
    epochs = read_epochs(folder)
    with Checkpoints(folder / CHECKPOINT_FOLDER, METRIC) as checkpoints:
        state, _ = checkpoints.restore(checkpoints.best_epoch(epochs), state)
    return Trained(nnx.merge(graphdef, state.params, state.fixed), epochs)


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, one per epoch. Raises DataError where there are none."""
    log = folder / LOG_FILE
    if not log.is_file():
        raise DataError(f"{folder}: no trained model; run `jaxrec train` first")
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _write_log(epochs: list[dict[str, Any]], folder: Path) -> None:
    write_text(folder / LOG_FILE, "".join(json.dumps(record) + "\n" for record in epochs))


def _run_epoch(
    step: StepFunction,
    state: TrainState,
    batches: TrainingData,
    seed: int,
    epoch: int,
    mesh: Mesh,
    bar: tqdm,
) -> tuple[TrainState, dict[str, float]]:
    """One pass over the windows: the mean loss, targets per second, and the share of time spent waiting for batches.

    Each loss is read a step late, so the device stays busy.
    """
    split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    key = jax.random.key(seed)
    losses: list[Any] = []
    waited, started = 0.0, time.perf_counter()
    on_device = prefetch(jax.device_put(batch, split) for batch in batches.epoch(seed, epoch))
    while True:
        asked = time.perf_counter()
        batch = next(on_device, None)
        waited += time.perf_counter() - asked
        if batch is None:
            break
        state, metrics = step(state, batch, key)
        losses.append(metrics["loss"])
        if len(losses) > 1:
            losses[-2] = float(losses[-2])
        bar.update()
    values = np.asarray([float(loss) for loss in losses])
    seconds = time.perf_counter() - started
    finite = np.append(
        np.isfinite(values), all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
    )
    if not finite.all():
        first = epoch * len(values) + int(np.argmin(finite))
        kept = f"the checkpoint of epoch {epoch - 1} is good" if epoch else "no epoch was finished"
        raise TrainingError(f"the loss or the weights are not finite from step {first} on (epoch {epoch}); {kept}")
    return state, {
        "loss": float(values.mean()),
        "targets_per_second": batches.target_count / seconds,
        "wait_share": waited / seconds,
    }


def _validate(model: TimeRatingAwareLSTM, data: PreparedData) -> dict[str, float]:
    scorer = jit_scorer(model, model_logits)
    values = {
        with_time: float(
            ndcg(rank_cases(scorer, data, data.split.validation, model.config.max_length, with_time).ranks, 10).mean()
        )
        for with_time in (False, True)
    }
    return {
        METRIC: (values[False] + values[True]) / 2,
        f"{METRIC}_without_request_time": values[False],
        f"{METRIC}_with_request_time": values[True],
    }


def _out_of_patience(epochs: list[dict[str, Any]], patience: int) -> bool:
    if not epochs:
        return False
    best = max(epochs, key=lambda record: record[METRIC])
    return len(epochs) - 1 - best["epoch"] >= patience
