"""The lines of large text files, as bytes, block by block: what is asked of all of them is computed at once."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 4 << 20  # bytes that are read at a time
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole lines of a file, each ended by LF. `before`: the lines of the file before them."""

    data: bytes
    before: int

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """[lines] int64: where each line's LF is."""
        return self.positions(ord("\n"))

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, at: int) -> bytes:
        """A line without its end."""
        return self.data[self.start(at) : int(self.ends[at])]

    def start(self, at: int) -> int:
        """Where a line begins in `data`."""
        return int(self.ends[at - 1]) + 1 if at else 0

    def lengths(self) -> np.ndarray:
        """[lines] int64: bytes of each line, without its end."""
        lengths = self.ends.copy()
        lengths[1:] -= self.ends[:-1] + 1
        return lengths

    def positions(self, byte: int) -> np.ndarray:
        """Where a byte occurs, rising."""
        return np.flatnonzero(self._array == byte)

    def counts(self, byte: int) -> np.ndarray:
        """[lines] int64: how often a byte occurs in each line."""
        return np.diff(np.searchsorted(self.positions(byte), self.ends), prepend=0)

    def not_ascii(self) -> np.ndarray:
        """The lines that are not ASCII, rising."""
        if self.data.isascii():
            return np.empty(0, np.int64)
        return np.unique(np.searchsorted(self.ends, np.flatnonzero(self._array >= 128)))

    @property
    def _array(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8)


def blocks(path: Path) -> Iterator[Block]:
    """A file's lines; line ends of any kind (LF, CR LF, CR) become LF, and a byte order mark of UTF-8 is left out."""
    before, rest = 0, b""
    with open(path, "rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        while read := file.read(BLOCK):
            data = rest + read
            held = data.endswith(b"\r")  # perhaps the first half of CR LF
            data = _unified(data[:-1] if held else data)
            cut = data.rfind(b"\n") + 1
            rest = data[cut:] + (b"\r" if held else b"")
            if cut:
                block = Block(data[:cut], before)
                yield block
                before += len(block)
    if rest:
        last = _unified(rest)
        yield Block(last if last.endswith(b"\n") else last + b"\n", before)


def _unified(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def lines_at(path: Path, numbers: np.ndarray) -> Iterator[str]:
    """The text of some lines. `numbers` [lines]: from 1, rising; what is not UTF-8 is visible as \\xNN."""
    at = 0
    for block in blocks(path):
        stop = int(np.searchsorted(numbers, block.before + len(block), side="right"))
        chosen = numbers[at:stop] - block.before - 1
        starts = np.where(chosen > 0, block.ends[chosen - 1] + 1, 0)
        for start, end in zip(starts.tolist(), block.ends[chosen].tolist(), strict=True):
            yield block.data[start:end].decode("utf-8", "backslashreplace")
        at = stop
        if at == len(numbers):
            break
