"""The engine answers a row as the graph does, whatever its neighbours are."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serve.model.directory import Artifact, read_artifact
from serve.model.features import Features
from serve.model.graphs import CUDA, ProviderError, exact_graphs, session
from serve.model.manifest import ArtifactError
from serve.model.ranking.engine import Engine


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Engine:
    return Engine(artifact, "cpu")


def random_rows(lengths: Sequence[int], item_count: int) -> list[Features]:
    rng = np.random.default_rng(0)
    return [
        Features(
            item=rng.integers(1, item_count + 1, n).astype(np.int32),
            rating=rng.choice([-1, 0, 0.5, 1], n).astype(np.float32),
            gap=np.concatenate([[-1], rng.integers(0, 10**7, n - 1)]).astype(np.float32),
            request_gap=float(rng.choice([-1, 0, 86_400])),
            exclude=rng.integers(1, item_count + 1, rng.integers(0, 5)).astype(np.int32),
        )
        for n in lengths
    ]


def test_batch_equals_single(engine: Engine) -> None:
    rows = random_rows([1, 50, 7, 2, 33], engine.item_count)
    for row, in_batch in zip(rows, engine.rank(rows, 10), strict=True):
        (alone,) = engine.rank([row], 10)
        np.testing.assert_array_equal(in_batch.items, alone.items)
        np.testing.assert_allclose(in_batch.scores, alone.scores, atol=1e-5)


def test_smaller_k_is_the_beginning_of_a_larger(engine: Engine) -> None:
    rows = random_rows([5], engine.item_count)
    (three,), (ten,) = engine.rank(rows, 3), engine.rank(rows, 10)
    np.testing.assert_array_equal(three.items, ten.items[:3])


def test_excluded_items_are_left_out_and_nothing_else(engine: Engine) -> None:
    (row,) = random_rows([5], engine.item_count)
    exclude = np.array([3, 9, 9, 27], np.int32)
    (ranking,) = engine.rank([Features(row.item, row.rating, row.gap, row.request_gap, exclude)], 10**6)
    assert sorted(ranking.items) == sorted(set(range(1, engine.item_count + 1)) - {3, 9, 27})
    assert (np.diff(ranking.scores) <= 0).all()


def test_all_excluded(engine: Engine) -> None:
    (row,) = random_rows([1], engine.item_count)
    exclude = np.arange(1, engine.item_count + 1, dtype=np.int32)
    (ranking,) = engine.rank([Features(row.item, row.rating, row.gap, row.request_gap, exclude)], 5)
    assert len(ranking.items) == len(ranking.scores) == 0


def test_provider_is_what_runs(engine: Engine) -> None:
    assert engine.provider == "CPUExecutionProvider"


def test_cuda_runs_or_is_refused(artifact: Artifact) -> None:
    if Engine(artifact, "auto").provider == CUDA:
        assert Engine(artifact, "cuda").provider == CUDA
    else:
        with pytest.raises(ProviderError, match=r"expected CUDA, but sequence\.onnx runs on CPUExecutionProvider"):
            Engine(artifact, "cuda")


def test_a_session_keeps_no_reference_to_the_bytes(model_directory: Path) -> None:
    _, step = exact_graphs(read_artifact(model_directory))
    before = sys.getrefcount(step.content)
    loaded = session(step, "cpu", 1, {})
    after = sys.getrefcount(step.content)
    assert after == before
    assert "state" in {one.name for one in loaded.get_inputs()}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file is written")
def test_a_process_that_ends_while_a_graph_is_loaded_leaves_no_copy_of_it(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Watched(onnxruntime.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
            super().__init__(*args, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    for graph in exact_graphs(read_artifact(model_directory)):
        session(graph, "cpu", 1, {})
    assert sizes == [0, 0]
    assert not list(tmp_path.iterdir())


def test_a_machine_without_room_for_a_copy_is_told_of_that(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    sequence, _ = exact_graphs(read_artifact(model_directory))
    with pytest.raises(ArtifactError, match=r"sequence\.onnx: cannot be copied for ONNX Runtime: \[Errno 2\]"):
        session(sequence, "cpu", 1, {})
