"""The loop goes round: each round once, whatever interrupts it, one at a time, and nothing is published unchecked."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pandas as pd
import pytest
from onnx import numpy_helper

import jaxrec
from jaxrec.data.store import SUMMARY_FILE
from jaxrec.errors import DataError, TrackingError
from jaxrec.files import locked, sha256
from jaxrec.runs.directory import HYBRID_FILE, MLFLOW_FILE, open_run
from jaxrec.runs.learn import stages
from jaxrec.runs.learn.loop import learn
from jaxrec.runs.learn.metrics import metrics_text
from jaxrec.runs.learn.state import State, read_state, write_state
from jaxrec.runs.tracking import Tracker
from jaxrec.training.log import read_epochs
from serve.client import RecommenderClient
from serve.client import UserEvent as Recorded
from serve.stores.base import UserEvent
from tests.runs.learn.conftest import CONFIG, LATER, TRAINING, Loop, events_of, events_of_round, new_loop
from tests.serve.process import running_server
from tests.serve.serving.test_models import wait_for
from tests.tracked import mlflow_client

pytestmark = [  # of MLflow's own code
    pytest.mark.filterwarnings("ignore:.*type hint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STAGES = (
    "events_stage",
    "append_stage",
    "train_stage",
    "gate_stage",
    "export_stage",
    "publish_stage",
    "track_stage",
)
STAGE_OF_COMMAND = {  # without MLflow
    "export-events": "events_stage",
    "append": "append_stage",
    "served": "served_stage",
    "train": "train_stage",
    "gate": "gate_stage",
    "export": "export_stage",
    "publish": "publish_stage",
}
# The command, which notes no end of one stage: it waits to be killed there. So it is killed in no other, however short.
HELD = """
import pathlib, signal, sys
from jaxrec.cli.main import main
from jaxrec.runs.learn import stages

name, done = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1))
play = getattr(stages, name)

def held(*given):
    play(*given)
    done.touch()
    signal.pause()

setattr(stages, name, held)
main()
"""


class Killed(BaseException):
    pass


class Played(NamedTuple):
    """A loop after its first round, and where that was tracked."""

    loop: Loop
    state: State
    mlflow: str


@pytest.fixture(scope="module")
def undisturbed(base: Path, new_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Its round is the only one that is tracked."""
    folder = tmp_path_factory.mktemp("undisturbed")
    loop, uri = new_loop(base, folder), f"sqlite:///{shutil.copy(new_store, folder / 'mlflow.db')}"
    loop.record(events_of_round(1))
    with contextlib.chdir(folder):  # where MLflow keeps the artifacts of such a store
        return Played(loop, learn(loop.places, dataclasses.replace(CONFIG, mlflow=uri)), uri)


def outcome(loop: Loop, state: State, *mlflow: str) -> dict[str, Any]:
    """All that a round comes to, but for times, paths and tracking."""
    model = loop.places.models / state.folder
    return {
        "revision": state.revision,
        "folder": state.folder,
        "reason": state.history[-1].reason,
        "data": json.loads((Path(state.data) / "prepared.json").read_text())["files"],
        "mix": (Path(state.run) / HYBRID_FILE).read_text(),
        "files": {name: sha256(model / name) for name in ("catalog.csv", "item_vectors.npy", "trend_counts.npy")},
        "graphs": {name: weights(model / name) for name in ("sequence.onnx", "step.onnx", "trend.onnx")},
        "rounds": [one.number for one in state.history],
        "models": sorted(path.name for path in loop.places.models.iterdir()),
        "work": sorted(str(path.relative_to(loop.places.work)) for path in loop.places.work.glob("*/*/*")),
    }


def weights(graph: Path) -> list[bytes]:
    """Of a graph, sorted: the names of its nodes are numbered in each process."""
    return sorted(numpy_helper.to_array(one).tobytes() for one in onnx.load(graph).graph.initializer)


def test_a_round_publishes_what_learned_from_the_new_events(undisturbed: Played, base: Path) -> None:
    loop, state, _ = undisturbed
    assert (state.folder, state.revision, state.round) == ("2", 120, None)
    assert open_run(state.run).data_folder == Path(state.data)
    data = jaxrec.read_prepared(state.data)
    assert data.histories.event_count == 60 * 10 + 120
    assert data.histories.times.max() > LATER + 1_000_000_000
    assert "NDCG@10 on the new held-out events of 60 users" in state.said
    assert state.said.startswith(f"round 1, 120 new events: version 2 ({state.model_version}) is published. NDCG@10")
    assert jaxrec.read_prepared(base / "data").histories.event_count == 600
    assert read_state(loop.places.work) == state


def test_the_training_of_a_round_is_tracked_with_the_model_that_came_of_it(undisturbed: Played) -> None:
    client, run = mlflow_client(undisturbed.mlflow), Path(undisturbed.state.run)
    run_id = json.loads((run / MLFLOW_FILE).read_text("utf-8"))["run_id"]
    [experiment] = [one for one in client.search_experiments() if one.name == "jaxrec"]
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status) == (run_id, "FINISHED")
    assert found.data.params["train.batch_tokens"] == str(TRAINING.batch_tokens)
    noted = [one.value for one in client.get_metric_history(run_id, "lstm/epoch/validation_ndcg_10")]
    epochs = [one["validation_ndcg_10"] for one in read_epochs(run / "lstm")]
    assert noted == epochs[-1 - TRAINING.max_epochs :]  # its epochs, after the model that it began with
    assert [one.path for one in client.list_artifacts(run_id)] == ["model"]


def test_runs_of_mlflow_say_what_they_are_of(undisturbed: Played) -> None:
    client, run = mlflow_client(undisturbed.mlflow), Path(undisturbed.state.run)
    found = client.get_run(json.loads((run / MLFLOW_FILE).read_text("utf-8"))["run_id"])
    tags = {name: value for name, value in found.data.tags.items() if name.startswith("jaxrec.")}
    began = tags.pop("jaxrec.time")
    assert datetime.fromisoformat(began).tzinfo is not None
    assert found.info.run_name == f"round 1, models, {began}"
    version = undisturbed.state.model_version
    assert tags == {"jaxrec.round": "1", "jaxrec.kind": "models", "jaxrec.model_version": version}


def test_a_round_that_mlflow_does_not_answer_is_published_and_says_so(
    undisturbed: Played,
    base: Path,
    new_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The next command adds the model to a run of MLflow that tells what it is."""
    loop, store = new_loop(base, tmp_path / "loop"), tmp_path / "mlflow.db"
    loop.record(events_of_round(1))
    monkeypatch.chdir(tmp_path)
    store.mkdir()
    config = dataclasses.replace(CONFIG, mlflow=f"sqlite:///{store}")
    state = learn(loop.places, config)
    lines = capsys.readouterr().err.splitlines()
    training, model = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert training.startswith("the training is not tracked: MLflow at sqlite")
    assert model.startswith("version 2 is not tracked: MLflow at sqlite")
    expected = outcome(*undisturbed)
    assert outcome(loop, state) == {**expected, "reason": f"{training}; {expected['reason']}; {model}"}
    assert (state.error, state.untracked) == ("", model)
    store.rmdir()
    shutil.copy(new_store, store)
    assert learn(loop.places, config).untracked == ""
    assert only_run(config.mlflow or "") == ("FINISHED", state.model_version, ["model"])
    tracked = json.loads((Path(state.run) / MLFLOW_FILE).read_text("utf-8"))["run_id"]
    assert mlflow_client(config.mlflow or "").get_run(tracked).info.run_name.startswith("round 1, models, ")


@pytest.mark.parametrize("store", ["new", "damaged"])
def test_a_store_of_mlflow_that_is_another_one_is_a_result_of_the_stage(
    store: str, undisturbed: Played, new_store: Path, tmp_path: Path
) -> None:
    loop, state, _ = undisturbed
    path = tmp_path / "mlflow.db"
    if store == "new":
        shutil.copy(new_store, path)
    else:
        path.write_text("no database\n" * 100)
    model = loop.places.models / state.folder
    result = stages.track_stage(f"sqlite:///{path}", Path(state.run), model, {})
    assert not result["tracked"]
    assert result["reason"].startswith(f"version 2 is not tracked: MLflow at sqlite:///{path}: ")
    assert ("not found" if store == "new" else "file is not a database") in result["reason"]


def test_the_first_model_is_added_to_the_run_of_mlflow_if_there_is_one(
    base: Path, tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that the loop begins with stays as it is."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(new_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config, client = dataclasses.replace(CONFIG, mlflow=uri), mlflow_client(uri)
    for name in ("untracked", "tracked"):
        loop, run = new_loop(base, tmp_path / name), tmp_path / name / "run"
        shutil.rmtree(loop.places.models)
        shutil.copytree(base / "run", run)
        if name == "tracked":
            Tracker(uri).begin(open_run(run), "FINISHED")
        before = {path: sha256(path) for path in run.rglob("*") if path.is_file()}
        state = learn(dataclasses.replace(loop.places, run=run), config)
        assert (state.folder, state.said) == ("1", "nothing to do: 0 new events since revision 0")
        assert {path: sha256(path) for path in run.rglob("*") if path.is_file()} == before
    [experiment] = [one for one in client.search_experiments() if one.name == "jaxrec"]
    [found] = client.search_runs([experiment.experiment_id])
    assert found.data.tags["jaxrec.model_version"] == state.model_version
    assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["model"]


def test_a_uri_that_is_none_ends_the_command_before_the_round(base: Path, tmp_path: Path) -> None:
    loop = new_loop(base, tmp_path / "loop")
    with pytest.raises(TrackingError, match="expected the URI of MLflow"):
        learn(loop.places, dataclasses.replace(CONFIG, mlflow="http://[x"))
    assert read_state(loop.places.work) is None


def test_a_round_that_is_interrupted_at_every_stage_comes_to_the_same(
    undisturbed: Played, base: Path, new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in each: before it did anything, and after it was done but not noted."""
    played: list[str] = []

    def interrupted(name: str, play: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*given: Any) -> Any:
            played.append(name)
            if played.count(name) == 1:
                raise Killed
            result = play(*given)
            if played.count(name) == 2:
                raise Killed
            return result

        return attempt

    for name in STAGES:
        monkeypatch.setattr(stages, name, interrupted(name, getattr(stages, name)))
    loop = new_loop(base, tmp_path / "loop")
    loop.record(events_of_round(1))
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{shutil.copy(new_store, tmp_path / 'mlflow.db')}"
    state, attempts = None, 0
    while state is None:
        attempts += 1
        try:
            state = learn(loop.places, dataclasses.replace(CONFIG, mlflow=uri))
        except Killed:
            under_way = read_state(loop.places.work)
            assert under_way is not None
            assert under_way.round is not None
    assert played == [name for name in STAGES for _ in range(3)]
    assert attempts == 2 * len(STAGES) + 1
    assert outcome(loop, state) == outcome(*undisturbed)
    assert (only_run(uri), state.untracked) == (("FINISHED", state.model_version, ["model"]), "")


def only_run(uri: str) -> tuple[str, str | None, list[str]]:
    """How the run stands, which MLflow has as the only one, which version it has, and its artifacts."""
    client = mlflow_client(uri)
    [experiment] = [one for one in client.search_experiments() if one.name == "jaxrec"]
    [run] = client.search_runs([experiment.experiment_id])
    artifacts = [one.path for one in client.list_artifacts(run.info.run_id)]
    return run.info.status, run.data.tags.get("jaxrec.model_version"), artifacts


def test_a_version_that_mlflow_missed_is_added_by_the_next_command(
    undisturbed: Played, base: Path, new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store of MLflow is gone between the training and the stage `track`, and then it is back."""
    loop, store, away = new_loop(base, tmp_path / "loop"), tmp_path / "mlflow.db", tmp_path / "away.db"
    shutil.copy(new_store, store)
    monkeypatch.chdir(tmp_path)
    config, gate_stage = dataclasses.replace(CONFIG, mlflow=f"sqlite:///{store}"), stages.gate_stage

    def without_mlflow(*given: Any) -> Any:
        store.rename(away)
        store.write_text("no database\n" * 100)
        return gate_stage(*given)

    monkeypatch.setattr(stages, "gate_stage", without_mlflow)
    loop.record(events_of_round(1))
    state = learn(loop.places, config)
    assert state.untracked.startswith("version 2 is not tracked: MLflow at sqlite")
    reason = outcome(*undisturbed)["reason"]
    assert outcome(loop, state) == {**outcome(*undisturbed), "reason": f"{reason}; {state.untracked}"}
    again = learn(loop.places, config)
    assert again.untracked == state.untracked
    away.replace(store)
    last = learn(loop.places, config)
    assert (last.said, last.untracked) == ("nothing to do: 0 new events since revision 120", "")
    assert read_state(loop.places.work) == last
    assert only_run(config.mlflow or "") == ("FINISHED", state.model_version, ["model"])


@pytest.mark.parametrize("stage", ["publish_stage", "track_stage"])
def test_the_first_version_belongs_to_the_loop_though_it_was_killed(
    stage: str, base: Path, new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the stage was done, and nothing was noted of that."""
    loop, run, play = new_loop(base, tmp_path / "loop"), tmp_path / "run", getattr(stages, stage)
    shutil.rmtree(loop.places.models)
    shutil.copytree(base / "run", run)
    uri = f"sqlite:///{shutil.copy(new_store, tmp_path / 'mlflow.db')}"
    monkeypatch.chdir(tmp_path)
    Tracker(uri).begin(open_run(run), "FINISHED")

    def killed(*given: Any) -> Any:
        play(*given)
        raise Killed

    places, config = dataclasses.replace(loop.places, run=run), dataclasses.replace(CONFIG, mlflow=uri)
    monkeypatch.setattr(stages, stage, killed)
    with pytest.raises(Killed):
        learn(places, config)
    monkeypatch.setattr(stages, stage, play)
    state = learn(places, config)
    assert (state.folder, state.published, state.untracked) == ("1", ("1",), "")
    assert only_run(uri) == ("FINISHED", state.model_version, ["model"])


def test_three_rounds_with_a_server_and_a_kill(undisturbed: Played, base: Path, tmp_path: Path) -> None:
    """A server records and takes each version. The first round is killed (SIGKILL) in a stage that is drawn anew in
    each run, and resumed by the same command. The others are played in this process, where all is compiled.
    KILLED="STAGE MOMENT", as it is printed, repeats one.
    """
    drawn = f"{random.choice(list(STAGE_OF_COMMAND))} {random.choice(('begun', 'done'))}"
    killed_at = os.environ.get("KILLED", drawn)
    print(f'KILLED="{killed_at}"')
    stage, moment = killed_at.split()
    loop = new_loop(base, tmp_path / "loop")
    places = loop.places
    options = ["learn", "--store", places.store, "--margin", "1", "--least-users", "1"]
    for name in ("run", "data", "models", "work"):
        options += [f"--{name}", str(getattr(places, name))]
    with (
        running_server(places.models, places.store, options=("--watch", "0.2")) as server,
        RecommenderClient(server.address, timeout_s=60.0) as client,
    ):
        before = client.get_model_info().model_version
        record(client, events_of_round(1))
        done = tmp_path / "done"
        held = [sys.executable, "-c", HELD, STAGE_OF_COMMAND[stage], str(done)]
        with subprocess.Popen([*held, *options]) as process:
            wait_for_stage(process, places.work, stage, done if moment == "done" else None)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        killed = read_state(places.work)
        assert killed is not None
        assert killed.round is not None
        assert list(killed.round.stages)[-1] == stage
        assert killed.round.result(stage) is None
        if stage != "publish":
            assert client.get_model_info().model_version == before
        subprocess.run([sys.executable, "-m", "jaxrec.cli.main", *options], check=True)
        state = read_state(places.work)
        assert state is not None
        expected = outcome(*undisturbed)
        reason = f"no policy: the store holds no recommendations; {expected['reason']}"
        assert outcome(loop, state) == {**expected, "reason": reason}
        assert {name: noted["attempts"] for name, noted in state.history[-1].stages.items()} == {
            name: 1 + (name == stage) for name in STAGE_OF_COMMAND
        }
        for number in (2, 3):
            wait_until_served(client, state)
            record(client, events_of_round(number))
            state = learn(places, dataclasses.replace(CONFIG, served=True))
            assert state.history[-1].result("export-events")["events"] == 120  # type: ignore[index]
        wait_until_served(client, state)
        assert len(client.recommend(user_id="7", k=5).recommendations) == 5
    assert [one.number for one in state.history] == [1, 2, 3]
    assert jaxrec.read_prepared(state.data).histories.event_count == 600 + 3 * 120


def wait_until_served(client: RecommenderClient, state: State) -> None:
    wait_for(lambda: client.get_model_info().model_version == state.model_version)


def record(client: RecommenderClient, events: list[UserEvent]) -> None:
    client.record_events(
        [
            Recorded(
                event_id=one.event_id,
                user_id=one.user_id,
                item_id=one.event.item_id,
                rating=one.event.rating,
                timestamp=one.event.timestamp,
            )
            for one in events
        ]
    )


def wait_for_stage(process: subprocess.Popen[bytes], work: Path, stage: str, done: Path | None) -> None:
    """Returns when the state says that the stage has begun, or when `done` is there; a state is always whole."""

    def reached() -> bool:
        assert process.poll() is None, "it ended before"
        if done is not None:
            return done.exists()
        state = read_state(work)
        return state is not None and state.round is not None and stage in state.round.stages

    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end, f"{stage} was not reached"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)


def test_without_new_events_nothing_is_done(undisturbed: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, state, _ = undisturbed
    monkeypatch.setattr(stages, "append_stage", None)
    again = learn(loop.places, CONFIG)
    assert again.said == "nothing to do: 0 new events since revision 120"
    assert outcome(loop, again) == outcome(loop, state)
    assert again.succeeded > state.succeeded
    few = learn(loop.places, dataclasses.replace(CONFIG, least_events=7))
    assert few.said == "nothing to do: 0 new events since revision 120, expected at least 7"


def test_late_events_are_learned_from_but_prove_nothing(base: Path, tmp_path: Path) -> None:
    """They come before the last event of their user, so that no held-out event is new: the version stays."""
    loop = new_loop(base, tmp_path / "loop")
    late = pd.DataFrame({"user_id": [1, 2, 999], "item_id": [3, 4, 5], "rating": 3.0, "timestamp": 999_999_999})
    loop.record([*events_of(late, "late"), *events_of(late.assign(user_id="somebody"), "other")])
    state = learn(loop.places, CONFIG)
    assert (state.folder, state.revision, state.history[-1].published) == ("1", 6, False)
    assert state.history[-1].reason.startswith("refused: no user has a new held-out event to compare on")
    assert state.run == str(base / "run")
    assert jaxrec.read_prepared(state.data).log.events.event_count == 600 + 3  # type: ignore[union-attr]
    metrics = metrics_text(state)
    # Users are numbers in this data: those of "somebody" were set aside, and are counted.
    for line in ("published 0.0", "events 6.0", "bad_events 3.0", "revision 6.0", "failed 0.0", "round 1.0"):
        assert f"\njaxrec_learn_{line}\n" in metrics
    assert 'jaxrec_learn_stage_seconds{stage="train"}' in metrics


def test_an_error_is_noted(base: Path, tmp_path: Path) -> None:
    loop = new_loop(base, tmp_path / "loop")
    loop.record(events_of_round(1))
    learn(loop.places, dataclasses.replace(CONFIG, least_events=1000))
    (base / "data").rename(base / "away")
    try:
        with pytest.raises(DataError, match="data"):
            learn(loop.places, CONFIG)
    finally:
        (base / "away").rename(base / "data")
    state = read_state(loop.places.work)
    assert state is not None
    assert "data" in state.error
    assert "\njaxrec_learn_failed 1.0\n" in metrics_text(state)


def test_one_works_at_a_time(base: Path, tmp_path: Path) -> None:
    loop = new_loop(base, tmp_path / "loop")
    with locked(loop.places.work, "learn"), pytest.raises(DataError, match="another `jaxrec learn` is at work there"):
        learn(loop.places, CONFIG)
    assert read_state(loop.places.work) is None


def test_other_data_than_those_of_the_run_and_a_folder_within_it_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "machine")
    loop = new_loop(tmp_path / "machine", tmp_path / "loop")
    places = loop.places
    with pytest.raises(DataError, match=r"work lies within .*run; choose another folder for --work"):
        learn(dataclasses.replace(places, work=places.run / "work"), CONFIG)
    other = tmp_path / "other"
    shutil.copytree(places.data, other)
    summary = other / SUMMARY_FILE
    summary.write_text(summary.read_text() + " ")
    with pytest.raises(DataError, match="other is no copy of it; give its own data"):
        learn(dataclasses.replace(places, data=other), CONFIG)
    assert read_state(places.work) is None


def test_run_and_data_that_were_copied_elsewhere_are_learned_from_where_they_are(base: Path, tmp_path: Path) -> None:
    """The originals are gone by then."""
    shutil.copytree(base, tmp_path / "machine")
    run = tmp_path / "machine/run/run.json"
    run.write_text(run.read_text().replace(str(base), "/gone"))
    before = run.read_text()
    loop = new_loop(tmp_path / "machine", tmp_path / "loop")
    begun = learn(loop.places, CONFIG)
    assert (begun.folder, begun.revision) == ("1", 0)
    assert open_run(begun.run).data_folder == (tmp_path / "machine/data").resolve()
    assert learn(loop.places, CONFIG).run == begun.run  # it stays while it serves
    loop.record(events_of_round(1))
    state = learn(loop.places, CONFIG)
    assert (state.folder, state.revision) == ("2", 120)
    assert jaxrec.read_prepared(state.data).histories.event_count == 60 * 10 + 120
    assert not Path(begun.run).exists()
    assert run.read_text() == before


def test_what_does_not_belong_together_is_refused(base: Path, tmp_path: Path) -> None:
    loop = new_loop(base, tmp_path / "loop")
    places = loop.places
    with pytest.raises(DataError, match="was trained on"):
        learn(dataclasses.replace(places, data=tmp_path), CONFIG)
    manifest = places.models / "1" / "manifest.json"
    before = manifest.read_text()
    content = json.loads(before)
    content["training"]["mix"]["lstm"] = -1.0
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match="the newest version is no export of"):
        learn(places, CONFIG)
    manifest.write_text(before)
    learn(places, CONFIG)
    with pytest.raises(DataError, match="reads the store"):
        learn(dataclasses.replace(places, store="redis://user:secret@host/0"), CONFIG)
    (places.models / "9").mkdir()
    (places.models / "9" / "manifest.json").write_text(json.dumps({**json.loads(before), "model_version": "2999"}))
    with pytest.raises(DataError, match="the newest version is 2999 \\(9\\), the loop published"):
        learn(places, CONFIG)


def test_old_versions_go_but_not_those_that_the_loop_did_not_write(undisturbed: Played) -> None:
    loop, state, _ = undisturbed
    for name in ("0", ".0.jaxrec-learn", ".0.removed", ".rounds"):
        (loop.places.models / name).mkdir()
    write_state(loop.places.work, dataclasses.replace(state, published=("0", "2")))
    assert learn(loop.places, dataclasses.replace(CONFIG, keep=2)).published == ("0", "2")
    assert learn(loop.places, dataclasses.replace(CONFIG, keep=1)).published == ("2",)
    left = sorted(path.name for path in loop.places.models.iterdir())
    assert left == [".0.removed", ".jaxrec-learn.lock", ".rounds", "1", "2"]
    for name in (".rounds", ".0.removed"):
        (loop.places.models / name).rmdir()


def test_a_damaged_state_is_an_error_that_says_what_to_do(tmp_path: Path, undisturbed: Played) -> None:
    write_state(tmp_path, undisturbed.state)
    assert read_state(tmp_path) == undisturbed.state
    (tmp_path / "state.json").write_text('{"schema_version": 1, "round": 3}')
    with pytest.raises(DataError, match="begin another loop with another --work"):
        read_state(tmp_path)
