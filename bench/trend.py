"""Measures what the trend is worth with the defaults of `jaxrec train`, for bench/trend.md.

    python -m bench.trend --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small \\
        movietweetings-50k=PATH/ratings.dat

Each log is filtered to users and movies with 5 ratings or more and split leave-one-out over the whole log. Each seed
trains a run, and each test case is ranked among the whole catalogue without its history. The trend counts the events of
all users before the case, with and without the request time, and so does recent popularity, with the half-life of the
best validation NDCG@10. Figures are means over the seeds, with 95 % bootstrap intervals over the users; differences and
ratios are paired by case. What is finished stays in the work folder: a call that was interrupted resumes where it
stopped.
"""

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from bench.logs import is_sequences, logs_argument
from bench.publish import Page, less, paragraph, publish_option
from bench.quality import begun, measure
from jaxrec.evaluation.bootstrap import Resamples, bootstrap, ratio, resample
from jaxrec.evaluation.metrics import hit_rate, ndcg
from jaxrec.training.host_memory import keep_freed_memory

LOGS, SEEDS = ("ml-100k", "ml-latest-small", "movietweetings-50k"), 3  # of the page
ROWS = ("recent popularity", "hybrid without its trend", "hybrid")


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@publish_option
@logs_argument
def main(work: Path, seeds: int, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables."""
    keep_freed_memory()
    if without := [name for name, path in logs.items() if is_sequences(path)]:
        raise click.BadParameter(f"{', '.join(without)}: a log without times has no trend")
    page = Page("trend", "The trend", publish, work, less(logs=(logs, LOGS), seeds=(seeds, SEEDS)))
    body = [
        paragraph(__doc__) + "\n",
        f"Seeds 0 to {seeds - 1}. Ties count against the target.\n",
    ]
    files = []
    for name, path in logs.items():
        of_seeds = [measure(work, name, path, seed) for seed in range(seeds)]
        files += of_seeds
        body += table(name, of_seeds)
    page.write(body, [*files, *map(begun, files)])


def table(name: str, files: list[Path]) -> list[str]:
    """The table of one log."""
    seeds = [dict(np.load(file)) for file in files]
    users, popularity = seeds[0]["users"], seeds[0]["popularity"]
    days = sorted({float(seed["half_life_s"]) / 86_400 for seed in seeds})
    lines = [
        f"\n## {name}\n",
        f"{len(users)} cases, {len(popularity) - 1} movies, data of SHA-256 {str(seeds[0]['data'])[:8]}. Recent "
        f"popularity has a half-life of {', '.join(f'{one:g}' for one in days)} days.\n",
        "| | time | NDCG@10 | HR@10 | NDCG@10 over recent popularity | less the hybrid without its trend |",
        "|---|---|---|---|---|---|",
    ]
    resamples = resample(users)
    of_recent = figures(seeds, "recent popularity", False)
    for model in ROWS:
        for time in (False, True) if model != "recent popularity" else (False,):
            own = figures(seeds, model, time)
            cells = [model, "with" if time else "without", interval(own, resamples)]
            cells.append(interval(figures(seeds, model, time, hit_rate), resamples))
            over = bootstrap(np.stack([own, of_recent], axis=1), resamples, ratio)
            cells.append(f"{over.mean:.2f} ({over.low:.2f} to {over.high:.2f})")
            more = own - figures(seeds, "hybrid without its trend", time)
            cells.append(interval(more, resamples, "+.4f") if model == "hybrid" else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def figures(
    seeds: list[dict[str, np.ndarray]], model: str, time: bool, figure: Callable[[np.ndarray, int], np.ndarray] = ndcg
) -> np.ndarray:
    """[cases], the means over the seeds."""
    return np.mean([figure(seed[f"{model}|{time}|ranks"], 10) for seed in seeds], axis=0)


def interval(values: np.ndarray, resamples: Resamples, sign: str = ".4f") -> str:
    """The mean of values [cases], and its interval over the users of the cases."""
    estimate = bootstrap(values, resamples)
    return f"{estimate.mean:{sign}} ({estimate.low:{sign}} to {estimate.high:{sign}})"


if __name__ == "__main__":
    main()
