"""A run from Python: what it takes, where it lies, and what of it a later stage keeps or removes."""

import dataclasses
import gc
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx

import jaxrec
from jaxrec.errors import TrainingStopped
from jaxrec.runs import directory
from jaxrec.runs.directory import (
    EVALUATION_FILE,
    LSTM_FOLDER,
    NEIGHBOURS_FILE,
    NEIGHBOURS_PARTIAL_FOLDER,
    POLICY_FILES,
    RUN_FILE,
    Run,
    new_models,
)
from jaxrec.runs.train import _data_folder, extend_run
from tests.synthetic import markov_log

MODEL = jaxrec.ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=8)
TRAINING = jaxrec.TrainConfig(max_epochs=2, batch_tokens=128)  # as in tests/examples: compiled once for both
EVERYTHING = jaxrec.PrepareConfig(min_user_ratings=1, min_movie_ratings=1)


@pytest.fixture(scope="module")
def log() -> pd.DataFrame:
    return markov_log(users=60, items=30, events=10, stay=0.9, seed=0)


@pytest.fixture(scope="module")
def run(log: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on data in memory."""
    folder = tmp_path_factory.mktemp("api")
    return jaxrec.train(jaxrec.prepare(log, None, EVERYTHING), folder / "run", MODEL, TRAINING)


def test_data_in_memory_is_kept_in_the_run(run: Run, log: pd.DataFrame) -> None:
    assert run.data_folder == (run.folder / "data").resolve()
    assert run.read_data().histories.event_count == len(log)


def test_data_that_lies_in_a_folder_is_not_copied(run: Run, tmp_path: Path) -> None:
    data = jaxrec.read_prepared(run.data_folder)
    assert data.folder == run.data_folder
    assert _data_folder(data, tmp_path) == data.folder
    changed = dataclasses.replace(data, config=dataclasses.replace(data.config, seed=1))
    assert changed.folder is None
    assert _data_folder(changed, tmp_path) == tmp_path / "data"
    assert jaxrec.read_prepared(tmp_path / "data").config.seed == 1


def test_without_a_folder_the_run_lives_as_long_as_the_object(log: pd.DataFrame) -> None:
    run = jaxrec.train(log, model_config=MODEL, train_config=TRAINING)
    folder = run.folder
    assert run.recommend([1, 2, 3], k=3)["rank"].tolist() == [1, 2, 3]
    assert folder.is_dir()
    del run
    gc.collect()
    assert not folder.parent.exists()


def test_a_file_is_prepared_and_a_failed_training_leaves_no_folder(
    log: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    log.head(3).to_csv(tmp_path / "ratings.csv", index=False)
    with pytest.raises(jaxrec.DataError, match="no event is left of 3"):
        jaxrec.train(tmp_path / "ratings.csv")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_stop_while_co_occurrence_is_counted_or_factorized_ends_the_command(
    log: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxrec.models.neighbours.DENSE_ITEMS", 0)
    data, out = jaxrec.prepare(log, None, EVERYTHING, out=tmp_path / "data"), tmp_path / "run"
    for end in (
        1,
        5,
    ):  # the question that is answered by yes: after the pass over the events, before a product
        asked = itertools.count(1)
        resume = (out / RUN_FILE).is_file()
        with pytest.raises(TrainingStopped, match="the co-occurrence is not counted yet, no model is trained"):
            jaxrec.train(
                data, out, MODEL, TRAINING, resume=resume, stop=lambda asked=asked, end=end: next(asked) == end
            )
        assert {path.name for path in out.iterdir()} == {RUN_FILE, NEIGHBOURS_PARTIAL_FOLDER}
    with pytest.raises(TrainingStopped, match="stopped and saved after step 0 "):
        jaxrec.train(data, out, MODEL, TRAINING, resume=True, stop=(out / NEIGHBOURS_FILE).is_file)
    assert {path.name for path in out.iterdir()} == {RUN_FILE, NEIGHBOURS_FILE, LSTM_FOLDER}


def test_an_evaluation_is_a_table_and_a_frame_and_stays_when_a_finished_run_is_resumed(run: Run) -> None:
    evaluation = jaxrec.evaluate(run.folder)
    frame = evaluation.to_frame()
    assert len(frame) == len(evaluation.rows)
    first = evaluation.rows[0]
    assert frame.loc[0, ["name", "ndcg_10", "ndcg_10_low", "ndcg_10_high"]].tolist() == [
        first.name,
        *(first.ndcg_10[part] for part in ("mean", "low", "high")),
    ]
    assert all(row.name in str(evaluation) for row in evaluation.rows)
    ndcg = {(row.name, row.request_time): row.ndcg_10["mean"] for row in evaluation.rows}
    for time, label in ((False, "without"), (True, "with")):
        ratio = evaluation.comparison["hybrid_over_recent_popularity_ndcg_10"][label]["mean"]
        assert ratio == pytest.approx(ndcg["hybrid", time] / ndcg["recent popularity", False])
    before = (run.folder / EVALUATION_FILE).read_text()
    jaxrec.train(None, run.folder, resume=True)
    assert (run.folder / EVALUATION_FILE).read_text() == before


def test_some_of_the_cases_are_ranked_if_that_is_asked(run: Run) -> None:
    some = jaxrec.evaluate(run.folder, max_cases=20)
    assert all(row.cases == 20 for row in some.rows)
    assert some.protocol["test_cases"] == 20
    assert some.protocol["test_cases_of_data"] == 60
    assert "Means over 20 of 60 test cases" in str(some)
    whole = jaxrec.evaluate(run.folder, max_cases=1_000)
    assert whole.protocol["test_cases"] == 60
    assert "Means over 60 test cases" in str(whole)


def test_an_evaluation_replaces_none_of_more_cases(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path, kept = run.folder / EVALUATION_FILE, []
    path.write_text('{"protocol": ')  # half a file counts for nothing
    for cases in (20, 30, 20, None, 30, None):
        jaxrec.evaluate(run.folder, max_cases=cases)
        kept.append(json.loads(path.read_text())["protocol"]["test_cases"])
    assert kept == [20, 30, 30, 60, 60, 60]
    said = [line for line in capsys.readouterr().out.splitlines() if "stays" in line]
    assert said == [
        f"{path} stays: it is of 30 test cases, this evaluation of 20",
        f"{path} stays: it is of 60 test cases, this evaluation of 30",
    ]


def test_new_data_removes_all_that_depends_on_the_old(run: Run, log: pd.DataFrame, tmp_path: Path) -> None:
    policies = [value for name, value in vars(directory).items() if name.endswith("_FOLDER") and "policy" in value]
    assert set(policies) <= set(POLICY_FILES)
    for name in (EVALUATION_FILE, *POLICY_FILES):
        if name in policies:
            (run.folder / name).mkdir()
        else:
            (run.folder / name).touch()
    later = markov_log(users=10, items=30, events=10, stay=0.9, seed=1).assign(user_id=lambda frame: frame.user_id + 60)
    later.to_csv(tmp_path / "later.csv", index=False)
    jaxrec.append(run.data_folder, tmp_path / "later.csv", out=tmp_path / "more")
    extend_run(run.folder, tmp_path / "more")
    assert [name for name in (EVALUATION_FILE, *POLICY_FILES) if (run.folder / name).exists()] == []


def test_initial_weights_depend_on_the_seed_and_share_no_key(run: Run) -> None:
    data = run.read_data()

    def weights(seed: int) -> list[np.ndarray]:
        return [np.asarray(model.item_embedding[...]) for model in new_models(data, MODEL, seed)]

    (lstm, content), again, other = weights(0), weights(0), weights(1)
    np.testing.assert_array_equal(lstm, again[0])
    assert not np.array_equal(lstm, other[0])
    assert not np.array_equal(content, other[0])  # twice the seed, and that plus one, met in the next seed
    assert not np.array_equal(lstm, content)
    of_seed = jax.random.key(0)
    initial = jax.random.split(jax.random.fold_in(of_seed, directory.INITIAL_WEIGHTS))
    steps = jax.vmap(lambda step: jax.random.key_data(jax.random.fold_in(of_seed, step)))(np.arange(10_000))
    both = {tuple(key) for key in np.asarray(jax.random.key_data(initial)).tolist()}
    assert both.isdisjoint(tuple(key) for key in np.asarray(steps).tolist())
    assert isinstance(nnx.Rngs(initial[0]).params(), jax.Array)
