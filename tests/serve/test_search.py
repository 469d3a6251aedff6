"""With an index the answers are those of the whole product, or, where it names too few candidates, still true."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxrec.export.model_directory import export_model
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from serve.artifact import Artifact, ArtifactError, read_artifact
from serve.engine import SEQUENCE_OUTPUTS, Engine, Features, Ranking, Step
from serve.history import Event
from serve.recommender import Query, Recommender

ITEMS = 60


@pytest.fixture(scope="module")
def indexed_directory(small_data: PreparedData, small_hybrid: Hybrid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `model_directory`, with an index."""
    out = tmp_path_factory.mktemp("indexed") / "model"
    export_model(
        small_hybrid, small_data, out, policy="reinforce", training={}, metrics={}, licence="Synthetic.", index=True
    )
    return out


@pytest.fixture(scope="module")
def indexed(indexed_directory: Path) -> Artifact:
    return read_artifact(indexed_directory)


@pytest.fixture(scope="module")
def exact(model_directory: Path) -> Engine:
    return Engine(read_artifact(model_directory), "cpu")


def histories(exclude: int) -> list[Features]:
    """Of 1 to 30 events; excluded are that many other items."""
    random = np.random.default_rng(exclude)
    rows = []
    for length in (1, 2, 7, 30):
        rating = random.random(length, np.float32)
        gap = random.integers(0, 10**6, length).astype(np.float32)
        item = random.integers(1, ITEMS + 1, length).astype(np.int32)
        others = random.permutation(ITEMS)[:exclude].astype(np.int32) + 1
        rows.append(Features(item, rating, gap, 3600.0, others))
    return rows


def assert_same(found: Ranking, expected: Ranking) -> None:
    np.testing.assert_array_equal(found.items, expected.items)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("k", "exclude"), [(1, 0), (10, 0), (10, 30), (10, 55), (60, 3), (60, 60)])
def test_answers_and_states_are_those_of_the_whole_product(
    indexed: Artifact, exact: Engine, k: int, exclude: int
) -> None:
    engine, rows = Engine(indexed, "cpu"), histories(exclude)
    assert engine.search_by == "index"
    for (ranking, state), (expected, expected_state) in zip(engine.replay(rows, k), exact.replay(rows, k), strict=True):
        assert len(ranking.items) == min(k, ITEMS - exclude)
        assert_same(ranking, expected)
        np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10])
def test_steps_are_those_of_the_whole_product(indexed: Artifact, exact: Engine, k: int) -> None:
    states = [state for _, state in exact.replay(histories(0))]
    item, one = np.array([5], np.int32), np.ones(1, np.float32)
    steps = [Step(state, item + at, one / 2, one * 60, -1.0, item[None]) for at, state in enumerate(states)]
    found, expected = Engine(indexed, "cpu").step(steps, k), exact.step(steps, k)
    for (ranking, state), (expected_ranking, expected_state) in zip(found, expected, strict=True):
        assert_same(ranking, expected_ranking)
        np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-5)


def test_with_few_candidates_items_can_be_missing_but_no_score_is_wrong(indexed: Artifact, exact: Engine) -> None:
    assert indexed.index is not None
    few = dataclasses.replace(indexed.index, candidates=1, candidates_per_answer=1)
    engine, rows = Engine(dataclasses.replace(indexed, index=few), "cpu"), histories(20)
    for k in (1, 10, 40):
        for ranking, everything in zip(engine.rank(rows, k), exact.rank(rows, ITEMS), strict=True):
            assert len(set(ranking.items.tolist())) == k
            of_item = dict(zip(everything.items.tolist(), everything.scores.tolist(), strict=True))
            assert [of_item[item] for item in ranking.items.tolist()] == pytest.approx(ranking.scores, abs=1e-4)
            assert (np.diff(ranking.scores) <= 0).all()


def test_the_same_directory_answers_exactly_if_asked_to(indexed: Artifact, exact: Engine) -> None:
    engine = Engine(indexed, "cpu", search_by="exact")
    assert engine.search_by == "exact"
    for found, expected in zip(engine.rank(histories(3), 10), exact.rank(histories(3), 10), strict=True):
        assert_same(found, expected)


def test_tensors_as_other_clients_send_them_are_answered(indexed: Artifact, exact: Engine) -> None:
    inputs = {
        "item": np.array([[3, 9], [4, 0]], np.int32),
        "rating": np.array([[0.5, -1], [1, 0]], np.float32),
        "gap": np.array([[-1, 60], [-1, 0]], np.float32),
        "length": np.array([2, 1], np.int32),
        "request_gap": np.array([5, -1], np.float32),
        "exclude": np.array([[3, 9], [4, 0]], np.int32),
        "k": np.array([ITEMS], np.int64),
    }
    names = list(SEQUENCE_OUTPUTS)
    found = dict(zip(names, Engine(indexed, "cpu").run_sequence(inputs, names), strict=True))
    expected = dict(zip(names, exact.run_sequence(inputs, names), strict=True))
    for name in names:
        assert found[name].dtype == expected[name].dtype
        assert found[name].shape == expected[name].shape
    np.testing.assert_array_equal(np.sort(found["items"]), np.sort(expected["items"]))
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5, atol=1e-4)


def test_a_recommender_explains_and_compares_as_without_an_index(indexed: Artifact, model_directory: Path) -> None:
    with_index, without = Recommender(indexed, "cpu"), Recommender(read_artifact(model_directory), "cpu")
    ids = without.catalog.item_ids
    query = Query([Event(ids[at], 4.0, 1000 * at) for at in (3, 8, 20)], 5, explain=True)
    (found,), (expected,) = with_index.recommend([query]), without.recommend([query])
    np.testing.assert_array_equal(found.items, expected.items)
    assert [one.text for one in found.explanations] == [one.text for one in expected.explanations]
    np.testing.assert_array_equal(with_index.similar(ids[3], 10).items, without.similar(ids[3], 10).items)


def test_an_index_that_was_demanded_must_be_there(model_directory: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no index, export it with --index always"):
        Engine(read_artifact(model_directory), "cpu", search_by="index")


def rewritten(directory: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    """A copy in which one file has other content, and the manifest agrees."""
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    (copy / name).write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def test_a_file_that_is_no_index_is_refused(indexed_directory: Path, tmp_path: Path) -> None:
    directory = rewritten(indexed_directory, tmp_path, "items.faiss", b"no index")
    with pytest.raises(ArtifactError, match=r"items.faiss: faiss cannot load it"):
        Engine(read_artifact(directory), "cpu")


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("item_bias.npy", np.zeros(7, np.float32), r"is float32 \(7,\), expected finite float32 \(61,\)"),
        ("item_bias.npy", np.full(61, np.nan, np.float32), "expected finite"),
        ("neighbour_item.npy", np.full((61, 8), 61, np.int32), r"expected items in 0\.\.60"),
        ("neighbour_weight.npy", np.zeros((61, 7), np.float32), r"expected finite float32 \(61, 8\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    indexed_directory: Path, tmp_path: Path, name: str, array: np.ndarray, expected: str
) -> None:
    np.save(tmp_path / name, array)
    directory = rewritten(indexed_directory, tmp_path, name, (tmp_path / name).read_bytes())
    with pytest.raises(ArtifactError, match=f"{name}: .*{expected}"):
        read_artifact(directory)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("candidates", 0, r"index\.candidates is 0, expected a number in 1\.\."),
        ("recent_weights", [], r"index\.recent_weights is \[\], expected a list of numbers"),
        ("file", "other.faiss", r"files\.other\.faiss is missing"),
    ],
)
def test_a_manifest_that_is_wrong_about_the_index_is_refused(
    indexed_directory: Path, tmp_path: Path, field: str, value: object, expected: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(indexed_directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["index"][field] = value
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError, match=expected):
        read_artifact(copy)
