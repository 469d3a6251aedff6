"""What a text file is: its encoding, its delimiter, and whether its first line is a header. Given, or recognized."""

import codecs
import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrec.data.reading.columns import MOVIE_NAMES, NAMES, plain
from jaxrec.data.reading.lines import BLOCK, blocks
from jaxrec.errors import DataError

DELIMITERS = ("\t", ";", "|", "::", ",")
SAMPLE = 1 << 18  # characters by which a file is recognized
SAMPLE_LINES = 100
KEY_SAMPLE = 64 << 20  # characters of JSON lines whose keys are looked at: a rare key may come late
BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the start of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WORD = re.compile(rb"[A-Za-z][\x80-\xff]|[\x80-\xff][A-Za-z]")
NOT_CP1252 = {0x81, 0x8D, 0x8F, 0x90, 0x9D}
# A field that is a number or a date, which no header has.
VALUE = re.compile(r"\s*[-+]?\d[\d.,:/TZ+eE -]*\s*")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a text file is written.

    Attributes:
        delimiter: None: JSON lines.
        names: The fields of the header; of JSON lines the keys of the first rows; None: there is no header.
        width: Fields of a row.
    """

    delimiter: str | None
    names: tuple[str, ...] | None
    width: int

    @property
    def header_lines(self) -> int:
        """Lines before the first row."""
        return int(self.delimiter is not None and self.names is not None)

    @property
    def quoting(self) -> bool:
        """Whether a field may stand in quotes."""
        return self.delimiter is not None and len(self.delimiter) == 1


class Scan(NamedTuple):
    """What a file is as bytes.

    Attributes:
        encoding: UTF-8, also where some lines are broken; UTF-16 or UTF-32; or else cp1252 or Latin-1, where no line
            has characters of UTF-8 and most of those that are not ASCII have such a byte beside a letter, as in words.
        lines: Up to the last that is not empty; 0 where the encoding is a wide one.
    """

    encoding: str
    lines: int


def scan(path: Path) -> Scan:
    """One pass over a file: its encoding, and what decides how it can be read."""
    with open(path, "rb") as file:
        head = file.read(4096)
    encoding = next((name for bom, name in BOMS.items() if head.startswith(bom)), None) or _wide(head)
    if encoding not in (None, "utf-8"):
        return Scan(encoding or "", 0)
    last = 0
    utf8 = other = words = 0  # lines that are not ASCII: of UTF-8; of none; of none, with words
    defined = True
    for block in blocks(path):
        text = np.flatnonzero(block.lengths())
        last = block.before + int(text[-1]) + 1 if len(text) else last
        try:
            if not block.data.isascii():
                block.data.decode("utf-8")
                utf8 += 1
        except UnicodeDecodeError:
            for at in block.not_ascii().tolist():
                line = block.line(at)
                try:
                    line.decode("utf-8")
                    utf8 += 1
                except UnicodeDecodeError:
                    other += 1
                    words += WORD.search(line) is not None
                    defined = defined and not set(line) & NOT_CP1252
    if utf8 or 2 * words <= other:
        return Scan("utf-8", last)
    return Scan("cp1252" if defined else "latin-1", last)


def _wide(head: bytes) -> str | None:
    """UTF-16 without a mark: every second byte of mostly Latin text is zero."""
    if len(head) < 4 or head.count(0) < 0.3 * len(head):
        return None
    return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"


def transcode(path: Path, encoding: str, copy: Path, name: str) -> None:
    """Writes `path` as UTF-8 to `copy`. Raises DataError where a byte is none of the encoding's."""
    try:
        with open(path, encoding=encoding, newline="") as source, open(copy, "w", encoding="utf-8", newline="") as out:
            while text := source.read(BLOCK):
                out.write(text)
    except LookupError:
        raise DataError(f"{name}: the encoding {encoding} is not known; expected one such as cp1252") from None
    except UnicodeError as error:
        reason = getattr(error, "reason", str(error))
        raise DataError(f"{name}: not {encoding} text ({reason}); give another --encoding") from error


def recognize(path: Path, name: str, delimiter: str | None, has_header: bool | None, expected: str) -> Dialect:
    """The dialect of a UTF-8 text file, by its first lines.

    Args:
        path: The file.
        name: What messages call it.
        delimiter: The one that was given; None: recognized.
        has_header: Whether its first line is a header; None: recognized.
        expected: The header that a message says where the file is empty.

    Returns:
        The dialect.

    Raises:
        DataError: Where the file is empty or holds one JSON document.
    """
    if delimiter is not None and (not 0 < len(delimiter.encode()) <= 4 or set(delimiter) & set('"\r\n')):
        raise DataError(f"--delimiter {delimiter!r}: expected one to four characters, without quotes and line ends")
    lines = _first_lines(path)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{name}: the file is empty; expected the header {expected}")
    if delimiter is None and first.lstrip().startswith("{"):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            keys = dict.fromkeys(key for line in file.readlines(KEY_SAMPLE) for key in _keys(line))
        return Dialect(None, tuple(keys), len(keys))
    if delimiter is None and first.lstrip().startswith("[") and '"' in first[:200] + "".join(lines[1:3]):
        raise DataError(f"{name}: a JSON list; expected JSON lines: one object in each line, and no list around them")
    delimiter = delimiter or max(DELIMITERS, key=lambda each: _fit(lines, each))
    fields = split_line(lines[0], delimiter)
    if has_header is None:
        has_header = any(map(_is_known, fields)) or not any(VALUE.fullmatch(field) for field in fields)
    names = tuple(field.strip() for field in fields) if has_header else None
    return Dialect(delimiter, names, len(fields))


def split_line(line: str, delimiter: str) -> list[str]:
    """The fields of one line; quotes that do not close are closed by its end."""
    if len(delimiter) > 1:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a field that is longer than Python reads
        return [line]


def _first_lines(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read(SAMPLE)
    lines = text.split("\n")
    return lines[: max(1, len(lines) - 1)][:SAMPLE_LINES] if len(text) == SAMPLE else lines[:SAMPLE_LINES]


def _keys(line: str) -> Sequence[str]:
    try:
        found = json.loads(line)
    except ValueError:
        return ()
    return list(found) if isinstance(found, dict) else ()


def _fit(lines: Sequence[str], delimiter: str) -> tuple[int, float, int]:
    """How well a delimiter explains the lines: known names in the first, lines of one width, and this width.

    The width is that of a first line with known names (other lines may be parts of rows), or else the most common one.
    """
    first = split_line(lines[0], delimiter)
    known = sum(map(_is_known, first))
    widths = Counter(len(split_line(line, delimiter)) for line in lines if line.strip())
    width = len(first) if known else max(widths, key=lambda each: (widths[each], each))
    return (known, widths[width] / widths.total(), width) if width > 1 else (0, 0.0, 0)


def _is_known(field: str) -> bool:
    groups = (group for names in (NAMES, MOVIE_NAMES) for groups in names.values() for group in groups)
    name = plain(field)
    return any(name in group or name.removesuffix("id") in group for group in groups)
