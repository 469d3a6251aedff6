"""The rows of a text file, one in each line.

DuckDB reads a file in parallel, and rightly only where each line is one whole row. Where that is not so (a quote that
opens or closes somewhere, a line break within quotes, a line of another width, bytes that are no text, line ends of
several kinds), `repair` writes a copy that holds the whole rows, one in each line, and reports every other line.
"""

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrec.data.reading.bad_rows import BadRow
from jaxrec.data.reading.connection import quoted
from jaxrec.data.reading.dialect import Dialect, Scan, scan, transcode
from jaxrec.data.reading.lines import BLOCK, Block, blocks, lines_at
from jaxrec.data.schema import ITEM, RATING, TIME, USER

AMBIGUOUS = (
    "ambiguous: lines {first} to {last} may be one row with a quoted field, or line {first} has a stray quote; write a"
    ' quote within a field as "", in quotes'
)
NO_FIELD = (dict, list, bool)  # JSON that is neither an id, nor a number or time
LONGEST_ROW = 1000  # lines that a row may span
MOST_TRIES = 20  # lines with quotes in which a quoted field does not end before it is given up
NEAR = 50  # lines around a row that show what its fields look like
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}")
LONGEST_LINE = 2_000_000  # bytes: the longest line that DuckDB reads by default


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A text file whose columns are known.

    Attributes:
        path: The file as UTF-8: itself, or a copy.
        name: What messages call it.
        encoding: That of the file itself.
        columns: Position by schema name.
        labels: What the file, and so a message, calls each column.
    """

    path: Path
    name: str
    encoding: str
    dialect: Dialect
    columns: Mapping[str, int]
    labels: Mapping[str, str]


def utf8_copy(path: Path, name: str, encoding: str | None, scratch: Path) -> tuple[Path, Scan, str]:
    """The file as UTF-8, what is in it, and its own encoding (`encoding` None: recognized).

    Raises DataError where it is not of the encoding.
    """
    found = scan(path)
    encoding = encoding or found.encoding
    wide = found.encoding.startswith("utf-") and found.encoding != "utf-8"
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig") and not wide:
        return path, found, "utf-8"
    copy = Path(tempfile.mkdtemp(dir=scratch)) / path.name
    transcode(path, encoding, copy, name)
    return copy, scan(copy), encoding


def select(table: TextTable, path: Path, roles: Mapping[str, str], trim: bool) -> str:
    """SQL of the whole rows of `path`, which is the table's file or its repaired copy.

    Args:
        table: The table.
        path: The file, each line of it a whole row.
        roles: Name of the result's column by schema name; NULL where the table lacks the column.
        trim: Cut white space around fields.

    Returns:
        SQL of text columns.
    """
    dialect = table.dialect

    def field(position: int) -> str:
        if dialect.delimiter is not None:
            column = f"c{position}"
        else:
            key = (dialect.names or ())[position].replace("\\", "\\\\").replace('"', '\\"')
            path = quoted(f'$."{key}"')
            nested = "('OBJECT', 'ARRAY', 'BOOLEAN')"
            column = f"CASE WHEN json_type(line, {path}) NOT IN {nested} THEN json_extract_string(line, {path}) END"
        return f"trim({column}, ' \t')" if trim else column

    chosen = ", ".join(
        f"{field(table.columns[role]) if role in table.columns else 'NULL'} AS {name}" for role, name in roles.items()
    )
    if dialect.delimiter is None:
        # One column of whole lines: the delimiter is a character that JSON does not have.
        layout = "delim = '\x1f', quote = '', escape = '', header = false, columns = {'line': 'VARCHAR'}"
    else:
        quote = '"' if dialect.quoting else ""
        columns = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(dialect.width))
        layout = (
            f"delim = {quoted(dialect.delimiter)}, quote = '{quote}', escape = '{quote}', "
            f"header = {dialect.names is not None}, columns = {{{columns}}}"
        )
    return f"SELECT {chosen} FROM read_csv({quoted(str(path))}, auto_detect = false, {layout})"


def rows(table: TextTable, path: Path, numbers: np.ndarray) -> Iterator[list[str]]:
    """The fields of some rows of a file whose lines are whole rows. `numbers` [rows]: from 0, rising."""
    for text in lines_at(path, numbers + table.dialect.header_lines + 1):
        yield fields_of(table.dialect, text)


def fields_of(dialect: Dialect, line: str, lists: bool = False) -> list[str]:
    """The fields of a line that is a whole row, in the order of the header.

    With `lists` a list in JSON is a field, as JSON writes it; without, it is as if it were missing. Raises csv.Error or
    ValueError where the line is no row.
    """
    if dialect.delimiter is None:
        found = json.loads(line, parse_constant=_no_constant)
        values = [found.get(name) if isinstance(found, dict) else None for name in dialect.names or ()]
        return [_text(value, lists) for value in values]
    if not dialect.quoting:
        return line.split(dialect.delimiter)
    return next(csv.reader([line], delimiter=dialect.delimiter, strict=True))


def _text(value: object, lists: bool) -> str:
    if isinstance(value, str):
        return value
    known = value is not None and (not isinstance(value, NO_FIELD) or (lists and isinstance(value, list)))
    return json.dumps(value) if known else ""


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def repair(table: TextTable, copy: Path, report: Callable[[BadRow], object]) -> tuple[np.ndarray, int]:
    """Writes the whole rows of a file to `copy`, one in each line, after the header.

    A quote opens a field if it closes, in this line or in one of the next, and makes a whole row; a quote for which
    this does not hold is a character like any other. Where the one may be as true as the other, all lines in question
    are reported. Of rows with quotes only the table's columns are kept.

    Args:
        table: The file.
        copy: The file to write.
        report: Takes each line that is no row.

    Returns:
        [lines] int64, rising: the lines (from 1) of `table.path` that are not the first of a row: the header, blank
        lines, further lines of a row, and those that were reported; and how many rows `copy` has.
    """
    dialect, removed = table.dialect, list(range(1, table.dialect.header_lines + 1))
    needed = set(table.columns.values())
    reader, rows_written = _Rows(table, report), 0
    with open(copy, "wb", BLOCK) as out:
        if dialect.header_lines:
            out.write(_line_of(dialect, dialect.names or ()))
        for row in reader.rows():
            if row.text:
                out.write(row.text)
                rows_written += row.lines
                continue
            removed += range(row.line + 1, row.line + row.lines)
            if any("\n" in row.fields[at] or "\r" in row.fields[at] for at in needed if row.fields):
                reader.bad(row.line, "a line break within a field that is read")
                removed.append(row.line)
            elif row.fields:
                out.write(_line_of(dialect, [field if at in needed else "" for at, field in enumerate(row.fields)]))
                rows_written += 1
            else:
                removed.append(row.line)
    return np.sort(np.array(removed, np.int64)), rows_written


def records(
    table: TextTable, report: Callable[[BadRow], object], lists: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """The line and the fields of each whole row, as `repair` understands rows. `report`: as there; `lists`: as for
    `fields_of`."""
    for row in _Rows(table, report, lists).rows():
        if row.fields:
            yield row.line, row.fields
        for at, line in enumerate(row.text.decode("utf-8").split("\n")[:-1]):
            yield row.line + at, fields_of(table.dialect, line, lists)


def _line_of(dialect: Dialect, fields: Sequence[str]) -> bytes:
    line = io.StringIO()
    if dialect.delimiter is None:
        line.write(json.dumps(dict(zip(dialect.names or (), fields, strict=True))) + "\n")
    else:
        csv.writer(line, delimiter=dialect.delimiter[0], lineterminator="\n").writerow(fields)
    return line.getvalue().encode("utf-8")


class _Row(NamedTuple):
    """`text`: lines that are whole rows, from `line` (from 1) on; or else one row in `lines` lines, with its `fields`,
    and without any if it is none."""

    line: int
    lines: int
    text: bytes = b""
    fields: list[str] = []  # noqa: RUF012 - a tuple's default, never changed


class _Rows:
    def __init__(self, table: TextTable, report: Callable[[BadRow], object], lists: bool = False) -> None:
        self._table, self._report, self._lists = table, report, lists
        self._dialect = table.dialect
        self._blocks = blocks(table.path)
        self._block = Block(b"", 0)
        self._near_group, self._near = -1, dict[int, _Column]()

    def rows(self) -> Iterator[_Row]:
        """What the lines after the header are."""
        while (block := next(self._blocks, None)) is not None:
            self._block = block
            odd = self._odd().tolist()
            at = self._dialect.header_lines if block.before == 0 else 0
            for stop in [*odd, len(block)]:
                if stop > at:
                    yield _Row(block.before + at + 1, stop - at, block.data[block.start(at) : block.start(stop)])
                    at = stop
                if stop == at < len(block):
                    row = self._row(at)
                    yield row
                    at += row.lines
            # A row over several lines may have taken more lines than the block had at first.
            while at < len(self._block):
                row = self._row(at)
                yield row
                at += row.lines

    def _odd(self) -> np.ndarray:
        """The lines of the block that are not at first sight whole rows: ASCII without quotes, of the right width."""
        block, dialect = self._block, self._dialect
        if dialect.delimiter is None:
            return np.arange(len(block))
        lengths = block.lengths()
        odd = (lengths == 0) | (lengths > LONGEST_LINE)
        if len(dialect.delimiter) == 1 and dialect.delimiter.isascii():
            odd |= block.counts(ord(dialect.delimiter)) != dialect.width - 1
        else:
            delimiter = dialect.delimiter.encode()
            widths = [line.count(delimiter) for line in block.data.split(b"\n")[:-1]]
            odd |= np.array(widths) != dialect.width - 1
        if dialect.quoting:
            odd |= block.counts(ord('"')) > 0
        odd[block.not_ascii()] = True
        return np.flatnonzero(odd)

    def bad(self, line: int, reason: str) -> None:
        """Reports a line of the block."""
        text = self._block.line(line - self._block.before - 1).decode("utf-8", "backslashreplace")
        self._report(BadRow(self._table.name, line, "", "", reason, text))

    def _row(self, at: int) -> _Row:
        line, none = self._block.line(at), _Row(self._block.before + at + 1, 1)
        if not line.strip(b" "):
            return none
        if len(line) > LONGEST_LINE:
            self.bad(none.line, f"{len(line)} bytes; expected a line of at most {LONGEST_LINE}")
            return none
        text = self._text_of(at)
        fields, reason, taken = self._parsed(at, text)
        if not reason and any(not self._is_text(fields[position]) for position in self._table.columns.values()):
            reason = "not UTF-8 text; another encoding can be given: --encoding"
        if reason:
            for n in range(taken):
                if self._block.line(at + n).strip(b" "):
                    self.bad(none.line + n, reason)
            return none._replace(lines=taken)
        # Of escapes in JSON, DuckDB does not read all that Python reads.
        plain = b"\\u" not in line if self._dialect.delimiter is None else not (self._dialect.quoting and b'"' in line)
        if taken == 1 and self._is_text(text) and plain:
            return none._replace(text=line + b"\n")
        return none._replace(lines=taken, fields=fields)

    def _text_of(self, at: int) -> str:
        """A line of the block. What is not UTF-8 is kept out of the way as surrogates, and matters only in a field that
        is read."""
        return self._block.line(at).decode("utf-8", "surrogateescape")

    def _parsed(self, at: int, text: str) -> tuple[list[str], str, int]:
        """The fields of the row that begins in line `at`, or why it is none, and how many lines it takes."""
        try:
            fields = fields_of(self._dialect, text, self._lists)
            if len(fields) == self._dialect.width + 1 and not fields[-1]:
                fields.pop()  # a delimiter at the end of the row
            if len(fields) == self._dialect.width:
                return fields, "", 1
            reason = self._width(fields)
        except csv.Error as error:
            reason = f"not CSV: {error}"
            fields, taken = self._over_lines(at, text) if "end of data" in reason else ([], 1)
            if fields and self._is_ambiguous(at, fields, taken):
                first = self._block.before + at + 1
                return [], AMBIGUOUS.format(first=first, last=first + taken - 1), taken
            if fields := fields or self._escaped(text):
                return fields, "", taken
        except ValueError as error:
            return [], f"not a JSON object: {error}", 1
        if '"' in text and self._is_row(text):
            return text.split(self._dialect.delimiter), "", 1
        return [], reason, 1

    def _escaped(self, text: str) -> list[str]:
        """The fields of a row in which a backslash goes before a quote within quotes; none for another row."""
        if '\\"' not in text:
            return []
        delimiter = self._dialect.delimiter or ","
        try:
            fields = next(csv.reader([text], delimiter=delimiter, escapechar="\\", doublequote=False, strict=True))
        except csv.Error:
            return []
        return fields if len(fields) == self._dialect.width else []

    @staticmethod
    def _is_text(field: str) -> bool:
        return field.isascii() or not any("\ud800" <= character <= "\udfff" for character in field)

    def _over_lines(self, at: int, joined: str) -> tuple[list[str], int]:
        """The fields of a row whose quoted field goes on in the next lines, and how many lines it takes; or none.

        A next line that is a whole row by itself, with a time like the others, is never part of such a field.
        """
        tries = 0
        for count in range(1, LONGEST_ROW):
            if at + count == len(self._block):
                following = next(self._blocks, None)
                if following is None:
                    break
                self._block = Block(self._block.data + following.data, self._block.before)
            line = self._text_of(at + count)
            if len(joined) > LONGEST_LINE or (self._is_row(line) and self._has_usual_time(at, line)):
                break
            joined += "\n" + line
            if '"' not in line:
                continue
            tries += 1
            if tries > MOST_TRIES:
                break
            reader = csv.reader(io.StringIO(joined, newline=""), delimiter=self._dialect.delimiter or ",", strict=True)
            try:
                found = list(reader)
            except csv.Error:
                continue
            if len(found) == 1 and len(found[0]) == self._dialect.width and self._is_whole(found[0]):
                return found[0], count + 1
            break
        return [], 1

    def _has_usual_time(self, at: int, line: str) -> bool:
        columns = self._table.columns
        if TIME not in columns:
            return True
        return self._near_column(at, TIME).is_like(line.split(self._dialect.delimiter)[columns[TIME]])

    def _is_ambiguous(self, at: int, joined: Sequence[str], lines: int) -> bool:
        """Whether `lines` that make one row may as well be several, with stray quotes.

        They may where a field over several lines hides what looks like a time of the log: `Heroes,1500000001`, but not
        `May, 2001` among seconds since 1970; where one of the next lines has all fields of a row, though its time looks
        like no other; and where no time comes after that field, the first line is a row by itself, and its rating looks
        like those of the log, or, without a rating, one of the next lines has enough fields for a row.
        """
        columns, delimiter = self._table.columns, self._dialect.delimiter or ","
        place = next(position for position, field in enumerate(joined) if "\n" in field)
        over_lines = [field for field in joined if "\n" in field]
        hidden = [text.split(delimiter) for field in over_lines for text in field.split("\n")]
        every = itertools.chain.from_iterable(hidden)
        if TIME in columns and any(self._near_column(at, TIME, joined).is_like(part) for part in every):
            return True
        following = [self._text_of(at + n) for n in range(1, lines)]
        if any(map(self._is_row, following)):
            return True
        later = {role for role, position in columns.items() if position > place}
        first = [*joined[:place], *hidden[0]]
        if not later or TIME in later or len(first) != self._dialect.width:
            return False
        if RATING in later:
            return self._near_column(at, RATING, joined).is_like(first[columns[RATING]])
        return any(line.count(delimiter) >= self._dialect.width - 1 for line in following)

    def _near_column(self, at: int, role: str, otherwise: Sequence[str] = ()) -> "_Column":
        """What a column holds in the whole rows around a line, looked up once for some lines together; where there is
        none, that of the row `otherwise`."""
        place = self._table.columns[role]
        group = (self._block.before + at) // NEAR
        if self._near_group != group:
            self._near_group, self._near = group, {}
        if place not in self._near:
            near = range(max(0, at - NEAR), min(len(self._block), at + 2 * NEAR))
            rows = (self._closed(self._text_of(n)) for n in near)
            self._near[place] = _Column([row[place] for row in rows if self._is_whole(row)])
        found = self._near[place]
        return found if found.is_known or not otherwise else _Column([otherwise[place]])

    def _closed(self, line: str) -> list[str]:
        """The fields of a line whose quotes do nothing but open and close fields; none for another one."""
        try:
            fields = fields_of(self._dialect, line)
        except csv.Error:
            return []
        return [] if any('"' in field for field in fields) else fields

    def _is_row(self, text: str) -> bool:
        """Whether a line is a whole row if quotes are characters like others."""
        fields = text.split(self._dialect.delimiter)
        needed = [fields[position] for position in self._table.columns.values() if position < len(fields)]
        return self._is_whole(fields) and all('"' not in field for field in needed)

    def _is_whole(self, fields: Sequence[str]) -> bool:
        """Whether there are as many fields as columns, with a user, an item and digits of a time."""
        columns = self._table.columns
        return (
            len(fields) == self._dialect.width
            and all(fields[columns[role]].strip() for role in (USER, ITEM) if role in columns)
            and (TIME not in columns or any(character.isdigit() for character in fields[columns[TIME]]))
        )

    def _width(self, fields: Sequence[object]) -> str:
        return f"{len(fields)} fields, expected {self._dialect.width}"


class _Column:
    """What some fields of a column look like: their numbers, and how others are written."""

    def __init__(self, fields: Sequence[str]) -> None:
        numbers = [number for field in fields if (number := _number(field)) is not None]
        self._least, self._most = min(numbers, default=-math.inf), max(numbers, default=math.inf)
        self._has_numbers, self.is_known = bool(numbers), bool(fields)
        self._forms = {_form(field) for field in fields if _number(field) is None}

    def is_like(self, text: str) -> bool:
        """Whether a text may be such a field: a number from half the least to twice the most, or a date, or written as
        one of the fields is. Where no field is known, a number or a date."""
        text = text.strip(' "')
        number = _number(text)
        if number is not None:
            is_near = self._least - abs(self._least) / 2 <= number <= self._most + abs(self._most)
            return is_near and (self._has_numbers or not self.is_known)
        is_date = DATE.match(text) is not None and (bool(self._forms) or not self.is_known)
        return is_date or _form(text) in self._forms


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _form(text: str) -> str:
    """How a text is written: its digits as 0, its words as a.

    Examples:
        >>> _form(" Nov 30, 2026 10:05")
        'a 0, 0 0:0'
    """
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"[0-9]+", "0", text.strip()))
