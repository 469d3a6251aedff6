"""`python -m serve outcomes`: what came of the recommendations of each model version and policy."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from serve.event_log.outcomes import Estimate, Outcomes
    from serve.event_log.slates import Slates

NOTE = (
    "Arms compare fairly if they answered at the same time, to users divided at random between them (SetTraffic).\n"
    "Each interval errs in 5 of 100 comparisons: among many arms, some seem to differ by chance."
)


@click.command("outcomes")
@click.argument("store")
@click.option(
    "--attribution-window",
    type=click.IntRange(0),
    metavar="SECONDS",
    help="Within which an event counts as a response to the slate that it names.  [default: the 99th percentile]",
)
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", help="For people or for programs."
)
def command(store: str, attribution_window: int | None, form: str) -> None:
    """Compare what was recommended and what users did, by model version and policy.

    STORE is a SQLite file, postgresql://... or redis://..., and may be in use by servers. A row has the number of
    slates and of users, the share of slates with a response, and the reward per slate: the share of its slots that were
    interacted with, weighted by DCG's rank discounts. Intervals (95 %) resample users.
    """
    from serve.event_log.outcomes import outcomes
    from serve.event_log.slates import read_slates
    from serve.stores import open_store
    from serve.stores.base import StoreError

    if "://" not in store and not Path(store).is_file():
        raise click.ClickException(f"{store}: expected a store, there is no such file")
    try:
        with open_store(store) as opened:
            slates = read_slates(opened, attribution_window)
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    found = outcomes(slates)
    click.echo(json.dumps(as_json(slates, found), indent=2) if form == "json" else as_table(slates, found))


def as_json(slates: "Slates", found: "Outcomes") -> dict[str, Any]:
    """Plain values; an interval that there is not is null."""
    return {
        "attribution_window_s": slates.attribution_window,
        "left_out": slates.left_out,
        "arms": [
            {
                **one.arm._asdict(),
                "slates": one.slates,
                "users": one.users,
                **_figures(one.interaction_rate, one.reward),
            }
            for one in found.arms
        ],
        "differences": [
            {
                "arm": one.arm._asdict(),
                "baseline": one.baseline._asdict(),
                **_figures(one.interaction_rate, one.reward),
                "verdict": one.verdict,
            }
            for one in found.differences
        ],
    }


def _figures(rate: "Estimate", reward: "Estimate") -> dict[str, Any]:
    return {
        name: {part: None if math.isnan(value) else value for part, value in estimate._asdict().items()}
        for name, estimate in (("interaction_rate", rate), ("reward", reward))
    }


def as_table(slates: "Slates", found: "Outcomes") -> str:
    """Text with a row for each arm, then a sentence for each difference."""
    header = ("model version", "policy", "slates", "users", "interaction rate", "reward per slate")
    rows = [
        (*one.arm, str(one.slates), str(one.users), str(one.interaction_rate), str(one.reward)) for one in found.arms
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    left_out = "".join(f"; {count} slates {reason} left out" for reason, count in slates.left_out.items())
    lines.append(f"Responses within {slates.attribution_window} s{left_out}.")
    lines += [f"{one.verdict}." for one in found.differences]
    return "\n".join(line.rstrip() for line in [*lines, *([NOTE] if found.differences else [])])
