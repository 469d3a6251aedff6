"""What each part of the content model's training is worth, for bench/ablation.md.

    python -m bench.ablation --work FOLDER ml-100k=FOLDER/ml-100k-leave-one-out-file/data

Each variant is TimeRatingAwareContentModel by the defaults of `jaxrec train` with one part taken out, trained on
prepared data (`bench.quality` leaves some in its work folder) and ranked on validation, where choices are made, and on
test. What is finished stays in the work folder.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import jax
import numpy as np

from bench.logs import logs_argument
from bench.publish import Page, begin, less, publish_option, read_figures, write_figures
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.data.batches import TrainBatch
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.evaluation.metrics import hit_rate, ndcg
from jaxrec.evaluation.ranking import ranks_by_request_time
from jaxrec.models.features import Array
from jaxrec.models.neighbours import initial_embedding, neighbours
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.runs.directory import new_models
from jaxrec.training import step as steps
from jaxrec.training.host_memory import keep_freed_memory
from jaxrec.training.loop import train_model

LOGS, SEEDS = ("ml-100k",), 1  # of the page


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


def without(**changes: object) -> ModelConfig:
    return dataclasses.replace(ModelConfig(), **changes)  # type: ignore[arg-type]


VARIANTS = (
    Variant("all of it"),
    Variant("softmax over seen items too", patch=all_items_compete),
    Variant("item vectors start at random", start=False),
    Variant("request gap scales, does not shift", patch=gap_only_scales),
    Variant("history of 100 instead of 200", without(max_length=100)),
    Variant("no dropout", without(input_dropout=0.0, output_dropout=0.0)),
    Variant("hidden 256 instead of 128", without(hidden=256)),
)


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=SEEDS)
@publish_option
@logs_argument
def main(work: Path, seeds: int, publish: bool, logs: dict[str, Path]) -> None:
    """Trains what is not there yet, then writes the table of all that was asked for."""
    keep_freed_memory()
    page = Page("ablation", "Ablation", publish, work, less(logs=(logs, LOGS), seeds=(seeds, SEEDS)))
    body = [
        f"TimeRatingAwareContentModel alone, leave-one-out, seeds 0 to {seeds - 1}; NDCG@10 / HR@10, without, then "
        "with the request time. One standard error of NDCG@10 over these cases is about .008: choices were made on "
        "validation, and small differences say nothing.",
    ]
    results = []
    for name, path in logs.items():
        data = read_prepared(path)
        body += [
            f"\n## {name}\n",
            f"{len(data.split.test)} cases, data of SHA-256 {data.digest[:8]}.\n",
            "| | validation | test | epochs |",
            "|---|---|---|---|",
        ]
        for number, variant in enumerate(VARIANTS):
            files = [measure(work / name / f"{number}-{seed}", variant, data, seed) for seed in range(seeds)]
            body.append(row(variant, files))
            results += files
    page.write(body, [*results, *(file.with_name("begun.json") for file in results)])


def measure(folder: Path, variant: Variant, data: PreparedData, seed: int) -> Path:
    """FOLDER/result.json: NDCG@10 and HR@10 without and with the request time, on validation and on test."""
    result = folder / "result.json"
    if result.is_file():
        return result
    begin(folder / "begun.json")
    start = initial_embedding(neighbours(data), variant.model.embedding) if variant.start else None
    _, model = new_models(data, variant.model, seed, start)
    with variant.patch() if variant.patch else contextlib.nullcontext():
        trained = train_model(model, data, TrainConfig(seed=seed), folder / "run", variant.name)
        figures: dict[str, list[float]] = {"epochs": [len(trained.epochs)]}
        for part, cases in (("validation", data.split.validation), ("test", data.split.test)):
            ranks = ranks_by_request_time(trained.model, data, cases)
            figures[f"{part}_ndcg"] = ndcg(ranks, 10).mean(axis=1).tolist()
            figures[f"{part}_hr"] = hit_rate(ranks, 10).mean(axis=1).tolist()
    write_figures(result, figures)
    return result


def row(variant: Variant, files: list[Path]) -> str:
    """The means over the seeds."""
    results = [read_figures(file) for file in files]
    mean = {key: np.mean([result[key] for result in results], axis=0) for key in results[0]}
    cells = [
        " ; ".join(f"{n:.4f} / {h:.4f}" for n, h in zip(mean[f"{part}_ndcg"], mean[f"{part}_hr"], strict=True))
        for part in ("validation", "test")
    ]
    return f"| {variant.name} | {cells[0]} | {cells[1]} | {mean['epochs'][0]:.0f} |"


if __name__ == "__main__":
    main()
