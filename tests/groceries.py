"""A log of groceries whose rule is known, and the best that any recommender can do on it."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from jaxrec.data.schema import ITEM, SECONDS_PER_DAY, TIME, USER
from jaxrec.evaluation.metrics import ndcg

NOISE = 0.2  # of the logarithm of the time between two purchases of a staple
START = 1_000_000_000


class Groceries(NamedTuple):
    """`log`: user, item, time. `best`: the mean NDCG@10 of the last event of each user, by one who knows the rule."""

    log: pd.DataFrame
    best: float


def groceries(users: int, items: int, staples: int, days: int, new_share: float, seed: int) -> Groceries:
    """Each user has `staples` of the items, each bought again after its own period of 3 to 20 days, times lognormal
    noise, and now and then some other item at random: `new_share` of the events.

    Purchases of a staple are a renewal process: given that something is bought at a time, a staple is bought with a
    probability in proportion to its hazard, and another item in proportion to the rate of those. So the best order is
    that of the hazards.
    """
    rng = np.random.default_rng(seed)
    columns, hits = [], []
    for user in range(users):
        chosen = 1 + rng.choice(items, staples, replace=False)
        periods = np.exp(rng.uniform(np.log(3), np.log(20), staples))
        times, bought = [], []
        for item, period in zip(chosen, periods, strict=True):
            waits = period * np.exp(NOISE * rng.normal(size=int(3 * days / period) + 3))
            waits[0] *= rng.random()
            of_item = np.cumsum(waits)
            times.append(of_item[of_item < days])
            bought.append(np.full(len(times[-1]), item))
        rate = new_share / (1 - new_share) * sum(map(len, times)) / days
        times.append(rng.uniform(0, days, rng.poisson(rate * days)))
        bought.append(rng.integers(1, items + 1, len(times[-1])))
        time, item = np.concatenate(times), np.concatenate(bought)
        order = np.argsort(time)
        time, item = time[order], item[order]
        columns.append((np.full(len(item), user), item, START + (time * SECONDS_PER_DAY).astype(np.int64)))
        hits.append(_rank(item, time, chosen, periods, rate / items, items))
    frame = dict(zip((USER, ITEM, TIME), map(np.concatenate, zip(*columns, strict=True)), strict=True))
    return Groceries(pd.DataFrame(frame), float(ndcg(np.array(hits), 10).mean()))


def _rank(
    item: np.ndarray, time: np.ndarray, staples: np.ndarray, periods: np.ndarray, rate_of_other: float, items: int
) -> float:
    """Of the last event's item, by the hazards at its time; another item than a staple has the mean rank of those."""
    hazard = np.full(items + 1, rate_of_other)
    hazard[0] = 0.0
    for staple, period in zip(staples, periods, strict=True):
        before = time[:-1][item[:-1] == staple]
        if len(before):
            wait = scipy.stats.lognorm(NOISE, scale=period)
            age = time[-1] - before[-1]
            hazard[staple] += np.exp(wait.logpdf(age) - wait.logsf(age))
    above, equal = (hazard > hazard[item[-1]]).sum(), (hazard[1:] == hazard[item[-1]]).sum()
    return above + (equal + 1) / 2
