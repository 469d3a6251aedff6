"""Prepared data in parts of whole users: the share of one training process, and all parts as one again.

A part is prepared data with the whole catalogue: a shard of `jaxrec prepare-distributed`, or some users of a folder of
`jaxrec prepare`. All users have one order, whatever part they are in: that of their raw ids, or of the folder.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrec.data.catalog import Catalog
from jaxrec.data.histories import EVENT_TYPES, Histories, blocks, event_writers, expand_ranges, open_histories, release
from jaxrec.data.ids import IdMap
from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases, Split
from jaxrec.errors import DataError


@dataclasses.dataclass(frozen=True)
class TrainingShare:
    """What a training process reads: its own parts, and of the other users only how many of their events train.

    Attributes:
        parts: At least one, if only of no users.
        train_counts: [all users] int64, in the order of all users.
        places: For each part [its users] int64: where they are in that order.
    """

    parts: tuple[PreparedData, ...]
    train_counts: np.ndarray
    places: tuple[np.ndarray, ...]

    @property
    def catalog(self) -> Catalog:
        """Of all parts."""
        return self.parts[0].catalog

    def train_popularity(self) -> np.ndarray:
        """[items + 1] int64: training events per item, of all users where `with_popularity` said them."""
        known = self.parts[0].popularity
        return self.own_popularity() if known is None else known

    def own_popularity(self) -> np.ndarray:
        """[items + 1] int64: training events per item of these parts alone."""
        return np.sum([part.own_popularity() for part in self.parts], axis=0)

    def with_popularity(self, popularity: np.ndarray) -> "TrainingShare":
        """The same share whose parts know `popularity` [items + 1] int64, that of all users."""
        parts = tuple(dataclasses.replace(part, popularity=popularity) for part in self.parts)
        return dataclasses.replace(self, parts=parts)


def share_of(data: PreparedData, index: int = 0, count: int = 1) -> TrainingShare:
    """Share `index` of `count` of one folder: users that follow each other, with about as many events as the others."""
    users, counts = _users_of(data, index, count), np.asarray(data.split.train_counts)
    part = data if count == 1 else _some_users(data, users)
    return TrainingShare((part,), counts, (np.arange(users.start, users.stop),))


def share_of_shards(shards: Sequence[PreparedData], index: int, count: int) -> TrainingShare:
    """Share `index` of `count`: the shards index, index + count, ...; with fewer shards than shares, a part of one.

    Of the other shards only the ids and training counts of the users are read.
    """
    order = np.argsort(np.concatenate([shard.users.raw_ids for shard in shards]), kind="stable")
    train_counts = np.concatenate([shard.split.train_counts for shard in shards])[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    places = np.split(place, np.cumsum([len(shard.users) for shard in shards])[:-1])
    own = range(index % len(shards), len(shards), count)
    sharing = len(range(index % len(shards), count, len(shards)))
    if sharing <= 1:
        return TrainingShare(tuple(shards[i] for i in own), train_counts, tuple(places[i] for i in own))
    shard, users = shards[own[0]], _users_of(shards[own[0]], index // len(shards), sharing)
    return TrainingShare((_some_users(shard, users),), train_counts, (places[own[0]][users],))


def _users_of(data: PreparedData, index: int, count: int) -> slice:
    """The users of one of `count` parts."""
    offsets, events = data.histories.offsets, data.histories.event_count
    first, stop = (int(np.searchsorted(offsets[:-1], events * i // count)) for i in (index, index + 1))
    return slice(first, data.histories.user_count if index + 1 == count else stop)


def _some_users(data: PreparedData, users: slice) -> PreparedData:
    """The part of these users, with their rows of the same memory maps."""
    histories, split = data.histories, data.split
    start, stop = int(histories.offsets[users.start]), int(histories.offsets[users.stop])
    rows = slice(start, stop)
    offsets = histories.offsets[users.start : users.stop + 1] - start

    def cases(of_all: Cases) -> Cases:
        where = (of_all.users >= users.start) & (of_all.users < users.stop)
        return Cases(of_all.users[where] - users.start, of_all.rows[where] - start)

    return dataclasses.replace(
        data,
        users=IdMap(data.users.raw_ids[users], distinct=True),
        histories=Histories(offsets, histories.items[rows], histories.ratings[rows], histories.times[rows]),
        split=Split(split.train_counts[users], cases(split.validation), cases(split.test)),
        log=None,
        movies=None,
    )


def joined(parts: Sequence[PreparedData]) -> PreparedData:
    """All parts as one: what `jaxrec.data.prepare.prepare` makes of the same log on one machine.

    The events are gathered in temporary files, which last as long as the histories.

    Args:
        parts: Of disjoint users, with one catalogue and one configuration; at least one.

    Returns:
        The users of all parts in the order of their raw ids, with their events and cases.

    Raises:
        DataError: The temporary files cannot be written.
    """
    raw_ids = np.concatenate([part.users.raw_ids for part in parts])
    order = np.argsort(raw_ids, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first_users = np.cumsum([0, *(len(part.users) for part in parts)])
    lengths = np.concatenate([part.histories.lengths() for part in parts])[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    part_of = np.searchsorted(first_users, order, side="right") - 1
    try:
        with tempfile.TemporaryDirectory(prefix="jaxrec-") as scratch:  # memory maps outlast it
            folder = Path(scratch)
            np.save(folder / "offsets.npy", offsets)
            _write_events(parts, part_of, order, first_users, offsets, folder)
            histories = open_histories(folder)
    except OSError as error:
        needed = offsets.nbytes + int(offsets[-1]) * sum(np.dtype(kind).itemsize for kind in EVENT_TYPES.values())
        raise DataError(
            f"{tempfile.gettempdir()}: cannot be written ({error.strerror or error}); gathering all events in one file "
            f"needs {needed} bytes there; the variable TMPDIR names another folder"
        ) from error

    def cases(of_parts: Sequence[Cases]) -> Cases:
        users, rows = [], []
        for part, own, first in zip(parts, of_parts, first_users, strict=False):
            users.append(place[first + own.users])
            rows.append(offsets[users[-1]] + own.rows - part.histories.offsets[own.users])
        by_row = np.argsort(np.concatenate(rows), kind="stable")
        return Cases(np.concatenate(users)[by_row], np.concatenate(rows)[by_row])

    train_counts = np.concatenate([part.split.train_counts for part in parts])[order]
    validation, test = ([getattr(part.split, name) for part in parts] for name in ("validation", "test"))
    split = Split(train_counts, cases(validation), cases(test))
    return dataclasses.replace(
        parts[0], users=IdMap(raw_ids[order], distinct=True), histories=histories, split=split, popularity=None
    )


def _write_events(
    parts: Sequence[PreparedData],
    part_of: np.ndarray,
    order: np.ndarray,
    first_users: np.ndarray,
    offsets: np.ndarray,
    folder: Path,
) -> None:
    """Writes the columns, block by block. `part_of` and `order` [users]: of each user in the order of all, its part,
    and its place among the users of all parts one after the other."""
    with event_writers(folder) as writers:
        for block in blocks(offsets):
            ends = np.cumsum(block.lengths)
            columns = {name: np.empty(int(block.lengths.sum()), np.dtype(w.dtype)) for name, w in writers.items()}
            for number in np.unique(part_of[block.users]):
                mine = np.flatnonzero(part_of[block.users] == number)
                users, histories = order[block.users[mine]] - first_users[number], parts[number].histories
                lengths = block.lengths[mine]
                source, into = (
                    expand_ranges(starts, lengths) for starts in (histories.offsets[users], ends[mine] - lengths)
                )
                for name, column in columns.items():
                    column[into] = getattr(histories, name)[source]
                release(histories.items, histories.ratings, histories.times)
            for name, writer in writers.items():
                writer.write(columns[name])
