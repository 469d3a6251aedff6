"""A small log for the simulator: users with a liking for one genre, and items that all rate alike."""

import numpy as np
import pandas as pd

from jaxrec.prepare import PreparedData
from jaxrec.schema import ITEM, RATING, TIME, USER

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
