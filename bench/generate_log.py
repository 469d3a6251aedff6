"""Generates a rating log with MovieLens' marginals, of any size, from a seed; the same arguments give the same file.

Rows come in blocks of one user, the users in random order, each block by movie as MovieLens writes them (not by time).
A global shuffle would need an out-of-core sort; `--shuffle` shuffles within chunks of about a million rows instead, so
that a user's rows are not contiguous, but still lie within one chunk. A user rates a movie once, so no event repeats.

What is matched, and where the figures come from:
- Rating shares: RATING_COUNTS are those of ML-25M; they sum to its published 25,000,095 (mean 3.534).
- Activity: at least 20 ratings, median about 70, mean about 150, at most 32,202 (ML-25M: 20, 71, 153.8, 32,202).
- Popularity: 59,047 movies, POPULARITY gives the ratings of some ranks of ML-25M; the top 1 % gets about 40 %, Gini
  0.94 (https://codex.lenskit.org/movielens/ML25M/description.html).
- Time: gaps within sessions, equal timestamps and breaks were measured on the 100,004 ratings of `dslabs/movielens`:
  22 % of events have the timestamp of the user's event before, the median gap is 10 s, 5 % are breaks of an hour
  to years.

Not matched: which movies go together, taste, a movie's year, whole stars before 2003. Models learn nothing from it.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

ROWS_PER_CHUNK = 1_000_000
MANY = 1000  # ratings of one user, from which drawing again and again is slow
RATING_COUNTS = {
    0.5: 393_068,
    1.0: 776_815,
    1.5: 399_490,
    2.0: 1_640_868,
    2.5: 1_262_797,
    3.0: 4_896_928,
    3.5: 3_177_318,
    4.0: 6_639_798,
    4.5: 2_200_539,
    5.0: 3_612_474,
}
MOVIES, LARGEST_MOVIE_ID = 59_047, 209_171
# Ranks and their weights: ML-25M's counts, steeper at the head, as drawing without repetition flattens it.
POPULARITY = ((1, 130_000), (600, 12_000), (3_800, 800), (10_300, 70), (24_300, 6.5), (32_700, 3.2), (MOVIES, 0.65))
MIN_ACTIVITY, MAX_ACTIVITY = 20, 32_202
EXTRA_ACTIVITY_MEDIAN, EXTRA_ACTIVITY_SIGMA = 51.0, 1.40  # of the log-normal part above the minimum
FIRST_TIME, LAST_TIME = 820_454_400, 1_574_327_703  # 1996-01-01 and 2019-11-21, UTC
TIE_SHARE = 0.215  # within sessions; gaps below a second add to it
GAP_MEDIAN, GAP_SIGMA = 14.0, 1.35  # seconds, within sessions, where there is no tie
BREAK_MEDIAN, BREAK_SIGMA = 5.4 * 86_400, 1.9  # seconds
BREAK_BETA = (0.15, 2.5)  # a user's chance of a break before an event: for most users about none
NAMES = ("userId", "movieId", "rating", "timestamp")


def activities(rows: int, rng: np.random.Generator) -> np.ndarray:
    """[users] int64: ratings per user, `rows` in all. Only a log below MIN_ACTIVITY rows breaks the minimum."""
    mean = MIN_ACTIVITY + EXTRA_ACTIVITY_MEDIAN * np.exp(EXTRA_ACTIVITY_SIGMA**2 / 2)
    extra = rng.lognormal(np.log(EXTRA_ACTIVITY_MEDIAN), EXTRA_ACTIVITY_SIGMA, int(rows / mean * 1.2) + 1000)
    counts = np.minimum(MIN_ACTIVITY + extra.astype(np.int64), MAX_ACTIVITY)
    users = int(np.searchsorted(np.cumsum(counts), rows)) + 1
    counts = counts[:users]
    counts[-1] -= counts.sum() - rows
    if counts[-1] < MIN_ACTIVITY and users > 1:
        missing = MIN_ACTIVITY - counts[-1]
        spare = np.cumsum(np.maximum(counts[:-1] - MIN_ACTIVITY, 0))
        moved = np.diff(np.minimum(spare, missing), prepend=0)
        counts[:-1] -= moved
        counts[-1] += moved.sum()
    return counts


def popularity_cdf(rng: np.random.Generator) -> np.ndarray:
    """[MOVIES] float64: cumulative share of the movies in the order of their ids; ranks fall on ids at random."""
    ranks, weights = np.log(np.array(POPULARITY, float)).T
    weight = np.exp(np.interp(np.log(np.arange(1, MOVIES + 1)), ranks, weights))
    cdf = np.cumsum(rng.permutation(weight))
    return cdf / cdf[-1]


def draw_movies(counts: np.ndarray, cdf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[events] int64: each user's movie indices, distinct and sorted, drawn one after the other by popularity."""
    few = np.where(counts < MANY, counts, 0)
    users = np.repeat(np.arange(len(counts)), few)
    kept = np.empty(0, np.int64)  # user * MOVIES + movie, sorted
    while len(users):
        drawn = np.sort(users * MOVIES + np.searchsorted(cdf, rng.random(len(users)), side="right"))
        place = np.searchsorted(kept, drawn)
        new = np.diff(drawn, prepend=-1) != 0
        if len(kept):
            new &= kept[np.minimum(place, len(kept) - 1)] != drawn
        kept = np.insert(kept, place[new], drawn[new])
        users = drawn[~new] // MOVIES
    weights = np.diff(cdf, prepend=0)
    for user in np.flatnonzero(counts >= MANY):
        # The n first of exponential clocks that run at rates `weights`: the same distribution without redrawing.
        clocks = rng.standard_exponential(MOVIES) / weights
        movies = np.sort(np.argpartition(clocks, counts[user])[: counts[user]])
        kept = np.insert(kept, np.searchsorted(kept, user * MOVIES), user * MOVIES + movies)
    return kept % MOVIES


def draw_times(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[events] int64 seconds: sessions of close events with ties, breaks between them; in random order per user."""
    events = int(counts.sum())
    users = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    gaps = rng.lognormal(np.log(GAP_MEDIAN), GAP_SIGMA, events).astype(np.int64)
    gaps[rng.random(events) < TIE_SHARE] = 0
    is_break = rng.random(events) < rng.beta(*BREAK_BETA, len(counts))[users]
    is_break[firsts] = False
    gaps[firsts] = 0
    gaps[is_break] = 0
    rest = np.zeros(events)
    rest[is_break] = 3600 + rng.lognormal(np.log(BREAK_MEDIAN), BREAK_SIGMA, int(is_break.sum()))
    starts = FIRST_TIME + (rng.random(len(counts)) * (LAST_TIME - FIRST_TIME)).astype(np.int64)
    active = np.add.reduceat(gaps, firsts)
    starts = np.minimum(starts, LAST_TIME - active - 1)
    resting = np.add.reduceat(rest, firsts)
    fit = np.minimum(1, (LAST_TIME - starts - active) / np.maximum(resting, 1))  # no event is after the end
    gaps[is_break] = (rest * fit[users])[is_break].astype(np.int64)
    total = np.cumsum(gaps)
    times = starts[users] + total - (total[firsts] - gaps[firsts])[users]
    order = np.argsort((users << 32) | rng.integers(0, 2**32, events))
    return times[order]


def generate(rows: int, seed: int, shuffle: bool = False) -> Iterator[pa.Table]:
    """Yields the log in tables of about ROWS_PER_CHUNK rows: userId, movieId int64, rating float64, timestamp int64.

    Needs memory for one chunk and 16 bytes per user. Each chunk has its own random stream.
    """
    rng = np.random.default_rng(seed)
    counts = activities(rows, rng)
    user_ids = rng.permutation(len(counts)) + 1
    cdf = popularity_cdf(rng)
    movie_ids = np.sort(rng.permutation(LARGEST_MOVIE_ID)[:MOVIES]) + 1
    stars = np.array(list(RATING_COUNTS))
    shares = np.array(list(RATING_COUNTS.values())) / sum(RATING_COUNTS.values())
    ends = np.cumsum(counts)
    marks = np.searchsorted(ends, np.arange(ROWS_PER_CHUNK, rows, ROWS_PER_CHUNK), side="right")
    bounds = np.unique(np.concatenate([[0], marks, [len(counts)]]))
    for chunk, (start, end) in enumerate(itertools.pairwise(bounds)):
        stream = np.random.default_rng([seed, chunk])
        part = counts[start:end]
        columns = [
            np.repeat(user_ids[start:end], part),
            movie_ids[draw_movies(part, cdf, stream)],
            stars[np.searchsorted(np.cumsum(shares)[:-1], stream.random(int(part.sum())), side="right")],
            draw_times(part, stream),
        ]
        if shuffle:
            order = stream.permutation(int(part.sum()))
            columns = [column[order] for column in columns]
        yield pa.table(dict(zip(NAMES, columns, strict=True)))


def write_csv(tables: Iterator[pa.Table], path: Path) -> None:
    """One file with a header, ratings as MovieLens writes them (`4.0`)."""
    texts = pa.array([f"{stars:.1f}" for stars in RATING_COUNTS])
    schema = pa.schema([(name, pa.string() if name == "rating" else pa.int64()) for name in NAMES])
    options = pa.csv.WriteOptions(quoting_style="none", quoting_header="none")
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.csv.CSVWriter(path, schema, write_options=options) as writer:
        for table in tables:
            index = (table["rating"].to_numpy() * 2).astype(np.int8) - 1
            writer.write_table(table.set_column(2, "rating", texts.take(pa.array(index))))


def write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    """A new directory of part-00000.parquet, part-00001.parquet, ..."""
    path.mkdir(parents=True)
    for number, table in enumerate(tables):
        pa.parquet.write_table(table, path / f"part-{number:05d}.parquet", compression="zstd", compression_level=1)


@click.command(context_settings={"show_default": True})
@click.option("--rows", type=click.IntRange(1), default=25_000_000)
@click.option("--seed", type=int, default=0)
@click.option("--format", "kind", type=click.Choice(["csv", "parquet"]), default="csv")
@click.option("--shuffle", is_flag=True, help="Shuffle the rows within chunks of about a million.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A CSV file, or a new Parquet directory.")
def main(rows: int, seed: int, kind: str, shuffle: bool, out: Path) -> None:
    """Writes a seeded rating log with MovieLens' marginals: userId,movieId,rating,timestamp."""
    if kind == "parquet" and out.exists():
        raise click.UsageError(f"{out} exists; Parquet goes to a new directory")
    write = write_csv if kind == "csv" else write_parquet
    write(generate(rows, seed, shuffle), out)


if __name__ == "__main__":
    main()
