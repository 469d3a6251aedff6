"""Plots of a run: figures of its records, and the files that they are saved as."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxrec.evaluation.ranking import MetricsRow
from jaxrec.files import new_file

LOST = "Likelihood that real events lose (nats)"


def training_figure(epochs: dict[str, list[dict[str, Any]]]) -> Figure:
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
    return figure


def policy_figure(steps: Sequence[Mapping[str, float]]) -> Figure:
    """The training of a policy.

    By update, as far as the records have them: its reward, its distance, what keeps it near, its spread and importance
    weights, and the likelihood that real events lose. For the latter also the path of reward and lost likelihood.
    """
    by_update = {
        "Mean reward of a slate": ("reward",),
        "KL to where it started (nats)": ("kl",),
        "Weight of the KL penalty": ("kl_coefficient",),
        "Entropy (nats)": ("entropy",),
        "Coverage of a batch's slates": ("coverage",),
        "Importance weights": ("ess_share", "clipped_share"),
        LOST: ("likelihood_lost",),
    }
    known = {name for record in steps for name in record}
    panels = {title: names for title, names in by_update.items() if known.intersection(names)}
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = iter(figure.subplots(2, 4).ravel())
    for title, names in panels.items():
        axis = next(axes)
        for name in names:
            points = [(record["step"], record[name]) for record in steps if name in record]
            axis.plot([step for step, _ in points], [value for _, value in points], linewidth=0.8, label=name)
        axis.set(title=title, xlabel="update")
        if len(names) > 1:
            axis.legend(fontsize="small")
    if LOST in panels:
        axis = next(axes)
        lost, reward = ([record[name] for record in steps] for name in ("likelihood_lost", "reward"))
        axis.plot(lost, reward, "o-", linewidth=0.4, markersize=3)
        axis.plot(lost[-1], reward[-1], "o", color="black", label="last updates")
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(title="What the reward costs", xlabel=LOST, ylabel="mean reward of a slate")
        axis.legend(fontsize="small")
    for axis in axes:
        axis.set_axis_off()
    return figure


def reranker_figure(curves: Sequence[Mapping[str, Any]], frontier: Sequence[Mapping[str, Any]]) -> Figure:
    """The training of a reranker: gains over the hybrid for held-out users by update, and what the rewards cost.

    Args:
        curves: `jaxrec.rl.logged.learn.Point` of each fit and update, as mappings.
        frontier: The same of fits with several weights of the rewards.

    Returns:
        Slate reward, NDCG@10 and the frontier.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, measure, title in ((axes[0], "reward", "Slate reward"), (axes[1], "ndcg", "NDCG@10")):
        for name in dict.fromkeys(point["name"] for point in curves):
            points = [(point["step"], point[measure]) for point in curves if point["name"] == name]
            axis.plot(*zip((0, 0.0), *points, strict=True), "o-", markersize=3, label=name)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(title=f"{title} of held-out users", xlabel="update", ylabel="gain over the hybrid")
        axis.legend(fontsize="small")
    axes[2].plot([point["ndcg"] for point in frontier], [point["reward"] for point in frontier], "o-")
    for point in frontier:
        axes[2].annotate(f"{point['reward_weight']:g}", (point["ndcg"], point["reward"]), fontsize="small")
    axes[2].set(title="Frontier, by weight of the rewards", xlabel="gain in NDCG@10", ylabel="gain in slate reward")
    return figure


def metrics_figure(rows: Sequence[MetricsRow]) -> Figure:
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
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
