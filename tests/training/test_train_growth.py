"""A run resumes with appended data: what it learned stays, new items and genres are fresh, other data is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from flax import nnx

from jaxrec.cli.main import main
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.append import append
from jaxrec.data.prepare import prepare
from jaxrec.models.sequence import TimeRatingAwareContentModel
from jaxrec.runs.directory import load_supervised, open_run
from jaxrec.training.checkpoints import Checkpoints, TrainProgress
from jaxrec.training.log import read_epochs, read_steps
from jaxrec.training.resize import genre_rows, restored_state
from jaxrec.training.step import TrainState, initial_state, make_optimizer
from tests.synthetic import markov_log

MODEL = ModelConfig(embedding=4, hidden=8, rating_width=2, time_width=2)
COLUMNS = ["userId", "movieId", "rating", "timestamp"]


def state_of(items: int, genres: list[str], seed: int, fill: float | None = None) -> TrainState:
    """A fresh state of a content model; with `fill` every trained value and moment is that, and the counters are 7."""
    matrix = np.random.default_rng(seed).integers(0, 2, (items + 1, len(genres))).astype(np.float32)
    model = TimeRatingAwareContentModel(items, matrix, MODEL, rngs=nnx.Rngs(seed))
    _, state = initial_state(model, make_optimizer(TrainConfig(), 100))
    if fill is None:
        return state
    filled = jax.tree.map(lambda leaf: jax.numpy.full_like(leaf, 7 if leaf.dtype == np.int32 else fill), state)
    return filled._replace(fixed=state.fixed)


def test_resizing_by_hand(tmp_path: Path) -> None:
    old, new = state_of(3, ["Comedy", "War"], 0, fill=0.5), state_of(5, ["Action", "Comedy", "War"], 1)
    saved = TrainProgress(3, 4, ["Comedy", "War"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(old, saved)
        checkpoints.wait()
        now = TrainProgress(5, 6, ["Action", "Comedy", "War"], data_version=1)
        resized = restored_state(checkpoints, 0, saved, new, now)
    for table in ("item_embedding", "item_bias_table"):
        np.testing.assert_array_equal(resized.params[table][...][:4], 0.5)
        np.testing.assert_array_equal(resized.params[table][...][4:], new.params[table][...][4:])
    kernel = resized.params["genre_projection"]["kernel"][...]
    np.testing.assert_array_equal(kernel[0], new.params["genre_projection"]["kernel"][...][0])
    np.testing.assert_array_equal(kernel[1:], 0.5)
    np.testing.assert_array_equal(resized.params["lstm"]["kernel"][...], 0.5)
    np.testing.assert_array_equal(resized.fixed["genre_matrix"][...], new.fixed["genre_matrix"][...])
    adam, _, schedule = resized.opt_state[1]
    for moments in (adam.mu, adam.nu):
        np.testing.assert_array_equal(
            moments["item_embedding"][...], np.repeat([[0.5], [0.0]], [4, 2], axis=0) * np.ones(4)
        )
        np.testing.assert_array_equal(moments["genre_projection"]["kernel"][...][:, 0], [0.0, 0.5, 0.5])
    assert (int(adam.count), int(schedule.count)) == (7, 0)


def test_genre_rows_by_hand() -> None:
    assert genre_rows(["A", "C"], ["A", "B", "C"]).tolist() == [0, -1, 1]
    assert genre_rows([], []).tolist() == [-1]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/data, FOLDER/run trained on it, and FOLDER/more: the data with new users, items and a new genre."""
    folder = tmp_path_factory.mktemp("growth")
    log = markov_log(users=60, items=30, events=10, stay=0.9, seed=0)
    later = markov_log(users=30, items=40, events=10, stay=0.9, seed=1).assign(user_id=lambda frame: frame.user_id + 60)
    for name, frame in (("a", log), ("b", later)):
        frame.set_axis(COLUMNS, axis=1).to_csv(folder / f"{name}.csv", index=False)
    for name, items, genre in (("movies", range(1, 31), "Drama|War"), ("new_movies", range(31, 41), "Action|War")):
        movies = pd.DataFrame({"movieId": items, "title": [f"Movie {i}" for i in items], "genres": genre})
        movies.to_csv(folder / f"{name}.csv", index=False)
    config = PrepareConfig(min_user_ratings=1, min_movie_ratings=1)
    prepare(folder / "a.csv", folder / "movies.csv", config, out=folder / "data")
    append(folder / "data", folder / "b.csv", folder / "new_movies.csv", out=folder / "more")
    options = ("--max-epochs", 2, "--hidden", 16, "--max-length", 8, "--batch-tokens", 128)
    result = run("train", folder / "data", "--out", folder / "run", *options)
    assert result.exit_code == 0, result.output
    return folder


def test_a_run_resumes_with_appended_data(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained / "run", out)
    (out / "policy").mkdir()
    (out / "policy.partial").mkdir()
    before = read_epochs(out / "content")
    command = ("train", "--out", out, "--resume", "--data", trained / "more")
    result = run(*command, "--max-epochs", 3)
    assert result.exit_code == 0, result.output
    epochs = read_epochs(out / "content")
    assert epochs[:2] == before
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3, 4]
    assert [record["data_version"] for record in epochs] == [0, 0, 1, 1, 1]
    steps = read_steps(out / "content")
    assert [record["step"] for record in steps] == list(range(len(steps)))
    assert next(record["learning_rate"] for record in steps if record["epoch"] == 2) == 0.0  # it warms up again
    resized = open_run(out)
    assert (resized.item_count, resized.data_version, resized.train_config.max_epochs) == (40, 1, 3)
    assert not (out / "policy").exists()  # it was of the old models
    assert not (out / "policy.partial").exists()
    hybrid = load_supervised(resized, resized.read_data())
    assert hybrid.item_vectors().shape[0] == 41
    # The same command again finds nothing left to do, whether it was killed before its end or not.
    mix = (out / "hybrid.json").read_text()
    assert run(*command).exit_code == 0
    assert (out / "hybrid.json").read_text() == mix
    assert read_epochs(out / "content") == epochs


def test_data_that_does_not_extend_the_old_is_refused(trained: Path, tmp_path: Path) -> None:
    other = markov_log(users=60, items=35, events=10, stay=0.9, seed=0)
    other.set_axis(COLUMNS, axis=1).assign(movieId=lambda frame: frame.movieId + 5).to_csv(tmp_path / "other.csv")
    config = PrepareConfig(min_user_ratings=1, min_movie_ratings=1)
    prepare(tmp_path / "other.csv", None, config, out=tmp_path / "other")
    before = json.loads((trained / "run/run.json").read_text())
    result = run("train", "--out", trained / "run", "--resume", "--data", tmp_path / "other")
    assert result.exit_code == 1
    assert "its catalogue does not begin with the 30 items that" in result.output
    assert json.loads((trained / "run/run.json").read_text()) == before
    assert (trained / "run/hybrid.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "run"), "DATA is missing"),
        (("data", "--out", "new", "--data", "more"), "--data is for --resume"),
        (("--out", "run", "--resume", "--hidden", "32"), "--hidden cannot be changed on --resume"),
        (("--out", "run", "--resume", "--max-epochs", "9"), "--max-epochs cannot be changed on --resume"),
        (("--out", "run", "--resume", "--data", "more", "--seed", "1"), "--seed cannot be changed on --resume"),
        (("data", "--out", "new", "--coordinator", "h:1"), "belong together"),
    ],
)
def test_options_that_do_not_go_together(trained: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("train", *[trained / word if (trained / word).exists() else word for word in arguments])
    assert result.exit_code == 2
    assert message in result.output
