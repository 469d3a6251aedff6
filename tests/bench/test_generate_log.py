"""The generated log: MovieLens' marginals within tolerance, the same bytes for the same seed, no event twice."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "bench" / "generate_log.py"
SPEC = importlib.util.spec_from_file_location("generate_log", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
generate_log = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate_log)

ROWS = 1_100_000  # two chunks


@pytest.fixture(scope="module")
def log() -> dict[str, np.ndarray]:
    table = pa.concat_tables(generate_log.generate(ROWS, seed=3))
    return {name: table[name].to_numpy() for name in table.column_names}


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True)


def test_has_the_rows_asked_for(log: dict[str, np.ndarray]) -> None:
    assert list(log) == ["userId", "movieId", "rating", "timestamp"]
    assert len(log["userId"]) == ROWS


@pytest.mark.parametrize("rows", [1, 19, 45, 5_000])
def test_small_logs_have_the_rows_asked_for(rows: int) -> None:
    table = pa.concat_tables(generate_log.generate(rows, seed=0))
    _, counts = np.unique(table["userId"].to_numpy(), return_counts=True)
    assert table.num_rows == rows
    assert rows < 20 or counts.min() >= 20


def test_activity_has_movielens_tail(log: dict[str, np.ndarray]) -> None:
    counts = np.bincount(log["userId"])[1:]  # ids are 1..users
    assert counts.min() == 20
    assert np.median(counts) == pytest.approx(71, rel=0.05)
    assert counts.mean() == pytest.approx(153.8, rel=0.08)


def test_popularity_has_movielens_tail(log: dict[str, np.ndarray]) -> None:
    counts = np.sort(np.bincount(log["movieId"], minlength=generate_log.MOVIES))[::-1]
    share = np.cumsum(counts) / ROWS
    assert share[590 - 1] == pytest.approx(0.41, abs=0.03)
    assert share[5900 - 1] == pytest.approx(0.93, abs=0.03)
    assert 1 < log["movieId"].max() <= 209_171


def test_ratings_have_ml_25m_shares(log: dict[str, np.ndarray]) -> None:
    assert sum(generate_log.RATING_COUNTS.values()) == 25_000_095
    stars, counts = np.unique(log["rating"], return_counts=True)
    expected = np.array(list(generate_log.RATING_COUNTS.values())) / 25_000_095
    assert stars.tolist() == list(generate_log.RATING_COUNTS)
    np.testing.assert_allclose(counts / ROWS, expected, atol=0.002)


def test_times_come_in_sessions_with_ties(log: dict[str, np.ndarray]) -> None:
    order = np.lexsort((log["timestamp"], log["userId"]))
    users, times = log["userId"][order], log["timestamp"][order]
    gaps = np.diff(times)[np.diff(users) == 0]
    assert np.mean(gaps == 0) == pytest.approx(0.22, abs=0.02)
    assert np.median(gaps) == pytest.approx(10, abs=2)
    assert np.mean(gaps > 3600) == pytest.approx(0.055, abs=0.025)
    assert times.min() >= generate_log.FIRST_TIME
    assert times.max() <= generate_log.LAST_TIME


def test_no_user_rates_a_movie_twice(log: dict[str, np.ndarray]) -> None:
    pairs = log["userId"] * 1_000_000 + log["movieId"]
    assert len(np.unique(pairs)) == ROWS


def test_very_active_users_rate_distinct_movies() -> None:
    rng = np.random.default_rng(0)
    cdf = generate_log.popularity_cdf(rng)
    counts = np.array([20, 5_000, 30, 1_000, 999])
    movies = generate_log.draw_movies(counts, cdf, rng)
    for part in np.split(movies, np.cumsum(counts)[:-1]):
        assert np.all(np.diff(part) > 0)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_same_seed_same_bytes(kind: str, tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.{kind}" for name in ("one", "two", "other")]
    for out, seed in zip(outs, ("5", "5", "6"), strict=True):
        _run("--rows", "20000", "--seed", seed, "--format", kind, "--out", str(out))
    contents = [(out if kind == "csv" else out / "part-00000.parquet").read_bytes() for out in outs]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_csv_and_parquet_hold_the_same_rows_and_csv_looks_like_movielens(tmp_path: Path) -> None:
    _run("--rows", "5000", "--format", "csv", "--out", str(tmp_path / "log.csv"))
    _run("--rows", "5000", "--format", "parquet", "--out", str(tmp_path / "log"))
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == "userId,movieId,rating,timestamp"
    rows = pa.parquet.read_table(tmp_path / "log").to_pylist()
    assert lines[1:] == ["{userId},{movieId},{rating:.1f},{timestamp}".format(**row) for row in rows]


def test_parquet_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    arguments = ["--rows", "100", "--format", "parquet", "--out", str(tmp_path)]
    result = CliRunner().invoke(generate_log.main, arguments)
    assert result.exit_code == 2
    assert f"{tmp_path} exists; Parquet goes to a new directory" in result.output


def test_shuffle_parts_the_users_and_keeps_the_rows() -> None:
    plain, shuffled = (next(generate_log.generate(20_000, 1, shuffle)) for shuffle in (False, True))
    keys = [(name, "ascending") for name in plain.column_names]
    assert shuffled.sort_by(keys).equals(plain.sort_by(keys))
    users_change = [int(np.count_nonzero(np.diff(table["userId"].to_numpy()))) for table in (plain, shuffled)]
    assert users_change[0] < 300
    assert users_change[1] > 19_000
