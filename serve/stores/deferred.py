"""Writes that no call waits for: gathered, and written together by a thread of their own."""

import logging
import sys
import threading
import time
from abc import abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import NamedTuple

from serve.stores.base import MOST_SLATES, EventStore, Slate, SpilledState, StoreError
from serve.stores.rows import Started

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
DEFERRED_BATCH = 500
# A store that stays broken costs so many entries and about so many bytes of memory, and no more.
LIMIT = 20_000
LIMIT_BYTES = 64 * 2**20
ENTRY_BYTES = 1_000
# What is older could be of a user whose deletion is forgotten, after MOST_DELETIONS others.
LONGEST_WAIT_S = 86_400.0


Write = Callable[[Sequence[Started], Sequence[SpilledState]], None]


class _Waiting(NamedTuple):
    entry: Slate | SpilledState
    since: float
    size: int
    """About how many bytes of memory the entry has."""


class DeferredWrites:
    """Hands what was added to `write`, at the latest a second later; keeps and repeats what could not be written."""

    def __init__(self, write: Write, last_deletion: Callable[[], int]) -> None:
        """`last_deletion` is the number of the store's last deletion of a user; raises StoreError as that does."""
        self._write = write
        self._last_deletion = last_deletion
        self._deletions: deque[tuple[float, int]] = deque([(time.monotonic(), last_deletion())])
        """Since when this process knows of a deletion, by `time.monotonic()`, and its number. A number and not the time
        of the deletion says what was asked before it: clocks are set, and those of servers differ."""
        self._waiting: deque[_Waiting] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        # Held while a batch is written, so that `discard` knows that nothing is half-way.
        self._writing = threading.Lock()
        # What was taken out and is being written.
        self._batch: Sequence[_Waiting] = ()
        self._closed = False
        self._failing = False
        self.dropped_count = 0
        self._thread = threading.Thread(target=self._run, name="deferred-writes", daemon=True)
        self._thread.start()

    def add(self, entries: Sequence[Slate | SpilledState], since: float | None = None) -> None:
        """Returns at once; beyond the limit the oldest entries are dropped. They are as of `since`, None: now."""
        since = time.monotonic() if since is None else since
        with self._changed:
            for entry in entries:
                self._waiting.append(_Waiting(entry, since, _size(entry)))
                self._bytes += self._waiting[-1].size
            while len(self._waiting) > LIMIT or self._bytes > LIMIT_BYTES:
                self._bytes -= self._waiting.popleft().size
                self.dropped_count += 1
            if len(self._waiting) >= DEFERRED_BATCH:
                self._changed.notify()

    def discard(self, user_id: str) -> None:
        """Forgets what waits for a user; nothing of the user is written after this returns but what is added later."""
        with self._writing, self._changed:
            self._keep([waiting for waiting in self._waiting if waiting.entry.user_id != user_id])

    def look(self) -> None:
        """Notes the store's last deletion of a user; if the store fails, the next call does."""
        try:
            number = self._last_deletion()
        except StoreError:
            return
        now = time.monotonic()
        with self._changed:
            # Of two calls at once the one that asked first may come here last.
            if number > self._deletions[-1][1]:
                self._deletions.append((now, number))
            while len(self._deletions) > 1 and now - self._deletions[1][0] > LONGEST_WAIT_S:
                self._deletions.popleft()

    @contextmanager
    def merging(self, source: str, target: str) -> Iterator[None]:
        """Writes what waits, and then nothing else within the block. What was added of the source meanwhile becomes the
        target's after the block; if the block raises, it stays the source's. A merge deletes the source."""
        with self._writing:
            self._flush()
            yield
            with self._changed:
                self._keep(
                    [
                        waiting._replace(entry=waiting.entry._replace(user_id=target))
                        if waiting.entry.user_id == source
                        else waiting
                        for waiting in self._waiting
                        if waiting.entry.user_id != source or isinstance(waiting.entry, Slate)
                    ]
                )
        self.look()

    def slates(self, user_id: str, since: int) -> list[Slate]:
        """Those of a user that are not known to be written, newest first, from a timestamp on."""
        with self._changed:
            waiting = [*self._batch, *self._waiting]
        return [
            entry
            for entry, *_ in reversed(waiting)
            if isinstance(entry, Slate) and entry.user_id == user_id and entry.timestamp >= since
        ]

    def flush(self) -> None:
        """Writes all that waits now, or raises what came of it and keeps it: a StoreError, unless an entry is bad."""
        self.look()
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._changed:
            left = len(self._waiting)
        while left > 0:
            batch = self._take(left)
            if not batch:
                return
            left -= len(batch)
            try:
                self._write_batch(batch)
            except Exception:
                self._put_back(batch)
                raise
            self._batch = ()

    def close(self) -> None:
        """Writes what waits, or counts it as dropped when that fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        try:
            try:
                self.flush()
            except Exception:
                self._write_one_by_one()
                self.flush()
        except Exception as error:
            self.dropped_count += len(self._waiting)
            logger.error("%d slates and states are lost", len(self._waiting), exc_info=error)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_cause_to_write, INTERVAL_S)
                if self._closed:
                    return
            # Whatever happens, the thread goes on: no other would be started.
            try:
                self.flush()
                self._failing = False
            except Exception as error:
                if self._failing:
                    with suppress(Exception):
                        self._write_one_by_one()
                else:
                    logger.error("slates and states wait for the store", exc_info=error)
                self._failing = True

    def _take(self, most: int) -> Sequence[_Waiting]:
        """The next batch, without what waited for too long; empty when nothing waits."""
        with self._changed:
            while self._waiting and time.monotonic() - self._waiting[0].since > LONGEST_WAIT_S:
                self._bytes -= self._waiting.popleft().size
                self.dropped_count += 1
            self._batch = [self._waiting.popleft() for _ in range(min(DEFERRED_BATCH, most, len(self._waiting)))]
            self._bytes -= sum(one.size for one in self._batch)
            return self._batch

    def _put_back(self, batch: Sequence[_Waiting]) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(batch))
            self._bytes += sum(one.size for one in batch)
            self._batch = ()

    def _keep(self, waiting: Sequence[_Waiting]) -> None:
        self._waiting = deque(waiting)
        self._bytes = sum(one.size for one in waiting)

    def _write_batch(self, batch: Sequence[_Waiting]) -> None:
        with self._changed:
            known = list(self._deletions)
        self._write(
            [Started(entry, _known_at(since, known)) for entry, since, _ in batch if isinstance(entry, Slate)],
            [entry for entry, *_ in batch if isinstance(entry, SpilledState)],
        )

    def _write_one_by_one(self) -> None:
        """Writes the next batch, and drops what cannot be written where others can: it would hold up all of them.

        Keeps what may be the store's failure, and raises StoreError where it is.
        """
        with self._writing:
            self._write_batch([])
            left = deque(self._take(DEFERRED_BATCH))
            failed: list[_Waiting] = []
            try:
                while left:
                    one = left.popleft()
                    try:
                        self._write_batch([one])
                    except StoreError:
                        failed.append(one)
                        # Where the store is down, the others need not be tried.
                        self._write_batch([])
                    except Exception as error:
                        self._drop([one], error)
                    else:
                        # So the store was not to blame.
                        self._drop(failed)
                        failed = []
            finally:
                self._put_back([*failed, *left])

    def _drop(self, bad: Sequence[_Waiting], error: Exception | None = None) -> None:
        if bad:
            self.dropped_count += len(bad)
            kinds = sorted({type(waiting.entry).__name__ for waiting in bad})
            logger.error("%d of %s cannot be written and are dropped", len(bad), ", ".join(kinds), exc_info=error)

    def _has_cause_to_write(self) -> bool:
        return self._closed or (len(self._waiting) >= DEFERRED_BATCH and not self._failing)


def _known_at(time_s: float, deletions: Sequence[tuple[float, int]]) -> int:
    """The last deletion that was known at a time; -1: none."""
    at = bisect_right(deletions, time_s, key=lambda one: one[0])
    return deletions[at - 1][1] if at else -1


def _size(entry: Slate | SpilledState) -> int:
    if isinstance(entry, SpilledState):
        return ENTRY_BYTES + sys.getsizeof(entry.state)
    # The texts of the ids are the catalogue's; a log-propensity is a number of its own beside its reference.
    ids = sys.getsizeof(entry.item_ids) + sys.getsizeof(entry.excluded_item_ids)
    return ENTRY_BYTES + ids + 4 * sys.getsizeof(entry.log_propensities)


class DeferringStore(EventStore):
    """A store that puts off writing slates and states."""

    _deferred: DeferredWrites

    def log_slate(self, slate: Slate, *, started: float | None = None) -> None:
        self._deferred.add([slate], started)

    def save_states(self, states: Sequence[SpilledState]) -> None:
        self._deferred.add(states)

    def shown_items(self, user_id: str, since: int, most: int, but: str = "") -> list[str]:
        # First: what is written meanwhile is found there.
        waiting = [(one.recommendation_id, one.item_ids) for one in self._deferred.slates(user_id, since)]
        slates = islice(chain(waiting, self._stored_slates(user_id, since)), MOST_SLATES)
        found: dict[str, None] = {}
        for recommendation_id, item_ids in slates:
            if recommendation_id != but:
                found |= dict.fromkeys(item_ids)
            if len(found) >= most:
                break
        return list(found)[:most]

    @abstractmethod
    def _stored_slates(self, user_id: str, since: int) -> Iterable[tuple[str, Sequence[str]]]:
        """Id and items of a user's newest `MOST_SLATES` written slates from a timestamp on, newest first."""

    @property
    def dropped_count(self) -> int:
        return self._deferred.dropped_count

    def flush(self) -> None:
        self._deferred.flush()
