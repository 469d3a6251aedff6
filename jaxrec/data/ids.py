"""The one place where raw ids become dense indices and back. Index 0 is padding and stands for no id."""

from pathlib import Path

import numpy as np
import pandas as pd


class IdMap:
    """A fixed set of raw ids (all int64, or all str), in the order of their indices 1..n.

    Examples:
        >>> ids = IdMap.fit(np.array([40, 10, 40, 30]))
        >>> ids.encode([10, 40, 5]).tolist(), ids.decode(np.array([3, 1])).tolist()
        ([1, 3, 0], [40, 10])
    """

    def __init__(self, raw_ids: np.ndarray, distinct: bool = False) -> None:
        """Takes the raw ids in the order of their indices.

        Args:
            raw_ids: [n] int64, or object (str).
            distinct: The ids are known to be distinct, which saves the time of comparing them.

        Raises:
            ValueError: For an id that occurs twice.
        """
        self._index = pd.Index(raw_ids)
        if not distinct and self._index.has_duplicates:
            raise ValueError(f"id {self._index[self._index.duplicated()][0]!r} occurs twice")

    @classmethod
    def fit(cls, raw_ids: np.ndarray | pd.Series) -> "IdMap":
        """Indices in the sorted order of the distinct ids, so that the order of the rows does not matter."""
        return cls(np.sort(pd.unique(np.asarray(raw_ids))))

    def __len__(self) -> int:
        return len(self._index)

    @property
    def raw_ids(self) -> np.ndarray:
        """The raw ids of the indices 1..n, in that order."""
        return self._index.to_numpy()

    def encode(self, raw_ids: np.ndarray | pd.Series | list) -> np.ndarray:
        """[ids] int32: indices of raw ids; 0 for an id that is not in the map."""
        return (self._index.get_indexer(pd.Index(raw_ids)) + 1).astype(np.int32)

    def decode(self, indices: np.ndarray) -> np.ndarray:
        """Raw ids of indices. Raises IndexError for padding and for an index beyond the last."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 1 or indices.max() > len(self)):
            raise IndexError(f"indices must be in 1..{len(self)}, not {indices.min()}..{indices.max()}")
        return self.raw_ids[indices - 1]


def write_ids(ids: IdMap, path: Path) -> None:
    """Writes the raw ids as .npy: whole numbers as int64; text as UTF-8 (uint8), each id followed by U+0000.

    Raises ValueError for a text id that has U+0000.
    """
    raw = ids.raw_ids
    if raw.dtype == np.int64:
        np.save(path, raw, allow_pickle=False)
        return
    text = "".join(f"{each}\0" for each in raw)
    if text.count("\0") != len(raw):
        raise ValueError("an id has the character U+0000")
    np.save(path, np.frombuffer(text.encode("utf-8"), np.uint8), allow_pickle=False)


def open_ids(path: Path) -> IdMap:
    """Reads what `write_ids` wrote; whole numbers as a memory map."""
    raw = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    if raw.dtype == np.uint8:
        raw = np.array(raw.tobytes().decode("utf-8").split("\0")[:-1], dtype=object)
    return IdMap(raw, distinct=True)
