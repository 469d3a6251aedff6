"""The trend is added to the items' logits, the same for each request, with an index and without."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.model.directory import Artifact, read_artifact
from serve.model.features import Features
from serve.model.manifest import ArtifactError
from serve.model.ranking.engine import Engine, Step
from serve.model.trend import HALF_LIVES_S, halved
from tests.serve.model.test_directory import edit_manifest, replace_file
from tests.serve.model.test_engine import random_rows

DAY = 86_400


def counts_of(items: dict[int, float], item_count: int) -> np.ndarray:
    """So many events of each item, for all half-lives."""
    counts = np.zeros((len(HALF_LIVES_S), item_count + 1), np.float32)
    for item, count in items.items():
        counts[:, item] = count
    return counts


def scores(engine: Engine, row: Features) -> np.ndarray:
    """Of all items, by item index; nan for those that are excluded."""
    (ranking,) = engine.rank([row], engine.item_count)
    found = np.full(engine.item_count + 1, np.nan, np.float32)
    found[ranking.items] = ranking.scores
    return found


@pytest.fixture(params=["exact", "index"])
def engine(request: pytest.FixtureRequest, artifact: Artifact, indexed: Artifact) -> Engine:
    return Engine(artifact if request.param == "exact" else indexed, "cpu")


def test_an_event_counts_half_after_a_half_life() -> None:
    left = halved(np.array([0.0, DAY, 7 * DAY, -5.0]))
    np.testing.assert_allclose(left[:, 1], [1, 1 / 2, 1 / 2**7, 1])
    np.testing.assert_allclose(left[:, 3], [1, 0.5 ** (1 / 7), 1 / 2, 1])


def test_the_counts_of_the_export_decay_until_now(artifact: Artifact) -> None:
    files = artifact.trend
    np.testing.assert_array_equal(files.at(files.counted_until), files.counts)
    np.testing.assert_array_equal(files.at(files.counted_until - 5), files.counts)
    later = files.at(files.counted_until + 30 * DAY)
    np.testing.assert_allclose(later[4], files.counts[4] / 2, rtol=1e-6)
    np.testing.assert_allclose(later[2], files.counts[2] / 2**10, rtol=1e-6)


def test_logits_with_a_trend_are_those_without_and_the_trend(engine: Engine) -> None:
    for row in random_rows([1, 7, 40], engine.item_count):
        engine.use_counts(counts_of({}, engine.item_count))
        nothing, without = engine.trend.values, scores(engine, row)
        engine.use_counts(counts_of({3: 5.0, 20: 1.0, 60: 100.0}, engine.item_count))
        added = engine.trend.values - nothing
        assert added[60] > added[3] > added[20] > 0
        np.testing.assert_allclose(scores(engine, row), without + added, atol=1e-4)


def test_a_step_has_the_trend_of_a_replay(engine: Engine) -> None:
    engine.use_counts(counts_of({3: 5.0, 20: 1.0}, engine.item_count))
    (row,) = random_rows([9], engine.item_count)
    ((_, before),) = engine.replay([row.without_last()])
    step = Step(before, row.item[-1:], row.rating[-1:], row.gap[-1:], row.request_gap, np.append(row.exclude, 0)[None])
    ((stepped, _),) = engine.step([step._replace(exclude=step.exclude.astype(np.int32))], 60)
    (replayed,) = engine.rank([row], 60)
    np.testing.assert_array_equal(stepped.items, replayed.items)
    np.testing.assert_allclose(stepped.scores, replayed.scores, atol=1e-4)


def test_what_is_excluded_stays_excluded_however_many_events_it_has(engine: Engine) -> None:
    engine.use_counts(counts_of({3: 1e30}, engine.item_count))
    (row,) = random_rows([4], engine.item_count)
    (ranking,) = engine.rank([dataclasses.replace(row, exclude=np.array([3], np.int32))], engine.item_count)
    assert 3 not in ranking.items
    (ranking,) = engine.rank([dataclasses.replace(row, exclude=np.array([4], np.int32))], 5)
    assert ranking.items[0] == 3


def test_a_batch_shares_the_trend(engine: Engine) -> None:
    engine.use_counts(counts_of({3: 50.0, 9: 20.0}, engine.item_count))
    rows = random_rows([1, 50, 7, 2, 33], engine.item_count)
    for row, in_batch in zip(rows, engine.rank(rows, 10), strict=True):
        (alone,) = engine.rank([row], 10)
        np.testing.assert_array_equal(in_batch.items, alone.items)
        np.testing.assert_allclose(in_batch.scores, alone.scores, atol=1e-5)


def test_before_any_refresh_the_trend_is_that_of_the_export(artifact: Artifact) -> None:
    """By a clock before the export's end nothing has decayed."""
    recent = dataclasses.replace(artifact, trend=dataclasses.replace(artifact.trend, counted_until=2**40))
    engine, other = Engine(recent, "cpu"), Engine(artifact, "cpu")
    other.use_counts(np.array(artifact.trend.counts))
    np.testing.assert_array_equal(engine.trend.values, other.trend.values)
    with pytest.raises(ValueError, match="read-only"):
        engine.trend.values[1] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.trend.counted = None  # type: ignore[misc]


def test_a_trend_that_is_not_finite_is_not_used(artifact: Artifact) -> None:
    engine = Engine(artifact, "cpu")
    before = engine.trend
    with pytest.raises(ValueError, match="expected a trend of finite numbers"):
        engine.use_counts(counts_of({3: np.nan}, engine.item_count))
    assert engine.trend is before


def test_a_trending_item_is_a_candidate_that_the_index_does_not_find(indexed: Artifact) -> None:
    """With few candidates, of which the item is none by itself."""
    assert indexed.index is not None
    few = dataclasses.replace(indexed.index, candidates=4, candidates_per_answer=1)
    narrow, exact = Engine(dataclasses.replace(indexed, index=few), "cpu"), Engine(indexed, "cpu", search_by="exact")
    for row in random_rows([3, 9, 30], exact.item_count):
        (whole,) = exact.rank([row], exact.item_count)
        # The last but those of the last place.
        item = int(whole.items[-1])
        for engine in (narrow, exact):
            engine.use_counts(counts_of({item: 1e20}, exact.item_count))
        (found,), (expected,) = narrow.rank([row], 3), exact.rank([row], 3)
        assert found.items[0] == expected.items[0] == item
        np.testing.assert_allclose(found.scores[0], expected.scores[0], atol=1e-3)


def test_a_search_goes_on_with_the_trend_that_it_began_with(indexed: Artifact) -> None:
    engine, exact = Engine(indexed, "cpu"), Engine(indexed, "cpu", search_by="exact")
    (row,) = random_rows([5], engine.item_count)
    before = engine.trend
    inputs = {
        **{"item": row.item[None], "rating": row.rating[None], "gap": row.gap[None]},
        **{"length": np.array([5], np.int32), "request_gap": np.array([-1], np.float32)},
        **{"exclude": np.zeros((1, 1), np.int32), "k": np.array([7])},
    }
    expected = exact.run_sequence(inputs, ["items", "scores"])
    engine.use_counts(counts_of({3: 1e20}, engine.item_count))
    found = engine._sequence.run(["items", "scores"], inputs, before)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("half_lives_s", [21600, 86400], r"trend\.half_lives_s is \[21600, 86400\], expected \[21600, .*stores keep"),
        ("file", "other.onnx", r'trend\.file is "other\.onnx", expected trend\.onnx'),
        ("counts", "other.npy", r'trend\.counts is "other\.npy", expected trend_counts\.npy'),
        ("counted_until", 1.5, r"trend\.counted_until is 1\.5, expected a whole number"),
    ],
)
def test_a_manifest_that_is_wrong_about_the_trend_is_refused(
    model_directory: Path, tmp_path: Path, field: str, value: Any, expected: str
) -> None:
    copy = shutil.copytree(model_directory, tmp_path / "model")
    edit_manifest(copy, lambda manifest: manifest["trend"].update({field: value}))
    with pytest.raises(ArtifactError, match=expected):
        read_artifact(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda counts: counts[:-1], r"is float32 \(5, 61\), expected float32 \(6, 61\)"),
        (lambda counts: counts.astype(np.float64), "is float64"),
        (lambda counts: counts + 1, "zeros in column 0"),
        (lambda counts: counts * np.float32(-1), "finite numbers from 0 on"),
        (lambda counts: np.where(counts > 2, np.nan, counts).astype(np.float32), "finite numbers from 0 on"),
    ],
)
def test_counts_that_do_not_fit_are_refused(
    model_directory: Path, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], expected: str
) -> None:
    copy = shutil.copytree(model_directory, tmp_path / "model")
    np.save(copy / "trend_counts.npy", change(np.load(copy / "trend_counts.npy")))
    replace_file(copy, "trend_counts.npy", (copy / "trend_counts.npy").read_bytes())
    with pytest.raises(ArtifactError, match=rf"trend_counts\.npy: .*{expected}"):
        read_artifact(copy)


def test_a_model_of_before_has_to_be_exported_again(model_directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model_directory, tmp_path / "model")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["trend"]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    with pytest.raises(ArtifactError, match=r"schema_version is 1, expected 5.*; export it again"):
        read_artifact(copy)
