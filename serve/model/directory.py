"""Finds model directories, reads one, and refuses one that breaks the contract.

Every file is read once, its checksum is compared with the manifest, and what is
returned was built from those same bytes, so a directory that changes while it is
being read cannot slip in unverified. Only the large arrays of a directory with an
index are mapped into memory instead, for as long as the model serves. So a served
directory must not be overwritten in place (`cp`, `rsync --inplace`): that would change
the arrays unverified, and a shorter file ends the process with SIGBUS. Write another
directory or file and rename it, as `jaxrec export` and plain `rsync` do.
"""

import hashlib
import io
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog, CatalogError, parse_catalog
from serve.model.item_rows import KINDS, Column, ItemRows
from serve.model.manifest import MANIFEST, ArtifactError, Fields, ModelInfo, model_info, read_manifest
from serve.model.parts import OF_GRAPH
from serve.model.trend import HALF_LIVES_S, TrendFiles

TREND_COUNTS = "trend_counts.npy"
ADDED_ITEMS = "added_items.npy"
GRAPHS = ("sequence", "step", "parts", "trend")
REQUIRED_FILES = (
    *(f"{name}.onnx" for name in GRAPHS),
    *("catalog.csv", "item_vectors.npy", TREND_COUNTS, ADDED_ITEMS, "DATA_LICENCE.txt"),
)
INDEX_ARRAYS = ("item_bias.npy", "neighbour_item.npy", "neighbour_weight.npy")
INDEX_GRAPHS = ("sequence_query", "step_query")
MOST_RECENT = 1000


@dataclass(frozen=True, slots=True)
class IndexFiles:
    """What a model directory with an index of its items has besides; see `serve.model.ranking.search`."""

    path: Path
    content: bytes
    """Of the index itself, as faiss writes it."""
    candidates: int
    candidates_per_answer: int
    recent_weights: NDArray[np.float32]
    """`[recent, 1]`, what the neighbours of the last items count, the last item first."""
    item_bias: NDArray[np.float32]
    """`[items+1]`."""
    neighbour_item: NDArray[np.int32]
    """`[items+1, neighbours]`; 0 is none."""
    neighbour_weight: NDArray[np.float32]
    """`[items+1, neighbours]`, what is added to their logits."""
    sequence_query_graph: bytes
    step_query_graph: bytes


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified model directory."""

    directory: Path
    info: ModelInfo
    catalog: Catalog
    item_vectors: NDArray[np.float32]
    """`[items+1, width]`, not writeable; row 0 is zeros."""
    sequence_graph: bytes
    step_graph: bytes
    parts_graph: bytes
    trend: TrendFiles
    item_rows: ItemRows
    """Of items that the model was not exported with."""
    index: IndexFiles | None = None


def read_artifact(directory: Path) -> Artifact:
    """Reads and verifies a model directory; raises ArtifactError."""
    fields = read_manifest(directory)
    info = model_info(fields)
    graphs = fields.section("graphs")
    indexed = fields.section("index") if "index" in fields else None
    for name in (*GRAPHS, *(INDEX_GRAPHS if indexed else ())):
        file = graphs.section(name).get("file", str)
        if file != f"{name}.onnx":
            graphs.section(name).fail("file", f"{name}.onnx", file)
    parts, expected = graphs.section("parts"), [part.name.lower() for part in OF_GRAPH]
    if parts.get("columns", list) != expected:
        parts.fail("columns", json.dumps(expected), parts.get("columns", list))
    contents = _verified_files(directory, fields.section("files"), indexed)
    catalog = _catalog(directory / "catalog.csv", contents["catalog.csv"], info)
    vectors = _item_vectors(directory / "item_vectors.npy", contents["item_vectors.npy"], info)
    return Artifact(
        directory=directory,
        info=info,
        catalog=catalog,
        item_vectors=vectors,
        sequence_graph=bytes(contents["sequence.onnx"]),
        step_graph=bytes(contents["step.onnx"]),
        parts_graph=bytes(contents["parts.onnx"]),
        trend=_trend_files(directory, fields.section("trend"), contents, info),
        item_rows=_item_rows(directory, fields.section("added_items"), contents, info, vectors.shape[1]),
        index=None if indexed is None else _index_files(directory, indexed, contents, info),
    )


Content = bytes | mmap.mmap


def _verified_files(directory: Path, files: Fields, indexed: Fields | None) -> Mapping[str, Content]:
    contents: dict[str, Content] = {}
    required: tuple[str, ...] = REQUIRED_FILES
    if indexed is not None:
        graphs = (f"{name}.onnx" for name in INDEX_GRAPHS)
        required = (*required, *INDEX_ARRAYS, *graphs, indexed.get("file", str))
    for name in (*required, *(name for name in files if name not in required)):
        entry = files.section(name)
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ArtifactError(f"{directory / MANIFEST}: files.{name!r} is not a plain file name")
        path = directory / name
        try:
            content = _mapped(path) if indexed is not None and name.endswith(".npy") else path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
        if len(content) != entry.get("bytes", int):
            raise ArtifactError(
                f"{path}: has {len(content)} bytes, expected {entry.get('bytes', int)} as in the manifest"
            )
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry.get("sha256", str):
            raise ArtifactError(f"{path}: has sha256 {digest}, expected {entry.get('sha256', str)} as in the manifest")
        contents[name] = content
    return contents


def _mapped(path: Path) -> Content:
    with path.open("rb") as file:
        # An empty file cannot be mapped.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def _catalog(path: Path, content: Content, info: ModelInfo) -> Catalog:
    try:
        catalog = parse_catalog(bytes(content).decode())
    except CatalogError as error:
        raise ArtifactError(f"{path}:{error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: expected UTF-8: {error}") from error
    if len(catalog) != info.item_count:
        raise ArtifactError(f"{path}: has {len(catalog)} items, expected {info.item_count} as in the manifest")
    genres = tuple(sorted({genre for of_item in catalog.genres for genre in of_item}))
    if genres != info.genres:
        raise ArtifactError(f"{path}: has the genres {list(genres)}, expected {list(info.genres)} as in the manifest")
    return catalog


def _item_vectors(path: Path, content: Content, info: ModelInfo) -> NDArray[np.float32]:
    vectors = _array(path, content)
    rows = info.item_count + 1
    if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[0] != rows:
        raise ArtifactError(f"{path}: is {vectors.dtype} {vectors.shape}, expected float32 ({rows}, width)")
    if vectors[0].any() or not np.isfinite(vectors).all():
        raise ArtifactError(f"{path}: expected finite numbers, and zeros in row 0")
    return vectors


def _trend_files(directory: Path, fields: Fields, contents: Mapping[str, Content], info: ModelInfo) -> TrendFiles:
    for name, file in (("file", "trend.onnx"), ("counts", TREND_COUNTS)):
        if fields.get(name, str) != file:
            fields.fail(name, file, fields.get(name, str))
    half_lives = fields.get("half_lives_s", list)
    if half_lives != list(HALF_LIVES_S):
        fields.fail("half_lives_s", f"{list(HALF_LIVES_S)}, for which stores keep counts", half_lives)
    path = directory / TREND_COUNTS
    counts, shape = _array(path, contents[TREND_COUNTS]), (len(HALF_LIVES_S), info.item_count + 1)
    if counts.dtype != np.float32 or counts.shape != shape:
        raise ArtifactError(f"{path}: is {counts.dtype} {counts.shape}, expected float32 {shape}")
    if counts[:, 0].any() or not ((counts >= 0) & (counts < np.inf)).all():
        raise ArtifactError(f"{path}: expected finite numbers from 0 on, and zeros in column 0")
    return TrendFiles(bytes(contents["trend.onnx"]), counts, fields.get("counted_until", int))


def _item_rows(
    directory: Path, fields: Fields, contents: Mapping[str, Content], info: ModelInfo, width: int
) -> ItemRows:
    if fields.get("file", str) != ADDED_ITEMS:
        fields.fail("file", ADDED_ITEMS, fields.get("file", str))
    genres = {genre: at for at, genre in enumerate(info.genres)} if fields.get("genres", bool) else {}
    columns = [_column(column) for column in fields.sections("columns")]
    years = fields.rising("title_years")
    count = len(genres) + sum(column.feature_count for column in columns) + len(years)
    rows, path = _array(directory / ADDED_ITEMS, contents[ADDED_ITEMS]), directory / ADDED_ITEMS
    if rows.dtype != np.float32 or rows.shape != (count + 1, width + 1) or not np.isfinite(rows).all():
        expected = f"finite float32 {(count + 1, width + 1)}"
        raise ArtifactError(f"{path}: is {rows.dtype} {rows.shape}, expected {expected}")
    return ItemRows(rows, genres, columns, years)


def _column(fields: Fields) -> Column:
    kind = fields.get("kind", str)
    if kind not in KINDS:
        fields.fail("kind", " or ".join(KINDS), kind)
    categories = fields.get("categories", list)
    if not all(isinstance(one, str) for one in categories) or len(set(categories)) < len(categories):
        fields.fail("categories", "a list of different texts", categories)
    places = {category: at for at, category in enumerate(categories)}
    return Column(fields.get("name", str), kind, places, fields.rising("starts"))


def _index_files(directory: Path, fields: Fields, contents: Mapping[str, Content], info: ModelInfo) -> IndexFiles:
    weights = fields.get("recent_weights", list)
    largest = float(np.finfo(np.float32).max)
    if not 1 <= len(weights) <= MOST_RECENT or not all(
        type(weight) in (int, float) and -largest <= weight <= largest for weight in weights
    ):
        fields.fail("recent_weights", f"a list of 1..{MOST_RECENT} finite numbers", weights)
    bias, item, weight = (_array(directory / name, contents[name]) for name in INDEX_ARRAYS)
    rows = info.item_count + 1
    shape = (rows, item.shape[1] if item.ndim == 2 else 0)
    for name, array, dtype, expected in zip(
        INDEX_ARRAYS, (bias, item, weight), (np.float32, np.int32, np.float32), ((rows,), shape, shape), strict=True
    ):
        if array.dtype != dtype or array.shape != expected or not np.isfinite(array).all():
            where = f"{directory / name}: is {array.dtype} {array.shape}"
            raise ArtifactError(f"{where}, expected finite {np.dtype(dtype)} {expected}")
    if item.min(initial=0) < 0 or item.max(initial=0) > info.item_count:
        raise ArtifactError(f"{directory / INDEX_ARRAYS[1]}: expected items in 0..{info.item_count}")
    return IndexFiles(
        path=directory / fields.get("file", str),
        content=bytes(contents[fields.get("file", str)]),
        candidates=fields.count("candidates"),
        candidates_per_answer=fields.count("candidates_per_answer"),
        recent_weights=np.array(weights, np.float32)[:, None],
        item_bias=bias,
        neighbour_item=item,
        neighbour_weight=weight,
        sequence_query_graph=bytes(contents["sequence_query.onnx"]),
        step_query_graph=bytes(contents["step_query.onnx"]),
    )


def _array(path: Path, content: Content) -> NDArray[Any]:
    """The array of an .npy file, in the memory of its content, not writeable."""
    stream = io.BytesIO(content[:_LONGEST_HEADER])
    try:
        read_header = _HEADERS[np.lib.format.read_magic(stream)]
        shape, fortran, dtype = read_header(stream)
        if fortran or dtype.hasobject:
            raise ValueError("in C order and of numbers")
        array: NDArray[Any] = np.frombuffer(content, dtype, int(np.prod(shape)), stream.tell()).reshape(shape)
    except (ValueError, EOFError, KeyError) as error:
        raise ArtifactError(f"{path}: expected a NumPy array without pickle: {error}") from error
    array.setflags(write=False)
    return array


_LONGEST_HEADER = 2**16
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


Fingerprint = tuple[tuple[str, int, int, int], ...]


class Version(NamedTuple):
    """A model directory as it was found, not verified."""

    path: Path
    folder: str
    """Name in the directory of versions; empty: the directory is the model itself."""
    model_version: str
    """As the manifest says; empty: it cannot be read."""
    fingerprint: Fingerprint
    """Name, size, time of change and inode of every file: equal while no file changes."""


def find_versions(directory: Path) -> list[Version]:
    """The versions in a directory, newest first; those whose manifest cannot be read come last.

    Model versions start with the time of the export, so their order as text is that of time. A child without a
    manifest is none, or not yet: the manifest is written last. Raises ArtifactError when the directory cannot be read.
    """
    try:
        if (directory / MANIFEST).exists():
            found = [(directory, "")]
        else:
            children = sorted(child for child in directory.iterdir() if (child / MANIFEST).exists())
            # An export is renamed when it is complete; until then its name starts with a dot.
            found = [(child, child.name) for child in children if not child.name.startswith(".")]
    except OSError as error:
        raise ArtifactError(f"{directory}: cannot be read: {error.strerror}") from error
    versions = [Version(path, folder, _model_version(path), _fingerprint(path)) for path, folder in found]
    return sorted(versions, key=lambda version: version.model_version, reverse=True)


def _model_version(path: Path) -> str:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return ""
    version = manifest.get("model_version") if isinstance(manifest, dict) else None
    return version if isinstance(version, str) else ""


def _fingerprint(path: Path) -> Fingerprint:
    files = []
    try:
        for file in sorted(path.iterdir()):
            status = file.stat()
            files.append((file.name, status.st_size, status.st_mtime_ns, status.st_ino))
    except OSError:
        # It is being changed just now, and will be looked at again.
        return ()
    return tuple(files)
