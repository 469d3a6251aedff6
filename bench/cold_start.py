"""Recommends movies that nobody has rated yet, for bench/cold_start.md.

    python -m bench.cold_start --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small

A tenth of the movies with 5 ratings or more are hidden: all their ratings are taken out of the log, their titles and
genres stay in the catalogue. Trained by the defaults on what is left (leave-one-out, `--min-movie-ratings 0`, so that
every movie stays), each hidden rating is a case: what would have been recommended at its time from the user's other
ratings before it (at least 5; up to 5 cases of each user)? Recall@50 is the share of cases whose movie is among the
first 50: of all movies that the user has not rated, and of the hidden movies alone.
"""

from collections.abc import Iterator
from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxrec
from bench.publish import Page, begin, less, publish_option, write_figures
from jaxrec.config import PrepareConfig, TrainConfig
from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, UNKNOWN_GAP, USER
from jaxrec.data.store import read_prepared, write_prepared
from jaxrec.evaluation.baselines import constant_scorer
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import exclude_items
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer, sequence_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.reward_tables import genre_directions
from jaxrec.runs.directory import load_supervised, open_run
from jaxrec.training.host_memory import keep_freed_memory

LOGS = ("ml-100k",)  # of the page
HIDDEN, CASES_PER_USER, MIN_HISTORY, TOP, BATCH = 0.1, 5, 5, 50, 64


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data and runs stay here.")
@click.option("--seed", default=0, show_default=True)
@publish_option
@click.argument("logs", nargs=-1, required=True, metavar="NAME=RATINGS...")
def main(work: Path, seed: int, publish: bool, logs: tuple[str, ...]) -> None:
    """Trains, ranks and writes the tables."""
    keep_freed_memory()
    ratings = {name: Path(path) for name, _, path in (log.partition("=") for log in logs)}
    page = Page("cold_start", "Cold start", publish, work, less(logs=(ratings, LOGS)))
    body = [(__doc__ or "").split("\n\n")[2].strip().replace("\n", " ")]
    results = []
    for name, path in ratings.items():
        folder = work / f"{name}-{seed}"
        results += [begin(folder / "begun.json"), folder / "table.json"]
        lines = table(name, path, folder, seed)
        write_figures(results[-1], lines)
        body += lines
    page.write(body, results)


def table(name: str, ratings: Path, folder: Path, seed: int) -> list[str]:
    """Recall@50 of each way to rank, with 95 % bootstrap intervals over the users."""
    movies = ratings.with_name("movies.csv")
    beside = movies if ratings.is_file() and movies.is_file() else None
    whole = prepare(ratings, beside, PrepareConfig(min_user_ratings=5, min_movie_ratings=5))
    rng = np.random.default_rng(seed)
    items = len(whole.catalog)
    hidden = np.zeros(items + 1, bool)
    hidden[1 + rng.choice(items, round(HIDDEN * items), replace=False)] = True
    data, hybrid = trained(whole, hidden, folder, seed)
    found = find_cases(whole, hidden, rng)
    batches = list(case_batches(whole, data, found, hybrid.lstm.config.max_length))
    resamples = resample(np.searchsorted(whole.histories.offsets, [row for _, row in found], side="right"))
    directions = genre_directions(data.catalog.genre_matrix())
    order = rng.random(items + 1).astype(np.float32) * 1e-4  # so that equal genres do not count against the rule

    def genre_rule(batch: CaseBatch) -> np.ndarray:
        taste = directions[batch.exclude].sum(axis=1)
        return taste @ directions.T / np.maximum(np.linalg.norm(taste, axis=1, keepdims=True), 1e-9) + order

    ways: dict[str, Scorer] = {
        "popularity": constant_scorer(data.train_popularity() + order),
        "genre cosine to the history": genre_rule,
        "TimeRatingAwareLSTM": sequence_scorer(hybrid.lstm),
        "TimeRatingAwareContentModel": sequence_scorer(hybrid.content),
        "hybrid": hybrid_scorer(hybrid),
    }
    lines = [
        f"\n## {name}\n",
        f"{hidden.sum()} of {items} movies hidden, {len(found)} cases, seed {seed}. With the request time.\n",
        "| | recall@50 of all | recall@50 of the hidden |",
        "|---|---|---|",
    ]
    candidates = data.catalog.ids.encode(whole.catalog.ids.decode(np.flatnonzero(hidden)))
    for way, scorer in ways.items():
        everywhere, among = [], []
        for batch in batches:
            real = batch.target > 0
            scores = np.asarray(exclude_items(jnp.asarray(scorer(batch), jnp.float32), jnp.asarray(batch.exclude)))
            own = np.take_along_axis(scores, batch.target[:, None], axis=1)
            everywhere.append(((scores >= own).sum(axis=1) <= TOP)[real])
            among.append(((scores[:, candidates] >= own).sum(axis=1) <= TOP)[real])
        cells = [bootstrap(np.concatenate(hits), resamples) for hits in (everywhere, among)]
        lines.append(f"| {way} | " + " | ".join(f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})" for e in cells) + " |")
    return lines


def trained(whole: PreparedData, hidden: np.ndarray, folder: Path, seed: int) -> tuple[PreparedData, Hybrid]:
    """The data without the hidden movies' ratings, and the models trained on it; both are kept in `folder`."""
    if not (folder / "data").is_dir():
        histories = whole.histories
        kept = ~hidden[histories.items]
        interactions = pd.DataFrame(
            {
                USER: whole.users.decode(histories.users() + 1)[kept],
                ITEM: whole.catalog.ids.decode(histories.items)[kept],
                RATING: histories.ratings[kept],
                TIME: histories.times[kept],
            }
        )
        config = PrepareConfig(min_user_ratings=5, min_movie_ratings=0, rating_scale=whole.config.rating_scale)
        write_prepared(prepare(interactions, whole.catalog.to_frame(), config), folder / "data")
    out = folder / "run"
    if not (out / "hybrid.json").is_file():
        jaxrec.train(folder / "data", out, train_config=TrainConfig(seed=seed), resume=(out / "run.json").is_file())
    data = read_prepared(folder / "data")
    return data, load_supervised(open_run(out), data)


def find_cases(whole: PreparedData, hidden: np.ndarray, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
    """(rows of the history without hidden items, row of the target) of up to CASES_PER_USER cases of each user."""
    histories = whole.histories
    found: list[tuple[np.ndarray, int]] = []
    for user in range(histories.user_count):
        rows = np.arange(histories.offsets[user], histories.offsets[user + 1])
        is_hidden = hidden[histories.items[rows]]
        seen = np.cumsum(~is_hidden) - ~is_hidden
        possible = np.flatnonzero(is_hidden & (seen >= MIN_HISTORY))
        for place in rng.permutation(possible)[:CASES_PER_USER]:
            found.append((rows[:place][~is_hidden[:place]], int(rows[place])))
    return found


def case_batches(
    whole: PreparedData, data: PreparedData, found: list[tuple[np.ndarray, int]], max_length: int
) -> Iterator[CaseBatch]:
    """Batches of BATCH cases, indices as in `data`; the last batch is filled up with cases whose target is 0."""
    histories, unit = whole.histories, whole.unit_ratings()
    index = np.concatenate([[0], data.catalog.ids.encode(whole.catalog.ids.raw_ids)])
    width, none = max(len(history) for history, _ in found), np.zeros(BATCH, np.int64)
    for start in range(0, len(found), BATCH):
        batch = found[start : start + BATCH]
        item, rating = np.zeros((BATCH, max_length), np.int32), np.full((BATCH, max_length), -1, np.float32)
        gap = np.full((BATCH, max_length), UNKNOWN_GAP, np.float32)
        length, target = np.ones(BATCH, np.int32), np.zeros(BATCH, np.int32)
        exclude, request_gap = np.zeros((BATCH, width), np.int32), np.full(BATCH, UNKNOWN_GAP, np.float32)
        for place, (history, row) in enumerate(batch):
            rows = history[-max_length:]
            length[place], target[place] = len(rows), index[histories.items[row]]
            item[place, : len(rows)], rating[place, : len(rows)] = index[histories.items[rows]], unit[rows]
            gap[place, 1 : len(rows)] = np.diff(histories.times[rows])
            request_gap[place] = histories.times[row] - histories.times[rows[-1]]
            exclude[place, : len(history)] = index[histories.items[history]]
        events, times = Events(item, rating, gap, length), np.zeros_like(exclude)
        yield CaseBatch(events, request_gap, target, exclude, none, exclude, times)


if __name__ == "__main__":
    main()
