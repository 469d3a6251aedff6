"""A run on shards, in two processes, is the run of one process on the folder of one machine; it resumes exactly."""

import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import jaxrec
from jaxrec.config import CheckpointConfig, ModelConfig, PrepareConfig, RatingScale, TrainConfig
from jaxrec.data.distributed.prepare import cluster, prepare_distributed
from jaxrec.data.schema import GENRES, ITEM, TITLE
from jaxrec.errors import DataError
from jaxrec.rl.config import LoggedConfig
from jaxrec.runs.directory import (
    HYBRID_FILE,
    LSTM_FOLDER,
    NEIGHBOURS_FILE,
    NEIGHBOURS_PARTIAL_FOLDER,
    RERANKER_FILE,
    Run,
    open_run,
)
from jaxrec.runs.rl_logged import run_logged
from jaxrec.runs.train import train
from jaxrec.training.log import read_steps
from jaxrec.training.loop import load_trained
from jaxrec.training.stopping import StopRequested, never
from tests.once import made_once
from tests.ports import reserved_port
from tests.synthetic import markov_log
from tests.training.test_train_sharding import DEADLINE_SECONDS, start_python, variables

MODEL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=8)
TRAINING = TrainConfig(max_epochs=1, batch_tokens=64)
ITEMS = 30


def make_data(folder: Path) -> None:
    """The same log, prepared on one machine (`one`) and by two workers (`shards`)."""
    log = markov_log(users=120, items=ITEMS, events=12, stay=0.9, seed=0)
    genres = np.where(np.arange(1, ITEMS + 1) % 2, "A", "B")
    movies = pd.DataFrame({ITEM: np.arange(1, ITEMS + 1), TITLE: genres, GENRES: genres})
    config = PrepareConfig(1, 1, rating_scale=RatingScale(0.5, 5) if "rating" in log else None)
    (folder / "log").mkdir(parents=True)
    log.to_parquet(folder / "log" / "part.parquet", index=False, row_group_size=500)
    jaxrec.prepare(folder / "log", movies, config, out=folder / "one")
    with cluster(None, workers=2) as client:
        prepare_distributed(client, folder / "log", folder / "shards", 3, movies, config, 600)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "shards and folder", make_data)


def train_on(data: Path | None, folder: Path, stop: StopRequested = never) -> Run:
    often = CheckpointConfig(seconds=0)
    return train(data, folder, MODEL, TRAINING, resume=data is None, checkpoint_config=often, stop=stop)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process on the folder."""
    return train_on(data / "one", tmp_path_factory.mktemp("alone") / "run")


ONE_OF_TWO = """
import os, signal, sys
from pathlib import Path
from jaxrec.errors import ProcessLost
from jaxrec.training.processes import join, leave, leave_at_once
from tests.training.test_train_shards import train_on

data, folder, port, index, killed_at = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:5]), sys.argv[5]
join(f"127.0.0.1:{port}", 2, index)

def kill():
    if index and killed_at and any(folder.glob(killed_at)):
        os.kill(os.getpid(), signal.SIGKILL)
    return False

try:
    train_on(None if (folder / "run.json").exists() else data, folder, kill)
except ProcessLost as lost:
    print("the other process is gone:", lost)
    leave_at_once()
leave()
"""


def two_processes(data: Path, folder: Path, killed_at: str = "") -> tuple[list[int], list[str]]:
    """Exit statuses and outputs; the second process is killed when it is asked whether to stop and the run has files of
    this pattern."""
    with reserved_port() as port:
        processes = [start_python(ONE_OF_TWO, 1, data, folder, port, index, killed_at) for index in (0, 1)]
        outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes on the shards."""
    folder = tmp_path_factory.mktemp("two") / "run"
    statuses, outputs = two_processes(data / "shards", folder)
    assert statuses == [0, 0], outputs
    return open_run(folder)


def losses(run: Run) -> list[list[float]]:
    return [[record["loss"] for record in read_steps(run.folder / name)] for name in (LSTM_FOLDER, "content")]


def test_two_processes_on_shards_train_as_one_on_the_folder(alone: Run, two: Run) -> None:
    np.testing.assert_allclose(losses(two), losses(alone), atol=1e-4)
    ours, theirs = (json.loads((run.folder / HYBRID_FILE).read_text()) for run in (two, alone))
    assert ours["validation_ndcg_10"] == pytest.approx(theirs["validation_ndcg_10"], abs=0.01)
    with np.load(two.folder / NEIGHBOURS_FILE) as counted, np.load(alone.folder / NEIGHBOURS_FILE) as expected:
        for name in expected.files:
            np.testing.assert_array_equal(counted[name], expected[name])


def test_later_stages_open_all_shards_as_one(alone: Run, two: Run) -> None:
    of_two, of_one = (jaxrec.evaluate(run).to_frame() for run in (two, alone))
    assert of_two["cases"].tolist() == of_one["cases"].tolist()
    np.testing.assert_allclose(of_two["ndcg_10"], of_one["ndcg_10"], atol=0.02)
    baselines = of_two["name"].isin(["popularity", "recent popularity"])
    pd.testing.assert_frame_equal(of_two[baselines], of_one[baselines])
    answers = [run.recommend([1, 2, 3], k=3)["item_id"].tolist() for run in (two, alone)]
    assert answers[0] == answers[1]


def test_two_processes_of_which_one_is_killed_resume_as_if_they_had_not_been(
    data: Path, two: Run, tmp_path: Path
) -> None:
    saved = f"{LSTM_FOLDER}/checkpoints/[0-9]"  # a whole one
    for killed_at in (NEIGHBOURS_PARTIAL_FOLDER, saved):  # in the counting, and in the epoch
        statuses, outputs = two_processes(data / "shards", tmp_path / "run", killed_at)
        assert statuses == [1, -signal.SIGKILL], outputs
        assert "the other process is gone: " in outputs[0]
        assert (tmp_path / "run" / NEIGHBOURS_FILE).is_file() == (killed_at == saved)
    statuses, outputs = two_processes(data / "shards", tmp_path / "run")
    assert statuses == [0, 0], outputs
    resumed = open_run(tmp_path / "run")
    assert losses(resumed) == losses(two)
    assert (resumed.folder / HYBRID_FILE).read_text() == (two.folder / HYBRID_FILE).read_text()
    both = [_trained(run) for run in (resumed, two)]
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _trained(run: Run) -> list[np.ndarray]:
    lstm = jaxrec.runs.directory.new_models(run.read_data(), MODEL, 0)[0]
    return variables(load_trained(lstm, run.train_config, run.folder / LSTM_FOLDER).model)


def test_a_reranker_is_learned_from_a_run_on_shards(two: Run) -> None:
    few = LoggedConfig(folds=2, fold_epochs=1, decisions=100, updates=5, samples=2)
    assert run_logged(two, few).reason
    assert (two.folder / RERANKER_FILE).is_file()
    assert "stacked" in jaxrec.evaluate(two).to_frame()["name"].tolist()


def test_shards_cannot_be_appended_to(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no log to append to"):
        jaxrec.append(data / "shards", markov_log(users=3, items=5, events=4, stay=0.9, seed=1), out=tmp_path / "more")
