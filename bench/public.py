"""Ranking quality on public benchmark files beside published results and two peers, for bench/public.md.

    python -m bench.public --work FOLDER --peers runs/peers beauty=PATH/beauty toys=PATH/toys

A file is a folder with `sequences.txt` (a line `user item item ...` for each user) and `item2attributes.json` (the
attributes of each item), as S3-Rec (CIKM 2020) published them.

Users and items with fewer than 5 events were left out by the publishers. Leave-one-out: the last event of each user is
the test case, and the one before, which is for validation, is part of its history. Each case is ranked among the whole
catalogue without its history. The files hold the order of events but no times and no ratings: all events get one time,
so jaxrec has neither gaps nor a trend, and no request time is given. Attributes are given as genres. jaxrec is trained
with its defaults and `--seen exclude` (`jaxrec train`, then `jaxrec rl logged` for the policy, which learns from the
training events; whether its gate lets it be used is said below); figures are means over the seeds, with 95 % bootstrap
intervals over the users. EASE's penalty and the decay of its history were chosen on validation. SASRec (RecTools, width
256, softmax over the catalogue) has one seed, and ends its training by validation. Published figures are those of the
papers, on the same files by the same protocol.

With `--peers` SASRec is trained by the Python of an environment of its own (`bench/peers/sasrec.txt` says which). What
is finished stays in the work folder: a call that was interrupted resumes where it stopped. `bench.quality` takes its
figures of these files from the same folder.
"""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd

from bench.linear import best_ease
from bench.logs import SEQUENCES_FILE, is_sequences, logs_argument
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from bench.quality import begun, folder_of, measure, prepared
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import hit_rate, ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.files import new_file
from jaxrec.runs.directory import RERANKER_OUTCOME_FILE
from jaxrec.training.host_memory import keep_freed_memory

LOGS, SEEDS = ("beauty",), 3  # of the page
MISSED = 1_000_000  # the rank of a target that is not among the 50 items that a peer recommends
EASE, SASREC = "EASE, history weighted by recency", "SASRec, softmax, width 256 (RecTools)"
# Rows, and their names in the ranks of `bench.quality`.
MODELS = {
    "policy": "policy",
    "hybrid": "hybrid",
    "content model alone": "TimeRatingAwareContentModel",
    "LSTM alone": "TimeRatingAwareLSTM",
}


class Published(NamedTuple):
    """What a paper prints: HR@10 and NDCG@10, None where it has none."""

    model: str
    source: str
    hit_rate: float
    ndcg: float | None


S3REC = "S3-Rec, CIKM 2020"
ESASREC = "eSASRec, RecSys 2025"
PUBLISHED = {
    "beauty": (
        Published("GRU4Rec", S3REC, 0.0283, 0.0137),
        Published("SASRec, binary cross-entropy", S3REC, 0.0605, 0.0318),
        Published("SASRec, softmax", "RecBole", 0.0830, 0.0415),
        Published("SASRec, sampled softmax, width 256", ESASREC, 0.0921, 0.0531),
        Published("HSTU", ESASREC, 0.0788, 0.0439),
        Published("FuXi-alpha", ESASREC, 0.0809, 0.0451),
        Published("TIGER", "TIGER, NeurIPS 2023", 0.0648, 0.0384),
        Published("ActionPiece", "ActionPiece, ICML 2025", 0.0775, 0.0424),
        Published("LRURec", "a user's run of its code", 0.0956, 0.0572),
        Published("Mamba4Rec", "a user's run of its code", 0.0914, 0.0551),
        Published("ICSRec", "ICSRec, WSDM 2024", 0.0959, 0.0578),
        Published("BSARec", "BSARec, AAAI 2024, a user's run", 0.1008, 0.0611),
        Published("WEARec, mean of its grid", "WEARec, AAAI 2026", 0.0992, 0.0591),
        Published("WEARec, best of 88 test scores", "WEARec, AAAI 2026", 0.1041, 0.0614),
        Published("FADE, texts and a language model", "FADE, draft of 2026", 0.1088, 0.0616),
    ),
    "sports": (
        Published("GRU4Rec", S3REC, 0.0204, 0.0110),
        Published("SASRec, binary cross-entropy", S3REC, 0.0350, 0.0192),
        Published("SASRec, softmax", "RecBole", 0.0480, 0.0227),
        Published("SASRec, sampled softmax, width 256", ESASREC, 0.0569, 0.0314),
        Published("HSTU", ESASREC, 0.0437, 0.0243),
        Published("FuXi-alpha", ESASREC, 0.0437, 0.0244),
        Published("TIGER", "TIGER, NeurIPS 2023", 0.0400, 0.0225),
        Published("ActionPiece", "ActionPiece, ICML 2025", 0.0500, 0.0264),
        Published("ICSRec", "ICSRec, WSDM 2024", 0.0565, 0.0335),
        Published("BSARec", "BSARec, AAAI 2024, a user's run", 0.0612, None),
        Published("WEARec, mean of its grid", "WEARec, AAAI 2026", 0.0607, 0.0353),
        Published("WEARec, best of 88 test scores", "WEARec, AAAI 2026", 0.0631, 0.0367),
        Published("FADE, texts and a language model", "FADE, draft of 2026", 0.0684, 0.0371),
    ),
    "toys": (
        Published("GRU4Rec", S3REC, 0.0176, 0.0084),
        Published("SASRec, binary cross-entropy", S3REC, 0.0675, 0.0374),
        Published("SASRec, sampled softmax, width 256", ESASREC, 0.0970, 0.0580),
        Published("HSTU", ESASREC, 0.0778, 0.0450),
        Published("FuXi-alpha", ESASREC, 0.0765, 0.0437),
        Published("TIGER", "TIGER, NeurIPS 2023", 0.0712, 0.0432),
        Published("ICSRec", "ICSRec, WSDM 2024", 0.1055, 0.0657),
    ),
    "yelp": (
        Published("GRU4Rec", S3REC, 0.0263, 0.0134),
        Published("SASRec, binary cross-entropy", S3REC, 0.0274, 0.0136),
        Published("BSARec", "BSARec, AAAI 2024, a user's run", 0.0442, 0.0226),
    ),
    "lastfm": (
        Published("GRU4Rec", S3REC, 0.0367, 0.0187),
        Published("SASRec, binary cross-entropy", S3REC, 0.0688, 0.0390),
        Published("WEARec, history of 200", "WEARec, AAAI 2026", 0.0972, 0.0556),
    ),
}


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@click.option("--peers", type=click.Path(path_type=Path, exists=True), help="Environment of RecTools; None: no SASRec.")
@publish_option
@logs_argument
def main(work: Path, seeds: int, peers: Path | None, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables of all that was asked for."""
    keep_freed_memory()
    if others := [name for name, path in logs.items() if not is_sequences(path)]:
        raise click.BadParameter(f"{', '.join(others)}: expected a folder with {SEQUENCES_FILE}")
    lacking = less(logs=(logs, LOGS), seeds=(seeds, SEEDS), peers=(["SASRec"] if peers else [], ["SASRec"]))
    page = Page("public", "Public benchmark files", publish, work, lacking)
    body = [paragraph(__doc__, 3) + "\n", f"Seeds 0 to {seeds - 1}."]
    results = []
    for name, folder in logs.items():
        of_log = folder_of(work, name)
        data = prepared(of_log / "data", name, folder)
        ours = [measure(work, name, folder, seed) for seed in range(seeds)]
        others = {EASE: measure_ease(of_log)}
        if peers:
            others[SASREC] = measure_sasrec(of_log, peers)
        files = [*ours, *others.values()]
        results += [of_log / "source.json", *files, *map(begun, files)]
        body += table(name, data, ours, others)
    page.write(body, results)


def measure_ease(folder: Path) -> Path:
    """The ranks of EASE for the data in FOLDER, in FOLDER/ease.npz."""
    done = folder / "ease.npz"
    if not done.is_file():
        begin(begun(done))
        data, length = read_prepared(folder / "data"), 200
        scorer, penalty, decay = best_ease(data, length)
        ranks = rank_cases(scorer, data, data.split.test, length, False).ranks
        write_arrays(done, {"ranks": ranks, "penalty": penalty, "decay": decay})
    return done


def measure_sasrec(folder: Path, peers: Path) -> Path:
    """The ranks of SASRec for the data in FOLDER, in FOLDER/sasrec.npz; the peer reads FOLDER/peer-log.csv and writes
    FOLDER/peer-answer.json."""
    done, log, answer = folder / "sasrec.npz", folder / "peer-log.csv", folder / "peer-answer.json"
    if not done.is_file():
        begin(begun(done), answer)
        data = read_prepared(folder / "data")
        write_parts(data, log)
        script = Path(__file__).parent / "peers/sasrec.py"
        subprocess.run([peers / "bin/python", script, log, answer], check=True)
        found = json.loads(answer.read_text("utf-8"))
        ranks = ranks_of(found["items"], data)
        write_arrays(done, {"ranks": ranks, **{name: found[name] for name in ("epochs", "seconds", "version")}})
    return done


def write_parts(data: PreparedData, path: Path) -> None:
    """user, item and part (train, validation, test) of every event in its order, as indices."""
    histories = data.histories
    part = np.full(histories.event_count, "train", dtype=object)
    part[data.split.validation.rows], part[data.split.test.rows] = "validation", "test"
    frame = pd.DataFrame({"user": histories.users(), "item": np.asarray(histories.items), "part": part})
    with new_file(path) as temporary:
        frame.to_csv(temporary, index=False)


def ranks_of(recommended: dict[str, list[int]], data: PreparedData) -> np.ndarray:
    """[cases] int: the place of each test target in what was recommended to its user, from 1 on; MISSED without one."""
    cases = data.split.test
    targets = np.asarray(data.histories.items)[cases.rows].tolist()
    lists = [recommended.get(str(user), []) for user in cases.users.tolist()]
    return np.array(
        [items.index(target) + 1 if target in items else MISSED for items, target in zip(lists, targets, strict=True)]
    )


def table(name: str, data: PreparedData, ours: list[Path], others: dict[str, Path]) -> list[str]:
    """The table of one file: published results, peers that were run here, and jaxrec."""
    cases, resamples = data.split.test, resample(data.split.test.users)
    lines = [
        f"\n## {name}\n",
        f"{len(cases)} cases, {len(data.catalog)} items, data of SHA-256 {data.digest[:8]}."
        f"{'' if name in PUBLISHED else ' No published results are known to this page.'}\n",
        "| | source | HR@10 | NDCG@10 |",
        "|---|---|---|---|",
    ]
    for one in PUBLISHED.get(name, ()):
        cells = f"{one.hit_rate:.4f}", "" if one.ndcg is None else f"{one.ndcg:.4f}"
        lines.append(f"| {one.model} | {one.source} | {cells[0]} | {cells[1]} |")
    for model, file in others.items():
        lines.append(_row(model, [np.load(file)["ranks"]], resamples))
    ranks = {model: [np.load(file)[f"{key}|False|ranks"] for file in ours] for model, key in MODELS.items()}
    lines += [_row(f"jaxrec, {model}", of_seeds, resamples) for model, of_seeds in ranks.items()]
    own = (
        f"{model} {', '.join(f'{ndcg(one, 10).mean():.4f}' for one in of_seeds)}" for model, of_seeds in ranks.items()
    )
    lines.append(f"\nNDCG@10 of the seeds: {'; '.join(own)}.")
    outcomes = [file.with_name(f"run-{seed}") / RERANKER_OUTCOME_FILE for seed, file in enumerate(ours)]
    used = sum(json.loads(outcome.read_text("utf-8"))["used"] for outcome in outcomes)
    lines.append(f"The gate let {used} of {len(ours)} policies be used.")
    ease = np.load(others[EASE])
    lines.append(f"EASE: penalty {float(ease['penalty']):g}, decay {float(ease['decay']):g}.")
    return lines


def _row(model: str, of_seeds: list[np.ndarray], resamples: np.ndarray) -> str:
    """The means over the seeds with their intervals."""
    ranks = np.stack(of_seeds)
    cells = []
    for metric in (hit_rate, ndcg):
        found = bootstrap(metric(ranks, 10).mean(axis=0), resamples)
        cells.append(f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})")
    return f"| {model} | run here | {cells[0]} | {cells[1]} |"


if __name__ == "__main__":
    main()
