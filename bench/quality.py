"""Measures ranking quality with the defaults of `jaxrec train`, for bench/quality.md.

    python -m bench.quality --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small \\
        movietweetings-50k=PATH/ratings.dat beauty=PATH/beauty

Each log is filtered to users and movies with 5 ratings or more and split: leave-one-out over the whole log, as the
literature does, and by time (the last tenth; up to 10 cases of each user), with equal times in the order of the file
and shuffled (in training and test). beauty has the order of events only (`bench.logs`): leave-one-out, in this order,
and no item is recommended again. Each seed trains a run and its policy (`jaxrec train`, `jaxrec rl logged`), and each
test case is ranked among the whole catalogue without its history; `stacked` is the policy's control, which only
imitates. The two models alone leave items without training events out, if the run has content heads. The trend counts
the events of all users before the case, with and without the request time, and so does recent popularity, with the
half-life of the best validation NDCG@10. Figures are means over the seeds, with 95 % bootstrap intervals over the
users. What is finished stays in the work folder: a call that was interrupted resumes where it stopped;
`bench.rl_logged`, `bench.public`, `bench.mix` and `bench.trend` take theirs from the same folder.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import click
import numpy as np

import jaxrec
from bench.logs import is_sequences, logs_argument, read_sequences, require_source
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from jaxrec.config import PrepareConfig, RatingScale, SeenItems, SplitKind, Ties, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.report import write_report
from jaxrec.data.split import Cases
from jaxrec.data.store import read_prepared
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.evaluation.baselines import best_half_life, cooccurrence_scorer, recent_popularity_scorer
from jaxrec.evaluation.bootstrap import Resamples, bootstrap, resample
from jaxrec.evaluation.metrics import coverage, hit_rate, ndcg, reciprocal_rank
from jaxrec.evaluation.ranking import rank_together
from jaxrec.evaluation.scorers import Scorer, Shared, hybrid_scorer, part_scorers
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.reward_tables import fit_reward_tables, rating_or_mean
from jaxrec.runs.directory import RERANKER_OUTCOME_FILE, RERANKER_PARTIAL_FOLDER, load_supervised, open_run
from jaxrec.runs.evaluate import policies
from jaxrec.training.host_memory import keep_freed_memory

CASES_PER_USER = 10
LOGS, SEEDS = ("ml-100k", "ml-latest-small", "movietweetings-50k", "beauty"), 5  # of the page
RATING_SCALES = {"movietweetings-50k": RatingScale(0, 10)}  # a few of its ratings are 0
MOVIES = ("movies.csv", "movies.dat")  # beside a file of ratings
SPLITS = {"leave-one-out": SplitKind.LEAVE_ONE_OUT, "temporal": SplitKind.TEMPORAL}
TIES = [ties.value for ties in Ties]


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@click.option("--splits", default=",".join(SPLITS))
@click.option("--ties", default=",".join(TIES), help="Order of equal times.")
@publish_option
@logs_argument
def main(work: Path, seeds: int, splits: str, ties: str, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables of all that was asked for."""
    keep_freed_memory()
    lacking = less(
        logs=(logs, LOGS), splits=(splits.split(","), SPLITS), ties=(ties.split(","), TIES), seeds=(seeds, SEEDS)
    )
    page = Page("quality", "Ranking quality", publish, work, lacking)
    results = {
        folder_of(work, name, split, tie).name: [
            measure(work, name, logs[name], seed, split, tie) for seed in range(seeds)
        ]
        for name, split, tie in settings(logs, splits.split(","), ties.split(","))
    }
    body = [
        paragraph(__doc__) + "\n",
        f"Seeds 0 to {seeds - 1}. Ties count against the target. `time`: whether the request time is given. NDCG and "
        "HR at 10 with their 95 % intervals; the seeds' own NDCG@10 in brackets.\n",
    ]
    for title, of_seeds in results.items():
        body += table(title, of_seeds)
    files = list(itertools.chain.from_iterable(results.values()))
    page.write(body, [*files, *(begun(file) for file in files)])


def measure(
    work: Path, name: str, ratings: Path, seed: int, split: str = "leave-one-out", ties: Ties = Ties.FILE
) -> Path:
    """The ranks of one seed's models, in WORK/NAME-SPLIT-TIES/ranks-SEED.npz."""
    folder = folder_of(work, name, split, ties)
    done = folder / f"ranks-{seed}.npz"
    if done.is_file():
        return done
    data, out = prepared(folder / "data", name, ratings, split, ties), folder / f"run-{seed}"
    begin(begun(done), out)
    # The literature leaves the history of such a file out of the ranking, also where items come again.
    config = TrainConfig(seed=seed, seen=SeenItems.EXCLUDE if is_sequences(ratings) else SeenItems.AUTO)
    jaxrec.train(folder / "data", out, train_config=config, resume=(out / "run.json").is_file())
    run = open_run(out)
    interrupted = (out / RERANKER_PARTIAL_FOLDER).is_dir()
    if interrupted or not (out / RERANKER_OUTCOME_FILE).is_file():
        jaxrec.fine_tune(run, LoggedConfig(seed=seed), resume=interrupted)
    hybrid = load_supervised(run, data, reranker=False)
    cases = few_per_user(data.split.test) if split == "temporal" else data.split.test
    arrays = {"popularity": data.train_popularity(), "users": cases.users, "data": data.digest}
    item_ratings = np.asarray(fit_reward_tables(data).item_ratings)
    arrays["rating"] = rating_or_mean(data.unit_ratings()[cases.rows], data.histories.items[cases.rows], item_ratings)
    counts = DecayedCounts.of(data)
    half_life = best_half_life(data, counts, hybrid.lstm.config.max_length, True, data.split.validation)
    arrays["half_life_s"] = HALF_LIVES_S[half_life]
    shared = Shared()
    recent = {"recent popularity": recent_popularity_scorer(data, counts, half_life, shared)}
    learned = {name: hybrid_scorer(policy, counts, shared) for name, policy in policies(run, hybrid)[0].items()}
    every = recent | scorers(hybrid, counts, shared) | learned
    times = (False,) if is_sequences(ratings) else (False, True)
    asked = {f"{model}|{time}": (scorer, time) for model, scorer in every.items() for time in times}
    for key, ranked in rank_together(asked, data, cases, hybrid.lstm.config.max_length).items():
        arrays[f"{key}|ranks"], arrays[f"{key}|top"] = ranked.ranks, ranked.top
    write_arrays(done, arrays)
    return done


def folder_of(work: Path, name: str, split: str = "leave-one-out", ties: Ties = Ties.FILE) -> Path:
    """The folder of a setting's data and runs. The defaults are the only setting of a log without times."""
    return work / f"{name}-{split}-{ties.value}"


def settings(logs: Mapping[str, Path], splits: Iterable[str], ties: Iterable[str]) -> list[tuple[str, str, Ties]]:
    """Log, split and order of equal times, as far as the log has times. Raises click.BadParameter if none is left."""
    every = itertools.product(logs, splits, map(Ties, ties))
    found = [one for one in every if not is_sequences(logs[one[0]]) or one[1:] == ("leave-one-out", Ties.FILE)]
    for log in logs:
        if all(name != log for name, _, _ in found):
            raise click.BadParameter(f"{log} has no times: it needs the split leave-one-out with ties in file order")
    return found


def prepared(out: Path, name: str, ratings: Path, split: str = "leave-one-out", ties: Ties = Ties.FILE) -> PreparedData:
    """The data in OUT, prepared if they are not there yet; OUT/../source.json says of which log.

    Raises click.ClickException where they are of another one.
    """
    require_source(out.with_name("source.json"), ratings, out)
    if not out.is_dir():
        movies = [path for path in map(ratings.with_name, MOVIES) if ratings.is_file() and path.is_file()]
        log = read_sequences(ratings) if is_sequences(ratings) else (ratings, movies[0] if movies else None)
        config = PrepareConfig(5, 5, split=SPLITS[split], ties=ties, rating_scale=RATING_SCALES.get(name))
        prepare(*log, config, out=out, add_files=write_report)
    return read_prepared(out)


def begun(ranks: Path) -> Path:
    """The file that says where the run of some ranks was begun."""
    return ranks.with_suffix(".json")


def few_per_user(cases: Cases) -> Cases:
    """Up to CASES_PER_USER of each user's cases, drawn by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(cases))
    by_user = order[np.argsort(cases.users[order], kind="stable")]
    users = cases.users[by_user]
    kept = np.sort(by_user[np.arange(len(users)) - np.searchsorted(users, users) < CASES_PER_USER])
    return Cases(cases.users[kept], cases.rows[kept])


def scorers(hybrid: Hybrid, counts: DecayedCounts, shared: Shared) -> dict[str, Scorer]:
    """The parts of the mix, the mix without its trend, and the mix."""
    return {
        "co-occurrence": cooccurrence_scorer(hybrid.cooccurrence),
        **part_scorers(hybrid, shared),
        "hybrid without its trend": hybrid_scorer(hybrid, shared=shared),
        "hybrid": hybrid_scorer(hybrid, counts, shared),
    }


def table(title: str, files: list[Path]) -> list[str]:
    """The table of one log, split and order of ties."""
    seeds = [dict(np.load(file)) for file in files]
    users, popularity = seeds[0]["users"], seeds[0]["popularity"]
    lines = [
        f"\n## {title}\n",
        f"{len(users)} cases of {len(np.unique(users))} users, {len(popularity) - 1} movies, data of SHA-256 "
        f"{str(seeds[0]['data'])[:8]}.\n",
        "| | time | NDCG@10 | HR@10 | MRR | HR@50 | coverage@10 | mean popularity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    resamples = resample(users)
    for key in seeds[0]:
        if not key.endswith("|ranks"):
            continue
        model, time, _ = key.split("|")
        if model in ("co-occurrence", "recent popularity") and time == "True":
            continue  # a request time changes nothing
        ranks = np.stack([seed[key] for seed in seeds])
        tops = [seed[f"{model}|{time}|top"] for seed in seeds]
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


if __name__ == "__main__":
    main()
