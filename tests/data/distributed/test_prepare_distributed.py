"""The preparation on a local cluster of two processes equals that of one machine, also when a worker is killed."""

import dataclasses
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrec.cli.main import main
from jaxrec.config import FilterOn, PrepareConfig, RatingScale, Repeats, SplitKind, Ties
from jaxrec.data.distributed.prepare import cluster, prepare_distributed
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.data.store import check_prepared, open_shards, open_share, read_prepared, summary_file
from jaxrec.errors import DataError

PIECE = 250
CONFIG = PrepareConfig(min_user_ratings=8, min_movie_ratings=6)
NAMES = {USER: "userId", ITEM: "movieId", RATING: "rating", TIME: "timestamp"}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster(None, workers=2) as client:
        yield client


def _log(seed: int = 0) -> pd.DataFrame:
    """3,000 events of 150 users and 120 movies with long tails, many ties in time, none twice, in no order."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            USER: 1000 - (150 * rng.random(4000) ** 2).astype(np.int64),
            ITEM: 7 * (120 * rng.random(4000) ** 2).astype(np.int64) + 3,
            RATING: rng.integers(1, 11, 4000) / 2,
            TIME: 1_000_000_000 + 3600 * rng.integers(0, 40, 4000),
        }
    )
    return frame.drop_duplicates([USER, ITEM, TIME]).head(3000).reset_index(drop=True)


def _write(log: pd.DataFrame, folder: Path, files: int = 3) -> Path:
    folder.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(log)), files)):
        part = log.iloc[rows].rename(columns=NAMES)
        part.to_parquet(folder / f"part-{number}.parquet", index=False, row_group_size=100)
    return folder


def _histories(parts: list[PreparedData]) -> dict[object, tuple[list, ...]]:
    """By raw user id: items, ratings, times, positions of the cases, and how many events are in training."""
    found: dict[object, tuple[list, ...]] = {}
    for data in parts:
        offsets = data.histories.offsets
        for i, user in enumerate(data.users.raw_ids):
            ratings = np.nan_to_num(data.histories.ratings, nan=-1)  # NaN differs from itself
            columns = (data.histories.items, ratings, data.histories.times)
            rows = [column[offsets[i] : offsets[i + 1]].tolist() for column in columns]
            assert user not in found
            cases = [
                (part.rows[part.users == i] - offsets[i]).tolist() for part in (data.split.validation, data.split.test)
            ]
            found[user] = (*rows, *cases, [int(data.split.train_counts[i])])
    return found


def _assert_one(folder: Path, expected: PreparedData) -> None:
    """The shards, opened as one, are the prepared data of one machine to the last array."""
    data = read_prepared(folder)
    np.testing.assert_array_equal(data.users.raw_ids, expected.users.raw_ids)
    for of_one in ("offsets", "items", "ratings", "times"):
        np.testing.assert_array_equal(getattr(data.histories, of_one), getattr(expected.histories, of_one))
    np.testing.assert_array_equal(data.split.train_counts, expected.split.train_counts)
    for cases in ("validation", "test"):
        for column in ("users", "rows"):
            ours, theirs = (getattr(getattr(each.split, cases), column) for each in (data, expected))
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(data.train_popularity(), expected.train_popularity())
    assert data.summary() == expected.summary()


def _assert_equal(parts: list[PreparedData], expected: PreparedData) -> None:
    for data in parts:
        assert data.catalog.to_frame().equals(expected.catalog.to_frame())
        assert data.config == expected.config
    assert _histories(parts) == _histories([expected])


def _one_machine(log: pd.DataFrame, movies: pd.DataFrame | None, config: PrepareConfig) -> PreparedData:
    return prepare(
        log.astype({RATING: np.float32}), movies, dataclasses.replace(config, rating_scale=RatingScale(0.5, 5))
    )


@pytest.mark.parametrize("shards", [1, 5])
def test_equals_one_machine(shards: int, client: Client, tmp_path: Path) -> None:
    log = _log()
    index = prepare_distributed(client, _write(log, tmp_path / "log"), tmp_path / "out", shards, None, CONFIG, PIECE)
    expected = _one_machine(log, None, CONFIG)
    assert 0 < expected.histories.event_count < len(log)  # the filter does something
    _assert_equal(open_shards(tmp_path / "out"), expected)
    assert (index["users"], index["events"]) == (len(expected.users), expected.histories.event_count)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.parametrize(
    "config",
    [
        {"ties": Ties.RANDOM, "seed": 7},
        {"filter_on": FilterOn.TRAINING},
        {"split": SplitKind.TEMPORAL, "min_movie_ratings": 3},
        {"split": SplitKind.USER_HELD_OUT, "seed": 3, "min_movie_ratings": 3},
    ],
)
def test_equals_one_machine_in_its_variants(config: dict[str, Any], client: Client, tmp_path: Path) -> None:
    log, config = _log(), dataclasses.replace(CONFIG, **config)
    prepare_distributed(client, _write(log, tmp_path / "log"), tmp_path / "out", 12, None, config, PIECE)
    shards = open_shards(tmp_path / "out")
    _assert_equal(shards, _one_machine(log, None, config))
    _assert_one(tmp_path / "out", _one_machine(log, None, config))
    with pytest.raises(AssertionError):
        _assert_equal(shards, _one_machine(log, None, CONFIG))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    events=st.integers(60, 600),
    shards=st.integers(1, 9),
    least=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    split=st.sampled_from(SplitKind),
    filter_on=st.sampled_from(FilterOn),
    ties=st.sampled_from(Ties),
    text=st.booleans(),
)
def test_any_log_is_prepared_as_on_one_machine(
    seed: int,
    events: int,
    shards: int,
    least: tuple[int, int],
    split: SplitKind,
    filter_on: FilterOn,
    ties: Ties,
    text: bool,
    client: Client,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    log = _log(seed).head(events)
    if text:
        log = log.assign(**{USER: "u" + log[USER].astype(str), ITEM: "m" + log[ITEM].astype(str)})
    if split is not SplitKind.LEAVE_ONE_OUT:
        filter_on = PrepareConfig.filter_on
    config = PrepareConfig(*least, split=split, filter_on=filter_on, ties=ties, seed=seed)
    folder = tmp_path_factory.mktemp("any")
    try:
        expected = _one_machine(log, None, config)
    except DataError as error:
        with pytest.raises(DataError, match=str(error)[:15]):
            prepare_distributed(client, _write(log, folder / "log"), folder / "out", shards, None, config, PIECE)
        return
    prepare_distributed(client, _write(log, folder / "log"), folder / "out", shards, None, config, PIECE)
    _assert_one(folder / "out", expected)


@pytest.mark.parametrize("unit", ["ms", "us"])
def test_times_are_ordered_within_a_second(unit: str, client: Client, tmp_path: Path) -> None:
    log = _log()
    log[TIME] = 1000 * log[TIME] + np.arange(999, -1, -1).repeat(3)  # later rows are earlier within their second
    if unit == "us":
        log[TIME] = pd.to_datetime(log[TIME], unit="ms")
    folder = _write(log, tmp_path / "log")
    prepare_distributed(client, folder, tmp_path / "out", 3, None, CONFIG, PIECE)
    _assert_equal(open_shards(tmp_path / "out"), prepare(folder, None, CONFIG))


def test_text_ids_movies_and_missing_ratings(client: Client, tmp_path: Path) -> None:
    log = _log()
    log[USER] = "u" + log[USER].astype(str)
    log[ITEM] = "m" + log[ITEM].astype(str)
    log.loc[::5, RATING] = np.nan
    movies = pd.DataFrame(
        {ITEM: ["m3", "m10", "unseen"], TITLE: ["A", "B", "C"], GENRES: ["War", "Drama|War", "Comedy"]}
    )
    config = dataclasses.replace(CONFIG, min_movie_ratings=0)
    prepare_distributed(client, _write(log, tmp_path / "log"), tmp_path / "out", 3, movies, config, PIECE)
    expected = _one_machine(log, movies, config)
    assert "unseen" in expected.catalog.ids.raw_ids
    assert np.isnan(expected.histories.ratings).sum() > 100
    _assert_equal(open_shards(tmp_path / "out"), expected)


class _Killer:
    """When the first task of a pass is done, stops a worker, sees that it has tasks of the pass, and kills it."""

    def __init__(self, client: Client, stage: str) -> None:
        self.client, self.stage = client, stage
        self.pids = client.run(os.getpid)
        self.killed: int | None = None
        self.lost_tasks = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage.startswith(self.stage) and self.killed is None:
            address, self.killed = next(iter(self.pids.items()))
            os.kill(self.killed, signal.SIGSTOP)
            self.lost_tasks = len(self.client.processing()[address])
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.parametrize("stage", ["partition", "sort", "count", "write"])
def test_killing_a_worker_loses_nothing(stage: str, tmp_path: Path) -> None:
    log = _log()
    folder = _write(log, tmp_path / "log")
    with cluster(None, workers=2) as client:
        killer = _Killer(client, stage)
        prepare_distributed(client, folder, tmp_path / "out", 16, None, CONFIG, 100, progress=killer)
        assert killer.lost_tasks > 0
        assert killer.killed not in client.run(os.getpid).values()
    _assert_equal(open_shards(tmp_path / "out"), _one_machine(log, None, CONFIG))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]
    assert len(list((tmp_path / "out").iterdir())) == 16 + 1


@pytest.mark.parametrize("count", [1, 3, 5, 12])
def test_processes_share_the_users(count: int, client: Client, tmp_path: Path) -> None:
    out, log = tmp_path / "out", _log()
    prepare_distributed(client, _write(log, tmp_path / "log"), out, 5, None, CONFIG, PIECE)
    expected = _one_machine(log, None, CONFIG)
    shares = [open_share(out, index, count) for index in range(count)]
    _assert_equal([part for share in shares for part in share.parts], expected)
    places = np.concatenate([place for share in shares for place in share.places])
    raw_ids = np.concatenate([part.users.raw_ids for share in shares for part in share.parts])
    assert dict(zip(places, raw_ids, strict=True)) == dict(enumerate(expected.users.raw_ids))
    for share in shares:
        np.testing.assert_array_equal(share.train_counts, expected.split.train_counts)
    counted = sum(share.own_popularity() for share in shares)
    np.testing.assert_array_equal(counted, expected.train_popularity())


def test_shards_that_do_not_belong_together_are_refused(client: Client, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(DataError, match="expected a folder written by `jaxrec prepare-distributed`"):
        open_shards(tmp_path)
    for folder, seed in ((out, 0), (other, 1)):
        log = _write(_log(seed), tmp_path / f"log-{seed}")
        prepare_distributed(client, log, folder, 2, None, CONFIG, PIECE)
    with pytest.raises(ValueError, match=r"index must be in 0..1"):
        open_share(out, 2, 2)
    assert check_prepared(out) > 0
    shutil.rmtree(out / "shard-00001")
    shutil.copytree(other / "shard-00001", out / "shard-00001")
    with pytest.raises(DataError, match=r"not the shard that .*shards.json names; prepare again"):
        read_prepared(out)


def test_a_damaged_list_of_shards_is_refused(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = prepare_distributed(client, _write(_log(), tmp_path / "log"), out, 2, None, CONFIG, PIECE)
    events = [shard["events"] for shard in index["shards"]]
    counts = f"{index['users']} users and {index['events']} events"
    for damage, message in (
        ([], "schema version None"),
        ({**index, "shards": [{"name": "shard-00000"}]}, "damaged"),
        ({**index, "shards": None}, "damaged"),
        ({**index, "events": "many"}, "damaged"),
        ({**index, "shards": []}, "names no shard"),
        ({**index, "shards": index["shards"][:1]}, f"its 1 shards hold .* and {events[0]} events, expected {counts}"),
    ):
        (out / "shards.json").write_text(json.dumps(damage))
        with pytest.raises(DataError, match=rf"shards.json: {message}"):
            read_prepared(out)
    (out / "shards.json").unlink()
    assert summary_file(out) == out / "shards.json"
    for opening in (read_prepared, open_share, check_prepared):
        with pytest.raises(DataError, match=r"shards.json: cannot be read .*prepare-distributed"):
            opening(out)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (TIME, -5, r"part-1.parquet:501: timestamp -5 is not a time"),
        (TIME, 10**12, r"part-1.parquet:501: timestamp 1000000000000 is not a time; expected whole seconds"),
        (RATING, 7.5, r"part-1.parquet:501: rating 7.5 is outside 0.5..5"),
        (RATING, np.inf, r"part-1.parquet:501: rating inf is not a number"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(
    column: str, value: float, message: str, client: Client, tmp_path: Path
) -> None:
    log = _log()
    log.loc[1500, column] = value
    with pytest.raises(DataError, match=message):
        prepare_distributed(client, _write(log, tmp_path / "log"), tmp_path / "out", 2, None, CONFIG, PIECE)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_event_that_occurs_twice(client: Client, tmp_path: Path) -> None:
    log = _log()
    log.loc[2999] = log.loc[10]
    message = r"part-2.parquet:1000: user \d+, item \d+ at time \d+ repeats .*part-0.parquet:11;"
    folder = _write(log, tmp_path / "log")
    failing = dataclasses.replace(CONFIG, repeats=Repeats.FAIL)
    with pytest.raises(DataError, match=message):
        prepare_distributed(client, folder, tmp_path / "out", 2, None, failing, PIECE)
    for repeats, events in ((Repeats.FIRST, len(log) - 1), (Repeats.KEEP, len(log))):
        config = PrepareConfig(0, 0, repeats=repeats)
        index = prepare_distributed(client, folder, tmp_path / "out", 2, None, config, PIECE)
        assert index["events"] == events


def test_what_is_not_there(client: Client, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .parquet file"):
        prepare_distributed(client, tmp_path, tmp_path / "out", 2)
    folder = _write(_log(), tmp_path / "log")
    with pytest.raises(DataError, match="no event is left after dropping users with fewer than 4000"):
        prepare_distributed(client, folder, tmp_path / "out", 2, None, PrepareConfig(4000, 0))
    (folder / "part-9.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"part-9.parquet: not Parquet"):
        prepare_distributed(client, folder, tmp_path / "out", 2)


def test_command_line(client: Client, tmp_path: Path) -> None:
    folder, out = _write(_log(), tmp_path / "log"), tmp_path / "out"
    arguments = ["prepare-distributed", str(folder), "--out", str(out), "--shards", "2"]
    arguments += ["--scheduler", client.scheduler_info()["address"]]
    result = CliRunner().invoke(main, [*arguments, "--min-movie-ratings", "6", "--min-user-ratings", "8"])
    assert result.exit_code == 0, result.output
    expected = _one_machine(_log(), None, CONFIG)
    _assert_equal(open_shards(out), expected)
    counts = f"{expected.histories.event_count} events of {len(expected.users)} users in 2 shards"
    assert result.stdout == f"{out}: {counts}\n"
    for path in folder.iterdir():
        path.unlink()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr.endswith(f"Error: {folder}: holds no .parquet file\n")


def test_no_scheduler(tmp_path: Path) -> None:
    with socket.socket() as unused, dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        out = str(tmp_path / "out")
        arguments = ["prepare-distributed", str(tmp_path), "--out", out, "--shards", "1", "--scheduler", address]
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"Error: {address}: no Dask scheduler answers there" in result.stderr


def test_workers_that_die_again_and_again_are_an_error(tmp_path: Path) -> None:
    folder = _write(_log(), tmp_path / "log")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        cluster(None, workers=2) as client,
        pytest.raises(DataError, match=r"died again and again in one task .*memory, take more shards"),
    ):
        prepare_distributed(client, folder, tmp_path / "out", 16, None, CONFIG, 100, _Killer(client, "partition"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_an_output_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="out: cannot be written"):
        prepare_distributed(client, _write(_log(), tmp_path / "log"), tmp_path / "file" / "out", 2)
