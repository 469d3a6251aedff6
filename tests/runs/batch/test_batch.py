"""Recommendations for everybody: equal to a real server's, whatever the number of workers, and after a kill."""

import csv
import gc
import itertools
import multiprocessing
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any

import dask
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from distributed import Client

from jaxrec.cli.main import main
from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data.distributed.prepare import cluster
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.errors import DataError
from jaxrec.files import locked, sync
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import TABLE_SIZE, Repeat
from jaxrec.onnx.model_directory import export_model
from jaxrec.runs.batch import cluster as on_cluster
from jaxrec.runs.batch import local
from jaxrec.runs.batch.job import Job
from jaxrec.runs.batch.local import recommend_log
from jaxrec.runs.batch.scoring import (
    ANSWERED_AT_ONCE,
    BATCHES_OF_PART,
    ModelSource,
    Scoring,
    forget_opened,
    opened,
)
from serve.client import Event, RecommenderClient
from serve.model.recommender import Recommender
from tests.runs.batch import held_back
from tests.serve.process import running_server

USERS_OF_PART = ANSWERED_AT_ONCE * BATCHES_OF_PART
PARTS = 4
USERS = (PARTS - 1) * USERS_OF_PART + 100


def _log(users: int, raw_items: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """One to four events of each user, some on an unknown item, without a repeat, in no order."""
    rng = np.random.default_rng(seed)
    events = rng.integers(1, 5, users)
    frame = pd.DataFrame(
        {
            "userId": np.repeat(np.arange(1, users + 1), events),
            "movieId": rng.choice(np.append(raw_items, 5), events.sum()),
            "rating": rng.integers(1, 11, events.sum()) / 2,
            "timestamp": 1_500_000_000 + rng.permutation(int(events.sum())),
        }
    )
    return frame.sample(frac=1.0, random_state=seed)


@pytest.fixture(scope="module")
def history(small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("history") / "log.csv"
    _log(USERS, small_data.catalog.ids.raw_ids).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def source(model_directory: Path) -> ModelSource:
    return ModelSource(model_directory, "cpu")


@pytest.fixture(scope="module")
def expected(source: ModelSource, history: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process writes that nothing interrupts."""
    out = tmp_path_factory.mktemp("expected") / "top.csv"
    counts = recommend_log(source, history, out, k=3)
    assert counts["rows"] == len(history.read_text().splitlines()) - 1
    assert [path.name for path in out.parent.iterdir()] == ["top.csv"]
    return out.read_bytes()


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster(None, workers=2) as client:
        yield client


def test_every_user_is_answered_once_and_two_workers_write_the_same_bytes(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path
) -> None:
    users = [row["userId"] for row in csv.DictReader(expected.decode().splitlines())]
    assert users == [str(user) for user in range(1, USERS + 1) for _ in range(3)]
    recommend_log(source, history, tmp_path / "top.csv", k=3, workers=2)
    assert (tmp_path / "top.csv").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["top.csv"]


def test_a_kill_loses_no_finished_part_and_shows_no_half_result(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, of which one is held back in the last part."""
    out, fifo = tmp_path / "top.csv", tmp_path / "fifo"
    out.write_text("as it was")
    os.mkfifo(fifo)
    command = ["recommend", str(source.directory), "--history", str(history)]
    command += ["--k", "3", "--out", str(out), "--provider", "cpu", "--workers", "2"]
    held = [sys.executable, "-m", "tests.runs.batch.held_back", str((PARTS - 1) * USERS_OF_PART), str(fifo)]
    with subprocess.Popen([*held, *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(PARTS - 1)] == [b"finished\n"] * (PARTS - 1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ends = [os.pidfd_open(int(child)) for child in children]
        process.kill()
    for end in ends:  # no worker outlives it
        assert select.select([end], [], [], 60.0)[0] == [end]
        os.close(end)
    fifo.unlink()
    assert out.read_text() == "as it was"
    (folder,) = tmp_path.glob(".top.csv.job")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.glob("parts-*/*.csv"))) == PARTS - 1
    answered = []
    answer = local._answer_part
    monkeypatch.setattr(local, "_answer_part", lambda *of: answered.append(of) or answer(*of))
    monkeypatch.setattr(local, "read_log", None)  # the log is not read again
    result = CliRunner().invoke(main, command[:-2])
    assert result.exit_code == 0, result.output
    assert len(answered) == 1
    assert out.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["top.csv"]


class _Stopping:
    """A writer of CSV that stops after so many rows, all files together."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def writer(self, file: IO[str], **options: Any) -> "_Stopping":
        self._file, self._write = file, csv.writer(file, **options).writerow
        return self

    def writerow(self, row: Sequence[object]) -> None:
        self._write(row)
        self.left -= 1
        if self.left == 0:
            self._file.flush()
            assert os.fstat(self._file.fileno()).st_size > 0
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(PARTS))
def test_a_part_that_is_half_written_is_written_anew(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "csv", _Stopping(3 * USERS_OF_PART * at + 100))
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert [path.name for path in tmp_path.iterdir()] == [".top.csv.job"]
    assert len(list(tmp_path.glob(".top.csv.job/parts-*/*"))) == at
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / "top.csv").read_bytes() == expected


def test_a_join_that_was_interrupted_is_done_anew(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> None:
        if path.name == "joined":
            raise KeyboardInterrupt
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(local, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert [path.name for path in tmp_path.iterdir()] == [".top.csv.job"]
    monkeypatch.setattr(local, "_answer_part", None)
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / "top.csv").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["top.csv"]


def test_a_deletion_that_was_interrupted_anywhere_loses_nothing(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the result nor the rows that were set aside; and the same command ends well."""
    log, out = tmp_path / "log.csv", tmp_path / "top.csv"
    log.write_text("userId,movieId,rating,timestamp\n1,1007,4.0,1500000000\n2,1014,9.0,1500000000\n")

    def write() -> tuple[bytes, bytes]:
        recommend_log(source, log, out, on_bad_rows=OnBadRows.QUARANTINE)
        return out.read_bytes(), local.quarantine_file(out).read_bytes()

    expected, remove, stops = write(), Job.remove, 0
    assert b"9.0" in expected[1]

    def removed_up_to(job: Job) -> None:
        """Stops after `stops` deletions."""
        deletions = itertools.count()

        def counting(delete: Callable[..., None]) -> Callable[..., None]:
            def stopping(*of: Any, **how: Any) -> None:
                if next(deletions) == stops:
                    raise KeyboardInterrupt
                delete(*of, **how)

            return stopping

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, counting(getattr(os, name)))
            remove(job)

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Job, "remove", removed_up_to)
            try:
                write()
                break
            except KeyboardInterrupt:
                pass
        assert write() == expected
        stops += 1
    assert stops > 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "top.csv", "top.quarantine.csv"]


def test_an_interrupted_reading_begins_anew(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "input_counts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert len(list(tmp_path.glob(".top.csv.job/input-*/log/times.npy"))) == 1
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / "top.csv").read_bytes() == expected


def test_another_command_does_not_continue(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, answer = tmp_path / "top.csv", local._answer_part

    def fail(scoring: object, folder: object, part: local.Part) -> int:
        if part.first:
            raise KeyboardInterrupt
        return answer(scoring, folder, part)

    with monkeypatch.context() as patch:
        patch.setattr(local, "_answer_part", fail)
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, out, k=2)
    assert len(list(tmp_path.glob(".top.csv.job/parts-*/*"))) == 1
    recommend_log(source, history, out, k=3)
    assert out.read_bytes() == expected


def test_one_process_works_at_a_job(source: ModelSource, history: Path, tmp_path: Path) -> None:
    with locked(tmp_path / ".top.csv.job", "recommend"), pytest.raises(DataError, match="another `jaxrec recommend`"):
        recommend_log(source, history, tmp_path / "top.csv")


def test_a_worker_that_dies_is_named_and_the_job_goes_on(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_first(futures: Sequence[Future[int]]) -> Iterator[Future[int]]:
        multiprocessing.active_children()[0].kill()
        return as_completed(futures)

    with monkeypatch.context() as patch:
        patch.setattr(local, "as_completed", kill_first)
        with pytest.raises(DataError, match="ended from outside"):
            recommend_log(source, history, tmp_path / "top.csv", k=3, workers=2)
    recommend_log(source, history, tmp_path / "top.csv", k=3, workers=2)
    assert (tmp_path / "top.csv").read_bytes() == expected


def test_a_model_that_was_replaced_is_not_used(source: ModelSource) -> None:
    with pytest.raises(DataError, match="the model was replaced"):
        source.open(0, "of another one")


def test_a_folder_is_not_replaced_by_a_file(source: ModelSource, history: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; expected the name of a CSV file"):
        recommend_log(source, history, tmp_path)


@pytest.fixture(scope="module")
def recent() -> PreparedData:
    """40 users whose last events are of this minute, so that the trend counts."""
    rng, raw_ids = np.random.default_rng(3), 1000 + 7 * np.arange(1, 61)
    movies = pd.DataFrame({ITEM: raw_ids, TITLE: [f"{one}" for one in raw_ids], GENRES: ["Drama", "War|Drama"] * 30})
    log = pd.DataFrame(
        {
            USER: np.repeat(np.arange(1, 41), 30),
            ITEM: np.concatenate([rng.choice(raw_ids, 30, replace=False) for _ in range(40)]),
            RATING: rng.integers(1, 11, 1200).astype(np.float32) / 2,
            TIME: int(time.time()) - rng.permutation(1200) * 300,
        }
    )
    return prepare(log, movies, PrepareConfig(rating_scale=RatingScale(0.5, 5.0)))


@pytest.mark.parametrize("kind", ["reranker", "seen"])
def test_the_answers_are_those_of_a_real_server(
    recent: PreparedData,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    tmp_path: Path,
    kind: str,
) -> None:
    """With the trend of recent events, and with a reranker or a rule that recommends items of the history again."""
    hybrid = random_hybrid(recent, 1, False)
    if kind == "reranker":
        hybrid = with_random_reranker(hybrid, recent)
    else:
        table = np.append(0, np.random.default_rng(2).normal(size=TABLE_SIZE - 1))
        parts = hybrid.lstm, hybrid.content, hybrid.cooccurrence, hybrid.mix_weights(), hybrid.trend
        hybrid = Hybrid(*parts, repeat=Repeat(table))
    export_model(hybrid, recent, tmp_path / "model", training={}, metrics={}, licence="Synthetic.")
    histories = recent.histories
    columns = {
        "userId": recent.users.decode(histories.users() + 1),
        "movieId": recent.catalog.ids.decode(histories.items),
        "rating": histories.ratings,
        "timestamp": histories.times,
    }
    log = pd.DataFrame(columns)
    log.to_csv(tmp_path / "log.csv", index=False)
    source = ModelSource(tmp_path / "model", "cpu")
    recommend_log(source, tmp_path / "log.csv", tmp_path / "top.csv", k=20, workers=2)
    found = pd.read_csv(tmp_path / "top.csv", dtype={"movieId": str})
    assert opened_trend(source) > 0.01
    again = 0
    with (
        running_server(tmp_path / "model", tmp_path / "events.sqlite", provider="cpu") as server,
        RecommenderClient(server.address) as client,
    ):
        for user, of_user in log.groupby("userId"):
            events = [
                Event(item_id=str(row.movieId), rating=row.rating, timestamp=row.timestamp)
                for row in of_user.itertuples()
            ]
            answer = client.recommend(history=events, k=20).recommendations
            mine = found[found["userId"] == user]
            assert mine["movieId"].tolist() == [one.item_id for one in answer]
            np.testing.assert_allclose(mine["score"], [one.score for one in answer], rtol=1e-3, atol=1e-3)
            again += len({one.item_id for one in answer} & {event.item_id for event in events})
    assert (again > 0) == (kind == "seen")


def opened_trend(source: ModelSource) -> float:
    """The largest amount that the trend adds now."""
    return float(np.abs(source.open(int(time.time()), source.version()).engine.trend.values).max())


@pytest.fixture(scope="module")
def parquet(history: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    frame = pd.read_csv(history)
    for at in range(3):
        frame[at::3].to_parquet(folder / f"{at}.parquet", index=False, row_group_size=2000)
    return folder


def _read(folder: Path) -> pd.DataFrame:
    files = sorted(folder.glob("*.parquet"))
    parts = [pq.read_table(file).to_pandas() for file in files]
    for part in parts:
        assert part["userId"].is_monotonic_increasing
    return pd.concat(parts).sort_values(["userId", "rank"], ignore_index=True)


def test_a_cluster_answers_as_one_machine(
    client: Client, source: ModelSource, parquet: Path, expected: bytes, tmp_path: Path
) -> None:
    (tmp_path / "expected.csv").write_bytes(expected)
    one = pd.read_csv(tmp_path / "expected.csv", dtype={"movieId": str})
    command = ["recommend", str(source.directory), "--history", str(parquet), "--out", str(tmp_path / "out")]
    address = client.scheduler.address
    result = CliRunner().invoke(main, [*command, "--k", "3", "--provider", "cpu", "--scheduler", address])
    assert result.exit_code == 0, result.output
    assert f"users: {USERS}" in result.output
    found = _read(tmp_path / "out")
    pd.testing.assert_frame_equal(found.drop(columns="score"), one.drop(columns="score"), check_dtype=False)
    np.testing.assert_allclose(found["score"], one["score"], rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.csv", "out"]


def test_a_job_on_a_cluster_is_continued(
    client: Client, source: ModelSource, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cluster.recommend_folder(client, source, parquet, tmp_path / "whole", k=3, rows_of_shard=3000)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recommend" and done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        on_cluster.recommend_folder(client, source, parquet, out, k=3, rows_of_shard=3000, progress=stop)
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.job/parts-*/*.parquet")}
    assert len(finished) >= 2
    stages = []
    with monkeypatch.context() as patch:
        patch.setattr(on_cluster, "Passes", None)  # the log is not sorted again
        on_cluster.recommend_folder(
            client, source, parquet, out, k=3, rows_of_shard=3000, progress=lambda *at: stages.append(at)
        )
    assert len(stages) == stages[-1][2] - len(finished)
    assert finished == {name: (out / name).stat().st_mtime_ns for name in finished}
    pd.testing.assert_frame_equal(_read(out), _read(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers is not possible with --scheduler"),
        (["--requests", "{history}"], "--requests is not possible with --scheduler"),
        (["--history", "{history}"], "--history is one folder"),
    ],
)
def test_options_of_one_machine_are_refused_for_a_cluster(
    source: ModelSource, history: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    given = [option.format(history=history) for option in options]
    command = ["recommend", str(source.directory), "--history", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*command, "--scheduler", "tcp://127.0.0.1:1", *given])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_result_is_copied_where_it_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*of: object) -> None:
        raise PermissionError

    (tmp_path / "part").write_text("rows")
    monkeypatch.setattr(os, "link", refuse)
    on_cluster._link(tmp_path / "part", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "rows"


def test_a_job_on_a_cluster_ends_when_its_tasks_do(
    client: Client, source: ModelSource, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would write into a job that was deleted, or into the next one."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recommend":
            threading.Thread(target=(tmp_path / "go").write_bytes, args=[b""]).start()
            raise KeyboardInterrupt

    for name in ("begun", "go"):
        os.mkfifo(tmp_path / name)
    monkeypatch.setattr(on_cluster, "_answer_shard", held_back.answer_in_turn)
    with pytest.raises(KeyboardInterrupt):
        on_cluster.recommend_folder(client, source, parquet, tmp_path / "out", k=3, rows_of_shard=10_000, progress=stop)
    assert len(list(tmp_path.glob(".out.job/parts-*/part-00001.parquet"))) == 1


def test_workers_that_die_again_and_again_are_an_error_with_advice(
    source: ModelSource, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_cluster, "_answer_shard", held_back.die)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        cluster(None, workers=1) as client,
        pytest.raises(DataError, match="start workers with more of it, or with one thread each; the same command con"),
    ):
        on_cluster.recommend_folder(client, source, parquet, tmp_path / "out", k=3)


def test_models_are_opened_once_for_all_parts_and_not_kept(
    source: ModelSource, history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, load = [], ModelSource.open
    monkeypatch.setattr(ModelSource, "open", lambda *of: models.append(weakref.ref(model := load(*of))) or model)
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    gc.collect()
    assert [model() for model in models] == [None]


def test_threads_share_one_model(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ask before the first has it."""
    loads, everybody, load = [], threading.Barrier(4), ModelSource.open
    monkeypatch.setattr(ModelSource, "open", lambda *of: loads.append(of) or load(*of))
    scoring = Scoring(source, source.version(), 1_500_000_000, 3)

    def ask(_: int) -> Recommender:
        everybody.wait()
        return opened(scoring)

    forget_opened()
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    forget_opened()
    assert len(loads) == 1
