"""`jaxrec learn`: a round of the loop, from what a server recorded to the next model version, or a reason why not."""

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError, ExportError, TrainingError
from jaxrec.files import sha256
from jaxrec.runs.directory import DATA_FOLDER, HYBRID_FILE, load_supervised, open_run
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.config import LearnConfig
from jaxrec.runs.learn.state import MODELS, POLICY, ROUNDS_FOLDER, Round, State, locked, read_state, write_state
from jaxrec.runs.policy import load_served, policy_name
from jaxrec.training.stopping import StopRequested, never
from serve.model.directory import find_versions
from serve.model.manifest import MANIFEST, ArtifactError

REMOVED = ".removed"  # ends the name of a version that is about to be removed


@dataclasses.dataclass(frozen=True)
class Places:
    """What the loop reads and writes.

    Attributes:
        store: The event store, as `python -m serve run --store` has it. Servers may use it meanwhile.
        run: The run that the loop begins with, finished. It stays as it is.
        data: The prepared data of that run. It stays as it is.
        models: The folder of model directories that a server watches; new versions are added.
        work: The folder of the loop (`jaxrec.runs.learn.state`).
    """

    store: str
    run: Path
    data: Path
    models: Path
    work: Path


def learn(places: Places, config: LearnConfig = LearnConfig(), stop: StopRequested = never) -> State:
    """Plays one round, or goes on with the one that was interrupted, at the stage that was interrupted.

    Stages: the new events are exported from the store and appended to the data. A policy is learned from the slates
    that the server showed, unless the last published round was such a one; its own gate decides (`jaxrec rl served`).
    If that is refused, a copy of the serving run is trained on the grown data, and accepted if it is not worse on new
    held-out events (`jaxrec.runs.learn.gate`). What is accepted is exported as the next version.

    Args:
        places: Where everything is. An empty folder of models gets the export of `run` first.
        config: How to learn.
        stop: Asked between training steps; the round can be gone on with once it is true.

    Returns:
        The state after the round, which is also in WORK/state.json.

    Raises:
        DataError: Something cannot be read or used, does not belong together, or another process is at work.
        ExportError: The run that the loop begins with cannot be exported.
        TrainingStopped: `stop()` became true.
    """
    with locked(places.work):
        for left in places.work.glob(".state.json.*"):
            left.unlink()
        state = read_state(places.work) or _begun(places, config)
        try:
            _check(places, state)
            _clean(places, state)
            state = _played(places, config, state, stop)
        except (DataError, ExportError, TrainingError, OSError) as error:
            state = read_state(places.work) or state
            write_state(places.work, dataclasses.replace(state, error=str(error), ended=time.time()))
            raise
        return state


def _begun(places: Places, config: LearnConfig) -> State:
    """The state before the first round. Raises DataError where run, data and models do not belong together."""
    run = open_run(places.run)
    if run.data_folder != places.data.resolve():
        raise DataError(f"{places.run} was trained on {run.data_folder}, not on {places.data}; give its own data")
    if not (places.run / HYBRID_FILE).is_file():
        raise DataError(f"{places.run}: is not trained to its end: `jaxrec train --out {places.run} --resume`")
    places.models.mkdir(parents=True, exist_ok=True)
    published: tuple[str, ...] = ()
    if not _newest(places.models)[0]:
        result = stages.export_stage(places.run, places.models, "1", config)
        if not result["exported"]:
            raise ExportError(result["reason"])
        published = ("1",)
    folder, version = _newest(places.models)
    _require_export(places, places.models / folder)
    state = State(
        store=_location(places.store),
        first_run=str(places.run.resolve()),
        first_run_sha256=sha256(places.run / HYBRID_FILE),
        run=str(places.run.resolve()),
        data=str(run.data_folder),
        revision=config.after,
        changed=MODELS,
        folder=folder,
        model_version=version,
        published=published,
    )
    write_state(places.work, state)
    return state


def _require_export(places: Places, model: Path) -> None:
    """Raises DataError where the newest version is no export of the run: it would be compared with another model than
    the one that serves."""
    run = open_run(places.run)
    mix = load_served(run, load_supervised(run, run.read_data())).mix_weights()._asdict()
    manifest = _manifest(model)
    if manifest.get("training", {}).get("mix") != mix or manifest.get("policy") != policy_name(run):
        raise DataError(
            f"{model}: the newest version is no export of {places.run}; export it (`jaxrec export {places.run} --out "
            f"{places.models}/N`), or begin with the run that serves"
        )


def _check(places: Places, state: State) -> None:
    """Raises DataError where the command was given other things than the loop was begun with."""
    remove = f"give what the loop was begun with, or remove {places.work} to begin anew"
    if _location(places.store) != state.store:
        raise DataError(
            f"the loop in {places.work} reads the store {state.store}, not {_location(places.store)}; {remove}"
        )
    changed = not (places.run / HYBRID_FILE).is_file() or sha256(places.run / HYBRID_FILE) != state.first_run_sha256
    if str(places.run.resolve()) != state.first_run or changed:
        raise DataError(f"the loop in {places.work} was begun with {state.first_run} as it was then; {remove}")
    exporting = state.round is not None and "export" in state.round.stages
    folder, version = _newest(places.models)
    if not exporting and version != state.model_version:
        raise DataError(
            f"{places.models}: the newest version is {version or 'none'} ({folder}), the loop put out "
            f"{state.model_version}; remove the other one, or remove {places.work} to begin anew with its run"
        )


def _played(places: Places, config: LearnConfig, state: State, stop: StopRequested) -> State:
    """Plays the round to its end."""
    number = max((one.number for one in state.history), default=0) + 1
    if state.round is None:
        state = dataclasses.replace(state, round=Round(number))
    under_way = _UnderWay(places.work, state)
    folder, serving = places.work / ROUNDS_FOLDER / str(number), Path(state.run)
    events = under_way.stage(
        "export-events",
        lambda given: stages.events_stage(places.store, state.revision, folder),
        revision=state.revision,
    )
    if events["events"] < config.least_events:
        said = f"nothing to do: {events['events']} new events since revision {state.revision}"
        said += f", expected at least {config.least_events}" if config.least_events > 1 else ""
        return _ended(places, dataclasses.replace(state, round=None), said, config.keep)
    under_way.stage(
        "append", lambda given: stages.append_stage(Path(state.data), events, folder, config), data=state.data
    )
    accepted, reasons, candidate = False, [], folder / stages.POLICY_RUN_FOLDER
    if config.served and state.changed == MODELS:
        served = under_way.stage(
            "served", lambda given: stages.served_stage(places.store, serving, folder, config, stop), run=state.run
        )
        accepted = served["used"]
        reasons.append(served["reason"])
    changed = POLICY if accepted else MODELS
    if not accepted:
        candidate = folder / stages.RUN_FOLDER
        trained = under_way.stage(
            "train", lambda given: stages.train_stage(serving, folder, config, stop), run=state.run
        )
        if trained["trained"]:
            gate = under_way.stage("gate", lambda given: stages.gate_stage(serving, folder, config), run=state.run)
            accepted = gate["accepted"]
            reasons.append(gate["reason"])
        else:
            reasons.append(trained["reason"])
    if accepted:
        exported = under_way.stage(
            "export",
            lambda given: _exported(candidate, places.models, given["folder"], config),
            folder=_next_folder(places.models),
        )
        accepted = exported["exported"]
        if accepted:
            state = dataclasses.replace(
                state,
                run=str(candidate.resolve()),
                changed=changed,
                folder=exported["folder"],
                model_version=exported["model_version"],
                published=(*state.published, exported["folder"]),
            )
        else:
            reasons.append(exported["reason"])
    finished = dataclasses.replace(under_way.round, published=accepted, reason="; ".join(reasons))
    state = dataclasses.replace(
        state,
        data=str((folder / DATA_FOLDER).resolve()),
        revision=events["revision"],
        round=None,
        history=(*state.history, finished),
    )
    done = f"version {state.folder} ({state.model_version}) is out" if accepted else f"version {state.folder} stays"
    return _ended(
        places, state, f"round {number}, {events['events']} new events: {done}. {finished.reason}", config.keep
    )


def _ended(places: Places, state: State, said: str, keep: int) -> State:
    """Notes how the command ended, then removes what nothing refers to any more."""
    now = time.time()
    published = state.published[-keep:]
    gone = [name for name in state.published if name not in published and name != state.folder]
    state = dataclasses.replace(state, published=published, ended=now, succeeded=now, error="", said=said)
    for name in gone:
        # Whole as long as it has its name. After a kill it may be gone already.
        if (places.models / name).exists():
            (places.models / name).rename(places.models / f".{name}{REMOVED}")
    write_state(places.work, state)
    _clean(places, state)
    return state


def _clean(places: Places, state: State) -> None:
    """Removes the folders of rounds that neither the serving run nor the data is in, and versions to be removed."""
    kept = {Path(state.run), open_run(state.run).data_folder, Path(state.data)}
    under_way = None if state.round is None else str(state.round.number)
    for folder in (places.work / ROUNDS_FOLDER).resolve().glob("*"):
        if folder.name != under_way:
            for path in [path for path in folder.iterdir() if path not in kept]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
    for path in places.models.glob(f".*{REMOVED}"):
        shutil.rmtree(path)


class _UnderWay:
    """The round that is under way, noted in the state file before and after each stage."""

    def __init__(self, work: Path, state: State) -> None:
        assert state.round is not None
        self._work, self._state, self.round = work, state, state.round

    def stage(self, name: str, play: Callable[[Mapping[str, Any]], dict[str, Any]], **given: Any) -> Mapping[str, Any]:
        """What a stage came to, now or before the command was interrupted. `play` gets what was `given` when the stage
        was first begun."""
        known = self.round.result(name)
        if known is not None:
            return known
        before = self.round.stages.get(name, {"given": given, "attempts": 0})
        begun = {**before, "began": time.time(), "attempts": before["attempts"] + 1}
        self._note(name, begun)
        clock = time.monotonic()
        result = play(begun["given"])
        self._note(name, {**begun, "seconds": round(time.monotonic() - clock, 3), "result": result})
        return result

    def _note(self, name: str, record: Mapping[str, Any]) -> None:
        self.round = dataclasses.replace(self.round, stages={**self.round.stages, name: record})
        write_state(self._work, dataclasses.replace(self._state, round=self.round))


def _exported(run: Path, models: Path, name: str, config: LearnConfig) -> dict[str, Any]:
    """The version that the stage wrote before it was interrupted, or a new one."""
    if (models / name / MANIFEST).is_file():
        manifest = _manifest(models / name)
        found = {"model_version": manifest["model_version"], "policy": manifest["policy"]}
        return {"exported": True, "folder": name, **found}
    return stages.export_stage(run, models, name, config)


def _newest(models: Path) -> tuple[str, str]:
    """The folder and the version of the newest model; empty: there is none. Raises DataError."""
    if (models / MANIFEST).exists():
        raise DataError(f"{models}: is a model directory; expected a folder with model directories in it")
    try:
        versions = [one for one in find_versions(models) if one.model_version]
    except ArtifactError as error:
        raise DataError(str(error)) from error
    return (versions[0].folder, versions[0].model_version) if versions else ("", "")


def _next_folder(models: Path) -> str:
    """The number after the largest one that is the name of a version."""
    return str(max((int(path.name) for path in models.iterdir() if path.name.isdecimal()), default=0) + 1)


def _manifest(model: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((model / MANIFEST).read_text(encoding="utf-8"))
    return content


def _location(store: str) -> str:
    """Where the store is, without user and password."""
    return re.sub(r"//[^/]*@", "//", store) if "://" in store else str(Path(store).resolve())
