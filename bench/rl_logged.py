"""Measures what `jaxrec rl logged` gains with its defaults, for bench/rl_logged.md.

    python -m bench.rl_logged --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small \\
        movietweetings-50k=PATH/ratings.dat beauty=PATH/beauty

Each log is filtered to users and movies with 5 ratings or more and split: leave-one-out over the whole log, and by time
(the last tenth; up to 10 cases of each user), with equal times in the order of the file and shuffled. beauty has the
order of events only: leave-one-out, in this order, and no item is recommended again. Each seed trains a run (`jaxrec
train`) and its policy (`jaxrec rl logged`), which is used or not, as the gate decides. Out of fold: the last 40
training events of each user, ranked by models and a policy that were trained without this user. Test: the test events,
each ranked among the whole catalogue without the history, with and without the request time, by the hybrid, by the
policy's control that only imitates (stacked), and by the policy. Reward-weighted NDCG@10 weighs each case by its rating
(that of the item where it has none); it is empty for a log without ratings. Figures are means over the seeds, with 95 %
bootstrap intervals over the users; differences are paired by case. What is finished stays in the work folder: a call
that was interrupted resumes where it stopped; `bench.quality` takes its figures from the same folder.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.logs import logs_argument
from bench.publish import Page, less, paragraph, publish_option
from bench.quality import LOGS, SEEDS, SPLITS, TIES, begun, folder_of, measure, settings
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, ratio, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.runs.directory import RERANKER_OUTCOME_FILE
from jaxrec.training.host_memory import keep_freed_memory

ROWS = ("hybrid", "stacked", "policy")
OUT_OF_FOLD = {
    "policy over the mix": "",
    "of that stacking (imitation alone)": "_by_stacking",
    "of that the rewards": "_by_rewards",
    "permuted rewards (control)": "_by_permuted_rewards",
}


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@click.option("--splits", default=",".join(SPLITS))
@click.option("--ties", default=",".join(TIES), help="Order of equal times.")
@publish_option
@logs_argument
def main(work: Path, seeds: int, splits: str, ties: str, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables."""
    keep_freed_memory()
    lacking = less(
        logs=(logs, LOGS), splits=(splits.split(","), SPLITS), ties=(ties.split(","), TIES), seeds=(seeds, SEEDS)
    )
    page = Page("rl_logged", "Policies from the run's own log", publish, work, lacking)
    body = [
        paragraph(__doc__) + "\n",
        f"Seeds 0 to {seeds - 1}. Ties count against the target.\n",
    ]
    files = []
    for name, split, tie in settings(logs, splits.split(","), ties.split(",")):
        of_seeds = [measure(work, name, logs[name], seed, split, tie) for seed in range(seeds)]
        outcomes = [
            json.loads((file.parent / f"run-{seed}" / RERANKER_OUTCOME_FILE).read_text())
            for seed, file in enumerate(of_seeds)
        ]
        files += of_seeds
        title = folder_of(work, name, split, tie).name
        rated = bool(np.ptp(np.load(of_seeds[0])["rating"]))
        body += [*test_table(title, of_seeds, outcomes, rated), *out_of_fold_table(outcomes, rated)]
    page.write(body, [*files, *map(begun, files)])


def test_table(title: str, files: list[Path], outcomes: list[dict[str, Any]], rated: bool) -> list[str]:
    """The table of the test cases of one log, split and order of ties; `rated`: whether the log has ratings."""
    seeds = [dict(np.load(file)) for file in files]
    users, rating = seeds[0]["users"], seeds[0]["rating"]
    used = sum(outcome["used"] for outcome in outcomes)
    lines = [
        f"\n## {title}\n",
        f"{len(users)} cases of {len(np.unique(users))} users, {len(seeds[0]['popularity']) - 1} movies, data of "
        f"SHA-256 {str(seeds[0]['data'])[:8]}. The gate let {used} of {len(outcomes)} policies be used.\n",
        "| test | time | NDCG@10 | less the hybrid | share of the hybrid's | reward-weighted NDCG@10 | share of the "
        "hybrid's |",
        "|---|---|---|---|---|---|---|",
    ]
    resamples = resample(users)
    for time in (time for time in (False, True) if f"hybrid|{time}|ranks" in seeds[0]):
        of_hybrid = figures(seeds, "hybrid", time)
        for model in ROWS:
            own = figures(seeds, model, time)
            weighted, of_hybrid_weighted = (values * rating / rating.mean() for values in (own, of_hybrid))
            shares = [
                "" if model == "hybrid" else percent(bootstrap(np.stack(both, axis=1), resamples, ratio))
                for both in ((own, of_hybrid), (weighted, of_hybrid_weighted))
            ]
            less_hybrid = "" if model == "hybrid" else shown(bootstrap(own - of_hybrid, resamples), "+.4f")
            cells = [model, "with" if time else "without", shown(bootstrap(own, resamples)), less_hybrid, shares[0]]
            by_rating = [f"{weighted.mean():.4f}", shares[1]] if rated else ["", ""]
            lines.append("| " + " | ".join([*cells, *by_rating]) + " |")
    return lines


def out_of_fold_table(outcomes: list[dict[str, Any]], rated: bool) -> list[str]:
    """The gains out of fold of one log; intervals are the means of the seeds' own."""
    lines = ["\n| out of fold | NDCG@10 | reward-weighted NDCG@10 | slate reward |", "|---|---|---|---|"]
    for label, of in OUT_OF_FOLD.items():
        cells = [label]
        for figure in ("ndcg", "reward_weighted_ndcg", "reward"):
            gains = [outcome["differences"][f"{figure}{of}"] for outcome in outcomes]
            mean, low, high = (float(np.mean([gain[part] for gain in gains])) for part in ("mean", "low", "high"))
            empty = figure == "reward_weighted_ndcg" and not rated
            cells.append("" if empty else shown(Estimate(mean, low, high), "+.4f"))
        lines.append("| " + " | ".join(cells) + " |")
    before = {
        figure: np.mean([outcome["figures"]["mix"][figure] for outcome in outcomes]) for figure in ("ndcg", "reward")
    }
    return [*lines, f"\nThe mix out of fold: NDCG@10 {before['ndcg']:.4f}, slate reward {before['reward']:.4f}."]


def figures(seeds: list[dict[str, np.ndarray]], model: str, time: bool) -> np.ndarray:
    """[cases]: NDCG@10, the mean over the seeds."""
    return np.mean([ndcg(seed[f"{model}|{time}|ranks"], 10) for seed in seeds], axis=0)


def percent(share: Estimate) -> str:
    """A ratio as a change in percent."""
    mean, low, high = (100 * (value - 1) for value in (share.mean, share.low, share.high))
    return f"{mean:+.1f} % ({low:+.1f} to {high:+.1f})"


def shown(estimate: Estimate, sign: str = ".4f") -> str:
    """An estimate with its interval."""
    return f"{estimate.mean:{sign}} ({estimate.low:{sign}} to {estimate.high:{sign}})"


if __name__ == "__main__":
    main()
