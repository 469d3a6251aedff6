"""Measures what users without a history are best shown, for bench/fallback.md.

    python -m bench.fallback movietweetings-50k=PATH/ratings.dat ml-100k=PATH/u.data \\
        ml-latest-small=PATH/ml-latest-small

Each log is filtered to users and items with 5 events or more. Its first 80 %, by time, are the training data. The cases
are the first events of the users who begin after that: what would a server have answered a moment before, to a user of
whom it knows nothing? Popularity ranks by the events of the training data. Recent popularity ranks by the events of all
users before the case, each with a weight that halves in so many days, and by so many more events (the prior), which are
shared among the items as those of the training data are. A server has the half-life and the prior that are marked. All
events count, whatever their rating is, as they do in a server. All items are ranked, and ties count against the target.
Intervals are 95 % bootstrap intervals over the users; differences from popularity are paired by user.
"""

from pathlib import Path

import click
import numpy as np

from bench.logs import logs_argument
from bench.publish import Page, less, paragraph, publish_option
from bench.quality import RATING_SCALES
from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import ndcg
from serve.model.popular import PRIOR_EVENTS, WEEK
from serve.model.trend import COUNTED_S

LOGS = ("ml-100k", "ml-latest-small", "movietweetings-50k")  # of the page
DAY_S, TRAINING, K = 86_400, 0.8, 10
DAYS, PRIORS = (1, 3, 7, 30), (100, 1_000, 10_000)
Way = tuple[int, int]
POPULARITY: Way = (0, 0)
HEAD = ("| half-life, days | prior, events | NDCG@10 | more than popularity |", "|---|---|---|---|")


@click.command()
@publish_option
@logs_argument
def main(publish: bool, logs: dict[str, Path]) -> None:
    """Measures and prints the page."""
    page = Page("fallback", "Users without a history", publish, None, less(logs=(logs, LOGS)))
    body = [paragraph(__doc__) + "\n"]
    for name, path in logs.items():
        body += table(name, ranks(prepare(path, config=PrepareConfig(5, 5, rating_scale=RATING_SCALES.get(name)))))
    page.write(body)


def ranks(data: PreparedData) -> dict[Way, np.ndarray]:
    """Of each way (days of the half-life, prior) `[cases]`: the target's rank among all items."""
    times, items = np.asarray(data.histories.times, np.float64), np.asarray(data.histories.items)
    is_first = np.zeros(len(times), np.bool_)
    is_first[np.asarray(data.histories.offsets)[:-1]] = True
    order = np.argsort(times, kind="stable")
    cut = int(TRAINING * len(order))
    training = np.bincount(items[order[:cut]], minlength=len(data.catalog) + 1).astype(np.float64)
    counts, last = np.zeros((len(DAYS), len(training))), times[order[0]]
    found: dict[Way, list[int]] = {POPULARITY: []} | {(days, prior): [] for days in DAYS for prior in PRIORS}
    # Events of the same second are no news to each other.
    for second in np.split(order, np.flatnonzero(np.diff(times[order])) + 1):
        now = times[second[0]]
        counts *= 0.5 ** ((now - last) / (DAY_S * np.array(DAYS, np.float64)))[:, None]
        last = now
        for row in second[(is_first[second]) & (now > times[order[cut - 1]])].tolist():
            found[POPULARITY].append(_rank(training, items[row]))
            for at, days in enumerate(DAYS):
                for prior in PRIORS:
                    scores = counts[at] + prior * training / training.sum()
                    found[days, prior].append(_rank(scores, items[row]))
        np.add.at(counts, (slice(None), items[second]), 1.0)
    return {way: np.array(of_way, np.int64) for way, of_way in found.items()}


def _rank(scores: np.ndarray, target: int) -> int:
    """From 1 on; padding, item 0, has no rank."""
    return int(np.count_nonzero(scores[1:] >= scores[target]))


def table(name: str, found: dict[Way, np.ndarray]) -> list[str]:
    """The table of one log."""
    cases = len(found[POPULARITY])
    resamples = resample(np.arange(cases))
    lines = [f"\n## {name}\n", f"{cases} users.\n", *HEAD]
    popularity = ndcg(found[POPULARITY], K)
    for (days, prior), of_way in found.items():
        own_ndcg = ndcg(of_way, K)
        figure = _interval(bootstrap(own_ndcg, resamples), ".4f")
        more = _interval(bootstrap(own_ndcg - popularity, resamples), "+.4f") if days else ""
        own = (days * DAY_S, prior) == (COUNTED_S[WEEK], PRIOR_EVENTS)
        cells = [f"{days}", f"{prior:,}"] if days else ["popularity", ""]
        lines.append(f"| {' | '.join(cells)} | {f'**{figure}**' if own else figure} | {more} |")
    return lines


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.mean:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


if __name__ == "__main__":
    main()
