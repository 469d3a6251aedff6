"""The directory on the disk: complete, verified, replaced as a whole or not at all."""

import csv
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.errors import ExportError
from jaxrec.evaluation.baselines import decayed_popularity
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import VIEWS, Trend
from jaxrec.onnx import model_directory as model_directory_module
from jaxrec.onnx.model_directory import export_model

SUMMARIES = {"training": {"epochs": 3}, "metrics": {"ndcg@10": 0.1}, "licence": "Synthetic data."}


@pytest.fixture(scope="module")
def manifest(model_directory: Path) -> dict:
    return json.loads((model_directory / "manifest.json").read_text(encoding="utf-8"))


def test_manifest_says_what_the_model_is(manifest: dict, small_data: PreparedData) -> None:
    assert manifest["schema_version"] == 5
    assert manifest["policy"] == "reinforce"
    assert manifest["opset"] == 17
    assert manifest["item_count"] == 60
    assert manifest["max_history"] == 50
    assert manifest["rating_scale"] == {"minimum": 0.5, "maximum": 5.0}
    assert manifest["genres"] == ["Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi"]
    assert manifest["dataset"] == small_data.summary()
    assert manifest["training"] == {"note": "random weights"}
    assert 0 <= manifest["parity"]["max_abs_difference"] <= 1e-4
    assert manifest["parity"]["longest_history"] == 50


def test_version_holds_the_time_and_the_content(manifest: dict) -> None:
    created = re.sub("[-:]", "", manifest["created"])
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(manifest["files"].items()))
    assert manifest["model_version"] == f"{created}-{hashlib.sha256(lines.encode()).hexdigest()[:8]}"


def test_every_file_is_in_the_manifest_with_its_checksum(manifest: dict, model_directory: Path) -> None:
    files = {path.name: path.read_bytes() for path in model_directory.iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }
    of_trend = {"trend.onnx", "trend_counts.npy"}
    assert set(files) == {
        "sequence.onnx",
        "step.onnx",
        "parts.onnx",
        "catalog.csv",
        "item_vectors.npy",
        "DATA_LICENCE.txt",
        "added_items.npy",
        *of_trend,
    }


def test_manifest_describes_the_graphs(manifest: dict) -> None:
    assert manifest["graphs"]["sequence"]["file"] == "sequence.onnx"
    assert manifest["graphs"]["step"]["file"] == "step.onnx"
    assert manifest["graphs"]["sequence"]["inputs"]["item"] == {"dtype": "int32", "shape": ["batch", "length"]}
    state = manifest["graphs"]["sequence"]["outputs"]["state"]
    assert state == {"dtype": "float32", "shape": ["batch", 64 + RECENT_ITEMS]}
    assert list(manifest["graphs"]["step"]["outputs"]) == ["next_state", "items", "scores", "query"]


def test_counts_of_the_trend_are_those_of_the_last_event(
    manifest: dict, model_directory: Path, small_data: PreparedData
) -> None:
    trend, times = manifest["trend"], np.asarray(small_data.histories.times)
    assert trend["counted_until"] == times.max()
    counts = np.load(model_directory / trend["counts"])
    for of_half_life, half_life in zip(counts, trend["half_lives_s"], strict=True):
        weights = 0.5 ** ((times.max() - times) / half_life)
        np.testing.assert_allclose(of_half_life, np.bincount(small_data.histories.items, weights, 61), rtol=1e-5)


def test_catalogue_has_raw_ids_and_popularity(model_directory: Path, small_data: PreparedData) -> None:
    with open(model_directory / "catalog.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["item_id", "title", "genres", "popularity", "recent_popularity", "new"]
    assert [row["item_id"] for row in rows] == [str(1000 + 7 * n) for n in range(1, 61)]
    assert rows[0]["title"] == "Movie 1, The (1951)"
    assert [tuple(row["genres"].split("|")) for row in rows] == list(small_data.catalog.item_genres)
    assert [int(row["popularity"]) for row in rows] == small_data.train_popularity()[1:].tolist()
    assert {row["new"] for row in rows} == {"0"}
    recent = [float(row["recent_popularity"]) for row in rows]
    np.testing.assert_array_equal(recent, decayed_popularity(small_data)[1:])


def test_item_vectors_are_those_of_the_model(model_directory: Path, small_hybrid: Hybrid) -> None:
    vectors = np.load(model_directory / "item_vectors.npy", allow_pickle=False)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    np.testing.assert_array_equal(vectors[0], 0)
    np.testing.assert_allclose(vectors, small_hybrid.item_vectors(), rtol=0, atol=1e-6)


def test_an_existing_directory_is_replaced_as_a_whole(
    small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    (out / "stale.txt").write_text("old")
    unrated = dataclasses.replace(small_data, config=dataclasses.replace(small_data.config, rating_scale=None))
    manifest = export_model(small_hybrid, unrated, out, **SUMMARIES)
    assert not (out / "stale.txt").exists()
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert manifest["rating_scale"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def refused(tmp_path: Path, message: str, hybrid: Hybrid, data: PreparedData, **changes) -> None:
    """Asserts that the export raises, and leaves the directory that was there as it was."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with pytest.raises(ExportError, match=message):
        export_model(hybrid, data, out, **(SUMMARIES | changes))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old.txt"]


def test_tampered_weights_are_refused(
    small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = model_directory_module.extract_weights

    def tampered(hybrid: Hybrid):
        weights = extract(hybrid)
        recurrent_kernel = weights.content.recurrent_kernel.copy()
        recurrent_kernel[3, 5] += 0.05
        return dataclasses.replace(
            weights, content=dataclasses.replace(weights.content, recurrent_kernel=recurrent_kernel)
        )

    monkeypatch.setattr(model_directory_module, "extract_weights", tampered)
    refused(tmp_path, r"sequence\.onnx: states differ from JAX by up to", small_hybrid, small_data)


def test_a_metric_that_is_no_number_is_refused(small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path) -> None:
    message = "metrics must hold JSON values only"
    refused(tmp_path, message, small_hybrid, small_data, metrics={"ndcg@10": float("nan")})


def test_a_model_of_another_catalogue_is_refused(
    small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path
) -> None:
    fewer = dataclasses.replace(small_data.catalog, ids=type(small_data.catalog.ids)(np.arange(1, 31)))
    other = dataclasses.replace(small_data, catalog=fewer)
    refused(tmp_path, "the model knows 60 items, the catalogue has 30", small_hybrid, other)


def test_nan_weights_are_refused(small_data: PreparedData, random_hybrid, tmp_path: Path) -> None:
    hybrid = random_hybrid(small_data, 3, True)
    hybrid.content.projection.bias[...] = hybrid.content.projection.bias[...].at[0].set(np.nan)
    refused(tmp_path, r"content.*projection.*bias.* of the model holds NaN", hybrid, small_data)


def test_a_missing_package_is_named_with_the_remedy(
    small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    refused(tmp_path, r'pip install "jaxrec\[export\]"', small_hybrid, small_data)


def test_tensorflow_is_imported_by_a_conversion_only() -> None:
    program = "import sys, jaxrec.onnx.model_directory; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("index", "trend"), [(True, True), (None, False), (False, True)])
def test_an_index_has_zero_vectors_for_new_items_and_the_export_says_so(
    index: bool | None,
    trend: bool,
    small_data: PreparedData,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(model_directory_module, "FROM_ITEMS", len(small_data.catalog))
    plain = random_hybrid(small_data, 3, False)
    new = np.isin(np.arange(len(small_data.catalog) + 1), [2, 5])
    of_mix = Trend(np.ones((VIEWS, len(HALF_LIVES_S))), np.ones(len(HALF_LIVES_S))) if trend else Trend.none()
    hybrid = Hybrid(plain.lstm, plain.content, plain.cooccurrence, plain.mix_weights(), of_mix, new_items=new)
    manifest = export_model(hybrid, small_data, tmp_path / "model", **SUMMARIES, index=index)
    vectors = np.load(tmp_path / "model" / "item_vectors.npy")
    with open(tmp_path / "model" / "catalog.csv", encoding="utf-8", newline="") as file:
        assert [at for at, row in enumerate(csv.DictReader(file), start=1) if row["new"] == "1"] == [2, 5]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("index: ")]
    if index is False:
        assert "index" not in manifest
        assert said == []
        np.testing.assert_array_equal(vectors, hybrid.item_vectors())
        return
    assert manifest["index"]["candidates"] > 0
    assert len(said) == 1
    end = "the trend of their first events lifts them" if trend else "the next training"
    assert "2 new items (without training events) have zero vectors in it" in said[0]
    assert f"they rank low, above known items with a lower score only, until {end} (to rank" in said[0]
    np.testing.assert_array_equal(vectors[~new], np.asarray(hybrid.item_vectors())[~new])
    np.testing.assert_allclose(vectors[new], 0, atol=1e-6)
