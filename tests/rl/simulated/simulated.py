"""A small log for the simulator: users with a liking for one genre, and items that all rate alike; and one user of a
simulator by hand."""

import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.rl.simulated.users import TASTE_EVENTS, SimulatorParams

FIRST_USER = 1001
"""Users of `small_data` have smaller ids."""


def genre_lovers(data: PreparedData, users: int = 40, events: int = 24, seed: int = 0) -> pd.DataFrame:
    """Interactions of other users than those of `data`, on its catalogue."""
    rng = np.random.default_rng(seed)
    matrix = data.catalog.genre_matrix()[1:]
    frames = []
    for user in range(users):
        liked = matrix[:, user % matrix.shape[1]] > 0
        weights = np.where(liked, 8.0, 1.0)
        places = rng.choice(len(matrix), events, replace=False, p=weights / weights.sum())
        quality = 1.5 + 3.0 * (7 * places % 10) / 9
        ratings = np.clip(np.round(2 * (quality + 0.3 * rng.standard_normal(events))) / 2, 0.5, 5)
        frames.append(
            pd.DataFrame(
                {
                    USER: FIRST_USER + user,
                    ITEM: data.catalog.ids.raw_ids[places],
                    RATING: ratings.astype(np.float32),
                    TIME: 1_000_000_000 + 3600 * np.arange(events),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def hand_made() -> SimulatorParams:
    """Four items: 1 draws 2 with 0.5, and 3 with 0.25; items 1 and 2 share a genre."""
    item_item = np.zeros((5, 5), np.float32)
    item_item[1, 2], item_item[1, 3], item_item[4, 3] = 0.5, 0.25, 1.0
    genres = np.array([[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    scalars = {
        "taste": 2.0,
        "decay": 0.5,
        "popularity": 0.1,
        "repetition": -0.3,
        "position_bias": 1.0,
        "salience": 3.0,
        "mean_rating": 3.0,
        "rating_noise": 0.0,
        "rating_share": 0.5,
        "leave": 0.0,
    }
    profile = np.zeros((1, TASTE_EVENTS), np.int32)
    profile[0, :2] = [4, 1]
    return SimulatorParams(
        item_item=jnp.asarray(item_item),
        log_popularity=jnp.array([0.0, 1.0, 2.0, 3.0, 4.0]),
        genre_directions=jnp.asarray(genres),
        item_bias=jnp.array([0.0, 0.5, 0.0, -0.5, 0.0]),
        item_factors=jnp.array([[0.0], [1.0], [2.0], [3.0], [9.0]]),
        user_bias=jnp.array([0.25]),
        user_factors=jnp.array([[0.5]]),
        rating_range=jnp.array([1.0, 5.0, 1.0]),
        profile=jnp.asarray(profile),
        profile_rating=jnp.asarray((profile > 0) * 4.0, jnp.float32),
        **{name: jnp.float32(number) for name, number in scalars.items()},
    )
