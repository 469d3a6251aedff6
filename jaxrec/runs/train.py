"""Trains the models of a run directory (`jaxrec.runs.directory`), anew or on data that extends its own."""

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from tqdm import tqdm

from jaxrec.config import CheckpointConfig, ModelConfig, SeenItems, TrainConfig, to_json
from jaxrec.data.catalog import Catalog
from jaxrec.data.content import item_content
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.shares import TrainingShare
from jaxrec.data.store import open_share, summary_file, unchanged_folder, write_prepared
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import new_file, sha256, write_text
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.neighbours import Together, initial_embedding, neighbours
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.runs.directory import (
    CONTENT_FOLDER,
    CONTENT_HEAD_FILE,
    DATA_FOLDER,
    EVALUATION_FILE,
    HYBRID_FILE,
    LSTM_FOLDER,
    NEIGHBOURS_FILE,
    NEIGHBOURS_PARTIAL_FOLDER,
    PLOT_FILE,
    POLICY_FILES,
    RUN_FILE,
    SCHEMA_VERSION,
    Run,
    new_models,
    open_run,
    place_new_items,
    read_content_heads,
    read_initial_embedding,
    read_neighbours,
)
from jaxrec.runs.tracking import begin, connect, tracked
from jaxrec.training.content_head import ridge_head, train_head
from jaxrec.training.host_memory import give_back_freed_memory
from jaxrec.training.log import Track
from jaxrec.training.loop import TrainedModel, known_share, require_trainable, train_model
from jaxrec.training.mix import learn_mix
from jaxrec.training.new_items import (
    NewItems,
    counts_without,
    hidden_items,
    shift_logits,
    tune_shift,
    without_events_of,
)
from jaxrec.training.processes import any_process, in_first, is_first, noticing_loss, wait_for_all
from jaxrec.training.seen import found_repeats
from jaxrec.training.sharding import building_device, data_mesh
from jaxrec.training.stopping import StopRequested, never

STOPPED_BEFORE_MODELS = "stopped: the co-occurrence is not counted yet, no model is trained"
STOPPED_BEFORE_MIX = "stopped: both models are trained and saved, their mix is not tuned yet"


@noticing_loss()
def train(
    data: PreparedData | pd.DataFrame | Path | str | None,
    out: Path | str | None = None,
    model_config: ModelConfig = ModelConfig(),
    train_config: TrainConfig = TrainConfig(),
    *,
    resume: bool = False,
    checkpoint_config: CheckpointConfig = CheckpointConfig(),
    item_shards: int = 1,
    stop: StopRequested = never,
    mlflow: str | None = None,
    mlflow_tags: Mapping[str, str] = {},
) -> Run:
    """Trains both sequence models on prepared data and tunes their mix; the run directory `out` holds the result.

    Args:
        data: Prepared data: a folder or shards, which the run refers to, or an object, which is written to OUT/data if
            it lies in no folder. Or a log (a file or a frame), which is prepared into OUT/data with the default
            PrepareConfig. None with `resume`: the data that the run started with.
        out: The run directory. None: a temporary folder, which is removed together with the returned object.
        model_config: Widths of the models.
        train_config: Epochs, steps, learning rate, seed. Whether items of a history may come again is looked up in
            validation where it does not say (`SeenItems.AUTO`), and the run holds what was found.
        resume: Continue an interrupted run from its latest checkpoints, with the configuration that it started with.
        checkpoint_config: How often training is saved.
        item_shards: Devices over which the item tables are split.
        stop: Asked between steps; training is saved and ends once it is true.
        mlflow: URI of MLflow's tracking server or store, which gets the configuration and what TensorBoard gets. A run
            that is resumed goes on in the same run of MLflow. None: the run is not tracked.
        mlflow_tags: Tags of a new run of MLflow. Its name is that of `out`, unless they have `mlflow.runName`.

    Returns:
        The run.

    Raises:
        ValueError: `resume` is on and there is no `out`.
        DataError: `out` already holds a run and `resume` is off, or one of other data and it is on; or there is nothing
            to train on.
        TrackingError: MLflow does not answer before training begins; if it fails later, training goes on.
        TrainingError: A loss is not finite. What was saved before stays, and no later file of the run is written.
        TrainingStopped: `stop()` became true; `resume` continues with the same result. Models are saved at any step;
            the co-occurrence before them, and the content heads and the mix after them, start again.
        ProcessLost: One of several processes is gone.
    """
    if out is None:
        if resume:
            raise ValueError("resume needs the folder of the run (`out`)")
        return _train_in_temporary_folder(data, model_config, train_config, item_shards, stop, mlflow, mlflow_tags)
    out, mesh = Path(out), data_mesh(item_shards=item_shards)
    tracker = connect(mlflow)
    if resume:
        run = open_run(out)
        given = data.folder if isinstance(data, PreparedData) else data
        if data is not None and not (isinstance(given, Path | str) and run.data_folder == Path(given).resolve()):
            raise DataError(f"{out} was trained on {run.data_folder}, not on {_name(data)} (to change that: --data)")
        run.require_data()
        share = _open_share(run.data_folder)
        begin(mlflow, tracker, run, mlflow_tags)
    elif (out / RUN_FILE).exists():
        raise DataError(f"{out} already holds a run; resume it (--resume) or choose another folder")
    elif data is None:
        raise DataError("which data is the run to be trained on?")
    else:
        data_folder = _data_folder(data, out)
        share = _open_share(data_folder)
        require_trainable(share)
        if train_config.seen is SeenItems.AUTO:
            found = found_repeats(share)
            train_config = dataclasses.replace(train_config, seen=found.choice())
            if is_first():
                print(found)
        run = _new_run(out, data_folder, share.catalog, model_config, train_config)
        begin(mlflow, tracker, run, mlflow_tags)
        wait_for_all("no process writes a run where another one still looks for it")
        _write_run(run)
    if is_first() and not (resume and (out / HYBRID_FILE).exists()):  # a run with a mix is finished: its weights stay
        (out / EVALUATION_FILE).unlink(missing_ok=True)
    with tracked(tracker) as track:
        _train_models(run, share, mesh, checkpoint_config, item_shards, stop, track)
    return run


def _train_in_temporary_folder(
    data: PreparedData | pd.DataFrame | Path | str | None,
    model_config: ModelConfig,
    train_config: TrainConfig,
    item_shards: int,
    stop: StopRequested,
    mlflow: str | None,
    mlflow_tags: Mapping[str, str],
) -> Run:
    scratch = _Scratch()
    options: dict[str, Any] = {
        "item_shards": item_shards,
        "stop": stop,
        "mlflow": mlflow,
        "mlflow_tags": mlflow_tags,
    }
    try:
        run = train(data, scratch.folder / "run", model_config, train_config, **options)
    except TrainingStopped:
        raise TrainingStopped("stopped; nothing is kept, since the run was given no folder (`out`)") from None
    return dataclasses.replace(run, scratch=scratch)


class _Scratch:
    """A temporary folder that is removed together with this object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jaxrec-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _data_folder(data: PreparedData | pd.DataFrame | Path | str, out: Path) -> Path:
    """The folder of prepared data to train on: the one given, or OUT/data, which is written here."""
    if isinstance(data, Path | str) and Path(data).is_dir():
        return Path(data)
    if isinstance(data, PreparedData) and (own := unchanged_folder(data)) is not None:
        return own
    folder = out / DATA_FOLDER

    def write(asked: StopRequested) -> None:
        if isinstance(data, PreparedData):
            write_prepared(data, folder)
        else:
            prepare(data, out=folder)

    in_first(write)
    return folder


def _open_share(folder: Path) -> TrainingShare:
    return known_share(open_share(folder, jax.process_index(), jax.process_count()))


def _name(data: object) -> str:
    return str(data) if isinstance(data, Path | str) else f"a {type(data).__name__} in memory"


def _train_models(
    run: Run,
    share: TrainingShare,
    mesh: Mesh,
    checkpoint_config: CheckpointConfig,
    item_shards: int,
    stop: StopRequested,
    track: Track | None,
) -> None:
    """Trains what is left of both models in all processes; the first one then makes the content heads and the mix."""
    out = run.folder
    with building_device(item_shards):
        _run_cooccurrence(run, share, stop)
        start = read_initial_embedding(run)
        lstm, content_model = new_models(share.parts[0], run.model_config, run.train_config.seed, start)
        del start  # of a large catalogue it is large
        give_back_freed_memory()
        common = (mesh, checkpoint_config, run.data_version, stop, track)
        trained_lstm = train_model(lstm, share, run.train_config, out / LSTM_FOLDER, "TimeRatingAwareLSTM", *common)
        give_back_freed_memory()
        trained_content = train_model(
            content_model, share, run.train_config, out / CONTENT_FOLDER, "TimeRatingAwareContentModel", *common
        )
        if any_process(stop())[0]:
            raise TrainingStopped(STOPPED_BEFORE_MIX)
        del lstm, content_model
        in_first(lambda asked: _finish(run, trained_lstm, trained_content, asked), stop)


def _finish(
    run: Run,
    trained_lstm: TrainedModel[TimeRatingAwareLSTM],
    trained_content: TrainedModel[TimeRatingAwareContentModel],
    stop: StopRequested,
) -> None:
    """Makes the content heads and the mix of trained models, from all of the data, in one process."""
    from jaxrec.evaluation.plots import save_plot, training_figure

    def stop_where_asked() -> None:
        if stop():
            raise TrainingStopped(STOPPED_BEFORE_MIX)

    data, models = run.read_data(), (trained_lstm.model, trained_content.model)
    excludes_seen = run.train_config.excludes_seen
    _run_content_heads(run, data, *models, stop)
    stop_where_asked()
    give_back_freed_memory()
    asked, cooccurrence = (data, excludes_seen, stop_where_asked), CoOccurrence(read_neighbours(run))
    mix = learn_mix(trained_lstm.model, trained_content.model, cooccurrence, *asked)
    give_back_freed_memory()
    new = place_new_items(run, data, *models)
    ranked = None
    if new is not None:
        ranked = tune_shift(mix.hybrid(*models, cooccurrence), new, *asked)
    whole = mix.hybrid(*models, cooccurrence, new)
    if new is not None and ranked is not None:
        shift_logits(whole, new, ranked.shift)
    give_back_freed_memory()
    hidden = _tune_on_hidden_items(run, data, whole, excludes_seen, stop_where_asked)
    of_items = {"new_items": ranked, "hidden_items": hidden}
    shifts = {name: None if found is None else dataclasses.asdict(found) for name, found in of_items.items()}
    content = {**dataclasses.asdict(mix), **shifts}
    write_text(run.folder / HYBRID_FILE, json.dumps(content, indent=2) + "\n")
    epochs = {"TimeRatingAwareLSTM": trained_lstm.epochs, "TimeRatingAwareContentModel": trained_content.epochs}
    save_plot(training_figure(epochs), run.folder / PLOT_FILE)


@noticing_loss()
def extend_run(out: Path, data_folder: Path, changes: Mapping[str, Any] = {}) -> None:
    """Moves a run to data that extends its own (from `jaxrec append`); it is trained there when it is resumed.

    `changes`: fields of TrainConfig and their new values. What depends on the old data (mix, policies, evaluation) is
    removed. Nothing happens where the run is on this data already.
    Raises DataError where the catalogue does not begin with that of the run, or there is nothing to train on;
    ProcessLost where another process is gone.
    """
    run = open_run(out)
    summary = summary_file(data_folder)
    digest = sha256(summary) if summary.is_file() else ""
    if run.data_folder == data_folder.resolve() and run.data_digest == digest:
        return
    share = _open_share(data_folder)
    require_trainable(share)
    if _items_digest(share.catalog, run.item_count) != run.items_digest:
        raise DataError(
            f"{data_folder}: its catalogue does not begin with the {run.item_count} items that {out} was trained on; "
            "expected what `jaxrec append` makes of that data"
        )
    train_config = dataclasses.replace(run.train_config, **changes)
    extended = _new_run(out, data_folder, share.catalog, run.model_config, train_config, run.data_version + 1)
    wait_for_all("every process has seen the run as it was")
    if is_first():
        for path in (
            out / name for name in (HYBRID_FILE, NEIGHBOURS_FILE, CONTENT_HEAD_FILE, EVALUATION_FILE, *POLICY_FILES)
        ):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    _write_run(extended)


def _new_run(
    out: Path,
    data_folder: Path,
    catalog: Catalog,
    model_config: ModelConfig,
    train_config: TrainConfig,
    data_version: int = 0,
) -> Run:
    digest, count = sha256(summary_file(data_folder)), len(catalog)
    items_digest = _items_digest(catalog, count)
    return Run(out, data_folder.resolve(), digest, count, items_digest, model_config, train_config, data_version)


def _items_digest(catalog: Catalog, count: int) -> str:
    """SHA-256 of the raw ids of the first `count` items, in their order."""
    return hashlib.sha256("\n".join(map(str, catalog.ids.raw_ids[:count].tolist())).encode()).hexdigest()


def _write_run(run: Run) -> None:
    """Writes run.json; returns in every process when it is there."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "data": str(run.data_folder),
        "data_sha256": run.data_digest,
        "data_version": run.data_version,
        "items": run.item_count,
        "items_sha256": run.items_digest,
        "model": to_json(run.model_config),
        "train": to_json(run.train_config),
        "versions": {name: importlib.metadata.version(name) for name in ("jaxrec", "jax", "flax", "optax")},
        "devices": [device.device_kind for device in jax.devices()],
    }
    if is_first():
        write_text(run.folder / RUN_FILE, json.dumps(content, indent=2) + "\n")
    wait_for_all("run.json is written")


def _run_cooccurrence(run: Run, share: TrainingShare, stop: StopRequested) -> None:
    """Sees to it that the run has the neighbours that it keeps, and what its item vectors start from. Where it has none
    yet all processes count them, and the first writes them, so that all read the same."""
    path, partial = run.folder / NEIGHBOURS_FILE, run.folder / NEIGHBOURS_PARTIAL_FOLDER
    missing = not path.is_file()
    wait_for_all("every process has seen whether the neighbours are to be counted")
    if not missing:
        read_neighbours(run)  # they are needed after the models: a damaged file is found before these are trained
        return

    def empty_folder(asked: StopRequested) -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of a count that was interrupted
        partial.mkdir()

    def wait(point: str) -> None:
        if any_process(stop())[0]:
            raise TrainingStopped(STOPPED_BEFORE_MODELS)

    def write(asked: StopRequested) -> None:
        def before_product() -> None:
            if asked():
                raise TrainingStopped(STOPPED_BEFORE_MODELS)

        # Vectors that start from other counts would not fit what is trained already.
        known, width = run.data_version > 0, run.model_config.embedding
        start = np.zeros((0, 0)) if known else initial_embedding(counted, width, before_product)
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **counted._asdict(), start=start)
        shutil.rmtree(partial)

    in_first(empty_folder)
    counted = neighbours(share, together=Together(jax.process_index(), jax.process_count(), partial, wait))
    in_first(write, stop)


def _run_content_heads(
    run: Run,
    data: PreparedData,
    lstm: TimeRatingAwareLSTM,
    content_model: TimeRatingAwareContentModel,
    stop: StopRequested,
) -> None:
    """Sees to it that the run has the heads of both models, which are made where it has none yet.

    Only the content model's is trained: a head of the LSTM beyond the ridge regression was never measured.
    """
    path = run.folder / CONTENT_HEAD_FILE
    if path.is_file():
        return
    content = item_content(data)
    if not content.names:
        tqdm.write("content head: skipped, since no genre, year or other feature of any item is known")
        return
    popularity = data.train_popularity()
    of_lstm, of_content = (ridge_head(model, content.matrix, popularity) for model in (lstm, content_model))
    of_content = train_head(content_model, of_content, content.matrix, data, run.train_config, stop)
    arrays = {"lstm": of_lstm._asdict(), "content": of_content._asdict()}
    named = {f"{name}_{key}": array for name, head in arrays.items() for key, array in head.items()}
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(content.names), **named)


def _tune_on_hidden_items(
    run: Run, data: PreparedData, hybrid: Hybrid, excludes_seen: bool, before_batch: Callable[[], None]
) -> NewItems | None:
    """How high items rank that come after the training, as known items that are hidden would; None without heads."""
    if not (run.folder / CONTENT_HEAD_FILE).is_file():
        return None
    hidden, features = hidden_items(data, run.train_config.seed), item_content(data)
    heads = read_content_heads(run, features.names)
    unseen = without_events_of(hybrid, hidden, [np.asarray(head.rows(features.matrix)) for head in heads])
    return tune_shift(unseen, hidden, data, excludes_seen, before_batch, counts_without(data, hidden))
