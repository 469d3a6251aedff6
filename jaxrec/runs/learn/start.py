"""How the loop begins, and whether a later command belongs to it."""

import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from jaxrec.errors import DataError, ExportError
from jaxrec.files import sha256
from jaxrec.onnx.model_directory import policy_name
from jaxrec.runs.directory import HYBRID_FILE, Run, load_supervised, open_run
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.config import LearnConfig, Places
from jaxrec.runs.learn.state import MODELS, ROUNDS_FOLDER, State, write_state
from jaxrec.runs.learn.versions import clean, manifest, newest
from jaxrec.runs.policy import load_served
from serve.model.manifest import MANIFEST

KEPT = ("host", "hostaddr", "port", "dbname", "db")  # of the query of a store's URL
PLACE = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[\w.%-]*)(:\d*)?(,(\[[0-9A-Fa-f:.%]*\]|[\w.%-]*)(:\d*)?)*(/[^@?#]*)?")


def begin(places: Places, config: LearnConfig) -> State:
    """Writes the state before the first round. An empty folder of models gets the export of the run.

    If the data is not where the run was trained on it, as after both were copied to another machine, the loop begins
    with a copy of the run that refers to where it is.

    Raises:
        DataError: Run, data and models do not belong together.
        ExportError: The run cannot be exported.
    """
    run, first = open_run(places.run), places.work / ROUNDS_FOLDER / "0"
    if places.work.resolve().is_relative_to(places.run.resolve()):
        raise DataError(f"{places.work} lies within {places.run}; choose another folder for --work")
    if not (places.run / HYBRID_FILE).is_file():
        raise DataError(f"{places.run}: is not trained to its end: `jaxrec train --out {places.run} --resume`")
    if run.data_folder.resolve() != places.data.resolve():
        stages.copy_run_to_data(places.run, first / stages.RUN_FOLDER, places.data)
        run = open_run(first / stages.RUN_FOLDER)
    if not newest(places.models)[0]:
        clean(places.models)
        exported = stages.export_stage(run.folder, first, config)
        if not exported["exported"]:
            raise ExportError(exported["reason"])
        stages.publish_stage(first, places.models)
    folder, version = newest(places.models)
    own = (first / stages.MODEL_FOLDER / MANIFEST).is_file()  # published now, or before a kill
    own = own and manifest(first / stages.MODEL_FOLDER)["model_version"] == version
    _require_export(places, run, places.models / folder)
    state = State(
        store=location(places.store),
        first_run=str(places.run.resolve()),
        first_run_sha256=sha256(places.run / HYBRID_FILE),
        run=str(run.folder.resolve()),
        data=str(run.data_folder),
        published_data=str(run.data_folder),
        after=config.after,
        revision=config.after,
        changed=MODELS,
        folder=folder,
        model_version=version,
        published=(folder,) if own else (),
        untracked="not tracked yet" if own and config.mlflow is not None else "",
    )
    write_state(places.work, state)
    return state


def _require_export(places: Places, run: Run, model: Path) -> None:
    """Raises DataError where the newest version is no export of the run: it would be compared with another model than
    the one that serves."""
    served, found = load_served(run, load_supervised(run, run.read_data())), manifest(model)
    mix = served.mix_weights()._asdict()
    if found.get("training", {}).get("mix") != mix or found.get("policy") != policy_name(served):
        raise DataError(
            f"{model}: the newest version is no export of {places.run}; export it (`jaxrec export {run.folder} --out "
            f"{places.models}/N`), or begin with the run that serves"
        )


def check(places: Places, config: LearnConfig, state: State) -> None:
    """Raises DataError where the command was given other things than the loop was begun with, or its folder of models
    has a newer version that is not its own."""
    another = (
        f"give what the loop was begun with, or begin another one with another --work ({places.work} stays: it holds "
        "the run that serves, and its data)"
    )
    if location(places.store) != state.store:
        raise DataError(
            f"the loop in {places.work} reads the store {state.store}, not {location(places.store)}; {another}"
        )
    changed = not (places.run / HYBRID_FILE).is_file() or sha256(places.run / HYBRID_FILE) != state.first_run_sha256
    if str(places.run.resolve()) != state.first_run or changed:
        raise DataError(f"the loop in {places.work} was begun with {state.first_run} as it was then; {another}")
    if config.after not in (LearnConfig.after, state.after):
        raise DataError(
            f"the loop in {places.work} was begun after revision {state.after}, not {config.after}; {another}"
        )
    exported = None if state.round is None else state.round.result("export")
    own = {state.model_version, "" if exported is None else exported.get("model_version", "")}
    folder, version = newest(places.models)
    if not version or version not in own:
        raise DataError(
            f"{places.models}: the newest version is {version or 'none'} ({folder}), the loop published "
            f"{state.model_version}; remove the other one, or begin another loop with its run and another --work"
        )


def location(store: str) -> str:
    """Where a store is: a path, or host, port and database of a URL, without all that may be secret.

    Examples:
        >>> location("postgresql://me:secret@h:5432/d?sslmode=require&password=secret")
        'postgresql://h:5432/d'
        >>> location("postgresql:///d?host=/run/postgresql&user=me")
        'postgresql:///d?host=%2Frun%2Fpostgresql'
    """
    scheme, separator, _ = store.partition("://")
    if not separator:
        return str(Path(store).resolve())
    try:
        parts = urlsplit(store)
        place = parts.netloc.rpartition("@")[2] + parts.path
        query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if name in KEPT])
    except ValueError:  # what urlsplit cannot read
        place, query = "@", ""
    if not PLACE.fullmatch(place):  # a password that is not percent-encoded, perhaps
        return f"{scheme}://"
    return f"{scheme}://{place}{'?' if query else ''}{query}"
