"""Reads what is known of items: a table of item ids and any columns (`--features`), as text."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.data.catalog import checked_ids, require_utf8
from jaxrec.data.reading.columns import feature_columns
from jaxrec.data.reading.dialect import Dialect
from jaxrec.data.reading.movies import listed, refuse, typed_ids
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.reading.sources import TextOptions, open_text
from jaxrec.data.reading.text_file import records
from jaxrec.data.schema import ITEM, is_missing
from jaxrec.errors import DataError


def features_like(
    features: Path | str | pd.DataFrame | None, raw_items: np.ndarray, others: bool = False
) -> pd.DataFrame | None:
    """Features of a file or a frame, with ids of the type of a log's.

    Args:
        features: CSV with a header or JSON lines, or a frame: a column of item ids and any others; None: none.
        raw_items: [items] the ids of the log.
        others: Features of no item of the log are welcome.

    Returns:
        item_id and the columns as text, "" where there is no value (`jaxrec.data.schema.MISSING`), `A|B` for lists, and
        `A|` for a list of one value; None for none.

    Raises:
        DataError: For a file or row that is none, text that is not Unicode, ids that are empty, occur twice or are of
            another type, and, unless `others` are welcome, where no id is one of the log's.
    """
    if features is None:
        return None
    if isinstance(features, pd.DataFrame):
        name, found = "features", _of_frame(features, raw_items)
    else:
        name, found = (
            str(features),
            read_features(Path(features), IdKind.INTEGER if raw_items.dtype == np.int64 else IdKind.TEXT),
        )
    ids = found[ITEM].to_numpy()
    if not others and not np.isin(ids, raw_items).any():
        raise DataError(
            f"{name}: none of its {len(ids)} ids, such as {ids[0]}, is one of the log's {len(raw_items)} items, such "
            f"as {raw_items[0]}; give the file of these items, or none"
        )
    return found


def read_features(path: Path, ids: IdKind = IdKind.AUTO) -> pd.DataFrame:
    """Reads a table of features.

    Args:
        path: CSV with a header (any delimiter and encoding), or JSON lines.
        ids: INTEGER: an id that is not a whole number is an error; AUTO: all are text then.

    Returns:
        item_id (int64, or str) and the other columns under their own names, as text.

    Raises:
        DataError: For a file or row that is none, text that is not Unicode (half of a surrogate pair), and an id that
            is empty or occurs twice, naming file and lines.
    """
    try:
        rows = list(_rows(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    (_, header), *rows = rows
    if not rows:
        raise DataError(f"{path}: no rows after the header")
    first: dict[str, int] = {}
    for line, (raw, *_) in rows:
        if not raw:
            raise DataError(f"{path}:{line}: the id is empty; expected one")
        if raw in first:
            raise DataError(f"{path}:{line}: the id {raw} occurs a second time; the first is in line {first[raw]}")
        first[raw] = line
    frame = pd.DataFrame([fields[1:] for _, fields in rows], columns=header[1:], dtype=object)
    frame.insert(0, ITEM, typed_ids([(line, fields[0]) for line, fields in rows], ids, str(path)))
    return frame


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and fields, the id first; before the rows the columns' names."""
    with tempfile.TemporaryDirectory(prefix="jaxrec-") as scratch:
        header: list[str] = []

        def choose(dialect: Dialect) -> tuple[dict[str, int], dict[str, str]]:
            names = list(dialect.names or ())
            header[:] = _header(names, str(path) if dialect.delimiter is None else f"{path}:1")
            return {name: names.index(name) for name in header}, {name: name for name in header}

        table, _ = open_text(path, str(path), TextOptions(), Path(scratch), choose, True, "movieId,NAME,...")
        yield 1, header
        if table.dialect.delimiter is None:
            yield from _json_rows(table.path, path, header)
            return
        for line, fields in records(table, refuse):
            yield line, _fields([fields[table.columns[name]] for name in header], header, f"{path}:{line}")


def _json_rows(utf8: Path, path: Path, header: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Of JSON lines; unlike a log's they may hold lists."""
    with utf8.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}:{line}: not a JSON object: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{line}: not a JSON object: {text.strip()[:80]}")
            if isinstance(raw := row.get(header[0]), list | dict):
                raise DataError(f"{path}:{line}: the id is {json.dumps(raw)[:80]}; expected text or a whole number")
            yield line, _fields([row.get(name) for name in header], header, f"{path}:{line}")


def _of_frame(frame: pd.DataFrame, raw_items: np.ndarray) -> pd.DataFrame:
    header = _header([str(name) for name in frame.columns], "features")
    named = frame.set_axis([str(name) for name in frame.columns], axis=1)
    texts = {name: [_text(value) for value in named[name].tolist()] for name in header[1:]}
    for row, values in enumerate(zip(*texts.values(), strict=True), start=1):
        require_utf8(zip(texts, values, strict=True), f"features: row {row}")
    found = pd.DataFrame({ITEM: named[header[0]].reset_index(drop=True), **texts})
    return checked_ids(found, raw_items, "features", header[0])


def _header(names: list[str], where: str) -> list[str]:
    """The columns' names, that of the ids first."""
    require_utf8((("column", name) for name in names), where)
    return feature_columns(names, where)


def _fields(values: list[Any], header: list[str], where: str) -> list[str]:
    """A row as text. The id may be any word; only spaces around it are removed."""
    raw, *others = values
    texts = ["" if raw is None else str(raw).strip(), *map(_text, others)]
    require_utf8(zip(header, texts, strict=True), where)
    return texts


def _text(value: object) -> str:
    """A value as text: lists, also as JSON or Python writes them, joined by `|`, without what means that there is none.

    A list of which one value is left ends with `|`, so that it still is a list.

    Examples:
        >>> _text('["x", "a|b", null]'), _text(" x | y "), _text(["x"]), _text("x|N/A")
        ('x|a/b', 'x|y', 'x|', 'x|')
        >>> _text(" x "), _text(float("nan")), _text(1.5), _text([])
        ('x', '', '1.5', '')
    """
    names = None if isinstance(value, float) else listed(value)  # to `listed` every float is a missing list
    # None, NaN, NaT and NA are missing by the words that Python writes for them.
    parts = str(value).split("|") if names is None else [name.replace("|", "/") for name in names]
    kept = [part.strip() for part in parts if not is_missing(part)]
    of_list = names is not None or len(parts) > 1
    return f"{kept[0]}|" if of_list and len(kept) == 1 else "|".join(kept)
