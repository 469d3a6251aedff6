"""A run that is stopped, killed or broken resumes from any step with the same result and the same logs."""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

import jaxrec.training.loop
import jaxrec.training.step
from jaxrec.cli.main import main
from jaxrec.config import CheckpointConfig, ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.batches import TrainBatch, TrainingData
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import write_prepared
from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.log import STEPS_FILE, TENSORBOARD_FOLDER, read_epochs, read_steps
from jaxrec.training.loop import TrainedModel, load_trained, train_model
from jaxrec.training.stopping import StopRequested, never, stop_on_signals
from tests.synthetic import random_log

MODEL = ModelConfig(embedding=16, hidden=32, max_length=16, input_dropout=0.1, output_dropout=0.1)
TRAIN = TrainConfig(seed=0, max_epochs=4, patience=99, batch_tokens=64)
STEPS = 5  # per epoch
OFTEN = CheckpointConfig(seconds=0.0)
DEADLINE_SECONDS = 300


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(random_log(users=40, items=20, max_events=20, seed=5), None, PrepareConfig(1, 1))


def train(
    data: PreparedData, folder: Path, stop: StopRequested = never, checkpoints: CheckpointConfig = CheckpointConfig()
) -> TrainedModel[TimeRatingAwareLSTM]:
    model = TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(0))
    return train_model(model, data, TRAIN, folder, "test", checkpoint_config=checkpoints, stop=stop)


@pytest.fixture(scope="module")
def whole(
    data: PreparedData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainedModel[TimeRatingAwareLSTM]]:
    """A run that was left in peace."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(data, folder, checkpoints=CheckpointConfig(keep=1))


def assert_same(folder: Path, trained: TrainedModel[TimeRatingAwareLSTM], whole: tuple[Path, TrainedModel]) -> None:
    """The loss of every step, the figures of every epoch and every weight."""
    assert read_steps(folder) == read_steps(whole[0])
    assert [record["step"] for record in read_steps(folder)] == list(range(STEPS * 4))
    curves = [[(r["loss"], r["validation_ndcg_10"]) for r in epochs] for epochs in (trained.epochs, whole[1].epochs)]
    assert curves[0] == curves[1]
    models = [jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))) for model in (trained.model, whole[1].model)]
    for ours, theirs in zip(*models, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_stopped_again_and_again_equals_one_left_in_peace(
    data: PreparedData, tmp_path: Path, whole: tuple[Path, TrainedModel]
) -> None:
    messages = []
    for ask in (3, 5, 11, 99):  # the question, of step or validation batch, that is answered by yes
        asked = iter(range(1, 100))
        try:
            trained = train(data, tmp_path, stop=lambda asked=asked, ask=ask: next(asked) == ask)
        except TrainingStopped as stopped:
            messages.append(str(stopped))
            # What a run may log after its last checkpoint, before it is killed in the middle of a line.
            with (tmp_path / STEPS_FILE).open("a") as file:
                file.write('{"step": 1000, "loss": 1.0}\n{"step": 10')
    assert messages == [
        "stopped and saved after step 2 (epoch 0, 2 of its 5 steps)",
        "stopped and saved after step 5 (epoch 0, 5 of its 5 steps)",
        "stopped and saved after step 11 (epoch 2, 1 of its 5 steps)",
    ]
    assert_same(tmp_path, trained, whole)


KILLED = """
import sys
from pathlib import Path
from tests.training.test_train_resume import OFTEN, prepare, random_log, train, PrepareConfig
train(prepare(random_log(users=40, items=20, max_events=20, seed=5), None, PrepareConfig(1, 1)), Path(sys.argv[1]),
      checkpoints=OFTEN)
"""


def test_a_killed_run_leaves_a_usable_checkpoint(
    data: PreparedData, tmp_path: Path, whole: tuple[Path, TrainedModel]
) -> None:
    # The moments of bench/kill_training.py, but two: a step after the start, and while some checkpoint is written.
    def steps_logged() -> bool:
        return (tmp_path / STEPS_FILE).exists() and (tmp_path / STEPS_FILE).stat().st_size > 0

    def in_a_save() -> bool:
        return any((tmp_path / "checkpoints").glob("*tmp*"))

    for moment in (steps_logged, in_a_save):
        process = start_python(KILLED, tmp_path)
        wait_until(lambda moment=moment, process=process: moment() or process.poll() is not None)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert_same(tmp_path, train(data, tmp_path), whole)


def start_python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_sigterm_saves_and_exits_0_and_says_how_to_go_on(data: PreparedData, tmp_path: Path) -> None:
    write_prepared(data, tmp_path / "data")
    run = tmp_path / "run"
    options = ("--max-epochs", "3", "--batch-tokens", "64", "--hidden", "32", "--max-length", "16", "--out", str(run))

    def terminate() -> None:
        wait_until((run / "lstm/tensorboard").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    stopped = CliRunner().invoke(main, ["train", str(tmp_path / "data"), *options])
    killer.join()
    assert stopped.exit_code == 0
    assert stopped.output.splitlines()[-1].startswith("stopped and saved after step ")
    assert stopped.output.endswith(f"; resume with: jaxrec train --out {run} --resume\n")
    assert not (run / "hybrid.json").exists()
    assert CliRunner().invoke(main, ["train", "--out", str(run), "--resume"]).exit_code == 0
    assert (run / "hybrid.json").exists()
    assert [record["step"] for record in read_steps(run / "lstm")] == list(range(STEPS * 3))
    assert (run / "training.png").stat().st_size > 0


def test_a_second_ctrl_c_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_nan_stops_with_the_steps_that_are_lost(
    data: PreparedData, tmp_path: Path, whole: tuple[Path, TrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = TrainingData.epoch

    def poisoned(self: TrainingData, seed: int, number: int, first_step: int = 0) -> Iterator[TrainBatch]:
        for step, batch in enumerate(epoch(self, seed, number, first_step)):
            if number == 1 and step == 2:
                batch.events.rating[...] = np.inf
            yield batch

    monkeypatch.setattr(TrainingData, "epoch", poisoned)
    expected = (
        r"the loss or its gradient is not finite at step 7 \(epoch 1\); the checkpoint of step 5 is good, "
        r"lost are the steps 5\.\.7"
    )
    with pytest.raises(TrainingError, match=expected):
        train(data, tmp_path)
    monkeypatch.undo()
    assert_same(tmp_path, train(data, tmp_path), whole)


def test_the_latest_checkpoint_and_the_best_are_kept(whole: tuple[Path, TrainedModel]) -> None:
    folder, trained = whole
    best = max(trained.epochs, key=lambda record: record["validation_ndcg_10"])["checkpoint"]
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert kept == {3, best}
    assert best < 3  # else the test would not tell
    loaded = load_trained(TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(9)), TRAIN, folder)
    assert_same(folder, loaded, whole)


def test_logs(whole: tuple[Path, TrainedModel]) -> None:
    folder, trained = whole
    assert read_epochs(folder) == trained.epochs
    steps = read_steps(folder)
    for record in trained.epochs:
        of_epoch = [step["loss"] for step in steps if step["epoch"] == record["epoch"]]
        assert record["loss"] == pytest.approx(np.mean(of_epoch), rel=1e-12)
    assert [record["compile_seconds"] > 0 for record in trained.epochs] == [True, False, False, False]
    # 5 % of 20 steps warm up from 0 to the peak, then a cosine goes down to 5 % of it.
    assert [steps[i]["learning_rate"] for i in (0, 1)] == [0.0, pytest.approx(TRAIN.learning_rate)]
    assert steps[-1]["learning_rate"] < 0.07 * TRAIN.learning_rate
    scalars = {
        (value.tag, event.step): value.simple_value
        for path in (folder / TENSORBOARD_FOLDER).iterdir()
        for event in tensorboard_events(path)
        for value in event.summary.value
    }
    assert scalars["train/loss", 10] == pytest.approx(steps[10]["loss"])
    assert scalars["epoch/validation_ndcg_10", 20] == pytest.approx(trained.epochs[3]["validation_ndcg_10"])


def tensorboard_events(path: Path) -> Iterator[Event]:
    """The records of a TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def test_a_run_traces_its_step_once_and_transfers_nothing_by_accident(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []
    loss = jaxrec.training.step.training_loss
    monkeypatch.setattr(jaxrec.training.step, "training_loss", lambda *arguments: traces.append(1) or loss(*arguments))
    train(data, tmp_path / "run", checkpoints=OFTEN)
    assert len(traces) == 1
    monkeypatch.setattr(jaxrec.training.loop, "put_batch", lambda batch, _: batch)  # batches stay on the host
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device transfer"):
        train(data, tmp_path / "other")


def test_a_checkpoint_of_another_version_is_named(data: PreparedData, tmp_path: Path) -> None:
    train(data, tmp_path)
    (record,) = (tmp_path / "checkpoints/3/progress").glob("metadata")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"unknown": 1}))
    with pytest.raises(Exception, match=r"checkpoints: written by another version of jaxrec"):
        train(data, tmp_path)
