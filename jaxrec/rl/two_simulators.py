"""Two simulators from one log of people on whom a run was not trained: one to train a policy, one to judge it.

They have no user in common, and their users' tastes are of different kinds: nearest neighbours by cosine train, EASE
judges. So what a policy gains in the second one is not a weakness of the first one that it found.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxrec.histories import Histories
from jaxrec.prepare import PreparedData
from jaxrec.rl.environments.fit_simulator import (
    MIN_HISTORY,
    ItemItem,
    SimulatorFit,
    ease,
    fit_simulator,
    shrunk_cosine,
    simulator_histories,
)
from jaxrec.rl.train_from_log import trains
from jaxrec.schema import ITEM, RATING, USER, DataError

MIN_USERS = 20
MAX_USERS = 2000  # of both together; more make the same simulators in more time
MAX_ITEMS = 10_000  # the item-item matrix has the square of that


class TwoSimulators(NamedTuple):
    """`training` and `judging`; `told`: who of the log's users is in which; `digest`: of the events they were fitted
    on."""

    training: SimulatorFit
    judging: SimulatorFit
    told: str
    digest: str


def two_simulators(interactions: pd.DataFrame, data: PreparedData, seed: int) -> TwoSimulators:
    """From interactions (user_id, item_id, rating, timestamp) on the catalogue of `data`. Users that `data` has, and
    those with too few events on its items, are left out. Deterministic.

    Raises DataError where the run or the log has no ratings, the catalogue is too large, or too few users are left.
    """
    scale, items = data.config.rating_scale, len(data.catalog)
    if scale is None:
        raise DataError("the run was trained without ratings, and simulated users rate; expected a log with ratings")
    if items > MAX_ITEMS:
        raise DataError(f"the run has {items} items, expected at most {MAX_ITEMS} for simulated users")
    stars = np.unique(interactions[RATING].dropna().to_numpy())
    if len(stars) < 2:
        raise DataError(f"the log of the simulated users has {len(stars)} different ratings, expected two or more")
    everybody = interactions[USER].nunique()
    strange = interactions[~interactions[USER].astype(str).isin(data.users.raw_ids.astype(str))]
    known_items = strange[data.catalog.ids.encode(strange[ITEM].to_numpy()) > 0]
    counts = known_items.groupby(USER)[ITEM].size()
    users = counts.index[counts > MIN_HISTORY].to_numpy()
    if len(users) < MIN_USERS:
        raise DataError(
            f"{len(users)} users of {everybody} are others than those that the run was trained on and have more than "
            f"{MIN_HISTORY} events on its items, expected at least {MIN_USERS}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(users)[:MAX_USERS])
    training = trains([str(user) for user in chosen], seed)
    digest = hashlib.sha256()

    def fit(some: np.ndarray, item_item: ItemItem) -> SimulatorFit:
        histories, names = simulator_histories(known_items[known_items[USER].isin(some)], data.catalog, data.users)
        digest.update(_digest(histories, names.raw_ids))
        star = float(np.diff(stars).min())
        return fit_simulator(histories, data.catalog.genre_matrix(), scale, star, seed, item_item=item_item)

    fits = fit(chosen[training], shrunk_cosine), fit(chosen[~training], ease)
    trained_on = everybody - strange[USER].nunique()
    told = (
        f"{everybody} users, of whom {trained_on} are left out because the run was trained on them, and "
        f"{everybody - trained_on - len(chosen)} for other reasons (not more than {MIN_HISTORY} events on its items, "
        f"or more than {MAX_USERS} users); {training.sum()} train (taste by nearest neighbours), {(~training).sum()} "
        "judge (taste by EASE)"
    )
    return TwoSimulators(*fits, told, digest.hexdigest())


def _digest(histories: Histories, names: np.ndarray) -> bytes:
    digest = hashlib.sha256("\n".join(map(str, names.tolist())).encode())
    for column in (histories.offsets, histories.items, histories.ratings, histories.times):
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()
