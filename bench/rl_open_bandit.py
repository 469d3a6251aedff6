"""Estimates each of two policies from the log of the other one, on real feedback, for bench/rl_open_bandit.md.

    python -m pip download --no-deps obp==0.4.1
    python -m bench.rl_open_bandit obp-0.4.1-py3-none-any.whl [--publish]

The Open Bandit Dataset (Saito et al. 2020, arXiv:2008.07146) has clicks on items of a fashion shop that two policies
showed in the same week, at random and by Bernoulli Thompson sampling, with the propensity of each. The package of the
Open Bandit Pipeline holds 10,000 rows for each policy and each of three campaigns. A row is one item on one of three
positions; it names no user, so rows count as independent.

What a policy earned in its own log, its mean click rate, is compared with the estimate from the other policy's log. The
random policy's propensities are 1 / items. Thompson sampling learned during the week, so its propensities change from
row to row; in the other log it is taken as its mean over the week: on each position the share that each item has in its
own log. No click goes into that. The reward model of doubly robust is the click rate of an item, shrunk to that of the
campaign, of the other half of the rows.
"""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd

from bench.estimators import ips
from bench.publish import Page, less, publish_option
from jaxrec.rl.ope.estimators import Terms, doubly_robust, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.intervals import OPE_SAMPLES, Interval, interval
from jaxrec.rl.ope.sample_size import effective_sample_size
from jaxrec.rl.ope.weights import ImportanceWeights, importance_weights

RANDOM, THOMPSON = "random", "bts"
NAMES = {RANDOM: "random", THOMPSON: "Thompson sampling"}
CAMPAIGNS = ("all", "men", "women")
HALVES, HALF_SAMPLES = 100, 500  # random halves of each log, of the page, and bootstrap samples of each
PRIOR = 100.0  # rows with the campaign's click rate that an item's own begins with
SCALE = 1e3  # clicks per 1,000 rows


class Log(NamedTuple):
    """`item` and `position` [rows] int, from 0; `click` [rows] float64; `propensity` [rows] float64 of the item."""

    item: np.ndarray
    position: np.ndarray
    click: np.ndarray
    propensity: np.ndarray

    def at(self, rows: np.ndarray) -> "Log":
        """Some of the rows."""
        return Log(*(column[rows] for column in self))


def read_logs(wheel: Path) -> dict[tuple[str, str], Log]:
    """The logs by policy and campaign.

    Raises:
        click.ClickException: The file is no package that holds them.
    """
    found = {}
    try:
        with zipfile.ZipFile(wheel) as package:
            for policy in NAMES:
                for campaign in CAMPAIGNS:
                    rows = package.read(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv")
                    table = pd.read_csv(io.BytesIO(rows), usecols=["item_id", "position", "click", "propensity_score"])
                    found[policy, campaign] = Log(
                        table["item_id"].to_numpy(),
                        table["position"].to_numpy() - 1,
                        table["click"].to_numpy(np.float64),
                        table["propensity_score"].to_numpy(np.float64),
                    )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise click.ClickException(f"{wheel}: expected the wheel of obp 0.4.1 with its data ({error})") from error
    return found


def mean_policy(own: Log, policy: str, shape: tuple[int, int]) -> np.ndarray:
    """[positions, items] float64: how often the policy shows each item on each position, over the week."""
    if policy == RANDOM:
        return np.full(shape, 1 / shape[1])
    shown = np.zeros(shape)
    np.add.at(shown, (own.position, own.item), 1.0)
    return shown / shown.sum(axis=1, keepdims=True)


def click_rates(log: Log, items: int) -> np.ndarray:
    """[items] float64, shrunk to the mean of all."""
    shown, clicked = (np.bincount(log.item, weights, items) for weights in (None, log.click))
    return (clicked + PRIOR * log.click.mean()) / (shown + PRIOR)


def terms_of(log: Log, policy: np.ndarray) -> tuple[ImportanceWeights, dict[str, Terms]]:
    """The terms of each estimator of the value of a `policy` [positions, items] from a log of another one."""
    with np.errstate(divide="ignore"):
        new = np.log(policy[log.position, log.item])
    weights = importance_weights(new, np.log(log.propensity))
    q_logged, q_new = np.zeros((2, len(log.item)))
    half = np.arange(len(log.item)) % 2
    for part in (0, 1):
        rates, rows = click_rates(log.at(half != part), policy.shape[1]), half == part
        q_logged[rows] = rates[log.item[rows]]
        q_new[rows] = (policy @ rates)[log.position[rows]]
    model = log.click, q_logged, q_new
    return weights, {
        "IPS": ips(weights, log.click),
        "SNIPS": snips(weights, log.click),
        "doubly robust": doubly_robust(weights, *model),
        "self-normalized doubly robust": self_normalized_doubly_robust(weights, *model),
    }


def difference(estimate: Interval, own: Interval) -> Interval:
    """The estimate less the policy's own mean. The two logs are independent, so each bound is as far from the
    difference as the square root of the two intervals' squared distances together."""
    mean = estimate.value - own.value
    low = float(np.hypot(estimate.value - estimate.low, own.high - own.value))
    high = float(np.hypot(estimate.high - estimate.value, own.value - own.low))
    return Interval(mean, mean - low, mean + high, float(np.hypot(estimate.standard_error, own.standard_error)))


def table(campaign: str, logs: dict[tuple[str, str], Log], halves: int) -> list[str]:
    """The campaign's table: the estimates from the whole logs, and how often those from halves hold the own mean."""
    lines = [
        f"\n## Campaign {campaign}\n",
        "| policy | from the other log | effective rows | clicks per 1,000 rows | less its mean | halves holding it |",
        "|---|---|---|---|---|---|",
    ]
    items, positions = (
        1 + max(int(getattr(logs[policy, campaign], column).max()) for policy in NAMES) for column in Log._fields[:2]
    )
    for policy, other in ((RANDOM, THOMPSON), (THOMPSON, RANDOM)):
        own_log, log = logs[policy, campaign], logs[other, campaign]
        own, shown = interval(on_policy(own_log.click)), mean_policy(own_log, policy, (positions, items))
        weights, terms = terms_of(log, shown)
        size = float(effective_sample_size(weights))
        lines.append(f"| {NAMES[policy]} | (its own mean) | | {numbers(own)} | | |")
        held = dict.fromkeys(terms, 0)
        rng = np.random.default_rng(0)
        for number in range(halves):
            half = log.at(rng.permutation(len(log.item))[: len(log.item) // 2])
            for name, of_half in terms_of(half, shown)[1].items():
                found = interval(of_half, samples=HALF_SAMPLES, seed=number)
                held[name] += found.low <= own.value <= found.high
        for name, of_name in terms.items():
            found = interval(of_name)
            cells = [name, f"{size:,.0f}", numbers(found), numbers(difference(found, own), "+.2f")]
            lines.append("| | " + " | ".join([*cells, f"{held[name] / halves:.2f}"]) + " |")
    return lines


def numbers(found: Interval, sign: str = ".2f") -> str:
    """Clicks per 1,000 rows."""
    value, low, high = (SCALE * bound for bound in (found.value, found.low, found.high))
    return f"{value:{sign}} ({low:{sign}} to {high:{sign}})"


@click.command(context_settings={"show_default": True})
@click.argument("wheel", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--halves", type=click.IntRange(1), default=HALVES, help="Random halves of each log.")
@publish_option
def main(wheel: Path, halves: int, publish: bool) -> None:
    """Estimates, then prints the tables."""
    page = Page("rl_open_bandit", "Offline evaluation on real feedback", publish, less=less(halves=(halves, HALVES)))
    logs = read_logs(wheel)
    body = [
        *(part.replace("\n", " ") + "\n" for part in (__doc__ or "").strip().split("\n\n")[2:]),
        f"95 % intervals by {OPE_SAMPLES:,} bootstrap samples of rows, studentized. The last column: of {halves} "
        f"random halves of the other log, the share whose interval ({HALF_SAMPLES} samples) holds the mean of the "
        "policy's own whole log. That mean has an error of its own and the halves overlap, so .95 is not expected.",
    ]
    for campaign in CAMPAIGNS:
        body += table(campaign, logs, halves)
    page.write(body)


if __name__ == "__main__":
    main()
