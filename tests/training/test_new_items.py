"""Content heads and new items: closed forms by hand, what they leave as it is, and a log that teaches them."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.batches import case_batches
from jaxrec.data.content import item_content
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer, sequence_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.runs.directory import CONTENT_HEAD_FILE, Run, load_supervised, new_models
from jaxrec.runs.evaluate import evaluate
from jaxrec.runs.train import train
from jaxrec.training.content_head import ridge, ridge_head, train_head
from jaxrec.training.new_items import SHIFTS, _largest_shifts, place_rows, shift_logits, tune_shift

MODEL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=2, max_length=20)


@pytest.mark.parametrize("rows", [7, 10_000])  # in four blocks and a rest, and in one
def test_ridge_is_the_closed_form(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrec.training.content_head.RIDGE_ROWS", rows)
    rng = np.random.default_rng(0)
    features, targets = rng.integers(0, 2, (30, 4)).astype(float), rng.normal(size=(30, 3))
    weights = rng.uniform(0.5, 4, 30)
    head = ridge(features, targets, weights, penalty=7.0)
    # The normal equations with a column of ones that is not penalized.
    x = np.column_stack([features, np.ones(30)])
    penalty = np.diag([7.0 * weights.mean()] * 4 + [0.0])
    expected = np.linalg.solve(x.T @ (weights[:, None] * x) + penalty, x.T @ (weights[:, None] * targets))
    np.testing.assert_allclose(head.kernel, expected[:-1], atol=1e-6)
    np.testing.assert_allclose(head.offset, expected[-1], atol=1e-6)


def test_a_strong_penalty_leaves_the_weighted_mean() -> None:
    targets = np.array([[1.0], [5.0]])
    head = ridge(np.array([[0.0], [1.0]]), targets, np.array([3.0, 1.0]), penalty=1e9)
    np.testing.assert_allclose(head.rows(np.array([[0.0], [1.0]])), 2.0, atol=1e-6)  # (3 * 1 + 1 * 5) / 4


def test_head_training_lowers_its_loss_changes_no_model_and_follows_from_the_seed(small_data: PreparedData) -> None:
    _, model = new_models(small_data, MODEL, seed=0)
    before = jax.tree.map(np.array, nnx.state(model))
    features, popularity = item_content(small_data).matrix, small_data.train_popularity()
    start = ridge_head(model, features, popularity)
    config = TrainConfig(seed=3, batch_tokens=200)
    heads = [train_head(model, start, features, small_data, config) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*heads, strict=True))
    assert not np.array_equal(heads[0].kernel, start.kernel)
    after = nnx.state(model)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    with pytest.raises(TrainingStopped, match="the content head is not trained yet"):
        train_head(model, start, features, small_data, config, stop=lambda: True)


def test_only_the_rows_of_new_items_change(small_data: PreparedData) -> None:
    new = np.zeros(len(small_data.catalog) + 1, bool)
    new[[3, 17]] = True
    rows = np.random.default_rng(0).normal(size=(len(new), MODEL.embedding + 1)).astype(np.float32)
    for model in new_models(small_data, MODEL, seed=0):
        vectors, bias = np.array(model.item_vectors()), np.array(model.item_bias())
        place_rows(model, new, rows)
        np.testing.assert_array_equal(np.asarray(model.item_vectors())[~new], vectors[~new])
        np.testing.assert_array_equal(np.asarray(model.item_bias())[~new], bias[~new])
        np.testing.assert_allclose(np.asarray(model.item_vectors())[new], rows[new, :-1], atol=1e-6)
        np.testing.assert_array_equal(np.asarray(model.item_bias())[new], rows[new, -1])


def test_a_shift_moves_the_logits_of_new_items_by_itself(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    hybrid = random_hybrid(small_data, 1, False)
    new = np.zeros(len(small_data.catalog) + 1, bool)
    new[[2, 5]] = True
    batch = next(case_batches(small_data, small_data.split.validation, 20))
    before = np.asarray(hybrid_scorer(hybrid)(batch))
    shift_logits(hybrid, new, -1.5)
    moved = np.asarray(hybrid_scorer(hybrid)(batch)) - before
    np.testing.assert_allclose(moved[:, new], -1.5, atol=1e-4)
    np.testing.assert_array_equal(moved[:, ~new], 0)


def test_the_largest_shift_at_which_a_target_stays_among_the_first_50() -> None:
    """Known items 1 to 60 with the logits 60 to 1; new items 61 to 100 with the logits 39.5, 38.5, ... 0.5."""
    logits = jnp.array([[0.0, *range(60, 0, -1), *(39.5 - np.arange(40))]] * 4, jnp.float32)
    new = jnp.arange(101) > 60
    target = jnp.array([10, 11, 50, 51])
    exclude = jnp.zeros((4, 1), jnp.int32)
    found = _largest_shifts(logits, new, target, exclude).tolist()
    # Place 11 (logit 50) is lost when all 40 new ones have passed it, place 50 (logit 11) when the first has.
    assert found == [np.inf, 50 - 0.5, 11 - 39.5, -np.inf]
    one_less = _largest_shifts(logits, new, target, jnp.full((4, 1), 61)).tolist()  # the best new one is excluded
    assert one_less == [np.inf, np.inf, 11 - 38.5, -np.inf]


def test_the_shift_keeps_the_hit_rate_of_known_items(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    hybrid = random_hybrid(small_data, 2, False)
    new = np.zeros(len(small_data.catalog) + 1, bool)
    new[1:21] = True
    found = tune_shift(hybrid, new, small_data)
    assert found.count == 20
    assert found.shift in SHIFTS
    assert 0.975 * found.validation_hr_50_without <= found.validation_hr_50 <= found.validation_hr_50_without


@pytest.fixture(scope="module")
def genre_log() -> PreparedData:
    """120 items of 4 genres, 100 users who each stay with one genre; 12 items, 3 a genre, are in the catalogue only."""
    rng = np.random.default_rng(0)
    items = np.arange(1, 121)
    movies = pd.DataFrame({ITEM: items, TITLE: [f"Item {i}" for i in items], GENRES: [f"G{i % 4}" for i in items]})
    rated = items[items <= 108]
    rows = [
        (user, item, 10_000 * user + place)
        for user in range(100)
        for place, item in enumerate(rng.choice(rated[rated % 4 == user % 4], 20, replace=False))
    ]
    log = pd.DataFrame(rows, columns=[USER, ITEM, TIME])
    return prepare(log, movies, PrepareConfig(min_user_ratings=5, min_movie_ratings=0))


@pytest.fixture(scope="module")
def run(genre_log: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("new") / "run"
    return train(genre_log, folder, MODEL, TrainConfig(max_epochs=6, batch_tokens=400, learning_rate=1e-2))


def test_new_items_of_the_users_genre_are_among_the_first_50_and_never_among_the_first_10(run: Run) -> None:
    data = run.read_data()
    hybrid = load_supervised(run, data)
    assert hybrid.new_items is not None
    new = np.asarray(hybrid.new_items[...])
    assert np.flatnonzero(new).tolist() == list(range(109, 121))
    found, before = [], []
    for batch in case_batches(data, data.split.test, MODEL.max_length):
        scores = np.array(hybrid_scorer(hybrid)(batch))
        np.put_along_axis(scores, batch.exclude, -np.inf, axis=1)
        order = np.argsort(-scores[:, 1:], axis=1) + 1
        right = order % 4 == batch.target[:, None] % 4
        assert not new[order[:, :10]].any()
        found.append((new[order] & right)[:, :50].sum(axis=1))
        of_new = right[new[order]].reshape(len(order), 12)
        before.append(of_new[:, :3].sum(axis=1))
    assert np.concatenate(found).mean() > 2.7  # of 3
    assert np.concatenate(before).mean() > 2.7  # before the 9 of the other genres


def test_rows_of_one_model_leave_new_items_out(run: Run) -> None:
    """Their shift is for the mix. Of these test cases, none has a new item as its target."""
    data, hybrid = run.read_data(), load_supervised(run, run.read_data())
    assert hybrid.new_items is not None
    new, frame = hybrid.new_items[...], evaluate(run).to_frame().set_index(["name", "request_time"])
    for name, model in (("TimeRatingAwareLSTM", hybrid.lstm), ("TimeRatingAwareContentModel", hybrid.content)):
        scorer = sequence_scorer(model)
        shifted, known = (
            ndcg(rank_cases(one, data, data.split.test, MODEL.max_length, False).ranks, 10).mean()
            for one in (scorer, lambda batch, scorer=scorer: jnp.where(new, NEVER, scorer(batch)))
        )
        assert frame.loc[(name, False), "ndcg_10"] == pytest.approx(known)
        assert known > shifted


def test_the_heads_are_kept_and_not_trained_again(run: Run) -> None:
    path = run.folder / CONTENT_HEAD_FILE
    before = path.stat().st_mtime_ns, path.read_bytes()
    scores = load_supervised(run, run.read_data()).item_vectors()
    train(None, run.folder, resume=True)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    np.testing.assert_array_equal(load_supervised(run, run.read_data()).item_vectors(), scores)
    with np.load(path) as arrays:
        assert arrays["names"].tolist() == ["G0", "G1", "G2", "G3"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["G0", "G2", "G1", "G3"], r"4 features, the data has 4; feature 2 was 'G2' and is 'G1'; train again"),
        (["G0", "G1", "G2"], r"3 features, the data has 4; feature 4 was none and is 'G3'; train again"),
        (["G0", "G1", "G2", "G3", "x"], r"5 features, the data has 4; feature 5 was 'x' and is none; train again"),
    ],
)
def test_heads_of_other_features_are_refused_when_a_run_is_loaded(
    names: list[str], message: str, run: Run, tmp_path: Path
) -> None:
    copy = dataclasses.replace(run, folder=tmp_path / "run")
    shutil.copytree(run.folder, copy.folder)
    with np.load(run.folder / CONTENT_HEAD_FILE) as arrays:
        np.savez(copy.folder / CONTENT_HEAD_FILE, **{**arrays, "names": np.array(names)})
    with pytest.raises(DataError, match=r"content_head\.npz: trained with " + message):
        load_supervised(copy, run.read_data())


def test_without_content_new_items_stay_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = pd.DataFrame({USER: np.repeat(range(10), 6), ITEM: [*range(6)] * 10, TIME: range(60)})
    data = prepare(log, config=PrepareConfig(min_user_ratings=1, min_movie_ratings=1))
    run = train(data, tmp_path / "run", MODEL, TrainConfig(max_epochs=1, batch_tokens=100))
    assert "content head: skipped" in capsys.readouterr().out
    assert not (tmp_path / "run" / CONTENT_HEAD_FILE).exists()
    hybrid = load_supervised(run, run.read_data())
    assert hybrid.new_items is None
