"""Measures an accelerator: parity, the recurrence, a training step, an epoch, exact search, and ML-100K end to end.

    pip install ".[export,serve,cuda]" torch
    python -m bench.gpu --ml-100k u.data --work FOLDER [--publish]

A part writes WORK/PART.json when it ends, so that a time limit or a failure loses only that part, and the same command
measures what is missing. Nothing is begun after the time limit, and a process of its own is ended then: only the figure
that is under way can exceed it. The page is published only if all parts were measured on one GPU at their full sizes,
with PyTorch, which is a peer, and ONNX Runtime's CUDA provider. With --tiny all parts run on the CPU in some minutes.
"""

import functools
import os
import subprocess
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
@click.option("--seconds", type=click.IntRange(1), default=SECONDS, help="No figure is begun after so many.")
@click.option("--tiny", is_flag=True, help="All parts at sizes for a test on the CPU.")
@publish_option
def main(ml_100k: Path | None, work: Path, seconds: int, tiny: bool, publish: bool) -> None:
    """Measures the parts that WORK does not have yet, and writes WORK/gpu.md."""
    until = monotonic() + seconds
    sizes, now = (parts.TINY if tiny else parts.FULL), conditions(tiny)
    page = Page("gpu", TITLE, publish, work, too_little("", now) if publish else [])
    work.mkdir(parents=True, exist_ok=True)
    measures: dict[str, Callable[[Sizes, float], Figures]] = {
        "device": parts.device,
        "parity": parts.parity,
        "recurrence": parts.recurrence,
        "step": parts.step,
        "epoch": parts.epoch,
        "search": parts.search,
    }
    if ml_100k is not None:
        measures["end_to_end"] = functools.partial(parts.end_to_end, ml_100k, work / "ml-100k")
    failed = []
    for name, measure in measures.items():
        file = work / f"{name}.json"
        if file.is_file() and origin(file) == here() and read_figures(file).get("conditions") == now:
            continue
        click.echo(name)
        try:
            write_figures(file, {**measure(sizes, until), "conditions": now})
        except (TimeoutError, subprocess.TimeoutExpired):
            click.echo(f"{name} and what follows: no time is left; the same command goes on")
            break
        except Exception as error:  # of any library: the other parts are measured nevertheless
            failed.append(f"{name} failed: {' '.join(str(error).split())[:200] or type(error).__name__}")
            click.echo(failed[-1], err=True)
    files = [work / f"{name}.json" for name in SECTIONS]
    figures = {file.stem: read_figures(file) for file in files if file.is_file()}
    page.write(lines(figures), files, [*failed, *reasons(figures)])


def conditions(tiny: bool) -> Figures:
    """How this process measures: the sizes, JAX's backend and its device."""
    return {"tiny": tiny, "backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


def reasons(figures: dict[str, Figures]) -> list[str]:
    """Why parts that were measured must not be published."""
    found, devices = [], set()
    for name, part in figures.items():
        how = part.get("conditions")
        if how is None:
            found.append(f"{name} does not say on which device it was measured")
            continue
        found += too_little(f"{name}: ", how)
        devices.add(how["device"])
    if len(devices) > 1:
        found.append(f"the parts are of different devices: {', '.join(sorted(devices))}")
    if "step" in figures and figures["step"]["torch"] is None:
        found.append("step: without PyTorch on the accelerator")
    if "search" in figures and not any(row[0] == "CUDA" for row in figures["search"]["rows"]):
        found.append("search: without ONNX Runtime's CUDA provider")
    return found


def too_little(part: str, how: Figures) -> list[str]:
    """Why what was measured under such `conditions` must not be published, each reason with `part` before it."""
    found = [f"{part}there is no accelerator"] if how["backend"] == "cpu" else []
    return [*found, f"{part}the sizes are tiny"] if how["tiny"] else found


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
    return ["## A training step", "", *_table(names, rows)]


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
