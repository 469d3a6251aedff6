"""Measures what diversity costs: likeness within answers against NDCG@10, for bench/diversity.md.

    python -m bench.diversity --work FOLDER ml-latest-small=PATH/ml-latest-small

A log is prepared and trained by the defaults of `jaxrec`, but for at most 8 epochs, and exported. The last event of
each user is the target. The history before it goes to the exported model as a server would send it, without request
time, and `rules.diversity` chooses 10 of the candidates. In each row scores are scaled by the first 200 candidates, as
in a server. Likeness is the mean cosine of the item vectors of each two items of an answer, which diversity lowers, and
the mean share of tags that they have in common (Jaccard), of which it knows nothing. Coverage is the share of all items
that are in some answer. "ms" is the median time to choose, without the model. Intervals are 95 % bootstrap intervals
over the users, and differences are paired by user. The log is old, so the trend of the export has decayed to nothing.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

import jaxrec
from bench.logs import logs_argument
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from jaxrec.config import TrainConfig
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import MISS, ndcg
from jaxrec.training.host_memory import keep_freed_memory
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.model.rules import CANDIDATES, Candidates, Rules
from serve.serving.ruled import choose

LOGS = ("ml-latest-small",)  # of the page
EPOCHS, K, AT_ONCE = 8, 10, 64
DIVERSITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
OTHER_CANDIDATES = (50, 1_000)
"""Beside those of a server, for the diversity of AMONG_OTHERS."""
AMONG_OTHERS = 0.3


@click.command(context_settings={"show_default": True})
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and figures stay here."
)
@publish_option
@logs_argument
def main(work: Path, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and measures what is not there yet, then writes the tables."""
    keep_freed_memory()
    page = Page("diversity", "Diversity", publish, work, less(logs=(logs, LOGS)))
    body, files = [paragraph(__doc__) + "\n"], []
    for name, path in logs.items():
        done = measure(path, work / name)
        files += [done, done.with_name("begun.json")]
        body += table(name, dict(np.load(done)))
    page.write(body, files)


def measure(ratings: Path, folder: Path) -> Path:
    """The figures of one log, in FOLDER/figures.npz."""
    done, data, model = folder / "figures.npz", folder / "data", folder / "model"
    if done.is_file():
        return done
    begin(folder / "begun.json", data, model)
    if not model.is_dir():
        movies = ratings / "movies.csv" if ratings.is_dir() else None
        log = ratings / "ratings.csv" if ratings.is_dir() else ratings
        prepared = jaxrec.prepare(log, movies, out=data)
        run = jaxrec.train(prepared, out=folder / "run", train_config=TrainConfig(max_epochs=EPOCHS))
        jaxrec.export(run, model)
    write_arrays(done, figures(read_prepared(data), Recommender(read_artifact(model), "cpu")))
    return done


def figures(data: PreparedData, model: Recommender) -> dict[str, np.ndarray]:
    """Of each case and way: the target's rank in the answer, how alike its items are, and the answer itself; the
    target's rank among the candidates; and how long it takes to choose, in milliseconds."""
    users, targets, rankings = np.asarray(data.split.test.users), [], []
    most = max(CANDIDATES, *OTHER_CANDIDATES)
    queries = []
    for user, row in zip(users.tolist(), np.asarray(data.split.test.rows).tolist(), strict=True):
        queries.append(Query(history(data, user, row), most))
        targets.append(model.catalog.index[raw_id(data, row)])
    for start in range(0, len(queries), AT_ONCE):
        answers = model.recommend(queries[start : start + AT_ONCE])
        rankings += [Candidates.of(answer.items, answer.scores) for answer in answers]
    found = {"users": users, "items": np.array(len(model.catalog))}
    found["place"] = np.array([rank(one.items, target) for one, target in zip(rankings, targets, strict=True)])
    for count, diversity in ways():
        answers, seconds = [], []
        for one in rankings:
            candidates = one.at(np.arange(min(count, len(one))))
            begun = time.perf_counter()
            answers.append(choose(candidates, K, Rules(diversity=diversity), model, model.live).items)
            seconds.append(time.perf_counter() - begun)
        way = name_of(count, diversity)
        found[f"{way}|ranks"] = np.array([rank(one, target) for one, target in zip(answers, targets, strict=True)])
        found[f"{way}|cosine"] = np.array([cosine(one, model) for one in answers])
        found[f"{way}|tags"] = np.array([shared_tags(one, model.catalog.genres) for one in answers])
        found[f"{way}|shown"] = np.unique(np.concatenate(answers))
        found[f"{way}|ms"] = 1e3 * np.array(seconds)
    return found


def ways() -> list[tuple[int, float]]:
    """Numbers of candidates, each with a diversity."""
    return [(CANDIDATES, one) for one in DIVERSITIES] + [(count, AMONG_OTHERS) for count in OTHER_CANDIDATES]


def name_of(count: int, diversity: float) -> str:
    """Of the arrays of a way."""
    return f"{count}|{diversity:g}"


def history(data: PreparedData, user: int, row: int) -> list[Event]:
    """A user's events before a row."""
    of_user = slice(int(data.histories.offsets[user]), row)
    items, times = data.histories.items[of_user], data.histories.times[of_user]
    ids = data.catalog.ids.decode(np.asarray(items)).astype(str).tolist()
    ratings = np.asarray(data.histories.ratings[of_user], np.float64).tolist()
    return [
        Event(item_id, None if np.isnan(rating) else rating, at)
        for item_id, rating, at in zip(ids, ratings, np.asarray(times).tolist(), strict=True)
    ]


def raw_id(data: PreparedData, row: int) -> str:
    """Of a row's item."""
    return str(data.catalog.ids.decode(np.asarray(data.histories.items[row : row + 1]))[0])


def rank(items: np.ndarray, target: int) -> int:
    """The target's place in an answer, from 1 on; MISS: it is not in it."""
    places = np.flatnonzero(items == target)
    return int(places[0]) + 1 if len(places) else int(MISS)


def cosine(items: np.ndarray, model: Recommender) -> float:
    """Mean cosine of each two items."""
    directions = model.directions(items, model.live)
    return float((directions @ directions.T)[np.triu_indices(len(items), 1)].mean())


def shared_tags(items: np.ndarray, tags: Sequence[Sequence[str]]) -> float:
    """Mean share of tags that each two items have in common, of those that one of them has; 0 without tags.

    >>> shared_tags(np.array([0, 1]), [("a", "b"), ("b",)])
    0.5
    """
    of_items = [set(tags[item]) for item in items.tolist()]
    shares = [
        len(one & other) / len(one | other) if one | other else 0.0
        for at, one in enumerate(of_items)
        for other in of_items[:at]
    ]
    return float(np.mean(shares))


def table(name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """The tables of one log."""
    resamples = resample(arrays["users"])
    plain = ndcg(arrays[f"{name_of(CANDIDATES, 0.0)}|ranks"], K)
    places = arrays["place"]
    within = ", ".join(f"{100 * np.mean(places <= count):.0f} % ({count})" for count in (50, 200, 1_000))
    lines = [
        f"\n## {name}\n",
        f"{len(places)} users, {int(arrays['items'])} items. Targets that are among the first candidates: {within}.\n",
        "| candidates | diversity | NDCG@10 | less without | cosine | tags in common | coverage | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, diversity in ways():
        way = name_of(count, diversity)
        own = ndcg(arrays[f"{way}|ranks"], K)
        shown = len(arrays[f"{way}|shown"]) / int(arrays["items"])
        cells = [f"{count}", f"{diversity:g}"]
        for values, form in ((own, ".4f"), (own - plain, "+.4f"), (arrays[f"{way}|cosine"], ".3f")):
            estimate = bootstrap(values, resamples)
            cells.append(f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})")
        cells += [f"{arrays[f'{way}|tags'].mean():.3f}", f"{shown:.3f}", f"{np.median(arrays[f'{way}|ms']):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
