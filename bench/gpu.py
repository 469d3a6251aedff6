"""Measures an accelerator: parity, the recurrence, a training step, an epoch, exact search, and ML-100K end to end.

    pip install ".[export,serve]" "jax[cuda12]" torch
    python -m bench.gpu --ml-100k u.data --work FOLDER [--publish]

A part writes WORK/PART.json when it ends, so that a time limit loses only what follows, and the same command measures
what is missing. The page is published only if all parts were measured on an accelerator at their full sizes. All parts
run on the CPU, too, with --tiny in some minutes. PyTorch is a peer: it is measured where it can be imported.
"""

import os
from collections.abc import Callable
from pathlib import Path
from time import monotonic

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # ONNX Runtime and PyTorch need memory, too

import click
import jax

from bench import gpu_parts as parts
from bench.gpu_parts import Figures, Sizes
from bench.publish import Page, here, origin, publish_option, read_figures, write_figures

SECONDS = 480
TITLE = "An accelerator: parity, training, search"


@click.command(context_settings={"show_default": True})
@click.option("--ml-100k", type=click.Path(exists=True, path_type=Path), help="The ratings of ML-100K, such as u.data.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--seconds", type=click.IntRange(1), default=SECONDS, help="No part begins after so many.")
@click.option("--tiny", is_flag=True, help="All parts at sizes for a test on the CPU.")
@publish_option
def main(ml_100k: Path | None, work: Path, seconds: int, tiny: bool, publish: bool) -> None:
    """Measures the parts that WORK does not have yet, and writes WORK/gpu.md."""
    sizes, reasons = (parts.TINY if tiny else parts.FULL), []
    if jax.default_backend() == "cpu":
        reasons.append("there is no accelerator")
    if tiny:
        reasons.append("the sizes are tiny")
    page = Page("gpu", TITLE, publish, work, reasons)
    work.mkdir(parents=True, exist_ok=True)
    measures: dict[str, Callable[[Sizes], Figures]] = {
        "device": parts.device,
        "parity": parts.parity,
        "recurrence": parts.recurrence,
        "step": parts.step,
        "epoch": parts.epoch,
        "search": parts.search,
    }
    if ml_100k is not None:
        measures["end_to_end"] = lambda sizes: parts.end_to_end(ml_100k, work / "ml-100k", sizes)
    start = monotonic()
    for name, measure in measures.items():
        file = work / f"{name}.json"
        if file.is_file() and origin(file) == here():
            continue
        if monotonic() - start > seconds:
            click.echo(f"{name} and what follows: no time is left; the same command goes on")
            break
        click.echo(name)
        write_figures(file, measure(sizes))
    files = [work / f"{name}.json" for name in (*measures, "end_to_end")]
    files = list(dict.fromkeys(files))
    page.write(lines({file.stem: read_figures(file) for file in files if file.is_file()}), files)


def lines(figures: dict[str, Figures]) -> list[str]:
    """The page below its head, with what was measured."""
    found: list[str] = []
    for name, write in SECTIONS.items():
        if name in figures:
            found += [*write(figures[name]), ""]
    return found


def _device(figures: Figures) -> list[str]:
    rows = [[name, f"{rate:.3g}"] for name, rate in figures["peak"].items()]
    head = f"{figures['device']} ({figures['platform']}), driver and memory: {figures['driver']}."
    return [head, "", *_table(["square product", "TFLOP/s"], rows)]


def _parity(figures: Figures) -> list[str]:
    rows = [[*row[:2], *(f"{one:.1e}" for one in row[2:5]), "yes" if row[5] else "NO"] for row in figures["rows"]]
    names = ["device", "precision", "loss is off by", "gradient is off by", "limit", "within"]
    return ["## Parity with float64 on the CPU", "", *_table(names, rows)]


def _recurrence(figures: Figures) -> list[str]:
    rows = [[row[0], row[1], f"{row[2]:.2f}", f"{row[3]:.1e}"] for row in figures["rows"]]
    names = ["batch", "recurrence", "ms forwards and backwards", "differs from scan by"]
    return ["## The recurrence, one layer", "", *_table(names, rows), "", fastest(figures)]


def fastest(figures: Figures) -> str:
    """Which recurrence is the fastest at the largest batch, among those that training can use.

    Training packs histories into rows, in which cuDNN cannot forget.
    """
    largest = max(row[0] for row in figures["rows"])
    able = {row[1]: row[2] for row in figures["rows"] if row[0] == largest and row[1] != "cudnn"}
    best = min(able, key=able.__getitem__)
    return f"Of those that can train on packed rows `{best}` is the fastest at batch {largest}."


def _step(figures: Figures) -> list[str]:
    rows = [[*row[:2], f"{row[2]:.2f}", f"{row[3]:,.0f}", f"{row[4]:.3g}", f"{row[5]:.0%}"] for row in figures["rows"]]
    names = ["batch", "way", "ms a step", "tokens/s", "TFLOP/s", "share of the product's rate"]
    without = [] if figures["torch"] else ["", "PyTorch was not there, so it was not measured."]
    return ["## A training step", "", *_table(names, rows), *without]


def _epoch(figures: Figures) -> list[str]:
    rows = [[f"{row[0]:,}", f"{row[1]:.2f}", f"{row[2]:,.0f}", f"{row[3]:,.0f}"] for row in figures["rows"]]
    softmax = f"sampled, {figures['sampled']} items" if figures["sampled"] else "full"
    names = ["events a step", "ms a step", "events/s", "seconds an epoch"]
    return [f"## An epoch of 25 million events (softmax: {softmax})", "", *_table(names, rows)]


def _search(figures: Figures) -> list[str]:
    rows = [[*row[:2], f"{row[2]:.2f}", f"{row[3]:.2f}", f"{row[4]:.4f}"] for row in figures["rows"]]
    names = ["provider", "batch", "ms", "ms with bound inputs and outputs", "items as on the CPU"]
    return [f"## The best 10 of {figures['items']:,} items, exactly", "", *_table(names, rows)]


def _end_to_end(figures: Figures) -> list[str]:
    rows = [[name, f"{seconds:.1f}"] for name, seconds in figures["rows"]]
    of_hybrid = [row for row in figures["evaluation"]["rows"] if row["name"] == "hybrid"]
    scores = {row["request_time"]: row["ndcg_10"]["mean"] for row in of_hybrid}
    quality = [f"NDCG@10 of the hybrid: {scores[False]:.4f} without and {scores[True]:.4f} with request time."]
    return ["## ML-100K end to end", "", *_table(["stage", "seconds"], rows), "", *quality]


SECTIONS = {
    "device": _device,
    "parity": _parity,
    "recurrence": _recurrence,
    "step": _step,
    "epoch": _epoch,
    "search": _search,
    "end_to_end": _end_to_end,
}


def _table(names: list[str], rows: list[list[object]]) -> list[str]:
    body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names), *body]


if __name__ == "__main__":
    main()
