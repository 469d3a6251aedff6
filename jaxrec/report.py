"""The metrics table of a run: baselines, models, hybrid and policy on the test cases."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrec.baselines import RecentPopularity
from jaxrec.config import to_json
from jaxrec.evaluate import (
    Metrics,
    Ranked,
    Scorer,
    constant_scorer,
    jit_scorer,
    model_logits,
    rank_cases,
    summarize,
)
from jaxrec.files import write_text
from jaxrec.metrics import ndcg
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from jaxrec.rl.policy_run import load_policy, read_outcome
from jaxrec.runs import load_supervised, open_run
from jaxrec.split import Cases

RECENT_WINDOWS_DAYS = (1.0, 7.0, 30.0, 90.0, 365.0)
POPULARITY, RECENT_POPULARITY = "popularity", "recent popularity"
HYBRID, POLICY = "hybrid", "policy"
EVALUATION_FILE = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `jaxrec evaluate` writes. `serving` names the row that is exported; `comparison` is paired by case."""

    protocol: dict[str, Any]
    rows: list[Metrics]
    serving: str
    comparison: dict[str, Any]


def evaluate_run(folder: Path) -> Evaluation:
    """Ranks the test cases with every scorer of a run, without and with the request time.

    The result is also kept as RUN/evaluation.json, which the export puts into the manifest.
    """
    run = open_run(folder)
    data = run.read_data()
    supervised = load_supervised(run, data)
    with_policy = load_policy(run, supervised, only_if_used=False)
    popularity = data.train_popularity()
    window = best_window(data, run.model_config.max_length)
    scorers: dict[str, tuple[Scorer, bool]] = {
        POPULARITY: (constant_scorer(popularity), False),
        RECENT_POPULARITY: (recent_scorer(data, window), False),
        "TimeRatingAwareLSTM": (jit_scorer(supervised.lstm, model_logits), True),
        "TimeRatingAwareContentModel": (jit_scorer(supervised.content, model_logits), True),
        HYBRID: (hybrid_scorer(supervised), True),
    }
    outcome = read_outcome(run)
    if with_policy is not None:
        scorers[POLICY] = (hybrid_scorer(with_policy), True)
    asked = [(name, time) for name, (_, timed) in scorers.items() for time in ((False, True) if timed else (False,))]
    ranked: dict[tuple[str, bool], Ranked] = {}
    for name, request_time in tqdm(asked, desc="evaluate", unit="row"):
        scorer = scorers[name][0]
        ranked[name, request_time] = rank_cases(
            scorer, data, data.split.test, run.model_config.max_length, request_time
        )
    rows = [summarize(name, time, ranked[name, time], popularity) for name, time in asked]
    protocol = {
        "split": data.config.split.value,
        "ties": data.config.ties.value,
        "filter": f"users with {data.config.min_user_ratings}+, movies with {data.config.min_movie_ratings}+ ratings",
        "candidates": "all items but those of the history",
        "history": f"last {run.model_config.max_length} events",
        "test_cases": len(data.split.test),
        "tied_test_share": tied_share(data, data.split.test),
        "interval": "95 % bootstrap over cases",
        "recent_popularity_window_days": window,
        "seed": run.train_config.seed,
        "data": data.summary(),
        "model": to_json(run.model_config),
    }
    serving = POLICY if outcome is not None and outcome.used else HYBRID
    compared = paired_ratio(ranked[HYBRID, False], ranked[RECENT_POPULARITY, False])
    evaluation = Evaluation(protocol, rows, serving, {"hybrid_over_recent_popularity_ndcg_10": compared})
    write_evaluation(evaluation, folder / EVALUATION_FILE)
    return evaluation


def hybrid_scorer(hybrid: Hybrid) -> Scorer:
    """The scorer of a hybrid, with its policy if it has one."""
    return jit_scorer(hybrid, _hybrid_logits)


def _hybrid_logits(hybrid: Hybrid, events: Any, request_gap: Any) -> Any:
    return hybrid.logits(events, request_gap)[0]


def recent_scorer(data: PreparedData, window_days: float) -> Scorer:
    """Recent popularity at each case's own time."""
    recent = RecentPopularity(data, window_days)
    return lambda batch: recent.scores(batch.time)


def best_window(data: PreparedData, max_length: int) -> float:
    """The window of recent popularity, in days, with the best NDCG@10 on validation."""

    def figure(window: float) -> float:
        ranked = rank_cases(recent_scorer(data, window), data, data.split.validation, max_length, request_time=False)
        return float(ndcg(ranked.ranks, 10).mean())

    return max(RECENT_WINDOWS_DAYS, key=figure)


def tied_share(data: PreparedData, cases: Cases) -> float:
    """The share of targets that have the timestamp of the event before them."""
    return float((data.histories.gaps()[cases.rows] == 0).mean())


def paired_ratio(ranked: Ranked, reference: Ranked, samples: int = 1000) -> dict[str, float]:
    """NDCG@10 of `ranked` over that of `reference`, with a 95 % interval from resampled pairs of cases."""
    ours, theirs = ndcg(ranked.ranks, 10), ndcg(reference.ranks, 10)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(ours), size=(samples, len(ours)))
    ratios = ours[draws].mean(axis=1) / np.maximum(theirs[draws].mean(axis=1), 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"ratio": float(ours.mean() / max(theirs.mean(), 1e-12)), "low": float(low), "high": float(high)}


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes the evaluation as JSON."""
    write_text(path, json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n")


def format_table(evaluation: Evaluation) -> str:
    """The metrics as a text table."""
    header = (
        f"{'':29}{'request':>8}  {'NDCG@10':^21}{'HR@10':^21}{'MRR':^21}{'HR@50':>6}{'coverage':>10}{'popularity':>12}"
    )
    lines = [header, f"{'':29}{'time':>8}"]
    for row in evaluation.rows:
        name = f"{row.name} *" if row.name == evaluation.serving else row.name
        cells = "".join(f"{_interval(values):^21}" for values in (row.ndcg_10, row.hit_rate_10, row.mrr))
        rest = f"{row.hit_rate_50['mean']:6.3f}{row.coverage_10:10.3f}{row.mean_popularity_10:12.1f}"
        lines.append(f"{name:29}{'with' if row.request_time else 'without':>8}  {cells}{rest}")
    protocol = evaluation.protocol
    ratio = evaluation.comparison["hybrid_over_recent_popularity_ndcg_10"]
    times = f"{ratio['ratio']:.1f} ({ratio['low']:.1f}-{ratio['high']:.1f})"
    lines += [
        f"* is exported and served. {protocol['test_cases']} test cases, {protocol['split']}, {protocol['filter']};",
        f"candidates: all {protocol['data']['items']} items but those of the history; means with 95 % intervals;",
        f"{protocol['tied_test_share']:.0%} of the targets tie with the event before (ties: {protocol['ties']}).",
        f"NDCG@10, hybrid without request time over recent popularity: {times} times.",
    ]
    return "\n".join(lines)


def _interval(values: dict[str, float]) -> str:
    return f"{values['mean']:.4f} ({values['low']:.3f}-{values['high']:.3f})"
