"""Measures ranking quality with the defaults of `jaxrec train`; writes bench/quality.md.

    python bench/quality.py --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small

Each log is filtered to users and movies with 5 ratings or more and split: leave-one-out over the whole log, as the
literature does, and by time (the last tenth; up to 10 cases of each user). Each seed trains a run, and each test case
is ranked among the whole catalogue without its history. Figures are means over the seeds, with 95 % bootstrap intervals
over the users. What is finished stays in the work folder: a call that was interrupted goes on where it stopped.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import jax
import numpy as np

import jaxrec
from jaxrec.config import PrepareConfig, SplitKind, Ties, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.report import write_report
from jaxrec.data.split import Cases
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.bootstrap import Resamples, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, hit_rate, ndcg, reciprocal_rank
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer, sequence_scorer
from jaxrec.files import new_file, write_text
from jaxrec.models.hybrid import Hybrid
from jaxrec.runs.directory import load_supervised, open_run
from jaxrec.training.host_memory import keep_freed_memory

OUT = Path(__file__).with_name("quality.md")
CASES_PER_USER = 10
SPLITS = {"leave-one-out": SplitKind.LEAVE_ONE_OUT, "temporal": SplitKind.TEMPORAL}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--splits", default="leave-one-out,temporal", show_default=True)
@click.option("--ties", type=click.Choice([t.value for t in Ties]), default=Ties.FILE.value, show_default=True)
@click.argument("logs", nargs=-1, required=True, metavar="NAME=RATINGS...")
def main(work: Path, seeds: int, splits: str, ties: str, logs: tuple[str, ...]) -> None:
    """Trains and ranks what is not there yet, then writes the tables of all that is."""
    keep_freed_memory()
    for split in splits.split(","):
        for log in logs:
            name, _, ratings = log.partition("=")
            for seed in range(seeds):
                measure(work, name, Path(ratings), split, Ties(ties), seed)
                write_tables(work)


def measure(work: Path, name: str, ratings: Path, split: str, ties: Ties, seed: int) -> None:
    """Leaves the ranks of one seed's models in WORK/NAME-SPLIT-TIES/ranks-SEED.npz."""
    folder = work / f"{name}-{split}-{ties.value}"
    done = folder / f"ranks-{seed}.npz"
    if done.is_file():
        return
    if not (folder / "data").is_dir():
        movies = ratings.with_name("movies.csv")
        config = PrepareConfig(min_user_ratings=5, min_movie_ratings=5, split=SPLITS[split], ties=ties)
        beside = movies if ratings.is_file() and movies.is_file() else None
        prepare(ratings, beside, config, out=folder / "data", add_files=write_report)
    data, out = read_prepared(folder / "data"), folder / f"run-{seed}"
    jaxrec.train(folder / "data", out, train_config=TrainConfig(seed=seed), resume=(out / "run.json").is_file())
    hybrid = load_supervised(open_run(out), data)
    cases = few_per_user(data.split.test) if split == "temporal" else data.split.test
    arrays: dict[str, np.ndarray] = {"popularity": data.train_popularity(), "users": cases.users}
    for model, scorer in scorers(hybrid).items():
        for time in (False, True):
            ranked = rank_cases(scorer, data, cases, hybrid.lstm.config.max_length, time)
            arrays[f"{model}|{time}|ranks"], arrays[f"{model}|{time}|top"] = ranked.ranks, ranked.top
    with new_file(done) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    summary = {"commit": commit(), "cases": len(cases), "items": len(data.catalog), "users": data.histories.user_count}
    write_text(folder / "summary.json", json.dumps(summary))


def few_per_user(cases: Cases) -> Cases:
    """Up to CASES_PER_USER of each user's cases, drawn by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(cases))
    by_user = order[np.argsort(cases.users[order], kind="stable")]
    users = cases.users[by_user]
    kept = np.sort(by_user[np.arange(len(users)) - np.searchsorted(users, users) < CASES_PER_USER])
    return Cases(cases.users[kept], cases.rows[kept])


def scorers(hybrid: Hybrid) -> dict[str, Scorer]:
    """The parts of the mix, and the mix."""
    return {
        "co-occurrence": cooccurrence_scorer(hybrid.cooccurrence),
        "TimeRatingAwareLSTM": sequence_scorer(hybrid.lstm),
        "TimeRatingAwareContentModel": sequence_scorer(hybrid.content),
        "hybrid": hybrid_scorer(hybrid),
    }


def write_tables(work: Path) -> None:
    """bench/quality.md from all ranks in the work folder."""
    parts = [
        "# Ranking quality\n",
        "`python bench/quality.py --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small`, with",
        "`--ties random` for equal times shuffled (in training and test) and `--seeds` as each table says,",
        f"on {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"jax {jax.__version__}.\n",
        __doc__.split("\n\n")[2].strip().replace("\n", " ") + "\n",
        "Ties count against the target. `time`: whether the request time is told. NDCG and HR at 10 with their 95 % "
        "intervals; the seeds' own NDCG@10 in brackets.\n",
    ]
    for folder in sorted(work.iterdir()):
        files = sorted(folder.glob("ranks-*.npz"))
        if files:
            parts += table(folder, files)
    write_text(OUT, "\n".join(parts) + "\n")


def table(folder: Path, files: list[Path]) -> list[str]:
    """The table of one data set and split."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [
        f"\n## {folder.name}\n",
        f"{summary['cases']} cases, {summary['users']} users, {summary['items']} movies, {len(files)} seed(s), trained "
        f"at {summary['commit']}.\n",
        "| | time | NDCG@10 | HR@10 | MRR | HR@50 | coverage@10 | mean popularity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seeds = [dict(np.load(file)) for file in files]
    resamples = resample(seeds[0]["users"])
    for key in seeds[0]:
        if not key.endswith("|ranks"):
            continue
        model, time, _ = key.split("|")
        if model == "co-occurrence" and time == "True":
            continue  # it knows no request time
        ranks = np.stack([seed[key] for seed in seeds])
        tops = [seed[f"{model}|{time}|top"] for seed in seeds]
        popularity = seeds[0]["popularity"]
        own = ", ".join(f"{ndcg(one, 10).mean():.4f}" for one in ranks)
        cells = [
            model,
            "yes" if time == "True" else "no",
            f"{interval(ranks, resamples, lambda r: ndcg(r, 10))} [{own}]",
            interval(ranks, resamples, lambda r: hit_rate(r, 10)),
            f"{reciprocal_rank(ranks).mean():.4f}",
            f"{hit_rate(ranks, 50).mean():.4f}",
            f"{np.mean([coverage(top, len(popularity) - 1) for top in tops]):.3f}",
            f"{np.mean([popularity[top[top > 0]].mean() for top in tops]):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def interval(ranks: np.ndarray, resamples: Resamples, figure: Callable[[np.ndarray], np.ndarray]) -> str:
    """ranks [seeds, cases]: the mean over both, and its interval over the users of the cases."""
    estimate = bootstrap(figure(ranks).mean(axis=0), resamples)
    return f"**{estimate.mean:.4f}** ({estimate.low:.4f} to {estimate.high:.4f})"


def without_folder(argument: str) -> str:
    """NAME=RATINGS with PATH for the folder that is this machine's own."""
    name, equals, path = argument.partition("=")
    if equals:
        return f"{name}=PATH/{Path(path).name}"
    return "FOLDER" if "/" in argument else argument


def commit() -> str:
    """Of the checkout, with a mark where more than the benches' own pages was changed."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=OUT.parent, check=True, text=True, capture_output=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*.md")
    return git("describe", "--always") + ("-dirty" if changed else "")


if __name__ == "__main__":
    main()
