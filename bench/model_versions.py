"""Directories of model versions, made of one exported model."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_version(directory: Path, model: Path, version: str, *, damage: Callable[[Path], None] | None = None) -> Path:
    """Puts a copy of a model into a directory of versions, as an export does: complete, then renamed."""
    directory.mkdir(exist_ok=True)
    staged = directory / f".{version}"
    shutil.copytree(model, staged)
    edit_manifest(staged, lambda manifest: manifest.update(model_version=version))
    if damage is not None:
        damage(staged)
    final = directory / version
    os.rename(staged, final)
    return final


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Changes a file with a manifest that agrees: no checksum tells."""
    (folder / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "sequence.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "sequence.onnx").write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "item_vectors.npy"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(folder: Path) -> None:
    (folder / "step.onnx").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"model_version": "2', encoding="utf-8")


def come_from_the_future(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(schema_version=99))


def hold_no_graph(folder: Path) -> None:
    replace_file(folder, "sequence.onnx", b"no graph")


def swap_graphs(folder: Path) -> None:
    """Inputs that the server does not know."""
    replace_file(folder, "sequence.onnx", (folder / "step.onnx").read_bytes())


def lose_a_row(folder: Path) -> None:
    """A catalogue of another model."""
    lines = (folder / "catalog.csv").read_bytes().splitlines(keepends=True)
    replace_file(folder, "catalog.csv", b"".join(lines[:-1]))


DAMAGES = (
    flip_a_byte,
    truncate,
    lose_a_file,
    garble_the_manifest,
    come_from_the_future,
    hold_no_graph,
    swap_graphs,
    lose_a_row,
)
