"""What each part of the content model's training is worth, for bench/ablation.md.

    python -m bench.ablation --work FOLDER ml-100k=PATH/u.data ml-latest-small=PATH/ml-latest-small \\
        movietweetings-50k=PATH/ratings.dat beauty=PATH/beauty

Each variant is TimeRatingAwareContentModel by the defaults of `jaxrec train` with one or two settings changed. It is
trained on the data of `bench.quality` (5 or more ratings, leave-one-out over the whole log, equal times in the order
of the file), and each case is ranked among the whole catalogue without its history. The defaults were chosen on
validation. Figures are NDCG@10, means over the seeds and over requests without and with their time. Differences from
the first row are paired by case, with 95 % bootstrap intervals over the users. What is finished stays in the work
folder, which may be that of `bench.quality`.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import jax
import numpy as np

from bench.logs import logs_argument
from bench.publish import Page, less, paragraph, publish_option, write_arrays
from bench.quality import folder_of, prepared
from jaxrec.config import ModelConfig, SeenItems, TrainConfig
from jaxrec.data.batches import TrainBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.bootstrap import bootstrap, resample
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import ranks_by_request_time
from jaxrec.models.features import Array
from jaxrec.models.neighbours import initial_embedding, neighbours
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.runs.directory import new_models
from jaxrec.training import step as steps
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.loop import train_model

LOGS, SEEDS = ("ml-100k", "ml-latest-small", "movietweetings-50k", "beauty"), 3  # of the page


@dataclasses.dataclass(frozen=True)
class Variant:
    """`patch` holds while the variant trains and is judged; `start`: whether item vectors start from co-occurrence."""

    name: str
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    start: bool = True
    patch: Callable[[], contextlib.AbstractContextManager[None]] | None = None


@contextlib.contextmanager
def all_items_compete() -> Iterator[None]:
    """The softmax is over all items, also those that the history holds."""

    def nothing(batch: TrainBatch) -> jax.Array:
        return jax.numpy.zeros((*batch.target.shape, 1), jax.numpy.int32)

    with mock.patch.object(steps, "seen_items", nothing):
        yield


@contextlib.contextmanager
def gap_only_scales() -> Iterator[None]:
    """The request gap scales the features and does not shift them."""

    def query(self: TimeRatingAwareLSTM, outputs: jax.Array, request_gap: Array) -> jax.Array:
        return self.projection(outputs * (1.0 + self.request_scale(self.request_gap(request_gap))))

    with mock.patch.object(TimeRatingAwareLSTM, "query", query):
        yield


def changed(**changes: object) -> ModelConfig:
    return dataclasses.replace(ModelConfig(), **changes)  # type: ignore[arg-type]


VARIANTS = (
    Variant("all of it"),
    Variant("softmax over seen items too", patch=all_items_compete),
    Variant("item vectors start at random", start=False),
    Variant("request gap scales, does not shift", patch=gap_only_scales),
    Variant("history of 100 instead of 200", changed(max_length=100)),
    Variant("no dropout", changed(input_dropout=0.0, output_dropout=0.0)),
    Variant("more dropout, 0.3 and 0.5", changed(input_dropout=0.3, output_dropout=0.5)),
    Variant("hidden 256 instead of 128", changed(hidden=256)),
    Variant("hidden 256, more dropout", changed(hidden=256, input_dropout=0.3, output_dropout=0.5)),
    Variant("embedding 128 instead of 64", changed(embedding=128)),
)


@click.command(context_settings={"show_default": True})
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Prepared data, models and ranks stay here."
)
@click.option("--seeds", default=SEEDS)
@publish_option
@logs_argument
def main(work: Path, seeds: int, publish: bool, logs: dict[str, Path]) -> None:
    """Trains what is not there yet, then writes the tables of all that was asked for."""
    keep_freed_memory()
    page = Page("ablation", "Ablation", publish, work, less(logs=(logs, LOGS), seeds=(seeds, SEEDS)))
    body = [paragraph(__doc__) + "\n", f"Seeds 0 to {seeds - 1}."]
    results = []
    for name, path in logs.items():
        data = prepared(folder_of(work, name) / "data", name, path)
        files = [[measure(work, name, number, data, seed) for seed in range(seeds)] for number in range(len(VARIANTS))]
        body += table(name, files)
        results += [file for of_variant in files for file in of_variant]
    page.write(body, results)


def measure(work: Path, name: str, number: int, data: PreparedData, seed: int) -> Path:
    """The ranks of a variant's model, [without and with the request time, cases] of validation and of test."""
    done, variant = folder_of(work, name) / f"ablation-{number}-{seed}.npz", VARIANTS[number]
    if done.is_file():
        return done
    folder = done.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # the CPU time of one that is trained in two goes is not known
    start = initial_embedding(neighbours(data), variant.model.embedding) if variant.start else None
    _, model = new_models(data, variant.model, seed, start)
    config, before = TrainConfig(seed=seed, seen=SeenItems.EXCLUDE), time.process_time()
    with variant.patch() if variant.patch else contextlib.nullcontext():
        trained = train_model(model, data, config, folder, variant.name)
        arrays = {"epochs": len(trained.epochs), "cpu_seconds": time.process_time() - before}
        for part, cases in (("validation", data.split.validation), ("test", data.split.test)):
            arrays |= {part: ranks_by_request_time(trained.model, data, cases), f"{part}_users": cases.users}
    write_arrays(done, arrays | {"data": data.digest})
    return done


def table(name: str, files: list[list[Path]]) -> list[str]:
    """The table of one log; `files` of all seeds, by variant."""
    variants = [[dict(np.load(file)) for file in of_variant] for of_variant in files]
    first = variants[0][0]
    users = first["test_users"]
    resamples = resample(users)
    lines = [
        f"\n## {name}\n",
        f"{len(users)} test cases, data of SHA-256 {str(first['data'])[:8]}.\n",
        "| | validation | test | difference | epochs | CPU seconds to train |",
        "|---|---|---|---|---|---|",
    ]
    all_of_it = _of_cases(variants[0], "test")
    for variant, seeds in zip(VARIANTS, variants, strict=True):
        found = _of_cases(seeds, "test")
        apart = bootstrap(found - all_of_it, resamples)
        difference = f"{apart.mean:+.4f} ({apart.low:+.4f} to {apart.high:+.4f})" if seeds is not variants[0] else ""
        cells = [
            variant.name,
            f"{_of_cases(seeds, 'validation').mean():.4f}",
            f"{found.mean():.4f}",
            difference,
            f"{np.mean([seed['epochs'] for seed in seeds]):.1f}",
            f"{np.mean([seed['cpu_seconds'] for seed in seeds]):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _of_cases(seeds: list[dict[str, np.ndarray]], part: str) -> np.ndarray:
    """[cases] NDCG@10, the mean over seeds and request times."""
    return np.mean([ndcg(seed[part], 10).mean(axis=0) for seed in seeds], axis=0)


if __name__ == "__main__":
    main()
