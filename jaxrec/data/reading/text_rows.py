"""Delimited text, row by row with line numbers: slower than the engine, and exact about where a row is broken."""

import csv
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxrec.data.reading.bad_rows import BadRow, BadRows
from jaxrec.data.reading.sources import ColumnNames, Format, choose_columns
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError

DELIMITERS = (",", "\t", ";")
FIXED_COLUMNS = (USER, ITEM, RATING, TIME)  # of the formats without a header
FIXED_LABELS = {USER: "userId", ITEM: "movieId", RATING: "rating", TIME: "timestamp"}


@dataclasses.dataclass(frozen=True)
class TextTable:
    """One text file of ratings. `header` None: the file has none and holds FIXED_COLUMNS. `columns`: position by
    schema name; `labels`: what messages call the column."""

    path: Path
    name: str
    delimiter: str
    header: tuple[str, ...] | None
    columns: dict[str, int]
    labels: dict[str, str]

    @property
    def width(self) -> int:
        """Fields of a row."""
        return len(self.header or FIXED_COLUMNS)


def open_table(path: Path, name: str, kind: Format, names: ColumnNames) -> TextTable:
    """Reads the header. Raises DataError for an empty file and where a column is missing."""
    if kind is Format.DAT or kind is Format.U_DATA:
        delimiter = "::" if kind is Format.DAT else "\t"
        return TextTable(path, name, delimiter, None, {role: i for i, role in enumerate(FIXED_COLUMNS)}, FIXED_LABELS)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
    if not first.strip():
        expected = ",".join(names.named(role) or label for role, label in FIXED_LABELS.items())
        raise DataError(f"{name}: the file is empty; expected the header {expected}")
    delimiter = max(DELIMITERS, key=first.count)
    try:
        header = next(csv.reader([first], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}:1: not CSV: {error}") from error
    header = [column.strip() for column in header]
    chosen = choose_columns(header, names, f"{name}:1")
    positions = {role: header.index(column) for role, column in chosen.items()}
    return TextTable(path, name, delimiter, tuple(header), positions, chosen)


def rows(table: TextTable, bad: BadRows) -> Iterator[tuple[int, list[str], str]]:
    """Each whole row as (line of its end, fields, text). Broken rows go to `bad`; blank lines hold no row."""
    with open(table.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        found = _plain_rows(file, table) if table.delimiter == "::" else _csv_rows(file, table, bad)
        for number, (line, fields, text) in enumerate(found):
            if number == 0 and table.header is not None:
                continue
            if not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text):
                bad.add(BadRow(table.name, line, "", "", "not UTF-8 text", _bytes_visible(text)))
            elif len(fields) != table.width:
                reason = f"{len(fields)} fields, expected {table.width}"
                bad.add(BadRow(table.name, line, "", "", reason, text))
            else:
                yield line, fields, text


def _plain_rows(file: Iterable[str], table: TextTable) -> Iterator[tuple[int, list[str], str]]:
    for line, raw in enumerate(file, start=1):
        text = raw.rstrip("\r\n")
        if text:
            yield line, text.split(table.delimiter), text


def _csv_rows(file: Iterable[str], table: TextTable, bad: BadRows) -> Iterator[tuple[int, list[str], str]]:
    lines = _Lines(file)
    while True:
        lines.consumed.clear()
        reader = _reader(lines, table)
        try:
            for fields in reader:
                text = "".join(lines.consumed).rstrip("\r\n")
                if fields:
                    yield lines.number, fields, text
                lines.consumed.clear()
            return
        except csv.Error as error:
            # A stray quote swallows what follows: only its own line is at fault, the others are read again.
            broken = lines.put_back_all_but_first()
            bad.add(BadRow(table.name, lines.number, "", "", f"not CSV: {error}", broken.rstrip("\r\n")))


def _reader(lines: Iterable[str], table: TextTable) -> Iterator[list[str]]:
    if table.header is None:
        return csv.reader(lines, delimiter=table.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=table.delimiter, strict=True)


class _Lines:
    """Lines of a file that can be put back; `consumed`: those since it was cleared, `number`: that of the last one."""

    def __init__(self, file: Iterable[str]) -> None:
        self._file = iter(file)
        self._waiting: deque[str] = deque()
        self.consumed: list[str] = []
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._file)
        self.number += 1
        self.consumed.append(line)
        return line

    def put_back_all_but_first(self) -> str:
        """Puts `consumed` back, except for its first line, which it returns."""
        first, *others = self.consumed
        self._waiting.extendleft(reversed(others))
        self.number -= len(others)
        return first


def _bytes_visible(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
