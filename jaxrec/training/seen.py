"""Decides from validation whether items of a user's history may be recommended again."""

import math
from typing import NamedTuple

import numpy as np

from jaxrec.config import SeenItems
from jaxrec.data.prepared import PreparedData
from jaxrec.data.shares import TrainingShare
from jaxrec.training.loop import known_share
from jaxrec.training.processes import sum_of_all

LEAST_SHARE = 0.03
"""Of the validation targets that must be in their user's history."""
LEAST_OF_CHANCE = 0.75
"""Of the share that chance has. Users with a smaller one avoid the items that they know."""
LEAST_Z = 3.0
"""Standard errors by which the share must be above 0, so that it is not that of a few users."""


class FoundRepeats(NamedTuple):
    """How often the targets of validation are items of their user's history.

    Attributes:
        share: Of the targets that are.
        chance: The same share if the targets were drawn by their popularity in training.
        z: The mean over users of each user's own share, divided by its standard error: infinite where all users have
            the same share above 0, and 0 for fewer than two users.
    """

    share: float
    chance: float
    z: float

    def choice(self) -> SeenItems:
        """ALLOW where enough targets are items of the history, and where users do not avoid these; else EXCLUDE."""
        enough = self.share >= LEAST_SHARE and self.z >= LEAST_Z
        return SeenItems.ALLOW if enough and self.share >= LEAST_OF_CHANCE * self.chance else SeenItems.EXCLUDE

    def __str__(self) -> str:
        verb = "may be recommended" if self.choice() is SeenItems.ALLOW else "are not recommended"
        return (
            f"items of the history {verb} again: {self.share:.1%} of the validation targets are in their user's "
            f"history, by chance it would be {self.chance:.1%} (to decide otherwise: --seen)"
        )


def found_repeats(data: PreparedData | TrainingShare) -> FoundRepeats:
    """Counts the validation targets that are items of their user's history. All processes have to call this.

    Args:
        data: With at least one validation case; of several processes each gives all of it, or its own share.

    Returns:
        Their share, beside that of targets drawn by training popularity.
    """
    share = known_share(data)
    popularity = share.train_popularity() / max(share.train_popularity().sum(), 1)
    totals = sum_of_all(np.sum([_sums(part, popularity) for part in share.parts], axis=0))
    cases, repeated, chance, users, of_users, of_squares = totals.tolist()
    z, mean = 0.0, of_users / users
    if users > 1 and mean > 0:
        error = math.sqrt(max(of_squares - users * mean**2, 0.0) / (users - 1) / users)
        z = mean / error if error else math.inf
    return FoundRepeats(repeated / cases, chance / cases, z)


def _sums(data: PreparedData, popularity: np.ndarray) -> list[float]:
    """Of one part: validation cases, those whose target is in the history, and the chances of that; users with cases,
    the sum of their shares of such cases, and of the squares of these."""
    histories, cases = data.histories, data.split.validation
    if not len(cases):
        return [0.0] * 6
    repeated = cases.repeated(histories)
    starts = histories.offsets[cases.users]
    chance = [
        popularity[np.unique(histories.items[start:row])].sum() for start, row in zip(starts, cases.rows, strict=True)
    ]
    users, user = np.unique(cases.users, return_inverse=True)
    shares = np.bincount(user, repeated) / np.bincount(user)
    return [len(cases), repeated.sum(), np.sum(chance), len(users), shares.sum(), np.square(shares).sum()]
