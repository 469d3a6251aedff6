"""Whether items of a user's history come again more often than chance has it: then they may be recommended."""

import math
from typing import NamedTuple

import numpy as np

from jaxrec.config import SeenItems
from jaxrec.data.prepared import PreparedData

LEAST_SHARE = 0.03  # of validation targets, beyond chance
LEAST_Z = 3.0  # one-sided, over users: one log in 700 without repeats would be taken for one with them


class FoundRepeats(NamedTuple):
    """`share`: of validation targets that the user's history has already; `chance`: of as many drawn by popularity;
    `z`: the mean difference over users, in standard errors (0 for fewer than two users)."""

    share: float
    chance: float
    z: float

    def seen(self) -> SeenItems:
        """ALLOW where the share is clearly beyond chance."""
        beyond = self.share - self.chance >= LEAST_SHARE and self.z >= LEAST_Z
        return SeenItems.ALLOW if beyond else SeenItems.EXCLUDE

    def __str__(self) -> str:
        verb = "may be recommended" if self.seen() is SeenItems.ALLOW else "are not recommended"
        return (
            f"items of the history {verb} again: {self.share:.1%} of the validation targets are in it, "
            f"{self.chance:.1%} by chance (to change that: --seen)"
        )


def found_repeats(data: PreparedData) -> FoundRepeats:
    """Compares the targets of validation with draws by training popularity, each with its user's history."""
    histories, cases = data.histories, data.split.validation
    popularity = data.train_popularity()
    popularity = popularity / max(popularity.sum(), 1)
    repeated, chance = np.zeros(len(cases)), np.zeros(len(cases))
    for at, (user, row) in enumerate(zip(cases.users, cases.rows, strict=True)):
        history = histories.items[histories.offsets[user] : row]
        repeated[at] = histories.items[row] in history
        chance[at] = popularity[np.unique(history)].sum()
    users, user = np.unique(cases.users, return_inverse=True)
    differences = np.bincount(user, repeated - chance) / np.bincount(user)
    z = 0.0
    if len(users) > 1:
        error = differences.std(ddof=1) / math.sqrt(len(users))
        z = float(differences.mean() / error) if error else 0.0
    return FoundRepeats(float(repeated.mean()), float(chance.mean()), z)
