"""Tracking with MLflow: what a store gets, what is refused, and that a store that fails ends no training."""

import contextlib
import json
import socket
import sqlite3
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import RunStatus

import jaxrec
from jaxrec.cli.main import main
from jaxrec.errors import TrackingError, TrainingStopped
from jaxrec.runs.directory import HYBRID_FILE, MLFLOW_FILE, Run
from jaxrec.runs.tracking import Tracker
from jaxrec.training.log import TENSORBOARD_STEPS, read_epochs, read_steps
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from tests.synthetic import markov_log

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
    jaxrec.prepare(markov_log(users=60, items=30, events=10, stay=0.9, seed=0), None, EVERYTHING, out=folder)
    return folder


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # where MLflow keeps the artifacts of such a store
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def train(data: Path, out: Path, uri: str, **options: object) -> Run:
    return jaxrec.train(data, out, MODEL, TRAINING, mlflow=uri, **options)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tracked in the store `uri_of(run)`, and left as it is by the tests."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.chdir(folder):  # where MLflow keeps the artifacts of such a store
        return train(data, folder / "run", f"sqlite:///{folder / 'mlflow.db'}")


def uri_of(run: Run) -> str:
    return f"sqlite:///{run.folder.parent / 'mlflow.db'}"


def tracked_id(folder: Path) -> str:
    return str(json.loads((folder / MLFLOW_FILE).read_text("utf-8"))["run_id"])


def status(client: MlflowClient, folder: Path) -> str:
    return str(client.get_run(tracked_id(folder)).info.status)


def execute(uri: str, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as store:
        store.execute(statement)
        store.commit()


def test_a_store_gets_the_configuration_and_the_metrics_by_step(run: Run) -> None:
    client = MlflowClient(tracking_uri=uri_of(run))
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
    monkeypatch.chdir(run.folder.parent)
    uri = uri_of(run)
    client = MlflowClient(tracking_uri=uri)
    evaluation = jaxrec.evaluate(run)
    ended = CliRunner().invoke(main, ["export", str(run.folder), "--out", str(tmp_path / "model"), "--mlflow", uri])
    assert ended.exit_code == 0, ended.output
    metrics = client.get_run(tracked_id(run.folder)).data.metrics
    for row in evaluation.rows:
        name = f"test/{row.name}/{'with' if row.request_time else 'without'}_request_time/ndcg_10"
        assert metrics[name] == row.ndcg_10["mean"]

    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"runs:/{tracked_id(run.folder)}/model")
    rows = [
        ("b", "3", 4.0, 200),
        ("a", "1", None, 100),
        ("b", "2", 5.0, 100),
        ("a", "5", 3.0, 300),
        ("c", "no", 3.0, 5),
    ]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    answers = model.predict(events, params={"k": 4})
    served = Recommender(read_artifact(tmp_path / "model"))
    histories = {user: [Event(*row[1:]) for row in rows if row[0] == user] for user in "bac"}
    expected = [
        (user, rank, served.catalog.item_ids[item], served.catalog.titles[item], float(score))
        for user, answer in zip(histories, served.recommend([Query(one, 4) for one in histories.values()]), strict=True)
        for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), start=1)
    ]
    assert list(answers.itertuples(index=False, name=None)) == expected
    assert len(expected) == 12
    assert len(model.predict(events.drop(columns="rating"))) == 30


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
    assert capsys.readouterr().out.count("fails, and training goes on: ") == 1


def test_what_could_not_be_sent_is_sent_later(run: Run) -> None:
    uri = uri_of(run)
    tracker = Tracker(uri)
    tracker.begin(run)
    execute(uri, "ALTER TABLE metrics RENAME TO away")
    for step in range(1200):  # more than one request takes
        tracker.metric("a", step / 7, step)
    execute(uri, "ALTER TABLE away RENAME TO metrics")
    tracker.status("FINISHED")
    noted = MlflowClient(tracking_uri=uri).get_metric_history(tracked_id(run.folder), "a")
    assert [(one.step, one.value) for one in noted] == [(step, step / 7) for step in range(1200)]


def test_a_stopped_run_goes_on_in_the_same_run_of_mlflow(data: Path, uri: str, tmp_path: Path) -> None:
    out, client = tmp_path / "run", MlflowClient(tracking_uri=uri)
    with pytest.raises(TrainingStopped):
        train(data, out, uri, stop=lambda: True)
    first = tracked_id(out)
    assert status(client, out) == "KILLED"
    jaxrec.train(None, out, resume=True, mlflow=uri)
    assert tracked_id(out) == first
    assert status(client, out) == RunStatus.to_string(RunStatus.FINISHED)


def test_a_run_that_was_tracked_elsewhere_is_refused(run: Run, uri: str) -> None:
    with pytest.raises(TrackingError, match="not found"):
        jaxrec.train(None, run.folder, resume=True, mlflow=uri)


def test_without_mlflow_the_extra_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match=r'pip install "jaxrec\[mlflow\]"'):
        train(data, tmp_path / "run", "sqlite:///mlflow.db")
