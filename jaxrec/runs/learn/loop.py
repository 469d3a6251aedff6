"""`jaxrec learn`: a round of the loop, from what a server recorded to the next model version, or a reason why not."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError, TrainingStopped
from jaxrec.files import locked
from jaxrec.runs import tracking
from jaxrec.runs.directory import DATA_FOLDER, open_run
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.config import LearnConfig, Places
from jaxrec.runs.learn.start import begin, check
from jaxrec.runs.learn.state import (
    MODELS,
    POLICY,
    ROUNDS_FOLDER,
    STATE_FILE,
    Round,
    State,
    UnderWay,
    read_state,
    write_state,
)
from jaxrec.runs.learn.versions import clean, remove
from jaxrec.training.stopping import StopRequested, never
from serve.model.manifest import MANIFEST

# By stage, the settings that it uses: once it is done they stay until the round has ended.
SETTINGS = {
    "export-events": ("least_events",),
    "append": ("on_bad_rows", "movies", "features"),
    "served": ("attribution_window",),
    "train": ("max_epochs", "patience"),
    "gate": ("margin", "least_users"),
    "export": ("int8", "index"),
}


def learn(places: Places, config: LearnConfig = LearnConfig(), stop: StopRequested = never) -> State:
    """Runs one round, or resumes the one that was interrupted, at the stage that was interrupted.

    Stages: the new events are exported from the store and appended to the data. A policy is learned from the slates
    that the server showed, unless the last published round was such a one; its own gate decides (`jaxrec rl served`).
    If that is refused, a copy of the serving run is trained on the grown data, and accepted if it is not worse on new
    held-out events (`jaxrec.runs.learn.gate`). What is accepted is exported, published as the next version,
    and then tracked.

    Args:
        places: Where everything is. An empty folder of models gets the export of `run` first.
        config: How to learn.
        stop: Asked between training steps; the round can be resumed once it is true.

    Returns:
        The state after the round, which is also in WORK/state.json.

    Raises:
        DataError: Something cannot be read or used, does not belong together, or another process is at work.
        ExportError: The run that the loop begins with cannot be exported.
        TrackingError: MLflow is not installed, or its URI is none. If it fails later, the round goes on without it, and
            the next call tries again to add the newest version.
        TrainingStopped: `stop()` became true.
    """
    with locked(places.work, "learn", 0o700), locked(places.models, "learn"):
        try:
            for left in places.work.glob(f".{STATE_FILE}.*"):
                left.unlink()
            if config.mlflow is not None:
                tracking.check(config.mlflow)
            state = read_state(places.work) or begin(places, config)
            check(places, config, state)
            if config.mlflow is not None and state.untracked:
                state = _track_again(places, config.mlflow, state)
            _clean(places, state)
            return _round(places, config, state, stop)
        except TrainingStopped:
            raise
        except Exception as error:
            _note(places.work, error)
            raise


def _note(work: Path, error: Exception) -> None:
    """Notes why a command failed, if there is a state to note it in."""
    try:
        state = read_state(work)
        if state is not None:
            said = str(error) or type(error).__name__
            write_state(work, dataclasses.replace(state, error=said, ended=time.time()))
    except (DataError, OSError) as second:
        error.add_note(f"The state could not be written: {second}")


def _track_again(places: Places, uri: str, state: State) -> State:
    """Tries to add the newest version to MLflow, which did not take it before, and notes what came of it."""
    run = Path(state.run)
    begun_with = (Path(state.first_run), (places.work / ROUNDS_FOLDER / "0" / stages.RUN_FOLDER).resolve())
    tags = None if run in begun_with else stages.tags_of(run.parent, state.changed)
    tracked = stages.track_stage(uri, run, places.models / state.folder, tags)
    state = dataclasses.replace(state, untracked=tracked["reason"])
    write_state(places.work, state)
    return state


def _round(places: Places, config: LearnConfig, state: State, stop: StopRequested) -> State:
    """Runs the round to its end."""
    number = max((one.number for one in state.history), default=0) + 1
    if state.round is None:
        state = dataclasses.replace(state, round=Round(number))
    settings = {stage: {name: str(getattr(config, name)) for name in names} for stage, names in SETTINGS.items()}
    under_way = UnderWay(places.work, state, settings)
    folder = places.work / ROUNDS_FOLDER / str(number)
    appended = under_way.round.result("append") is not None
    events = under_way.stage(
        "export-events",
        lambda: stages.events_stage(places.store, state.revision, folder),
        lambda result: appended or stages.has_events(result, folder),
        revision=state.revision,
    )
    if events["events"] < config.least_events:
        said = f"nothing to do: {events['events']} new events since revision {state.revision}"
        said += f", expected at least {config.least_events}" if config.least_events > 1 else ""
        return _ended(places, dataclasses.replace(state, round=None), said, config.keep)
    grown = under_way.stage("append", lambda: stages.append_stage(Path(state.data), folder, config), data=state.data)
    accepted, reasons = False, [grown.get("reason", "")]
    if grown["usable"]:
        accepted, reasons, learned = _learned(places, config, state, under_way, folder, stop)
        state = dataclasses.replace(state, data=str((folder / DATA_FOLDER).resolve()))
        if accepted:
            state = dataclasses.replace(state, **learned, published_data=state.data)
    finished = dataclasses.replace(under_way.round, published=accepted, reason="; ".join(filter(None, reasons)))
    state = dataclasses.replace(state, revision=events["revision"], round=None, history=(*state.history, finished))
    bad = grown["input"].get("bad_rows", 0)
    new = f"{events['events']} new events" + (f" ({bad} set aside)" if bad else "")
    done = (
        f"version {state.folder} ({state.model_version}) is published" if accepted else f"version {state.folder} stays"
    )
    return _ended(places, state, f"round {number}, {new}: {done}. {finished.reason}", config.keep)


def _learned(
    places: Places, config: LearnConfig, state: State, under_way: UnderWay, folder: Path, stop: StopRequested
) -> tuple[bool, list[str], dict[str, Any]]:
    """The stages after the data is grown: whether a version was published, the reasons, and what changed in the
    state."""
    accepted, reasons, candidate, serving = False, [], folder / stages.POLICY_RUN_FOLDER, Path(state.run)
    if config.served and state.changed == MODELS:
        served = under_way.stage(
            "served", lambda: stages.served_stage(places.store, serving, folder, config, stop), run=state.run
        )
        accepted = served["used"]
        reasons.append(served["reason"])
    changed = POLICY if accepted else MODELS
    if not accepted:
        candidate = folder / stages.RUN_FOLDER
        trained = under_way.stage("train", lambda: stages.train_stage(serving, folder, config, stop), run=state.run)
        reasons.append(trained.get("untracked", ""))
        if not trained["trained"]:
            return False, [*reasons, trained["reason"]], {}
        published = Path(state.published_data)
        gate = under_way.stage("gate", lambda: stages.gate_stage(serving, published, folder, config), run=state.run)
        accepted = gate["accepted"]
        reasons.append(gate["reason"])
    if not accepted:
        return False, reasons, {}
    published_already = under_way.round.result("publish") is not None
    exported = under_way.stage(
        "export",
        lambda: stages.export_stage(candidate, folder, config),
        lambda result: (
            published_already or not result["exported"] or (folder / stages.MODEL_FOLDER / MANIFEST).is_file()
        ),
        run=str(candidate),
    )
    if not exported["exported"]:
        return False, [*reasons, exported["reason"]], {}
    version = exported["model_version"]
    placed = under_way.stage("publish", lambda: stages.publish_stage(folder, places.models), model_version=version)
    untracked = ""
    if (uri := config.mlflow) is not None:
        model, tags = places.models / placed["folder"], stages.tags_of(folder, changed)
        tracked = under_way.stage("track", lambda: stages.track_stage(uri, candidate, model, tags), run=str(candidate))
        untracked = tracked["reason"]
    learned = {
        "run": str(candidate.resolve()),
        "changed": changed,
        "folder": placed["folder"],
        "model_version": version,
        "published": (*state.published, placed["folder"]),
        "untracked": untracked,
    }
    return True, [*reasons, untracked], learned


def _ended(places: Places, state: State, said: str, keep: int) -> State:
    """Notes how the command ended, then removes what nothing refers to any more."""
    now = time.time()
    published = state.published[-keep:]
    gone = [name for name in state.published if name not in published and name != state.folder]
    state = dataclasses.replace(state, published=published, ended=now, succeeded=now, error="", said=said)
    remove(places.models, gone)
    write_state(places.work, state)
    _clean(places, state)
    return state


def _clean(places: Places, state: State) -> None:
    """Removes folders of rounds that the state does not refer to, and what the loop left in the folder of models."""
    run = open_run(state.run)
    kept = {path.resolve() for path in (run.folder, run.data_folder, Path(state.data), Path(state.published_data))}
    under_way = None if state.round is None else str(state.round.number)
    for folder in (places.work / ROUNDS_FOLDER).resolve().glob("*"):
        if folder.name != under_way:
            for path in [path for path in folder.iterdir() if path.resolve() not in kept]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
    clean(places.models)
