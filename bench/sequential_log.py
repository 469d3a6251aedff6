"""A log of any size in which the probability of every next item is known, so that the best possible ranking is.

Items lie on circles of CIRCLE, and the circles on a circle of their own. The next item of a user is drawn like this:

- from the user's last event with probability LAST, else from the one before it (the first two: from popularity);
- with probability NEAR one of the next 10 items of that event's circle, the nearer the likelier (DECAY);
- with probability FAR an item of one of the next three circles, by popularity;
- else any item, by popularity;
- drawn again while it is an item of the user's history.

So a user never repeats an item, and an item's probability is `Transitions.probabilities`, but for a factor that all
items outside the history share. No ranking has a higher expected NDCG@10 than that by these probabilities. Ratings and
times are random and say nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from jaxrec.data.batches import CaseBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.scorers import Scorer
from jaxrec.files import new_directory

LAST, NEAR, FAR = 0.7, 0.45, 0.35
STEPS, DECAY = 10, 0.75
CIRCLE, NEXT_CIRCLES = 100, 3
GENRES = 20  # of circles, in turn
LEAST_EVENTS, ACTIVITY_SIGMA = 20, 0.8  # of a user; of the log-normal part above it
USERS_PER_FILE = 5_000
FIRST_TIME, LAST_TIME = 1_500_000_000, 1_600_000_000
LOG_FOLDER, FIRST_FILE, ITEMS_FILE = "log", "part-00000.parquet", "movies.csv"


class Transitions(NamedTuple):
    """`popularity` [items] float64, which sums to 1; item i lies on circle i // CIRCLE."""

    popularity: np.ndarray

    @classmethod
    def of(cls, items: int, seed: int = 0) -> "Transitions":
        """Of so many items, a multiple of CIRCLE; the popularity of rank r is (r + 20) ** -0.8."""
        if items % CIRCLE:
            raise ValueError(f"{items} items do not make whole circles of {CIRCLE}")
        weight = (np.arange(items) + 20.0) ** -0.8
        return cls(np.random.default_rng(seed).permutation(weight / weight.sum()))

    def probabilities(self, last: np.ndarray, before: np.ndarray) -> np.ndarray:
        """[n, items] float64: of each next item after the last two items [n] int of each of n users."""
        return LAST * self._after(last) + (1 - LAST) * self._after(before)

    def _after(self, source: np.ndarray) -> np.ndarray:
        items, rows = len(self.popularity), np.arange(len(source))
        circles = items // CIRCLE
        found = np.tile((1 - NEAR - FAR) * self.popularity, (len(source), 1))
        by_circle = self.popularity.reshape(circles, CIRCLE)
        of_circle = found.reshape(len(source), circles, CIRCLE)
        for ahead in range(1, NEXT_CIRCLES + 1):
            circle = (source // CIRCLE + ahead) % circles
            of_circle[rows, circle] += FAR / NEXT_CIRCLES * by_circle[circle] / by_circle[circle].sum(1, keepdims=True)
        for step, share in enumerate(_step_shares(), start=1):
            found[rows, _ahead(source, step)] += NEAR * share
        return found

    def draw(self, source: np.ndarray, cdf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[n] int64: one item after each source [n] int64; -1 is none. `cdf` [items + 1]: of the popularity."""
        items = len(self.popularity)
        kind = np.where(source < 0, 1.0, rng.random(len(source)))
        steps = 1 + np.searchsorted(np.cumsum(_step_shares())[:-1], rng.random(len(source)))
        circle = (source // CIRCLE + rng.integers(1, NEXT_CIRCLES + 1, len(source))) % (items // CIRCLE)
        far = (kind >= NEAR) & (kind < NEAR + FAR)
        low, high = np.where(far, circle * CIRCLE, 0), np.where(far, (circle + 1) * CIRCLE, items)
        place = cdf[low] + rng.random(len(source)) * (cdf[high] - cdf[low])
        popular = np.clip(np.searchsorted(cdf, place, side="right") - 1, low, high - 1)
        return np.where(kind < NEAR, _ahead(source, steps), popular)


def histories(transitions: Transitions, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[users, most events] int64: the items of users with `counts` [users] events each, in order; -1 after the last.

    Raises ValueError where a user is to have more than half of the items.
    """
    if 2 * counts.max() > len(transitions.popularity):
        raise ValueError(f"{counts.max()} distinct events of {len(transitions.popularity)} items take too many draws")
    cdf = np.concatenate([[0.0], np.cumsum(transitions.popularity)])
    order = np.argsort(-counts, kind="stable")  # those who go on are the first ones then
    items = np.full((len(counts), int(counts.max())), -1, np.int64)
    ordered = counts[order]
    for at in range(items.shape[1]):
        left = np.arange(np.searchsorted(-ordered, -at))
        while len(left):
            source = np.full(len(left), -1)
            if at >= 2:
                source = items[left, np.where(rng.random(len(left)) < LAST, at - 1, at - 2)]
            drawn = transitions.draw(source, cdf, rng)
            new = (items[left, :at] != drawn[:, None]).all(axis=1)
            items[left[new], at] = drawn[new]
            left = left[~new]
    result = np.empty_like(items)
    result[order] = items
    return result


def best_scorer(data: PreparedData, items: int, seed: int = 0) -> Scorer:
    """The probabilities of the next items, of a log by `write_log` with so many items that was prepared as `data`."""
    places, transitions = np.asarray(data.catalog.ids.raw_ids, np.int64) - 1, Transitions.of(items, seed)

    def score(batch: CaseBatch) -> np.ndarray:
        row, length = np.arange(len(batch.target)), np.asarray(batch.events.length)
        last, before = (places[np.asarray(batch.events.item)[row, length - ago] - 1] for ago in (1, 2))
        found = transitions.probabilities(last, before)[:, places]
        return np.pad(found, ((0, 0), (1, 0))).astype(np.float32)

    return score


def activities(users: int, events: int, least: int, rng: np.random.Generator) -> np.ndarray:
    """[users] int64: events of each user, at least `least`, `events` in all."""
    weight = rng.lognormal(0, ACTIVITY_SIGMA, users)
    return least + rng.multinomial(events - least * users, weight / weight.sum())


def write_log(
    folder: Path, users: int, items: int, events: int, least_events: int = LEAST_EVENTS, seed: int = 0
) -> None:
    """A new folder, whole or absent, with the log as Parquet files of whole users in `log/` and a catalogue of all
    items in `movies.csv`. Raw ids of items are their places in `Transitions` plus 1."""
    transitions, rng = Transitions.of(items, seed), np.random.default_rng([seed, 1])
    counts = activities(users, events, least_events, rng)
    with new_directory(folder, ITEMS_FILE) as new:
        (new / LOG_FOLDER).mkdir()
        for number, table in enumerate(_tables(transitions, counts, seed)):
            pq.write_table(table, new / LOG_FOLDER / f"part-{number:05d}.parquet")
        ids = np.arange(1, items + 1)
        genres = [f"Genre {at}" for at in range(GENRES)]
        columns = {
            "movieId": ids,
            "title": [f"Item {one}" for one in ids.tolist()],
            "genres": np.array(genres)[(ids - 1) // CIRCLE % GENRES],
        }
        pa_csv.write_csv(pa.table(columns), new / ITEMS_FILE)


def _tables(transitions: Transitions, counts: np.ndarray, seed: int) -> Iterator[pa.Table]:
    for number, first in enumerate(range(0, len(counts), USERS_PER_FILE)):
        of_users, rng = counts[first : first + USERS_PER_FILE], np.random.default_rng([seed, 2, number])
        items, total = histories(transitions, of_users, rng), int(of_users.sum())
        gaps = 1 + rng.lognormal(8.0, 2.0, total).astype(np.int64)
        starts = np.cumsum(of_users) - of_users
        length = np.add.reduceat(gaps, starts)
        gaps = np.maximum(1, gaps // np.repeat(1 + length // ((LAST_TIME - FIRST_TIME) // 2), of_users))
        passed = np.cumsum(gaps)
        passed -= np.repeat(passed[starts], of_users)
        begin = FIRST_TIME + rng.integers(0, (LAST_TIME - FIRST_TIME) // 2, len(of_users))
        yield pa.table(
            {
                "userId": np.repeat(np.arange(first + 1, first + len(of_users) + 1), of_users),
                "movieId": 1 + items[items >= 0],
                "rating": rng.integers(1, 11, total) / 2,
                "timestamp": np.repeat(begin, of_users) + passed,
            }
        )


def _ahead(item: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
    """The item so many steps further on its circle."""
    return item // CIRCLE * CIRCLE + (item + steps) % CIRCLE


def _step_shares() -> np.ndarray:
    """[STEPS] float64: of each of the next items of a circle; they sum to 1."""
    weight = DECAY ** np.arange(STEPS)
    return weight / weight.sum()
