"""Plots of a run as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrec.evaluate import Metrics
from jaxrec.files import new_file


def plot_training(epochs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and validation NDCG@10 by epoch; `epochs` maps a model's name to the records of its log."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, records in epochs.items():
        numbers = [record["epoch"] + 1 for record in records]
        (line,) = left.plot(numbers, [record["loss"] for record in records], label=name)
        for suffix, style in (("without", "-"), ("with", "--")):
            values = [record[f"validation_ndcg_10_{suffix}_request_time"] for record in records]
            right.plot(numbers, values, style, color=line.get_color(), label=f"{name}, {suffix} request time")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set(title="Validation", xlabel="epoch", ylabel="NDCG@10")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    _save(figure, path)


def plot_rl(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward of the sampled slates and KL to the supervised policy by step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    left.plot(steps, [record["reward"] for record in records])
    left.set(title="Mean reward of a sampled slate", xlabel="step", ylabel="reward")
    right.plot(steps, [record["kl"] for record in records])
    right.set(title="KL to the supervised policy", xlabel="step", ylabel="nats")
    _save(figure, path)


def plot_metrics(rows: Sequence[Metrics], path: Path) -> None:
    """HR@10 and NDCG@10 of every row with their intervals."""
    figure = Figure(figsize=(11, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [f"{row.name}{', with request time' if row.request_time else ''}" for row in rows]
    for axis, title, values in (
        (axes[0], "NDCG@10", [row.ndcg_10 for row in rows]),
        (axes[1], "HR@10", [row.hit_rate_10 for row in rows]),
    ):
        means = [value["mean"] for value in values]
        below = [value["mean"] - value["low"] for value in values]
        above = [value["high"] - value["mean"] for value in values]
        axis.barh(labels, means, xerr=[below, above], color="steelblue", ecolor="black", capsize=3)
        axis.set(title=f"{title} on test cases, 95 % interval")
    axes[0].invert_yaxis()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
