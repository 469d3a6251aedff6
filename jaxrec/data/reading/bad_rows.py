"""Rows that break the rules: counted, and either the reason to stop or set aside. No row is dropped silently."""

import contextlib
import csv
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxrec.errors import DataError

QUARANTINE_FILE = "quarantine.csv"
LISTED = 3  # rows that an error names
SHOWN = 80  # characters of a value that an error shows
BUFFER = 1 << 20  # bytes of the quarantine file that are written at a time


class OnBadRows(enum.StrEnum):
    """What happens to rows that break the rules."""

    FAIL = "fail"
    QUARANTINE = "quarantine"


class BadRow(NamedTuple):
    """One bad row. `line` counts from 1, the header included; in Parquet and in a frame it is the row, from 1.

    `value` is empty where the whole row is at fault; `text` is the row as it was.
    """

    file: str
    line: int
    field: str
    value: str
    reason: str
    text: str

    def __str__(self) -> str:
        value = self.value if len(self.value) <= SHOWN else f"{self.value[:SHOWN]}..."
        return " ".join(part for part in (f"{self.file}:{self.line}:", self.field, value, self.reason) if part)


class BadRows:
    """Collects bad rows. With a quarantine file every row goes there at once, so that any number of them fits."""

    def __init__(self, on_bad_rows: OnBadRows, write: Callable[[Iterable[BadRow]], object] | None = None) -> None:
        self.on_bad_rows = on_bad_rows
        self.by_field: Counter[str] = Counter()
        self._first: list[BadRow] = []
        self._write = write

    @property
    def count(self) -> int:
        return sum(self.by_field.values())

    @property
    def limit(self) -> int | None:
        """How many rows of one kind are worth a BadRow each, the first ones; the others are `add_unlisted`."""
        return LISTED if self.on_bad_rows is OnBadRows.FAIL else None

    def add_unlisted(self, fields: Iterable[str]) -> None:
        """Counts rows that no message will name, by the field that is at fault; "": the whole row."""
        self.by_field.update(field or "row" for field in fields)

    def add(self, row: BadRow) -> None:
        """Takes note of a row; `fail_if_any` decides later what follows."""
        self.add_all([row])

    def add_all(self, rows: Iterable[BadRow]) -> None:
        """The same of many rows."""
        if self._write is None:
            for _ in self._counted(rows):
                pass
        else:
            self._write(self._counted(rows))

    def _counted(self, rows: Iterable[BadRow]) -> Iterator[BadRow]:
        for row in rows:
            self.by_field[row.field or "row"] += 1
            # In quarantine the first ones that come are enough.
            if self.on_bad_rows is OnBadRows.FAIL or len(self._first) < LISTED:
                self._first = sorted([*self._first, row], key=lambda bad: (bad.file, bad.line))[:LISTED]
            yield row

    def fail_if_any(self) -> None:
        """Raises DataError that lists the first bad rows and says how many more there are, unless in quarantine."""
        if self.count and self.on_bad_rows is OnBadRows.FAIL:
            raise DataError(str(self))

    def __str__(self) -> str:
        listed = "; ".join(str(row) for row in self._first)
        rest = self.count - len(self._first)
        return f"{listed} (and {rest} more bad rows)" if rest else listed


@contextlib.contextmanager
def bad_rows(on_bad_rows: OnBadRows, folder: Path, earlier: Path | None = None) -> Iterator[BadRows]:
    """A collector; in quarantine its rows are in folder/quarantine.csv afterwards, a file only if there are any.

    The rows of the quarantine file `earlier`, if there is one, come first.
    """
    path = folder / QUARANTINE_FILE
    before = earlier.read_text(encoding="utf-8") if earlier is not None and earlier.is_file() else ""
    if on_bad_rows is OnBadRows.FAIL:
        if before:
            path.write_text(before, encoding="utf-8")
        yield BadRows(on_bad_rows)
        return
    # What is not UTF-8 in the source stays visible as \\xNN.
    with open(path, "w", BUFFER, encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        if before:
            file.write(before)
        else:
            writer.writerow(BadRow._fields)
        bad = BadRows(on_bad_rows, writer.writerows)
        yield bad
    if not bad.count and not before:
        path.unlink()
