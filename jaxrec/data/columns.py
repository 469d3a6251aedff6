"""Columns on disk as .npy files: written block by block, read as memory maps that give their pages back."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

BLOCK_EVENTS = 4_000_000  # events that a pass over the log holds in memory at a time


class ColumnWriter:
    """Writes one-dimensional arrays one after the other into one .npy file."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._length = 0
        self._write_header()
        self._start = self._file.tell()

    def __enter__(self) -> "ColumnWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                if self._file.tell() != self._start:  # NumPy pads the header for growth; else data would be lost
                    raise RuntimeError(f"{self._file.name}: the header of {self._length} rows does not fit")

    def write(self, values: np.ndarray) -> None:
        """Appends `values`, cast to the column's type."""
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self._length += len(values)

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def open_column(path: Path) -> np.ndarray:
    """The column as a read-only memory map: nothing is read before it is used."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def release(*columns: np.ndarray) -> None:
    """Gives back the memory of pages of memory maps that were read; they are read again when they are used again."""
    for column in columns:
        base: object = column
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def user_blocks(offsets: np.ndarray, block_events: int = BLOCK_EVENTS) -> Iterator[tuple[int, int]]:
    """Ranges of users (first, stop) that cover all, each with at most `block_events` events, or a single user."""
    first, users = 0, len(offsets) - 1
    while first < users:
        stop = int(np.searchsorted(offsets, offsets[first] + block_events, side="right")) - 1
        stop = min(max(stop, first + 1), users)
        yield first, stop
        first = stop


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Row numbers (int64) of the runs starts[i] : starts[i] + lengths[i], one run after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
