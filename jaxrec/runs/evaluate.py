"""The metrics table of a run: baselines, models, hybrid and policy on the test cases."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxrec.config import to_json
from jaxrec.data.batches import gaps_at
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import SECONDS_PER_DAY
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.evaluation.baselines import best_half_life, own_items_scorer, popularity_scorer, recent_popularity_scorer
from jaxrec.evaluation.bootstrap import bootstrap, ratio, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import MetricsRow, rank_together, summarize
from jaxrec.evaluation.scorers import Scorer, Shared, hybrid_scorer, part_scorers
from jaxrec.files import write_text
from jaxrec.models.hybrid import Hybrid
from jaxrec.runs.directory import EVALUATION_FILE, Run, load_supervised, open_run, read_reranker
from jaxrec.runs.policy import load_policy

POPULARITY, RECENT_POPULARITY = "popularity", "recent popularity"
OWN_ITEMS = "user's own items"
HYBRID, STACKED, POLICY = "hybrid", "stacked", "policy"
REQUEST_TIME = {False: "without", True: "with"}
HALF_LIFE_DAYS = "recent_popularity_half_life_days"
HYBRID_OVER_RECENT = "hybrid_over_recent_popularity_ndcg_10"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics of a run on its test cases; `print` shows them as a table.

    Attributes:
        protocol: How they were measured: data, split, filter, candidates, seeds.
        rows: One for each scorer, without and with the request time.
        serving: Name of the rows of the model that is exported.
        comparison: Ratios and differences between two scorers, paired by case; `without` and `with` request time.
    """

    protocol: dict[str, Any]
    rows: list[MetricsRow]
    serving: str
    comparison: dict[str, Any]

    def __str__(self) -> str:
        return format_table(self)

    def to_frame(self) -> pd.DataFrame:
        """One row per scorer; each estimate is a column, and its 95 % interval two: NAME_low and NAME_high."""
        return pd.DataFrame([dict(_cells(row)) for row in self.rows])


def evaluate(run: Run | Path | str, seed: int = 0, max_cases: int | None = None) -> Evaluation:
    """Ranks the test cases with every scorer of a run, without and with the request time.

    Baselines are popularity and recent popularity; where items of the history may be recommended again, also the user's
    own items by their number of events, then by the latest event.

    Args:
        run: A run or its folder.
        seed: Seed of the bootstrap intervals.
        max_cases: Of more test cases, so many that are evenly spaced are ranked; recent popularity's half-life is then
            chosen on as many validation cases. None: all.

    Returns:
        The metrics, which are also kept as RUN/evaluation.json; the export puts them into the manifest. Those of a
        sample do not replace those of more test cases; one line on the terminal says so.

    Raises:
        DataError: The run or its data cannot be read.
    """
    run = open_run(run)
    data = run.read_data()
    mix = load_supervised(run, data, reranker=False)
    learned_policies, policy_is_used = policies(run, mix)
    popularity = data.train_popularity()
    max_length = run.model_config.max_length
    counts = DecayedCounts.of(data)
    excluded = mix.repeat is None
    validation, test = (
        cases if max_cases is None else cases.at_most(max_cases) for cases in (data.split.validation, data.split.test)
    )
    half_life = best_half_life(data, counts, max_length, excluded, validation)
    shared = Shared()
    learned: dict[str, Scorer] = {
        **part_scorers(mix, shared),
        HYBRID: hybrid_scorer(mix, counts, shared),
        **{name: hybrid_scorer(hybrid, counts, shared) for name, hybrid in learned_policies.items()},
    }
    baselines: dict[str, Scorer] = {
        POPULARITY: popularity_scorer(data),
        RECENT_POPULARITY: recent_popularity_scorer(data, counts, half_life, shared),
        **({} if excluded else {OWN_ITEMS: own_items_scorer(len(data.catalog))}),
    }
    scorers = {(name, False): (scorer, False) for name, scorer in baselines.items()}
    scorers |= {(name, time): (scorer, time) for name, scorer in learned.items() for time in (False, True)}
    ranked = rank_together(scorers, data, test, max_length, excluded, progress="evaluate")
    resamples = resample(test.users, seed=seed)
    rows = [summarize(name, time, of_row, popularity, resamples) for (name, time), of_row in ranked.items()]
    protocol = {
        "split": data.config.split.value,
        "ties": data.config.ties.value,
        "filter": f"users with {data.config.min_user_ratings}+, movies with {data.config.min_movie_ratings}+ ratings",
        "filter_on": data.config.filter_on.value,
        "candidates": "all items but those of the history" if excluded else "all items",
        "history": f"last {max_length} events",
        "test_cases": len(test),
        "test_cases_of_data": len(data.split.test),
        "repeated_test_share": float(test.repeated(data.histories).mean()),
        "tied_test_share": tied_share(data, test),
        "interval": "95 % bootstrap over users",
        "trend": "counts all users' events before the case, with and without request time",
        HALF_LIFE_DAYS: HALF_LIVES_S[half_life] / SECONDS_PER_DAY,
        "seed": run.train_config.seed,
        "bootstrap_seed": seed,
        "data_folder": str(run.data_folder),
        "data_sha256": run.data_digest,
        "jaxrec": importlib.metadata.version("jaxrec"),
        "data": data.summary(),
        "model": to_json(run.model_config),
    }
    serving = POLICY if policy_is_used else HYBRID
    compared: dict[str, Any] = {}
    differences: dict[str, Any] = {f"{one}_less_{other}_ndcg_10": {} for one, other in _pairs(learned_policies)}
    recent = ndcg(ranked[RECENT_POPULARITY, False].ranks, 10)
    for time, label in REQUEST_TIME.items():
        both = np.stack([ndcg(ranked[HYBRID, time].ranks, 10), recent], axis=1)
        compared[label] = dataclasses.asdict(bootstrap(both, resamples, ratio))
        for one, other in _pairs(learned_policies):
            gain = ndcg(ranked[one, time].ranks, 10) - ndcg(ranked[other, time].ranks, 10)
            differences[f"{one}_less_{other}_ndcg_10"][label] = dataclasses.asdict(bootstrap(gain, resamples))
    evaluation = Evaluation(protocol, rows, serving, {HYBRID_OVER_RECENT: compared, **differences})
    path = run.folder / EVALUATION_FILE
    kept = _test_cases(path, run.data_digest) if max_cases is not None else 0
    if kept > len(test):
        tqdm.write(f"{path} stays: it is of {kept} test cases, this evaluation of {len(test)}")
    else:
        write_evaluation(evaluation, path)
    return evaluation


def _test_cases(path: Path, data_sha256: str) -> int:
    """How many test cases of these data an evaluation ranked; 0 where the file is none of them."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        protocol = json.loads(path.read_text("utf-8"))["protocol"]
        return int(protocol["test_cases"]) if protocol["data_sha256"] == data_sha256 else 0
    return 0


def policies(run: Run, mix: Hybrid) -> tuple[dict[str, Hybrid], bool]:
    """What `jaxrec rl` learned for a run.

    Args:
        run: That was trained.
        mix: Its supervised models without a reranker.

    Returns:
        Models by the name of their row, and whether that of POLICY is in use.

    Raises:
        DataError: Files of a policy or of the reranker are damaged, or belong to other models.
    """
    learned = read_reranker(run, mix)
    supervised = mix if learned is None or not learned.used else mix.with_reranker(learned.policy)
    found = {} if learned is None else {STACKED: mix.with_reranker(learned.stacked)}
    in_use = load_policy(run, supervised)
    if in_use is not None:
        return {**found, POLICY: in_use}, True
    if learned is not None:
        return {**found, POLICY: mix.with_reranker(learned.policy)}, learned.used
    refused = load_policy(run, supervised, only_if_used=False)
    return ({} if refused is None else {POLICY: refused}), False


def _pairs(policies: Iterable[str]) -> list[tuple[str, str]]:
    """Which rows are compared: each of the policies with the hybrid, and with the one before it."""
    names = [HYBRID, *policies]
    return [(one, other) for at, one in enumerate(names) for other in names[:at]]


def tied_share(data: PreparedData, cases: Cases) -> float:
    """The share of targets that have the timestamp of the event before them."""
    return float((gaps_at(data.histories, cases.rows) == 0).mean())


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
        lines.append(f"{name:29}{REQUEST_TIME[row.request_time]:>8}  {cells}{rest}")
    protocol = evaluation.protocol
    data = f"{Path(protocol['data_folder']).name} (SHA-256 {protocol['data_sha256'][:8]})"
    tied, repeated = protocol["tied_test_share"], protocol["repeated_test_share"]
    candidates = protocol["candidates"].replace("all items", f"all {protocol['data']['items']} items")
    cases, of_data = protocol["test_cases"], protocol["test_cases_of_data"]
    ranked = f"{cases}" if cases == of_data else f"{cases} of {of_data}"
    lines += [
        f"* is exported and served. Means over {ranked} test cases, with 95 % intervals over users.",
        f"Data: {data}, {protocol['filter']}. Split: {protocol['split']}. Seed: {protocol['seed']}.",
        f"Candidates: {candidates}. {tied:.0%} of the targets tie in",
        f"time with the event before them (ties: {protocol['ties']}), {repeated:.0%} are in the history already.",
        f"NDCG@10, hybrid over recent popularity (half-life of {protocol[HALF_LIFE_DAYS]:g} days, from validation):",
    ]
    for label, over in evaluation.comparison[HYBRID_OVER_RECENT].items():
        times = f"{over['mean']:.1f} ({over['low']:.1f}-{over['high']:.1f}) times"
        if over["mean"] > 1000:
            times = "the latter finds next to nothing"
        lines.append(f"  {label} request time: {times}")
    for name, gains in evaluation.comparison.items():
        if name != HYBRID_OVER_RECENT:
            shown = ", ".join(
                f"{label} request time {gain['mean']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
                for label, gain in gains.items()
            )
            lines.append(f"NDCG@10, {name.removesuffix('_ndcg_10').replace('_', ' ')}: {shown}")
    return "\n".join(lines)


def _interval(values: dict[str, float]) -> str:
    return f"{values['mean']:.4f} ({values['low']:.3f}-{values['high']:.3f})"


def _cells(row: MetricsRow) -> Iterator[tuple[str, Any]]:
    for name, value in dataclasses.asdict(row).items():
        if isinstance(value, dict):
            yield from ((name if part == "mean" else f"{name}_{part}", figure) for part, figure in value.items())
        else:
            yield name, value
