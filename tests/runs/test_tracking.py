"""Tracking with MLflow: what a store gets, what is refused, and that a store that fails ends no training."""

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

import jaxrec
from jaxrec.cli.main import main
from jaxrec.errors import DataError, TrackingError, TrainingStopped
from jaxrec.runs.directory import EVALUATION_FILE, HYBRID_FILE, MLFLOW_FILE, Run
from jaxrec.runs.tracking import DATA_NAME, EXPECTED, EXPERIMENT, LIMITS, Tracker, with_limits
from jaxrec.training.log import TENSORBOARD_STEPS, read_epochs, read_steps
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from tests.ports import reserved_port
from tests.synthetic import markov_log
from tests.tracked import mlflow_client
from tests.training.test_train_sharding import DEADLINE_SECONDS, start_python

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = [  # of MLflow's own code
    pytest.mark.filterwarnings("ignore:.*type hint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MODEL = jaxrec.ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=8)
TRAINING = jaxrec.TrainConfig(max_epochs=2, batch_tokens=128)
EVERYTHING = jaxrec.PrepareConfig(min_user_ratings=1, min_movie_ratings=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "data"
    jaxrec.prepare(markov_log(users=30, items=20, events=10, stay=0.9, seed=0), None, EVERYTHING, out=folder)
    return folder


@pytest.fixture
def uri(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # where MLflow keeps the artifacts of such a store
    shutil.copy(new_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def train(data: Path, out: Path, uri: str, **options: object) -> Run:
    return jaxrec.train(data, out, MODEL, TRAINING, mlflow=uri, **options)


@pytest.fixture(scope="module")
def kept(data: Path, new_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/run, evaluated, and the store FOLDER/mlflow.db in which it was tracked."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copy(new_store, folder / "mlflow.db")
    with contextlib.chdir(folder):
        jaxrec.evaluate(train(data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}"))
    return folder


@pytest.fixture
def run(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy, tracked in the store `uri_of(run)`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return jaxrec.open_run(tmp_path / "run")


def uri_of(run: Run) -> str:
    return f"sqlite:///{run.folder.parent / 'mlflow.db'}"


def tracked_id(folder: Path) -> str:
    return str(json.loads((folder / MLFLOW_FILE).read_text("utf-8"))["run_id"])


def status(client: "MlflowClient", folder: Path) -> str:
    return str(client.get_run(tracked_id(folder)).info.status)


def execute(uri: str, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as store:
        store.execute(statement)
        store.commit()


def test_a_store_gets_the_configuration_and_the_metrics_by_step(run: Run) -> None:
    client = mlflow_client(uri_of(run))
    found = client.get_run(tracked_id(run.folder))
    assert found.info.run_name == "run"
    assert found.data.params["train.batch_tokens"] == "128"
    assert found.data.params["model.hidden"] == "8"
    assert status(client, run.folder) == "FINISHED"
    for folder in ("lstm", "content"):
        noted = client.get_metric_history(found.info.run_id, f"{folder}/train/loss")
        steps = [(one["step"], one["loss"]) for one in read_steps(run.folder / folder)]
        assert [(one.step, one.value) for one in noted] == [one for one in steps if one[0] % TENSORBOARD_STEPS == 0]
        epochs = client.get_metric_history(found.info.run_id, f"{folder}/epoch/validation_ndcg_10")
        assert [one.value for one in epochs] == [one["validation_ndcg_10"] for one in read_epochs(run.folder / folder)]


def test_a_store_gets_a_model_that_answers_as_the_server_and_the_test_metrics(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = uri_of(run)
    client = mlflow_client(uri)
    client.update_run(tracked_id(run.folder), status="KILLED")
    ended = CliRunner().invoke(main, ["export", str(run.folder), "--out", str(tmp_path / "model"), "--mlflow", uri])
    assert ended.exit_code == 0, ended.output
    metrics = client.get_run(tracked_id(run.folder)).data.metrics
    rows = json.loads((run.folder / EVALUATION_FILE).read_text("utf-8"))["rows"]
    for row in rows:
        name = f"test/{row['name']}/{'with' if row['request_time'] else 'without'}_request_time/ndcg_10"
        assert metrics[name] == row["ndcg_10"]["mean"]
    assert status(client, run.folder) == "KILLED"  # as the training ended

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(f"runs:/{tracked_id(run.folder)}/model")
    events = [
        ("b", "3", 4.0, 200),
        ("a", "1", None, 100),
        ("b", "2", 5.0, 100),
        ("a", "5", 3.0, 300),
        ("c", "no", 3.0, 5),
    ]
    frame = pd.DataFrame(events, columns=["user_id", "item_id", "rating", "timestamp"])
    answers = model.predict(frame, params={"k": 4})
    served = Recommender(read_artifact(tmp_path / "model"))
    histories = {user: [Event(*event[1:]) for event in events if event[0] == user] for user in "bac"}
    expected = [
        (user, rank, served.catalog.item_ids[item], served.catalog.titles[item], float(score))
        for user, answer in zip(histories, served.recommend([Query(one, 4) for one in histories.values()]), strict=True)
        for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
    ]
    assert list(answers.itertuples(index=False, name=None)) == expected
    assert len(expected) == 12
    assert len(model.predict(frame.drop(columns="rating"))) == 30


@pytest.mark.parametrize("wrong", ["", "http://[x", "http://me:sec/ret@host", "http://h:99999", "http://"])
def test_what_is_no_uri_is_refused_and_not_shown(wrong: str, data: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(main, ["train", str(data), "--out", str(tmp_path / "run"), "--mlflow", wrong])
    assert ended.exit_code == 1
    assert ended.output == f"Error: {EXPECTED}\n"


@pytest.mark.parametrize("command", ["train", "export", "learn"])
def test_the_uri_may_come_from_the_environment(
    command: str, data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXREC_MLFLOW", "http://[x")
    (tmp_path / "events.sqlite").touch()
    models = ("--models", str(tmp_path / "models"))
    arguments = {
        "train": (str(data), "--out", str(tmp_path / "new")),
        "export": (str(run.folder), "--out", str(tmp_path / "new")),
        "learn": ("--store", str(tmp_path / "events.sqlite"), "--run", str(run.folder), "--data", str(data), *models),
    }
    ended = CliRunner().invoke(main, [command, *arguments[command]])
    assert (ended.exit_code, ended.output) == (1, f"Error: {EXPECTED}\n")


def test_a_database_that_does_not_answer_is_asked_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("no database\n" * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        Tracker(f"sqlite:///{tmp_path / 'notes'}")
    assert capfd.readouterr().err == ""  # MLflow writes of each time that it asks again
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(TrackingError, match=f"MLflow at postgresql\\+psycopg://{address}: ") as refused:
            Tracker(f"postgresql+psycopg://{address}/db?user=me&password=secret")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("driver", [one for drivers in LIMITS for one in drivers])
def test_a_driver_is_told_how_long_connecting_may_take(driver: str) -> None:
    url = make_url(with_limits(f"{driver}://me@localhost/db?application_name=a"))
    options = url.get_dialect()().create_connect_args(url)[1]
    assert (int(options["connect_timeout"]), options["application_name"]) == (5, "a")


@pytest.mark.parametrize("wrong", ["htp://localhost:5000", "sqlite:////proc/no/mlflow.db"])
def test_a_wrong_uri_is_refused_before_training(wrong: str, data: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(main, ["train", str(data), "--out", str(tmp_path / "run"), "--mlflow", wrong])
    assert ended.exit_code == 1
    assert ended.output.splitlines()[-1].startswith(f"Error: MLflow at {wrong}: ")
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_not_there_is_refused_before_training_and_no_password_is_shown(
    data: Path, tmp_path: Path
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nothing listens, and nobody else gets the port
        address = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(TrackingError, match=f"MLflow at http://{address}: ") as refused:
            train(data, tmp_path / "run", f"http://me:secret@{address}")
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_store_that_fails_during_training_is_named_once_and_ends_nothing(
    data: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def stop() -> bool:
        if not asked:
            execute(uri, "DROP TABLE metrics")
        asked.append(True)
        return False

    run = train(data, tmp_path / "run", uri, stop=stop)
    assert (run.folder / HYBRID_FILE).is_file()
    said = capsys.readouterr().err
    assert said.count("fails, and training goes on: ") == 1
    assert re.search(r"^MLflow at sqlite:\S+ does not have \d\d+ values of this run$", said, re.MULTILINE)


def test_a_server_that_is_gone_is_asked_once_at_the_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(uri_of(run))
    tracker.find(run)
    for step in range(100, 103):
        tracker.metric("a", 1.0, step)
    (run.folder.parent / "mlflow.db").write_bytes(b"no database")
    for step in range(103, 105):
        tracker.metric("a", 1.0, step)
    tracker.status("FINISHED")
    said = capsys.readouterr().err
    assert "does not have 4 values of this run, nor that it is FINISHED\n" in said


def test_values_that_mlflow_calls_invalid_are_counted_and_not_sent_again(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(uri_of(run))
    tracker.find(run)
    tracker.metric("no*name", 1.0, 1)  # sent alone, as the first
    tracker.metric("a", 1.0, 1)
    tracker.status("FINISHED")
    client = mlflow_client(uri_of(run))
    assert [one.step for one in client.get_metric_history(tracked_id(run.folder), "a")] == [1]
    assert "does not have 1 values of this run\n" in capsys.readouterr().err


def test_what_waits_for_a_server_is_limited(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jaxrec.runs.tracking.MOST_WAITING", 3)
    tracker = Tracker(uri_of(run))
    tracker.find(run)
    execute(uri_of(run), "ALTER TABLE metrics RENAME TO away")
    for step in range(5):
        tracker.metric("a", 1.0, step)
    execute(uri_of(run), "ALTER TABLE away RENAME TO metrics")
    tracker.status("FINISHED")
    client = mlflow_client(uri_of(run))
    assert [one.step for one in client.get_metric_history(tracked_id(run.folder), "a")] == [2, 3, 4]
    assert "does not have 2 values of this run\n" in capsys.readouterr().err


def test_steps_that_come_again_after_a_crash_are_not_sent_again(run: Run) -> None:
    client, name = mlflow_client(uri_of(run)), "lstm/epoch/loss"
    before = [one.step for one in client.get_metric_history(tracked_id(run.folder), name)]
    tracker = Tracker(uri_of(run))
    tracker.begin(run)
    for step in (*before, before[-1] + 1):
        tracker.metric(name, 1.0, step)
    tracker.status("FINISHED")
    after = [one.step for one in client.get_metric_history(tracked_id(run.folder), name)]
    assert after == [*before, before[-1] + 1]


def test_the_environment_stays_as_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    tracker = Tracker(uri_of(run))
    tracker.begin(run)
    tracker.status("FINISHED")
    assert dict(os.environ) == {"MLFLOW_DISABLE_TELEMETRY": "true", **before}
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")


def test_a_second_export_takes_the_place_of_the_first_and_names_what_it_needs(run: Run, tmp_path: Path) -> None:
    client = mlflow_client(uri_of(run))
    (run.folder / MLFLOW_FILE).unlink()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("a model directory")
        tracker = Tracker(uri_of(run))
        tracker.begin(run, "FINISHED")
        tracker.log_model(tmp_path / name, {"model_version": name, "metrics": {}})
    assert status(client, run.folder) == "FINISHED"
    assert client.get_run(tracked_id(run.folder)).data.tags["jaxrec.model_version"] == "second"
    kept = client.list_artifacts(tracked_id(run.folder), f"model/data/{DATA_NAME}")
    assert [Path(one.path).name for one in kept] == ["second"]
    needs = Path(client.download_artifacts(tracked_id(run.folder), "model/requirements.txt", str(tmp_path)))
    assert [one.partition("=")[0] for one in needs.read_text().split()] == [
        "mlflow-skinny",
        "jaxrec[index,mlflow,serve-cpu]",
    ]


def test_an_export_that_fails_leaves_no_run_of_mlflow(run: Run) -> None:
    (run.folder / MLFLOW_FILE).unlink()
    (run.folder / HYBRID_FILE).unlink()
    client = mlflow_client(uri_of(run))
    before = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    with pytest.raises(DataError):
        jaxrec.export(run, run.folder.parent / "model", mlflow=uri_of(run))
    assert len(client.search_runs([before[0].info.experiment_id])) == len(before) == 1


def test_a_run_that_cannot_be_begun_in_mlflow_leaves_nothing_in_the_way(data: Path, uri: str, tmp_path: Path) -> None:
    Tracker(uri)  # makes the experiment
    execute(uri, "CREATE TRIGGER refusing BEFORE INSERT ON params BEGIN SELECT RAISE(ABORT, 'no room'); END")
    with pytest.raises(TrackingError):
        train(data, tmp_path / "run", uri)
    execute(uri, "DROP TRIGGER refusing")
    assert status(mlflow_client(uri), tmp_path / "run") == "FAILED"
    with pytest.raises(TrainingStopped):
        train(data, tmp_path / "run", uri, stop=lambda: True)


def test_a_run_of_mlflow_that_was_half_begun_is_completed(run: Run) -> None:
    uri = uri_of(run)
    (run.folder / MLFLOW_FILE).unlink()
    tracker = Tracker(uri)
    execute(uri, "ALTER TABLE params RENAME TO away")
    with pytest.raises(TrackingError):
        tracker.begin(run)
    half = tracked_id(run.folder)
    execute(uri, "ALTER TABLE away RENAME TO params")
    tracker = Tracker(uri)
    assert not tracker.find(run)
    tracker.begin(run, "FINISHED")
    found = mlflow_client(uri).get_run(half)
    assert (tracked_id(run.folder), found.info.status) == (half, "FINISHED")
    assert found.data.params["train.batch_tokens"] == "128"


ONE_OF_TWO = """
import sys
from pathlib import Path
from jaxrec.errors import TrainingError
from jaxrec.runs.train import train
from jaxrec.training.processes import join, leave

folder, uri, port, index = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
join(f"127.0.0.1:{port}", 2, index)
try:
    train(None, folder, resume=True, mlflow=uri)
except TrainingError as error:
    print("failed:", error)
leave()
"""


def test_two_processes_are_refused_together(run: Run) -> None:
    (run.folder / MLFLOW_FILE).write_text("{")
    with reserved_port() as port:
        processes = [start_python(ONE_OF_TWO, 1, run.folder, uri_of(run), port, index) for index in (0, 1)]
        outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    failed = [line for output in outputs for line in output.splitlines() if line.startswith("failed:")]
    assert failed[1:] == [f"{failed[0]} (in the first process)"]
    assert MLFLOW_FILE in failed[0]


def test_what_could_not_be_sent_is_sent_later(run: Run) -> None:
    uri = uri_of(run)
    tracker = Tracker(uri)
    tracker.find(run)
    execute(uri, "ALTER TABLE metrics RENAME TO away")
    for step in range(1200):  # more than one request takes
        tracker.metric("a", step / 7, step)
    execute(uri, "ALTER TABLE away RENAME TO metrics")
    tracker.status("FINISHED")
    noted = mlflow_client(uri).get_metric_history(tracked_id(run.folder), "a")
    assert [(one.step, one.value) for one in noted] == [(step, step / 7) for step in range(1200)]


def test_a_stopped_run_goes_on_in_the_same_run_of_mlflow(data: Path, uri: str, tmp_path: Path) -> None:
    out, client = tmp_path / "run", mlflow_client(uri)
    with pytest.raises(TrainingStopped):
        train(data, out, uri, stop=lambda: True)
    first = tracked_id(out)
    assert status(client, out) == "KILLED"
    jaxrec.train(None, out, resume=True, mlflow=uri)
    assert tracked_id(out) == first
    assert status(client, out) == "FINISHED"


def test_a_stopped_command_says_how_to_go_on_in_mlflow(
    data: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxrec.training.stopping.stop_on_signals", lambda: contextlib.nullcontext(lambda: True))
    out = tmp_path / "run"
    ended = CliRunner().invoke(main, ["train", str(data), "--out", str(out), "--mlflow", uri])
    assert ended.output.endswith(f"; resume with: jaxrec train --out {out} --resume --mlflow URI\n")


def test_a_run_that_was_tracked_elsewhere_is_refused(run: Run, uri: str) -> None:
    with pytest.raises(TrackingError, match="not found"):
        jaxrec.train(None, run.folder, resume=True, mlflow=uri)


def test_without_mlflow_the_extra_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match=r'pip install "jaxrec\[mlflow\]"'):
        train(data, tmp_path / "run", "sqlite:///mlflow.db")
