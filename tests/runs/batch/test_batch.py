"""Recommendations for everybody: equal to a real server's, whatever the number of workers, and after a kill."""

import csv
import multiprocessing
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.errors import DataError
from jaxrec.files import locked
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import TABLE_SIZE, Repeat
from jaxrec.onnx.model_directory import export_model
from jaxrec.runs.batch import cluster as on_cluster
from jaxrec.runs.batch import local
from jaxrec.runs.batch.local import recommend_log
from jaxrec.runs.batch.scoring import ANSWERED_AT_ONCE, BATCHES_OF_PART, ModelSource, opened
from serve.client import Event, RecommenderClient
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
    out = tmp_path / "top.csv"
    out.write_text("as it was")
    command = [sys.executable, "-m", "jaxrec.cli.main", "recommend", str(source.directory), "--history", str(history)]
    options = ["--k", "3", "--out", str(out), "--provider", "cpu"]
    with subprocess.Popen([*command, *options, "--workers", "2"], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        shown = b""
        while not re.search(rb" [1-9]\d*/%d" % USERS, shown):  # progress is on stderr
            shown += (piece := os.read(process.stderr.fileno(), 1000))
            assert piece, shown.decode()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ends = [os.pidfd_open(int(child)) for child in children]
        process.kill()
    for end in ends:  # no worker outlives it
        assert select.select([end], [], [], 60.0)[0] == [end]
        os.close(end)
    assert out.read_text() == "as it was"
    finished = len(list((tmp_path / ".top.csv.job/parts").glob("*.csv")))
    assert finished >= 1
    answered = []
    answer = local._answer_part
    monkeypatch.setattr(local, "_answer_part", lambda *of: answered.append(of) or answer(*of))
    monkeypatch.setattr(local, "read_log", None)  # the log is not read again
    result = CliRunner().invoke(main, [*command[3:], *options])
    assert result.exit_code == 0, result.output
    assert len(answered) == PARTS - finished
    assert out.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["top.csv"]


@pytest.mark.parametrize("at", range(PARTS + 1))
def test_what_was_interrupted_anywhere_is_continued(
    source: ModelSource,
    history: Path,
    expected: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Part `at` ends with its file half written; the last one: the join does."""
    count = 0

    def fail(*of: object) -> int:
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt
        return answer(*of)

    answer = local._answer_part
    with monkeypatch.context() as patch:
        patch.setattr(local, "_answer_part", fail)
        patch.setattr(local, "_keep_quarantine", fail)
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / "top.csv").exists() == (at == PARTS)
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / "top.csv").read_bytes() == expected


def test_an_interrupted_reading_begins_anew(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "input_counts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert (tmp_path / ".top.csv.job/input/log/times.npy").is_file()
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
    assert len(list((tmp_path / ".top.csv.job/parts").iterdir())) == 1
    recommend_log(source, history, out, k=3)
    assert out.read_bytes() == expected


def test_one_process_works_at_a_job(source: ModelSource, history: Path, tmp_path: Path) -> None:
    with locked(tmp_path / ".top.csv.job", "recommend"), pytest.raises(DataError, match="another `jaxrec recommend`"):
        recommend_log(source, history, tmp_path / "top.csv")


def test_a_worker_that_dies_is_named_and_the_job_goes_on(
    source: ModelSource, history: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(local.ProcessPoolExecutor):
        def submit(self, function: Callable, *arguments: object) -> object:  # type: ignore[override]
            future = super().submit(function, *arguments)
            multiprocessing.active_children()[0].kill()
            return future

    with monkeypatch.context() as patch:
        patch.setattr(local, "ProcessPoolExecutor", Dying)
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
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.job/parts").glob("*.parquet")}
    assert len(finished) >= 2
    stages = []
    with monkeypatch.context() as patch:
        patch.setattr(on_cluster, "Passes", None)  # the log is not sorted again
        on_cluster.recommend_folder(
            client, source, parquet, out, k=3, rows_of_shard=3000, progress=lambda *at: stages.append(at)
        )
    assert len(stages) <= stages[-1][2] - 2
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


def test_models_are_opened_once_a_process(source: ModelSource, history: Path, tmp_path: Path) -> None:
    opened.cache_clear()
    recommend_log(source, history, tmp_path / "top.csv", k=3)
    assert opened.cache_info().misses == 1
