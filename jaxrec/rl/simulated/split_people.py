"""Two simulators from one log of users that a run was not trained on: one trains a policy, the other evaluates it.

They have no user in common, and their tastes follow different models: nearest neighbours by cosine for training, EASE
for evaluation. So a gain in the second simulator does not exploit a weakness of the first one. The split of users does
not depend on the seed, so that a user that trained one policy never evaluates another.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxrec.data.histories import Histories
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, USER
from jaxrec.errors import DataError
from jaxrec.rl.served.train import is_training_user
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
MAX_SIMULATED_ITEMS = 10_000  # the item-item matrix has the square of that


class TwoSimulators(NamedTuple):
    """`training` and `evaluation`, and the raw ids of the users of each; `training_histories`: the real events of those
    that train; `summary`: how many users are in which, and how well they fit; `digest`: of the events they were fitted
    on."""

    training: SimulatorFit
    evaluation: SimulatorFit
    training_users: np.ndarray
    evaluation_users: np.ndarray
    training_histories: Histories
    summary: str
    digest: str


def two_simulators(interactions: pd.DataFrame, data: PreparedData, seed: int) -> TwoSimulators:
    """From interactions (user_id, item_id, rating, timestamp) on the catalogue of `data`. Users of `data`, and
    users with too few events on its items, are left out. `seed` decides the fits, but not the split. Deterministic.

    Raises DataError where the run or the log has no ratings, the catalogue is too large, too few users or ratings are
    left, or one of the simulators does not predict held-out events better than popularity and than chance.
    """
    scale, items = data.config.rating_scale, len(data.catalog)
    if scale is None:
        raise DataError("the run was trained without ratings, and simulated users rate; expected a log with ratings")
    if items > MAX_SIMULATED_ITEMS:
        raise DataError(f"the run has {items} items, expected at most {MAX_SIMULATED_ITEMS} for simulated users")
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
            f"{len(users)} of {everybody} users were not in the run's training data and have more than {MIN_HISTORY} "
            f"events on its items, expected at least {MIN_USERS}"
        )
    chosen = np.sort(np.random.default_rng(0).permutation(users)[:MAX_USERS])  # the same for every seed
    training = is_training_user([str(user) for user in chosen])  # one split for every seed
    digest = hashlib.sha256()

    parts = [known_items[known_items[USER].isin(some)] for some in (chosen[training], chosen[~training])]
    rated = [int(part[RATING].notna().sum()) for part in parts]
    if min(rated) < MIN_RATED:
        raise DataError(
            f"{rated[0]} events with a rating are left for training and {rated[1]} for evaluation, expected at least "
            f"{MIN_RATED} of each"
        )

    def fit(part: pd.DataFrame, item_item: ItemItem, name: str) -> tuple[SimulatorFit, np.ndarray, Histories]:
        histories, names = simulator_histories(part, data.catalog, data.users)
        digest.update(_digest(histories, names.raw_ids))
        star = float(np.diff(stars).min())
        found = fit_simulator(histories, data.catalog.genre_matrix(), scale, star, seed, item_item=item_item)
        if found.nats >= min(found.popularity_nats, found.uniform_nats):
            raise DataError(
                f"the {name} simulator does not predict its users: {_fitted(found)}, expected less than both; a log "
                "of more users may help"
            )
        return found, names.raw_ids, histories

    train, training_users, training_histories = fit(parts[0], shrunk_cosine, "training")
    evaluation, evaluation_users, _ = fit(parts[1], ease, "evaluation")
    trained_on = everybody - strange[USER].nunique()
    summary = (
        f"{everybody} users, of whom {trained_on} are left out because the run was trained on them, and "
        f"{everybody - trained_on - len(chosen)} for other reasons (not more than {MIN_HISTORY} events on its items, "
        f"or more than {MAX_USERS} users); {training.sum()} for training (taste by nearest neighbours), "
        f"{(~training).sum()} for evaluation (taste by EASE). Held-out events, training: {_fitted(train)}; evaluation: "
        f"{_fitted(evaluation)}"
    )
    digests = digest.hexdigest()
    return TwoSimulators(train, evaluation, training_users, evaluation_users, training_histories, summary, digests)


def _fitted(fit: SimulatorFit) -> str:
    return f"{fit.nats:.3f} nats each (popularity alone {fit.popularity_nats:.3f}, chance {fit.uniform_nats:.3f})"


def _digest(histories: Histories, names: np.ndarray) -> bytes:
    digest = hashlib.sha256("\n".join(map(str, names.tolist())).encode())
    for column in (histories.offsets, histories.items, histories.ratings, histories.times):
        digest.update(np.ascontiguousarray(column).data)
    return digest.digest()
