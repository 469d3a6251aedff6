"""A model directory that breaks the contract is refused, and the error names the file and what was expected."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from serve.model.directory import Artifact, read_artifact
from serve.model.events import RatingScale
from serve.model.manifest import ArtifactError
from serve.model.ranking.engine import Engine

FILES = (
    *("sequence.onnx", "step.onnx", "parts.onnx", "trend.onnx"),
    *("catalog.csv", "item_vectors.npy", "trend_counts.npy", "DATA_LICENCE.txt"),
)


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_directory, tmp_path / "model")


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Changes a file and its checksum, so that only its content can be what is wrong."""
    (directory / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(directory, lambda manifest: manifest["files"].update({name: entry}))


def test_reads_what_was_exported(artifact: Artifact, model_directory: Path) -> None:
    manifest = json.loads((model_directory / "manifest.json").read_text())
    assert artifact.info.model_version == manifest["model_version"]
    assert artifact.info.item_count == len(artifact.catalog) == manifest["item_count"]
    assert artifact.info.rating_scale == RatingScale(0.5, 5.0)
    assert artifact.item_vectors.shape[0] == manifest["item_count"] + 1
    assert artifact.catalog.item_ids[1] == "1007"
    assert artifact.catalog.index["1007"] == 1
    assert artifact.catalog.titles[1] == "Movie 1, The (1951)"


def test_vectors_cannot_be_written(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match="read-only"):
        artifact.item_vectors[1] = 0


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: has sha256 .*, expected .* as in the manifest"):
        read_artifact(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: cannot be read: No such file"):
        read_artifact(copy)


def test_shortened_file(copy: Path) -> None:
    content = (copy / "sequence.onnx").read_bytes()
    (copy / "sequence.onnx").write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
        read_artifact(copy)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json: cannot be read"):
        read_artifact(tmp_path / "nowhere")


def test_half_written_manifest(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected one JSON object"):
        read_artifact(copy)


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("1970-01-02T00:00:00+00:00", 86_400),
        ("1970-01-02T00:00:00Z", 86_400),
        ("1970-01-02T02:00:00+02:00", 86_400),
        ("1970-01-02", 86_400),
        ("1970-01-02T00:00:00", 86_400),
        ("1969-12-31T23:59:59", 0),
        ("0001-01-01T00:00:00+14:00", 0),
        ("yesterday", 0),
    ],
)
def test_when_a_model_was_exported(
    copy: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, created: str, expected: int
) -> None:
    """A time without a zone is UTC, wherever the server is."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    request.addfinalizer(time.tzset)
    edit_manifest(copy, lambda manifest: manifest.update(created=created))
    assert read_artifact(copy).info.created_time == expected


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("schema_version", 4, "schema_version is 4, expected 5, the only one this server reads; export it again"),
        ("schema_version", 6, "schema_version is 6, expected 5, the only one this server reads$"),
        ("schema_version", "1", 'schema_version is "1", expected a whole number'),
        ("schema_version", True, "schema_version is true, expected a whole number"),
        ("model_version", "", "expected a text that is not empty"),
        ("created", 5, "created is 5, expected a text"),
        ("policy", "greedy", 'policy is "greedy", expected reinforce or supervised'),
        ("item_count", 0, "item_count is 0, expected a number in 1"),
        ("item_count", 10.5, "item_count is 10.5, expected a whole number"),
        ("item_count", 61, "has 60 items, expected 61"),
        ("max_history", -1, "max_history is -1"),
        ("rating_scale", {"minimum": 5, "maximum": 5}, r"rating_scale.maximum is 5.0, expected a finite number above"),
        ("rating_scale", {"minimum": 5}, r"rating_scale.maximum is missing, expected a number"),
        ("genres", ["B", "A"], "genres is .* expected a sorted list"),
        ("genres", "Action", "expected a list"),
        ("graphs", {}, "graphs.sequence is missing, expected an object"),
        ("files", [], r"files is \[\], expected an object"),
    ],
)
def test_wrong_manifest_field(copy: Path, field: str, value: object, expected: str) -> None:
    edit_manifest(copy, lambda manifest: manifest.update({field: value}))
    with pytest.raises(ArtifactError, match=expected):
        read_artifact(copy)


@pytest.mark.parametrize(
    "field",
    [
        "schema_version",
        "model_version",
        "created",
        "policy",
        "item_count",
        "max_history",
        "rating_scale",
        "genres",
        "trend",
    ],
)
def test_missing_manifest_field(copy: Path, field: str) -> None:
    edit_manifest(copy, lambda manifest: manifest.pop(field))
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {field} is missing"):
        read_artifact(copy)


def test_file_name_that_leads_out_of_the_directory(copy: Path) -> None:
    entry = {"sha256": "", "bytes": 0}
    edit_manifest(copy, lambda manifest: manifest["files"].update({"../secret": entry}))
    with pytest.raises(ArtifactError, match="not a plain file name"):
        read_artifact(copy)


def test_log_without_ratings_has_no_scale(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(rating_scale=None))
    assert read_artifact(copy).info.rating_scale is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1007,Again,Drama,1,1.0,0", "item_id '1007' is empty or was used before"),
        (",No id,Drama,1,1.0,0", "item_id '' is empty"),
        ("x,Title,Drama,-1,1.0,0", "popularity '-1' is not a whole number"),
        ("x,Title,Drama,1,nan,0", "recent_popularity 'nan' is not a finite number"),
        ("x,Title,Drama,1,1.0", "expected 6 fields, found 5"),
        ("x,Title,Drama,1,1.0,yes", "new 'yes' is neither 0 nor 1"),
    ],
)
def test_bad_catalogue_row(copy: Path, line: str, expected: str) -> None:
    rows = (copy / "catalog.csv").read_text().splitlines()
    rows[3] = line
    replace_file(copy, "catalog.csv", "\n".join(rows).encode())
    with pytest.raises(ArtifactError, match=rf"catalog\.csv:4: {expected}"):
        read_artifact(copy)


def test_catalogue_in_another_encoding(copy: Path) -> None:
    text = (copy / "catalog.csv").read_text().replace("Movie 1,", "Amélie,")
    replace_file(copy, "catalog.csv", text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"catalog\.csv: expected UTF-8"):
        read_artifact(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda vectors: vectors[:-1], "is float32"),
        (lambda vectors: vectors.astype(np.float64), r"is float64 .* expected float32"),
        (lambda vectors: vectors + 1, "zeros in row 0"),
        (lambda vectors: np.where(vectors == vectors[5], np.nan, vectors).astype(np.float32), "expected finite"),
    ],
)
def test_bad_vectors(copy: Path, change: Callable[[np.ndarray], np.ndarray], expected: str) -> None:
    vectors = np.load(copy / "item_vectors.npy")
    np.save(copy / "item_vectors.npy", change(vectors))
    replace_file(copy, "item_vectors.npy", (copy / "item_vectors.npy").read_bytes())
    with pytest.raises(ArtifactError, match=rf"item_vectors\.npy: .*{expected}"):
        read_artifact(copy)


def test_pickled_vectors_are_not_unpickled(copy: Path) -> None:
    np.save(copy / "item_vectors.npy", np.array([{}], object), allow_pickle=True)
    replace_file(copy, "item_vectors.npy", (copy / "item_vectors.npy").read_bytes())
    with pytest.raises(ArtifactError, match="without pickle"):
        read_artifact(copy)


@pytest.mark.parametrize("name", ["sequence", "step"])
def test_graph_that_is_no_graph(copy: Path, name: str) -> None:
    replace_file(copy, f"{name}.onnx", b"not a graph")
    artifact = read_artifact(copy)
    with pytest.raises(ArtifactError, match=rf"{name}\.onnx: ONNX Runtime cannot load it"):
        Engine(artifact, "cpu")


@pytest.mark.parametrize("name", ["sequence", "step"])
def test_graph_with_another_signature(copy: Path, name: str) -> None:
    graph = onnx.load(copy / f"{name}.onnx")
    for node in graph.graph.node:
        node.output[:] = ["ranking" if output == "items" else output for output in node.output]
    (output,) = (output for output in graph.graph.output if output.name == "items")
    output.name = "ranking"
    replace_file(copy, f"{name}.onnx", graph.SerializeToString())
    artifact = read_artifact(copy)
    with pytest.raises(ArtifactError, match=rf"{name}\.onnx: outputs are .*ranking int32.*, expected items int32"):
        Engine(artifact, "cpu")
