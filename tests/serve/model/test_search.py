"""With an index the answers are those of the whole product, or, where it names too few candidates, still true."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from jaxrec.onnx.ann_index import index_points
from serve.client import RecommenderClient
from serve.model.directory import Artifact, read_artifact
from serve.model.events import Event
from serve.model.graphs import CPU, CUDA, SEQUENCE_OUTPUTS, searches_index
from serve.model.manifest import ArtifactError
from serve.model.ranking.engine import Engine, Step
from serve.model.ranking.search import Search, best_of
from serve.model.recommender import Query, Recommender
from serve.settings import SearchBy
from tests.serve.model.rankings import LARGE, assert_same, histories, index_of
from tests.serve.process import StartError, running_server

ITEMS = 60


@pytest.fixture(scope="module")
def exact(model_directory: Path) -> Engine:
    return Engine(read_artifact(model_directory), "cpu")


@pytest.mark.parametrize(("k", "exclude"), [(1, 0), (10, 0), (10, 30), (10, 55), (60, 3), (60, 60)])
def test_answers_and_states_are_those_of_the_whole_product(
    indexed: Artifact, exact: Engine, k: int, exclude: int
) -> None:
    engine, rows = Engine(indexed, "cpu"), histories(exclude, ITEMS)
    assert engine.search_by == "index"
    for (ranking, state), (expected, expected_state) in zip(engine.replay(rows, k), exact.replay(rows, k), strict=True):
        assert len(ranking.items) == min(k, ITEMS - exclude)
        assert_same(ranking, expected)
        np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10])
def test_steps_are_those_of_the_whole_product(indexed: Artifact, exact: Engine, k: int) -> None:
    states = [state for _, state in exact.replay(histories(0, ITEMS))]
    item, one = np.array([5], np.int32), np.ones(1, np.float32)
    steps = [Step(state, item + at, one / 2, one * 60, -1.0, item[None]) for at, state in enumerate(states)]
    found, expected = Engine(indexed, "cpu").step(steps, k), exact.step(steps, k)
    for (ranking, state), (expected_ranking, expected_state) in zip(found, expected, strict=True):
        assert_same(ranking, expected_ranking)
        np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-5)


def test_with_few_candidates_items_can_be_missing_but_no_score_is_wrong(indexed: Artifact, exact: Engine) -> None:
    assert indexed.index is not None
    few = dataclasses.replace(indexed.index, candidates=1, candidates_per_answer=1)
    engine, rows = Engine(dataclasses.replace(indexed, index=few), "cpu"), histories(20, ITEMS)
    for k in (1, 10, 40):
        for ranking, everything in zip(engine.rank(rows, k), exact.rank(rows, ITEMS), strict=True):
            assert len(set(ranking.items.tolist())) == k
            of_item = dict(zip(everything.items.tolist(), everything.scores.tolist(), strict=True))
            assert [of_item[item] for item in ranking.items.tolist()] == pytest.approx(ranking.scores, abs=1e-4)
            assert (np.diff(ranking.scores) <= 0).all()


def test_the_same_directory_answers_exactly_if_asked_to(indexed: Artifact, exact: Engine) -> None:
    engine = Engine(indexed, "cpu", search_by="exact")
    assert engine.search_by == "exact"
    for found, expected in zip(engine.rank(histories(3, ITEMS), 10), exact.rank(histories(3, ITEMS), 10), strict=True):
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
    of_index, of_all = (model.similar(ids[3], 10, model.live) for model in (with_index, without))
    np.testing.assert_array_equal(of_index.items, of_all.items)


def test_an_index_that_was_demanded_must_be_there(model_directory: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no index, export it with --index always"):
        Engine(read_artifact(model_directory), "cpu", search_by="index")


def test_among_thousands_of_items_the_index_finds_the_best(large: Artifact) -> None:
    exact, index = Engine(large, "cpu", search_by="exact"), Engine(large, "cpu")
    files = index_of(large)
    # Else all items would be candidates, and the test would show nothing.
    assert index.search_by == "index"
    assert files.candidates + 10 * files.candidates_per_answer + 20 < LARGE / 4
    rows = [row for seed in range(20, 30) for row in histories(seed, LARGE)]
    kept = [
        np.isin(found.items, expected.items).mean()
        for found, expected in zip(index.rank(rows, 10), exact.rank(rows, 10), strict=True)
    ]
    assert np.mean(kept) >= 0.99


def shuffled(artifact: Artifact) -> Artifact:
    """With an index of the same points in another order."""
    points = index_points(artifact.item_vectors[1:], index_of(artifact).item_bias[1:])
    index = faiss.deserialize_index(np.frombuffer(index_of(artifact).content, np.uint8))
    index.reset()
    index.add(points[np.random.default_rng(0).permutation(len(points))])
    files = dataclasses.replace(index_of(artifact), content=bytes(faiss.serialize_index(index)))
    return dataclasses.replace(artifact, index=files)


def test_an_index_of_other_items_is_refused(large: Artifact) -> None:
    with pytest.raises(
        ArtifactError, match=r"items\.faiss: its candidates hold 0\.\d+ of the best items .* other items"
    ):
        Engine(shuffled(large), "cpu")


def test_items_with_zero_vectors_make_no_index_of_other_items(large: Artifact) -> None:
    """In a catalogue of which most items are new."""
    index = faiss.deserialize_index(np.frombuffer(index_of(large).content, np.uint8))
    vectors, bias = np.array(large.item_vectors), np.array(index_of(large).item_bias)
    vectors[np.arange(len(vectors)) % 19 > 0] = 0
    bias[1:] /= 1e6  # less than the index tells apart
    index.reset()
    index.add(index_points(vectors[1:], bias[1:]))
    files = dataclasses.replace(index_of(large), content=bytes(faiss.serialize_index(index)), item_bias=bias)
    Search(dataclasses.replace(large, item_vectors=vectors), files)
    with pytest.raises(ArtifactError, match="an index of other items"):
        Search(dataclasses.replace(large, item_vectors=np.roll(vectors, 7, axis=0)), files)


def test_an_answer_does_not_depend_on_its_neighbours(large: Artifact) -> None:
    # So that some of the best are missed.
    few = dataclasses.replace(index_of(large), candidates=5, candidates_per_answer=1)
    engine = Engine(dataclasses.replace(large, index=few), "cpu")
    rows = [row for seed in range(10) for row in histories(seed, LARGE)]
    heavy = dataclasses.replace(rows[0], exclude=np.arange(1, 1501, dtype=np.int32))
    alone = [engine.rank([row], 10)[0] for row in rows]
    for neighbour, k in ((heavy, 10), (rows[0], 200)):
        ks = [10] * len(rows) + [k]
        for one, among in zip(alone, engine.rank([*rows, neighbour], ks), strict=False):
            assert_same(among, one)
    ((_, state),) = engine.replay([rows[5]])
    item, one = np.array([5], np.int32), np.ones(1, np.float32)
    step = Step(state, item, one / 2, one * 60, -1.0, item[None])
    other = step._replace(exclude=heavy.exclude[None])
    assert_same(engine.step([step, other], [10, 200])[0][0], engine.step([step], 10)[0][0])


def test_a_heavy_neighbour_does_not_make_the_others_search_for_more(large: Artifact) -> None:
    search = Search(large, index_of(large))
    query = np.random.default_rng(0).normal(size=(3, large.item_vectors.shape[1])).astype(np.float32)
    found = search._found(query, np.array([290, 2000, 300]))
    assert [len(items) for items in found] == [290, 2000, 300]
    for row, count in enumerate((290, 2000, 300)):
        (alone,) = search._found(query[row : row + 1], np.array([count]))
        np.testing.assert_array_equal(found[row], alone)


def test_equal_scores_are_lowest_item_first() -> None:
    items = np.random.default_rng(0).permutation(2000) + 1
    best, _ = best_of(items, np.where(items == 1500, np.float32(1), np.float32(0)), 4)
    np.testing.assert_array_equal(best, [1500, 1, 2, 3])
    assert len(best_of(items, np.zeros(2000, np.float32), 0)[0]) == 0


def test_with_equal_logits_index_and_exact_agree(indexed: Artifact) -> None:
    """Of 60 items all are candidates, and vectors of zeros make all logits the same."""
    files = index_of(indexed)
    nothing = {name: np.zeros_like(getattr(files, name)) for name in ("item_bias", "neighbour_weight")}
    equal = dataclasses.replace(
        indexed,
        item_vectors=np.zeros_like(indexed.item_vectors),
        index=dataclasses.replace(files, **nothing),
    )
    for search_by in ("exact", "index"):
        engine = Engine(equal, "cpu", search_by=search_by)
        engine.use_counts(np.zeros_like(equal.trend.counts))
        (ranking,) = engine.rank(histories(0, ITEMS)[:1], 10)
        np.testing.assert_array_equal(ranking.items, np.arange(1, 11))


def test_similar_items_that_are_equally_near_are_lowest_first(model_directory: Path) -> None:
    artifact = read_artifact(model_directory)
    same = np.ones_like(artifact.item_vectors)
    same[0] = 0
    model = Recommender(dataclasses.replace(artifact, item_vectors=same), "cpu")
    item_id = next(item_id for item_id, item in model.catalog.index.items() if item == 4)
    np.testing.assert_array_equal(model.similar(item_id, 5, model.live).items, [1, 2, 3, 5, 6])


@pytest.mark.skipif(os.cpu_count() == 1, reason="OpenMP starts no threads on one core")
def test_searching_starts_no_threads_in_any_thread(large_directory: Path) -> None:
    """OpenMP's would spin after every batch; how many it uses is set for each thread by itself."""
    program = f"""
import os, threading
from pathlib import Path
import numpy as np
from serve.model.directory import read_artifact
from serve.model.ranking.search import Search
artifact = read_artifact(Path({str(large_directory)!r}))
search = Search(artifact, artifact.index)
query = np.ones((64, artifact.item_vectors.shape[1]), np.float32)
counts = []
def ask():
    counts.append(len(os.listdir("/proc/self/task")))
    search._found(query, np.full(64, 300))
    counts.append(len(os.listdir("/proc/self/task")))
thread = threading.Thread(target=ask)
thread.start()
thread.join()
print(*counts)
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, after = map(int, ended.stdout.split())
    assert after == before


@pytest.mark.parametrize(
    ("asked", "provider", "expected"),
    [("auto", CPU, True), ("auto", CUDA, False), ("index", CUDA, True), ("exact", CPU, False)],
)
def test_on_cuda_the_whole_product_is_the_default(asked: SearchBy, provider: str, expected: bool) -> None:
    assert searches_index(asked, provider) is expected


def test_arrays_that_were_replaced_after_they_were_read_are_not_read_again(
    indexed_directory: Path, exact: Engine, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(indexed_directory, copy)
    artifact = read_artifact(copy)
    for path in copy.glob("*.npy"):
        array = np.load(path)
        path.unlink()
        np.save(path, np.zeros_like(array))
    engine = Engine(artifact, "cpu", search_by="exact")
    for found, expected in zip(engine.rank(histories(3, ITEMS), 10), exact.rank(histories(3, ITEMS), 10), strict=True):
        assert_same(found, expected)


def test_a_graph_gets_no_file_besides_the_verified_ones(
    indexed: Artifact, indexed_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from its directory nor from the working directory."""
    monkeypatch.chdir(indexed_directory)
    with pytest.raises(ArtifactError, match=r"sequence\.onnx: ONNX Runtime cannot load it: .*item_vectors"):
        Engine(dataclasses.replace(indexed, index=None), "cpu")


def rewritten(directory: Path, tmp_path: Path, name: str, content: bytes) -> Path:
    """A copy in which one file has other content, and the manifest agrees."""
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    (copy / name).write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return copy


def test_a_server_without_faiss_says_what_to_install_and_serves_the_whole_product(
    indexed_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "faiss.py").write_text("raise ModuleNotFoundError(\"No module named 'faiss'\", name='faiss')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with (
        open(tmp_path / "log", "w") as log,
        pytest.raises(StartError) as refused,
        running_server(indexed_directory, tmp_path / "store", provider="cpu", stderr=log),
    ):
        pass
    [line] = [line for line in str(refused.value).splitlines() if line.startswith("Error: ")]
    expected = """needs faiss (pip install "jaxrec[index]"), or --search exact: No module named 'faiss'"""
    assert line == f"Error: {indexed_directory / 'items.faiss'}: {expected}"
    with (
        running_server(indexed_directory, tmp_path / "store", provider="cpu", options=("--search", "exact")) as server,
        RecommenderClient(server.address, timeout_s=60.0) as client,
    ):
        assert len(client.recommend(user_id="new", k=5).recommendations) == 5


def test_a_file_that_is_no_index_is_refused(indexed_directory: Path, tmp_path: Path) -> None:
    directory = rewritten(indexed_directory, tmp_path, "items.faiss", b"no index")
    with pytest.raises(ArtifactError, match=r"items.faiss: faiss cannot load it"):
        Engine(read_artifact(directory), "cpu")


def test_another_kind_of_index_is_refused(large: Artifact) -> None:
    points = index_points(large.item_vectors[1:], index_of(large).item_bias[1:])
    width = points.shape[1]
    kinds = {
        "Flat": (faiss.METRIC_INNER_PRODUCT, "it is a IndexFlatIP, not one with a rotation"),
        f"RR{width},Flat": (faiss.METRIC_INNER_PRODUCT, "it is a RandomRotationMatrix before a IndexFlat"),
        f"RR{width},PQ{width}x4fs": (faiss.METRIC_L2, "IndexPreTransform.metric_type is 1, not 0"),
    }
    for kind, (metric, expected) in kinds.items():
        index = faiss.index_factory(width, kind, metric)
        index.train(points)
        index.add(points)
        files = dataclasses.replace(index_of(large), content=bytes(faiss.serialize_index(index)))
        with pytest.raises(ArtifactError, match=f"items.faiss: expected an index of 3000 points .*: {expected}"):
            Search(large, files)


def test_wrong_lengths_and_sizes_are_refused_and_crash_nothing(large_directory: Path) -> None:
    """Writes other numbers over each field of the file but its floats and codes, in a process that may die of it."""
    program = f"""
import dataclasses
from pathlib import Path
import numpy as np
from serve.model.directory import ArtifactError, read_artifact
from serve.model.ranking.search import Search
artifact = read_artifact(Path({str(large_directory)!r}))
content = artifact.index.content
width = artifact.item_vectors.shape[1] + 1
codes = (3000 + 31) // 32 * 32 * ((width + 1) // 2)
floats = [content.index(np.uint64(n).tobytes()) + 8 for n in (width * width, 16 * width)]
last = len(content) - codes
fields = [*range(0, floats[0], 2), *range(floats[0] + 4 * width * width, floats[1], 2),
    *range(floats[1] + 64 * width, last, 2)]
query = np.random.default_rng(0).normal(size=(4, width - 1)).astype(np.float32)
refused = 0
for at in fields:
    for size, value in ((4, 0), (4, 1), (4, 170), (4, 2**31 - 1), (8, 2**33), (8, 30080)):
        changed = bytearray(content)
        changed[at : at + size] = value.to_bytes(size, "little")
        try:
            search = Search(artifact, dataclasses.replace(artifact.index, content=bytes(changed)))
            search._found(query, np.full(4, 300))
        except ArtifactError:
            refused += 1
print(len(fields), refused)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stderr
    fields, refused = map(int, ended.stdout.split())
    # Some fields mean nothing, and some values are those that were there.
    assert refused > 3 * fields


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
        ("recent_weights", [], r"index\.recent_weights is \[\], expected a list of 1\.\.1000 finite numbers"),
        ("recent_weights", [1e40], r"index\.recent_weights is \[1e\+40\], expected a list of 1\.\.1000 finite numbers"),
        ("recent_weights", [1.0] * 1001, r"expected a list of 1\.\.1000 finite numbers"),
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
