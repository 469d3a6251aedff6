"""What `bench.quality` and `bench.rl_logged` measure, and that both make their pages of one work folder."""

import itertools
import json
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import pytest
from click.testing import CliRunner

from bench import public, quality, rl_logged, trend
from bench.publish import begin, write_arrays
from bench.quality import LOGS, SPLITS, TIES, begun, folder_of, prepared, settings
from jaxrec.config import Ties
from jaxrec.rl.logged.learn import MIX
from jaxrec.runs.directory import RERANKER_OUTCOME_FILE
from tests.synthetic import random_log

MODELS = ("recent popularity", "hybrid", "stacked", "policy")
USERS = np.repeat(np.arange(6), 2)


@pytest.fixture
def logs(tmp_path: Path) -> dict[str, Path]:
    """The logs of the page: empty folders, that of beauty of sequences."""
    found = {name: tmp_path / "logs" / name for name in LOGS}
    for path in found.values():
        path.mkdir(parents=True)
    (found["beauty"] / "sequences.txt").touch()
    return found


def test_a_log_without_times_has_one_setting_and_others_have_all(logs: dict[str, Path]) -> None:
    found = settings(logs, SPLITS, TIES)
    assert [one for one in found if one[0] == "beauty"] == [("beauty", "leave-one-out", Ties.FILE)]
    every = list(itertools.product(SPLITS, map(Ties, TIES)))
    for log in LOGS[:3]:
        assert [one[1:] for one in found if one[0] == log] == every


def test_a_log_without_times_keeps_the_order_of_its_file(tmp_path: Path) -> None:
    users = {f"u{user}": [f"i{(3 * user + step) % 8}" for step in range(6)] for user in range(8)}
    (tmp_path / "sequences.txt").write_text("".join(f"{user} {' '.join(items)}\n" for user, items in users.items()))
    (tmp_path / "item2attributes.json").write_text(json.dumps({f"i{item}": [item % 2] for item in range(8)}))
    data = prepared(tmp_path / "data", "beauty", tmp_path)
    offsets, raw = data.histories.offsets, data.catalog.ids.raw_ids
    for user, name in enumerate(data.users.raw_ids):
        items = data.histories.items[offsets[user] : offsets[user + 1]]
        assert [str(raw[item - 1]) for item in items] == users[str(name)]
    assert (data.split.test.rows == offsets[1:] - 1).all()
    assert (data.unit_ratings() < 0).all()


@pytest.mark.parametrize("asked", [(("temporal",), TIES), (SPLITS, ("random",))])
def test_a_log_without_any_setting_is_named(
    asked: tuple[tuple[str, ...], tuple[str, ...]], logs: dict[str, Path]
) -> None:
    with pytest.raises(click.BadParameter, match="beauty has no times"):
        settings(logs, *asked)


def test_data_of_another_log_are_refused(tmp_path: Path) -> None:
    """Also where it has the same name, and of a folder whichever of its files is another one."""
    (tmp_path / "log").mkdir()
    log = random_log(users=20, items=8, max_events=8, seed=0)
    log.set_axis(["userId", "movieId", "rating", "timestamp"], axis=1).to_csv(tmp_path / "log/ratings.csv", index=False)
    movies = tmp_path / "log/movies.csv"
    movies.write_text("movieId,title,genres\n1,One (2001),Drama\n")
    asked = tmp_path / "work/data", "ml-latest-small", tmp_path / "log", "leave-one-out", Ties.FILE
    digest = prepared(*asked).digest
    assert prepared(*asked).digest == digest
    movies.write_text("movieId,title,genres\n1,One (2001),Comedy\n")
    with pytest.raises(click.ClickException, match=r"data was made of another file than .*log; delete .*work"):
        prepared(*asked)


@pytest.fixture
def work(tmp_path: Path, logs: dict[str, Path]) -> Path:
    """What `measure` leaves of one seed in every setting of all logs: random ranks, and outcomes of the gate."""
    rng = np.random.default_rng(0)
    gain = {"mean": 0.01, "low": 0.005, "high": 0.015}
    differences = {
        f"{figure}{of}": gain
        for figure in ("ndcg", "reward_weighted_ndcg", "reward")
        for of in rl_logged.OUT_OF_FOLD.values()
    }
    outcome = {"used": True, "differences": differences, "figures": {MIX: {"ndcg": 0.1, "reward": 0.3}}}
    for name, split, ties in settings(logs, SPLITS, TIES):
        folder = folder_of(tmp_path, name, split, ties)
        (folder / "run-0").mkdir(parents=True)
        (folder / "run-0" / RERANKER_OUTCOME_FILE).write_text(json.dumps(outcome))
        ranks = folder / "ranks-0.npz"
        begin(begun(ranks))
        arrays = {"popularity": np.arange(21), "users": USERS, "data": "0" * 64, "half_life_s": 1}
        arrays["rating"] = np.full(len(USERS), 0.5) if name == "beauty" else rng.random(len(USERS))
        for model, time in itertools.product(MODELS, (False,) if name == "beauty" else (False, True)):
            arrays[f"{model}|{time}|ranks"] = rng.integers(1, 21, len(USERS))
            arrays[f"{model}|{time}|top"] = rng.integers(1, 21, (len(USERS), 10))
        write_arrays(ranks, arrays)
    return tmp_path


def test_a_path_that_is_not_there_and_a_log_of_another_kind_are_refused(tmp_path: Path, logs: dict[str, Path]) -> None:
    for page, log, reason in (
        (quality, f"beauty={tmp_path}/beuaty", "expected NAME=PATH of a log that is there"),
        (quality, "beauty", "expected NAME=PATH of a log that is there"),
        (quality, f"={logs['beauty']}", "expected NAME=PATH of a log that is there"),
        (trend, f"beauty={logs['beauty']}", "beauty: a log without times has no trend"),
        (public, f"ml-100k={logs['ml-100k']}", "ml-100k: expected a folder with sequences.txt"),
    ):
        result = CliRunner().invoke(page.main, ["--work", str(tmp_path / "w"), log])
        assert (result.exit_code, reason in result.output) == (2, True), result.output
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("page", [quality, rl_logged])
def test_both_pages_are_made_of_one_work_folder(work: Path, page: ModuleType, logs: dict[str, Path]) -> None:
    """Nothing is left to measure, so that no log is read."""
    asked = [f"{name}={path}" for name, path in logs.items()]
    CliRunner().invoke(page.main, ["--work", str(work), "--seeds", "1", *asked], catch_exceptions=False)
    (text,) = (file.read_text() for file in work.glob("*.md"))
    sections = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert sections == [folder_of(work, *one).name for one in settings(logs, SPLITS, TIES)]
    assert {"ml-100k-temporal-random", "beauty-leave-one-out-file"} < set(sections)
    rows = [line for line in text.splitlines() if line.startswith("| policy |")]
    assert len(rows) == 2 * len(sections) - 1  # with and without the request time, which beauty does not have
    assert "- not to be published: seeds: 1 of 5" in text


def test_weights_by_rating_are_empty_without_ratings(work: Path, logs: dict[str, Path]) -> None:
    asked = [f"{name}={logs[name]}" for name in ("ml-100k", "beauty")]
    options = ["--work", str(work), "--seeds", "1", "--splits", "leave-one-out", "--ties", "file"]
    CliRunner().invoke(rl_logged.main, [*options, *asked], catch_exceptions=False)
    rated, without = (work / "rl_logged.md").read_text().split("\n## ")[1:]
    for label, columns in (("| policy |", (6, 7)), ("| policy over the mix |", (3,))):
        for text, empty in ((rated, False), (without, True)):
            cells = next(line for line in text.splitlines() if line.startswith(label)).split("|")
            assert [not cells[column].strip() for column in range(2, len(cells) - 1)] == [
                empty and column in columns for column in range(2, len(cells) - 1)
            ]
