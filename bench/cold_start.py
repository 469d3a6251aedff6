"""Recommends movies that nobody has rated yet, for bench/cold_start.md.

    python -m bench.cold_start --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small

A tenth of the movies with 5 ratings or more are hidden: all their ratings are taken out of the log, their titles and
genres stay in the catalogue. Trained by the defaults on what is left (leave-one-out, `--min-movie-ratings 0`, so that
every movie stays), each hidden rating is a case: what would have been recommended at its time from the user's other
ratings before it (at least 5; up to 5 cases of each user)? Recall@50 is the share of cases whose movie is among the
first 50: of all movies that the user has not rated, and of the hidden movies alone. What this costs known movies is
measured on their test cases: NDCG@10 and HR@50 (means of without and with the request time) beside the new ones,
relative to those of the same hybrid with new movies shut out. It is an upper bound, since no hidden movie is the target
of a test case. A movie that comes after the export, into the catalogue of a server, has the same vector, and ranks as
high as known movies did that were hidden for that (`jaxrec.training.new_items`): the row "if they come while serving".
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxrec
from bench.logs import logs_argument
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from jaxrec.config import PrepareConfig, TrainConfig
from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, UNKNOWN_GAP, USER
from jaxrec.data.split import Cases
from jaxrec.data.store import read_prepared, write_prepared
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.baselines import constant_scorer
from jaxrec.evaluation.bootstrap import bootstrap, ratio, resample
from jaxrec.evaluation.metrics import hit_rate, ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer
from jaxrec.files import read_json
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.rl.reward_tables import genre_directions
from jaxrec.runs.directory import HYBRID_FILE, load_supervised, open_run
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.new_items import shift_logits

LOGS = ("ml-100k", "ml-latest-small")  # of the page
SEEDS = 3
HIDDEN, CASES_PER_USER, MIN_HISTORY, TOP, BATCH = 0.1, 5, 5, 50, 64
SHUT_OUT = "hybrid, new movies shut out"
SERVING = "hybrid, if they come while serving"


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@publish_option
@logs_argument
def main(work: Path, seeds: int, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables of all that was asked for."""
    keep_freed_memory()
    lacking = less(logs=(logs, LOGS), seeds=(seeds, SEEDS))
    page = Page("cold_start", "Cold start", publish, work, lacking)
    results = {
        name: [measure(path, work / f"{name}-{seed}", seed) for seed in range(seeds)] for name, path in logs.items()
    }
    body = [
        paragraph(__doc__) + "\n",
        f"With the request time. Seeds 0 to {seeds - 1} hide other movies and train other models; the cases of all "
        "seeds together, with 95 % bootstrap intervals over the users, and the seeds' own figures in brackets.",
    ]
    for name, files in results.items():
        body += table(name, files)
    files = list(itertools.chain.from_iterable(results.values()))
    page.write(body, [*files, *(begun(file) for file in files)])


def begun(ranks: Path) -> Path:
    """The file that says where the run of some ranks was begun."""
    return ranks.with_name("begun.json")


def measure(ratings: Path, folder: Path, seed: int) -> Path:
    """The ranks of one seed, in FOLDER/ranks.npz."""
    done = folder / "ranks.npz"
    if done.is_file():
        return done
    begin(begun(done), folder / "run")
    movies = ratings.with_name("movies.csv")
    beside = movies if ratings.is_file() and movies.is_file() else None
    whole = prepare(ratings, beside, PrepareConfig(min_user_ratings=5, min_movie_ratings=5))
    rng = np.random.default_rng(seed)
    items = len(whole.catalog)
    hidden = np.zeros(items + 1, bool)
    hidden[1 + rng.choice(items, round(HIDDEN * items), replace=False)] = True
    data, hybrid = trained(whole, hidden, folder, seed)
    max_length = hybrid.lstm.config.max_length
    found = find_cases(whole, hidden, rng)
    batches = list(case_batches(whole, data, found, max_length))
    order = rng.random(items + 1).astype(np.float32) * 1e-4  # so that equal genres do not count against the rule
    candidates = data.catalog.ids.encode(whole.catalog.ids.decode(np.flatnonzero(hidden)))
    arrays = {
        "movies": items,
        "hidden": hidden.sum(),
        "users": np.searchsorted(whole.histories.offsets, [row for _, row in found], side="right"),
    }
    served = hybrid_scorer(while_serving(folder / "run", data), DecayedCounts.of(data))
    for way, scorer in {**ways(data, hybrid, order), SERVING: served}.items():
        everywhere, among = [], []
        for batch in batches:
            real = batch.target > 0
            scores = np.asarray(exclude_items(jnp.asarray(scorer(batch), jnp.float32), jnp.asarray(batch.exclude)))
            own = np.take_along_axis(scores, batch.target[:, None], axis=1)
            everywhere.append((scores >= own).sum(axis=1)[real])
            among.append((scores[:, candidates] >= own).sum(axis=1)[real])
        arrays[f"{way}|all"], arrays[f"{way}|hidden"] = np.concatenate(everywhere), np.concatenate(among)
    new = data.train_popularity() == 0
    test = data.split.test
    known = ~new[data.histories.items[test.rows]]
    cases = Cases(test.users[known], test.rows[known])
    scorer = hybrid_scorer(hybrid, DecayedCounts.of(data))
    shut_out: Scorer = lambda batch: jnp.where(new, NEVER, scorer(batch))  # noqa: E731
    arrays["known_users"] = data.users.decode(cases.users + 1)
    for way, of_known in (("hybrid", scorer), (SERVING, served), (SHUT_OUT, shut_out)):
        both = [rank_cases(of_known, data, cases, max_length, time).ranks for time in (False, True)]
        arrays[f"{way}|known"] = np.stack(both)
    write_arrays(done, arrays)
    return done


def ways(data: PreparedData, hybrid: Hybrid, order: np.ndarray) -> dict[str, Scorer]:
    """Ways to rank; `order` [items + 1] breaks ties of the simple ones."""
    directions = genre_directions(data.catalog.genre_matrix())

    def genre_rule(batch: CaseBatch) -> np.ndarray:
        taste = directions[batch.exclude].sum(axis=1)
        return taste @ directions.T / np.maximum(np.linalg.norm(taste, axis=1, keepdims=True), 1e-9) + order

    return {
        "popularity": constant_scorer(data.train_popularity() + order),
        "genre cosine to the history": genre_rule,
        "hybrid": hybrid_scorer(hybrid, DecayedCounts.of(data)),
    }


def table(name: str, files: list[Path]) -> list[str]:
    """The table of one log."""
    seeds = [dict(np.load(file)) for file in files]
    resamples, of_known = (resample(np.concatenate([seed[key] for seed in seeds])) for key in ("users", "known_users"))

    def recall(key: str) -> str:
        hits = [seed[key] <= TOP for seed in seeds]
        found = bootstrap(np.concatenate(hits), resamples)
        own = " ".join(f"{of_seed.mean():.3f}" for of_seed in hits)
        return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}) [{own}]"

    def relative(way: str, metric: str) -> str:
        of_seeds = []
        for seed in seeds:
            pair = [seed[f"{one}|known"] for one in (way, SHUT_OUT)]
            values = [ndcg(ranks, 10) if metric == "NDCG@10" else hit_rate(ranks, TOP) for ranks in pair]
            of_seeds.append(np.stack([value.mean(axis=0) for value in values], axis=1))
        found = bootstrap(np.concatenate(of_seeds), of_known, ratio)
        own = " ".join(f"{ratio(values.mean(axis=0)):.3f}" for values in of_seeds)
        return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}) [{own}]"

    cases, known = (", ".join(str(len(seed[key])) for seed in seeds) for key in ("users", "known_users"))
    lines = [
        f"\n## {name}\n",
        f"{int(seeds[0]['hidden'])} of {int(seeds[0]['movies'])} movies hidden; cases of them by seed: {cases}; of "
        f"known movies: {known}.\n",
        "| | recall@50 of all | recall@50 of the hidden | NDCG@10 of known movies | HR@50 of known movies |",
        "|---|---|---|---|---|",
    ]
    for key in seeds[0]:
        way, _, kind = key.partition("|")
        if kind == "all":
            is_hybrid = way in ("hybrid", SERVING)
            costs = " | ".join(relative(way, metric) if is_hybrid else "" for metric in ("NDCG@10", "HR@50"))
            lines.append(f"| {way} | {recall(key)} | {recall(f'{way}|hidden')} | {costs} |")
    return [*lines, f"| {SHUT_OUT} | 0.000 | 0.000 | 1.000 | 1.000 |"]


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


def while_serving(run: Path, data: PreparedData) -> Hybrid:
    """The hybrid whose new movies rank as high as those that come after the export."""
    hybrid, shifts = load_supervised(open_run(run), data), read_json(run / HYBRID_FILE, "train again")
    assert hybrid.new_items is not None
    of_new, of_hidden = (shifts[name]["shift"] for name in ("new_items", "hidden_items"))
    shift_logits(hybrid, np.asarray(hybrid.new_items[...]), of_hidden - of_new)
    return hybrid


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
