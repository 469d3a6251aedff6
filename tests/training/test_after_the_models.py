"""What comes after the models of a run, the content heads and the mix, stops and fails as the models' training does."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.schema import GENRES, ITEM, TITLE
from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.runs.directory import CONTENT_HEAD_FILE, HYBRID_FILE, Run, open_run, read_content_heads
from jaxrec.runs.train import train
from tests.ports import reserved_port
from tests.synthetic import markov_log
from tests.training.test_train_sharding import DEADLINE_SECONDS, start_python

MODEL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """30 items with events and 4 new ones, of two genres."""
    items = np.arange(1, 35)
    movies = pd.DataFrame({ITEM: items, TITLE: items.astype(str), GENRES: np.where(items % 2, "A", "B")})
    data = prepare(markov_log(users=60, items=30, events=10, stay=0.9, seed=0), movies, PrepareConfig(1, 0))
    config = TrainConfig(max_epochs=1, batch_tokens=128)
    return train(data, tmp_path_factory.mktemp("whole") / "run", MODEL, config)


@pytest.fixture
def models_alone(run: Run, tmp_path: Path) -> Path:
    """A copy of the run as it is when both models are trained."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    for name in (HYBRID_FILE, CONTENT_HEAD_FILE):
        (folder / name).unlink()
    return folder


def written(folder: Path) -> set[str]:
    """The files of heads and mix, and those that are half written."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return {name for name in names if name.startswith(".") or name in (CONTENT_HEAD_FILE, HYBRID_FILE)}


def test_a_stop_in_heads_or_mix_leaves_whole_files_and_the_run_ends_as_if_it_had_not_been(
    run: Run, models_alone: Path
) -> None:
    head = models_alone / CONTENT_HEAD_FILE
    for end in (1, 3, 6):  # the question that is answered by yes: the second and later ones are those of the head
        asked = itertools.count(1)
        what = "their mix is not tuned" if end == 1 else "the content head is not trained"
        with pytest.raises(TrainingStopped, match=f"both models are trained and saved, {what} yet"):
            train(None, models_alone, resume=True, stop=lambda asked=asked, end=end: next(asked) == end)
        assert written(models_alone) == set()
    for end in (1, 2, 5):  # of the questions after the head is written
        asked = itertools.count(1)
        with pytest.raises(TrainingStopped, match="both models are trained and saved, their mix is not tuned yet"):
            train(None, models_alone, resume=True, stop=lambda a=asked, end=end: head.exists() and next(a) > end)
        assert written(models_alone) == {CONTENT_HEAD_FILE}
    resumed = train(None, models_alone, resume=True)
    assert (models_alone / HYBRID_FILE).read_text() == (run.folder / HYBRID_FILE).read_text()
    for ours, whole in zip(*(read_content_heads(each, ("A", "B")) for each in (resumed, run)), strict=True):
        assert all(np.array_equal(*arrays) for arrays in zip(ours, whole, strict=True))


def test_a_head_that_diverges_ends_the_training_and_writes_nothing(
    models_alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("jaxrec.training.content_head.LEARNING_RATE", 1e38)
        with pytest.raises(TrainingError, match=r"content head .* no content head is written"):
            train(None, models_alone, resume=True)
    assert written(models_alone) == set()
    train(None, models_alone, resume=True)
    assert written(models_alone) == {CONTENT_HEAD_FILE, HYBRID_FILE}


ONE_OF_TWO = """
import sys
from pathlib import Path
from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.runs.train import train
from jaxrec.training import content_head
from jaxrec.training.processes import join, leave

folder, port, index = Path(sys.argv[1]), *map(int, sys.argv[2:])
join(f"127.0.0.1:{port}", 2, index)
rate, content_head.LEARNING_RATE = content_head.LEARNING_RATE, 1e38
try:
    train(None, folder, resume=True)
except TrainingError as error:
    print("failed:", error)
content_head.LEARNING_RATE = rate
for asked in (lambda: index == 1, lambda: index == 0 and (folder / "content_head.npz").exists()):
    try:
        train(None, folder, resume=True, stop=asked)
    except TrainingStopped as stopped:
        print(stopped)
leave()
"""


def test_two_processes_stop_and_fail_together(models_alone: Path) -> None:
    """The head diverges in the first, which trains it; then one process is asked to stop: the second, the first."""
    with reserved_port() as port:
        processes = [start_python(ONE_OF_TWO, 1, models_alone, port, index) for index in (0, 1)]
        outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    failed = [line for output in outputs for line in output.splitlines() if line.startswith("failed:")]
    assert failed[0].endswith("no content head is written")
    assert failed[1:] == [f"{failed[0]} (in the first process)"]
    for output in outputs:
        assert output.count("stopped: both models are trained and saved, their mix is not tuned yet") == 2
    assert written(models_alone) == {CONTENT_HEAD_FILE}
    assert open_run(models_alone).data_version == 0
