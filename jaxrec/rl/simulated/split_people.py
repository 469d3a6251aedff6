"""Two simulators from one log of people on whom a run was not trained: one to train a policy, one to judge it.

They have no user in common, and their users' tastes are of different kinds: nearest neighbours by cosine train, EASE
judges. So what a policy gains in the second one is not a weakness of the first one that it found. Who trains one policy
does not judge the next one either, whatever the seed.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxrec.data.histories import Histories
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, USER
from jaxrec.errors import DataError
from jaxrec.rl.served.train import trains
from jaxrec.rl.simulated.fit import (
    MIN_HISTORY,
    ItemItem,
    SimulatorFit,
    ease,
    fit_simulator,
    shrunk_cosine,
    simulator_histories,
)

MIN_USERS = 40
MIN_RATED = 20  # events with a rating, of each of both
MAX_USERS = 2000  # of both together; more make the same simulators in more time
MAX_ITEMS = 10_000  # the item-item matrix has the square of that


class TwoSimulators(NamedTuple):
    """`training` and `judging`, and the raw ids of the users of each; `told`: who of the log's users is in which, and
    how well they fit; `digest`: of the events they were fitted on."""

    training: SimulatorFit
    judging: SimulatorFit
    training_users: np.ndarray
    judging_users: np.ndarray
    told: str
    digest: str


def two_simulators(interactions: pd.DataFrame, data: PreparedData, seed: int) -> TwoSimulators:
    """From interactions (user_id, item_id, rating, timestamp) on the catalogue of `data`. Users that `data` has, and
    those with too few events on its items, are left out. `seed`: of what is drawn, which is not who trains and who
    judges. Deterministic.

    Raises DataError where the run or the log has no ratings, the catalogue is too large, too few users or ratings are
    left, or one of the simulators does not foresee held-out events better than popularity does, or than chance.
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
    chosen = np.sort(np.random.default_rng(0).permutation(users)[:MAX_USERS])  # the same for every seed
    training = trains([str(user) for user in chosen])  # one split for every seed
    digest = hashlib.sha256()

    parts = [known_items[known_items[USER].isin(some)] for some in (chosen[training], chosen[~training])]
    rated = [int(part[RATING].notna().sum()) for part in parts]
    if min(rated) < MIN_RATED:
        raise DataError(
            f"{rated[0]} events with a rating are of the users who would train and {rated[1]} of those who would "
            f"judge, expected at least {MIN_RATED} of each"
        )

    def fit(part: pd.DataFrame, item_item: ItemItem, name: str) -> tuple[SimulatorFit, np.ndarray]:
        histories, names = simulator_histories(part, data.catalog, data.users)
        digest.update(_digest(histories, names.raw_ids))
        star = float(np.diff(stars).min())
        found = fit_simulator(histories, data.catalog.genre_matrix(), scale, star, seed, item_item=item_item)
        if found.nats >= min(found.popularity_nats, found.uniform_nats):
            raise DataError(
                f"the {name} simulator does not know its users: {_fitted(found)}, expected less than both; a log of "
                "more users may help"
            )
        return found, names.raw_ids

    train, training_users = fit(parts[0], shrunk_cosine, "training")
    judge, judging_users = fit(parts[1], ease, "judging")
    trained_on = everybody - strange[USER].nunique()
    told = (
        f"{everybody} users, of whom {trained_on} are left out because the run was trained on them, and "
        f"{everybody - trained_on - len(chosen)} for other reasons (not more than {MIN_HISTORY} events on its items, "
        f"or more than {MAX_USERS} users); {training.sum()} train (taste by nearest neighbours), {(~training).sum()} "
        f"judge (taste by EASE). Held-out events, training: {_fitted(train)}; judging: {_fitted(judge)}"
    )
    return TwoSimulators(train, judge, training_users, judging_users, told, digest.hexdigest())


def _fitted(fit: SimulatorFit) -> str:
    return f"{fit.nats:.3f} nats each (popularity alone {fit.popularity_nats:.3f}, chance {fit.uniform_nats:.3f})"


def _digest(histories: Histories, names: np.ndarray) -> bytes:
    digest = hashlib.sha256("\n".join(map(str, names.tolist())).encode())
    for column in (histories.offsets, histories.items, histories.ratings, histories.times):
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()
