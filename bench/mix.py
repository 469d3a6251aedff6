"""What each part of the mix is worth, and what a linear item-item model would add to it, for bench/mix.md.

    python -m bench.mix --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small \\
        movietweetings-50k=PATH/ratings.dat beauty=PATH/beauty

The models are those of `bench.quality` (5 or more ratings, leave-one-out over the whole log, defaults of `jaxrec
train`). For each row the weights of its parts are learned anew on validation, as `jaxrec train` learns them. The test
cases are ranked among all items, or with content heads among those with training events, without their history. EASE
is the linear item-item model (Steck 2019), its penalty and the decay of its history chosen on validation. Figures are
means over the seeds; differences from the mix of all parts are paired by case, with 95 % bootstrap intervals over the
users. What is finished stays in the work folder, which may be that of `bench.quality`: a call that was interrupted
resumes where it stopped.
"""

from pathlib import Path
from typing import NamedTuple

import click
import jax.numpy as jnp
import numpy as np

from bench.linear import best_ease
from bench.logs import logs_argument
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from bench.quality import begun, measure
from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import ndcg, rank_of_target
from jaxrec.evaluation.ranking import in_time, without_request_time
from jaxrec.evaluation.scorers import Scorer, part_scorers
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import Trend
from jaxrec.runs.directory import load_supervised, open_run
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.mix import MAX_MIX_CASES, START, collect_candidates, fit_weights, typical_events

LOGS, SEEDS = ("ml-100k", "ml-latest-small", "movietweetings-50k", "beauty"), 3  # of the page
LSTM, CONTENT, COOCCURRENCE, EASE = range(4)
STARTS = (*START, 1.0)


class Variant(NamedTuple):
    """A row: its `parts`, and whether it has the `trend`."""

    name: str
    parts: tuple[int, ...] = (LSTM, CONTENT, COOCCURRENCE)
    trend: bool = True


VARIANTS = (
    Variant("all parts"),
    Variant("without TimeRatingAwareLSTM", (CONTENT, COOCCURRENCE)),
    Variant("without TimeRatingAwareContentModel", (LSTM, COOCCURRENCE)),
    Variant("without co-occurrence", (LSTM, CONTENT)),
    Variant("without the trend", trend=False),
    Variant("EASE instead of co-occurrence", (LSTM, CONTENT, EASE)),
    Variant("with EASE", (LSTM, CONTENT, COOCCURRENCE, EASE)),
)


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Prepared data, runs and ranks stay here.")
@click.option("--seeds", default=SEEDS)
@publish_option
@logs_argument
def main(work: Path, seeds: int, publish: bool, logs: dict[str, Path]) -> None:
    """Trains and ranks what is not there yet, then writes the tables."""
    keep_freed_memory()
    page = Page("mix", "The parts of the mix", publish, work, less(logs=(logs, LOGS), seeds=(seeds, SEEDS)))
    body = [paragraph(__doc__) + "\n", f"Seeds 0 to {seeds - 1}."]
    results = []
    for name, path in logs.items():
        files = []
        for seed in range(seeds):
            trained = measure(work, name, path, seed)
            files.append(measure_variants(trained, seed))
            results += [trained, files[-1], begun(trained), begun(files[-1])]
        body += table(name, files)
    page.write(body, results)


def measure_variants(trained: Path, seed: int) -> Path:
    """The ranks of all variants of the run beside the ranks in `trained`, in mix-SEED.npz."""
    folder = trained.parent
    done = folder / f"mix-{seed}.npz"
    if not done.is_file():
        begin(begun(done))
        data = read_prepared(folder / "data")
        hybrid = load_supervised(open_run(folder / f"run-{seed}"), data)
        write_arrays(done, {"users": data.split.test.users, **rank_variants(hybrid, data)})
    return done


def rank_variants(hybrid: Hybrid, data: PreparedData) -> dict[str, np.ndarray]:
    """The variants' ranks of the test cases, NAME|TIME [cases], and the weights of their parts, NAME|weights."""
    length, counts = hybrid.lstm.config.max_length, DecayedCounts.of(data)
    scorers = (
        *part_scorers(hybrid).values(),
        cooccurrence_scorer(hybrid.cooccurrence),
        best_ease(data, length)[0],
    )
    cases = data.split.validation.at_most(MAX_MIX_CASES)
    typical = typical_events(counts, data.histories.times[cases.rows])
    found = collect_candidates(scorers, data, cases, length, counts, typical)
    results, mixes = {}, {}
    for variant in VARIANTS:
        parts, views = list(variant.parts), found.views if variant.trend else found.views[:, :0]
        weights = fit_weights(found._replace(parts=found.parts[:, parts], views=views), [STARTS[at] for at in parts])
        of_parts, of_views = np.split(weights, [len(parts)])
        trend = Trend(of_views.reshape(-1, len(typical)), typical) if variant.trend else Trend.none()
        mixes[variant] = of_parts, trend
        results[f"{variant.name}|weights"] = of_parts
    ranks: dict[str, list[np.ndarray]] = {}
    ordered, places = in_time(data, data.split.test)
    for batch in case_batches(data, ordered, length):
        trends = {
            variant: jnp.stack([trend(counts.before(time)[0]) for time in batch.time[:, None]])
            for variant, (_, trend) in mixes.items()
        }
        for time in (False, True):
            scores = _scores(scorers, batch if time else without_request_time(batch))
            for variant, (of_parts, _) in mixes.items():
                mixed = jnp.einsum("p,pbi->bi", of_parts, scores[np.array(variant.parts)]) + trends[variant]
                of_batch = np.asarray(rank_of_target(mixed, batch.target, batch.exclude))
                ranks.setdefault(f"{variant.name}|{time}", []).append(of_batch)
    return results | {key: np.concatenate(of_batches)[places] for key, of_batches in ranks.items()}


def _scores(scorers: tuple[Scorer, ...], batch: CaseBatch) -> jnp.ndarray:
    """[parts, batch, items + 1] float32."""
    return jnp.stack([jnp.asarray(scorer(batch)) for scorer in scorers])


def table(name: str, files: list[Path]) -> list[str]:
    """The table of one log."""
    seeds = [dict(np.load(file)) for file in files]
    resamples = resample(seeds[0]["users"])
    lines = [
        f"\n## {name}\n",
        f"{len(seeds[0]['users'])} cases. NDCG@10 without, then with the request time.\n",
        "| | NDCG@10 | less all parts | NDCG@10, with | less all parts, with |",
        "|---|---|---|---|---|",
    ]

    def mean(variant: Variant, time: bool) -> np.ndarray:
        return np.stack([ndcg(seed[f"{variant.name}|{time}"], 10) for seed in seeds]).mean(axis=0)

    for variant in VARIANTS:
        cells = [variant.name]
        for time in (False, True):
            own = mean(variant, time)
            less_all = bootstrap(own - mean(VARIANTS[0], time), resamples)
            cells.append(f"{own.mean():.4f}")
            cells.append(f"{less_all.mean:+.4f} ({less_all.low:+.4f} to {less_all.high:+.4f})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
