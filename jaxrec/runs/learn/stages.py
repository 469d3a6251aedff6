"""The stages of a round. Each may be begun again after it was interrupted, and then comes to the same.

A stage writes its folders and files wholly or not at all, under the round's folder, and returns what the state notes.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrec.config import from_json
from jaxrec.data.append import KnownEvents, append
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.columns import ColumnNames
from jaxrec.data.reading.rules import TimeUnit
from jaxrec.data.store import SUMMARY_FILE, read_prepared, summary_file
from jaxrec.errors import DataError, ExportError, NoUsableRow, TrackingError, TrainingError
from jaxrec.files import new_directory, read_json, sha256, write_text
from jaxrec.rl.config import LoggedConfig, ServedConfig
from jaxrec.runs.directory import (
    DATA_FOLDER,
    MLFLOW_FILE,
    RERANKER_OUTCOME_FILE,
    RERANKER_PARTIAL_FOLDER,
    RUN_FILE,
    load_supervised,
    open_run,
)
from jaxrec.runs.export import NO_LICENCE, export
from jaxrec.runs.learn.config import LearnConfig
from jaxrec.runs.learn.gate import compare
from jaxrec.runs.learn.state import MODELS
from jaxrec.runs.learn.versions import manifest, publish
from jaxrec.runs.policy import LoadedRun, load_served
from jaxrec.runs.rl_logged import run_logged
from jaxrec.runs.rl_served import run_served
from jaxrec.runs.tracking import RUN_NAME, Tracker
from jaxrec.runs.train import extend_run, train
from jaxrec.training.stopping import StopRequested
from serve.event_log.export import COLUMNS, export_events
from serve.stores import open_store
from serve.stores.base import StoreError
from serve.stores.copy import copy_log

EVENTS_FILE, LOG_FILE = "events.parquet", "log.sqlite"
RUN_FOLDER, POLICY_RUN_FOLDER, MODEL_FOLDER = "run", "policy", "model"
Result = dict[str, Any]


def events_stage(store: str, after: int, folder: Path) -> Result:
    """Writes the events that the store recorded after a revision.

    Raises:
        DataError: The store cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EVENTS_FILE
    try:
        with open_store(store) as opened:
            exported = export_events(opened, path, after)
    except StoreError as error:
        raise DataError(str(error)) from error
    return {"after": after, "events": exported.events, "revision": exported.revision, "sha256": sha256(path)}


def has_events(events: Mapping[str, Any], folder: Path) -> bool:
    """Whether the file of the stage `export-events` is as that wrote it."""
    path = folder / EVENTS_FILE
    return path.is_file() and sha256(path) == events["sha256"]


def append_stage(data: Path, folder: Path, config: LearnConfig) -> Result:
    """Adds the events to the data, in a new folder: a model may still refer to the old one. Events that are in the data
    already are left out. That no event can be used is a result, unless bad rows are an error.

    Raises:
        DataError: The events cannot be used.
    """
    out = folder / DATA_FOLDER
    if not (out / SUMMARY_FILE).is_file():
        try:
            append(
                data,
                folder / EVENTS_FILE,
                config.movies,
                features=config.features,
                out=out,
                options=ReadOptions(ColumnNames(*COLUMNS), time_unit=TimeUnit.SECONDS),
                on_bad_rows=config.on_bad_rows,
                known_events=KnownEvents.LEAVE_OUT,
            )
        except NoUsableRow as error:
            return {"usable": False, "input": {"bad_rows": error.bad_rows}, "reason": f"no new data: {error}"}
    result = read_prepared(out)
    counts = {name: value for name, value in result.input.items() if isinstance(value, int | str | dict | list)}
    grown = {"data_sha256": result.digest, "input": counts, "events": result.histories.event_count}
    return {"usable": True, **grown}


def served_stage(store: str, run: Path, folder: Path, config: LearnConfig, stop: StopRequested) -> Result:
    """Learns a policy on top of the serving models from what the server showed. That there is too little to learn from
    is a result.

    Raises:
        DataError: The store or the run cannot be read.
        TrainingStopped: `stop()` became true.
    """
    try:
        with open_store(store) as opened:
            copied = copy_log(opened, folder / LOG_FILE)
    except StoreError as error:
        raise DataError(str(error)) from error
    if not copied.slates:
        return {"used": False, "reason": "no policy: the store holds no recommendations"}
    candidate = folder / POLICY_RUN_FOLDER
    _copy_run(run, candidate)
    opened_run = open_run(candidate)
    data = opened_run.read_data()
    supervised = load_supervised(opened_run, data)
    load_served(opened_run, supervised)  # a damaged policy is an error, too
    if supervised.repeat is not None:
        return {"used": False, "reason": "no policy: the run may recommend items of the history again"}
    loaded = LoadedRun(opened_run, data, supervised)
    try:
        outcome = run_served(
            loaded, folder / LOG_FILE, ServedConfig(attribution_window=config.attribution_window), stop
        )
    except (DataError, TrainingError) as error:
        return {"used": False, "reason": f"no policy: {error}"}
    return {"used": outcome.used, "reason": outcome.reason, "differences": outcome.differences}


def train_stage(run: Path, folder: Path, config: LearnConfig, stop: StopRequested) -> Result:
    """Trains a copy of the serving run on the grown data, from where the copy stands, and then its reranker, if the
    serving run was given one (`jaxrec rl logged`), with the same configuration.

    If MLflow does not answer before training begins, it is not tracked, and the result says why.

    Raises:
        DataError: The data does not extend that of the run.
        TrainingStopped: `stop()` became true.
    """
    candidate, data = folder / RUN_FOLDER, folder / DATA_FOLDER
    if not (candidate / RUN_FILE).is_file():
        _copy_run(run, candidate)
    changes = {name: value for name in ("max_epochs", "patience") if (value := getattr(config, name)) is not None}
    extend_run(candidate, data, changes)
    untracked = ""
    try:
        try:
            tags = tags_of(folder, MODELS)
            trained = train(None, candidate, resume=True, stop=stop, mlflow=config.mlflow, mlflow_tags=tags)
        except TrackingError as error:
            untracked = _warning(f"the training is not tracked: {error}")
            trained = train(None, candidate, resume=True, stop=stop)
    except TrainingError as error:
        return {"trained": False, "reason": f"refused: {error}", "untracked": untracked}
    result = {"trained": True, "from": str(run), "data_sha256": trained.data_digest, "untracked": untracked}
    learned = run / RERANKER_OUTCOME_FILE
    if learned.is_file() and not (candidate / RERANKER_OUTCOME_FILE).is_file():
        of_serving = from_json(LoggedConfig, read_json(learned, "run `jaxrec rl logged` again")["configuration"])
        interrupted = (candidate / RERANKER_PARTIAL_FOLDER).is_dir()
        try:
            result["reranker"] = run_logged(open_run(candidate), of_serving, interrupted, stop).reason
        except TrainingError as error:
            result["reranker"] = f"refused: {error}"
    return result


def gate_stage(serving: Path, published: Path, folder: Path, config: LearnConfig) -> Result:
    """Compares the retrained run with the serving one. Raises DataError where one of them cannot be read."""
    decision = compare(serving, folder / RUN_FOLDER, published, config.margin, config.least_users)
    return dataclasses.asdict(decision)


def export_stage(run: Path, folder: Path, config: LearnConfig) -> Result:
    """Exports a run into the round's folder. That it cannot be exported is a result.

    Raises:
        DataError: The run cannot be read.
    """
    try:
        made = export(run, folder / MODEL_FOLDER, config.licence or NO_LICENCE, config.int8, config.index)
    except ExportError as error:
        return {"exported": False, "reason": f"refused: {error}"}
    return {"exported": True, "model_version": made["model_version"], "policy": made["policy"]}


def publish_stage(folder: Path, models: Path) -> Result:
    """Copies the export of the round into the folder of models. Raises DataError where that cannot be read."""
    return {"folder": publish(folder / MODEL_FOLDER, models)}


def track_stage(uri: str, run: Path, model: Path, tags: Mapping[str, str] | None) -> Result:
    """Adds a published model to its run of MLflow. That MLflow does not take it is a result, and no error: it serves.

    Args:
        uri: Of MLflow.
        run: The run that was exported.
        model: The version in the folder of models.
        tags: Of a new run of MLflow, if `run` has none. None: then it is not tracked, and its folder stays as it is.
    """
    try:
        tracker, opened = Tracker(uri), open_run(run)
        if tags is not None:
            tracker.begin(opened, "FINISHED", tags)
        elif not tracker.find(opened):
            return {"tracked": False, "reason": ""}
        tracker.log_model(model, manifest(model))
    except TrackingError as error:
        return {"tracked": False, "reason": _warning(f"version {model.name} is not tracked: {error}")}
    return {"tracked": True, "reason": ""}


def tags_of(folder: Path, kind: str) -> dict[str, str]:
    """What tells the runs of MLflow apart: the round, what it changed (MODELS or POLICY), and when.

    Args:
        folder: Of the round.
        kind: What the run is.
    """
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = f"round {folder.name}, {kind}, {now}"
    return {RUN_NAME: name, "jaxrec.round": folder.name, "jaxrec.kind": kind, "jaxrec.time": now}


def _warning(text: str) -> str:
    tqdm.write(f"warning: {text}", file=sys.stderr)
    return text


def _copy_run(run: Path, out: Path) -> None:
    """A copy of a run, without the data that it may hold, to which the copy refers, and with no run of MLflow yet."""
    open_run(run)
    with new_directory(out, RUN_FILE) as new:
        _copy_without(run, new, DATA_FOLDER, MLFLOW_FILE)


def copy_run_to_data(run: Path, out: Path, data: Path) -> None:
    """A copy of a run that refers to `data`, where the data of the run is now, and is the same run of MLflow.

    Raises:
        DataError: The folder holds other data, or the run cannot be read.
    """
    opened, summary = open_run(run), summary_file(data)
    if not summary.is_file() or sha256(summary) != opened.data_digest:
        raise DataError(f"{run} was trained on {opened.data_folder}, and {data} is no copy of it; give its own data")
    content = read_json(run / RUN_FILE, "expected a folder written by `jaxrec train`")
    with new_directory(out, RUN_FILE) as new:
        _copy_without(run, new, DATA_FOLDER)
        write_text(new / RUN_FILE, json.dumps({**content, "data": str(data.resolve())}, indent=2) + "\n")


def _copy_without(run: Path, new: Path, *left_out: str) -> None:
    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in left_out if Path(folder) == run and name in names]

    shutil.copytree(run, new, ignore=ignore, dirs_exist_ok=True)
