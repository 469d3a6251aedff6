"""How the arms of a log compare: interaction rate and reward per slate, with intervals that resample users."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.event_log.slates import Arm, Slates

SAMPLES = 1000
DRAWN_AT_ONCE = 1_000_000  # users, over some samples
PARTS = 3  # slates, slates with a response, reward
LEAST_USERS = 30  # of an arm: intervals of fewer are too narrow


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval, which is NaN for fewer than two users."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "no interval" if math.isnan(self.low) else f"{self.low:.4f} to {self.high:.4f}"
        return f"{self.mean:.4f} ({interval})"


class ArmOutcome(NamedTuple):
    """What came of the slates of one arm."""

    arm: Arm
    slates: int
    users: int
    interaction_rate: Estimate
    """Share of slates with a response."""
    reward: Estimate
    """Mean over slates."""


class Difference(NamedTuple):
    """An arm less the arm with the most slates."""

    arm: Arm
    baseline: Arm
    interaction_rate: Estimate
    reward: Estimate
    verdict: str


class Outcomes(NamedTuple):
    """The arms, that with the most slates first, and each of the others less that one."""

    arms: list[ArmOutcome]
    differences: list[Difference]


def outcomes(slates: Slates, seed: int = 0) -> Outcomes:
    """Compares the arms of a log.

    Users are drawn with replacement, all slates of a user together, in the same draws for all arms: a user who met
    several arms counts in each, so that their difference is paired as far as the log allows.

    Args:
        slates: Of the log.
        seed: Of the draws.

    Returns:
        The outcomes; no arm where there are no slates.
    """
    if not len(slates.arm):
        return Outcomes([], [])
    names, arm = np.unique(slates.arm, return_inverse=True)
    of_arms = [_sums_by_user(slates, np.flatnonzero(arm == place)) for place in range(len(names))]
    users = np.unique(slates.user)  # all of a user's slates may be left out
    met = np.array([len(one.users) for one in of_arms])
    whole = np.array([one.sums.sum(axis=0) for one in of_arms])
    order = np.argsort(-whole[:, 0], kind="stable")
    totals = _resampled(users, of_arms, seed)
    with np.errstate(invalid="ignore"):
        drawn = totals[..., 1:] / totals[..., :1]  # [samples, arms, rate and reward]; NaN: a sample without the arm
    means = whole[:, 1:] / whole[:, :1]
    enough = met > 1
    arms = [slates.arms[name] for name in names]
    found = [
        ArmOutcome(
            arms[at],
            int(whole[at, 0]),
            int(met[at]),
            *(_estimate(means[at, figure], drawn[:, at, figure], bool(enough[at])) for figure in (0, 1)),
        )
        for at in order
    ]
    differences = []
    for at in order[1:]:
        first = order[0]
        rate, reward = (
            _estimate(
                means[at, figure] - means[first, figure],
                drawn[:, at, figure] - drawn[:, first, figure],
                bool(enough[at] and enough[first]),
            )
            for figure in (0, 1)
        )
        said = verdict(arms[at], arms[first], reward, int(min(met[at], met[first])))
        differences.append(Difference(arms[at], arms[first], rate, reward, said))
    return Outcomes(found, differences)


def verdict(arm: Arm, baseline: Arm, reward: Estimate, users: int) -> str:
    """Which of two arms is better, in a sentence.

    Args:
        arm: One of them.
        baseline: The other one.
        reward: The reward per slate of `arm` less that of `baseline`.
        users: How many users the arm with fewer of them has.

    Examples:
        >>> verdict(Arm("2", "reinforce"), Arm("1", "supervised"), Estimate(0.02, 0.01, 0.03), 900)
        '2 (reinforce) is better than 1 (supervised): reward per slate +0.0200 (+0.0100 to +0.0300)'
    """
    one, other = (f"{each.model_version} ({each.policy})" for each in (arm, baseline))
    if users < LEAST_USERS:
        return f"too few users to compare {one} with {other}: {users}, expected at least {LEAST_USERS} of each"
    figures = f"reward per slate {reward.mean:+.4f} ({reward.low:+.4f} to {reward.high:+.4f})"
    if reward.low <= 0 <= reward.high:
        return f"no difference can be seen between {one} and {other}: {figures}"
    return f"{one} is {'better' if reward.low > 0 else 'worse'} than {other}: {figures}"


class _ByUser(NamedTuple):
    """What an arm's slates came to: `users` `[users]`, in order, and `sums` `[users, PARTS]`."""

    users: NDArray[np.int32]
    sums: NDArray[np.float64]


def _sums_by_user(slates: Slates, rows: NDArray[np.int64]) -> _ByUser:
    """Of the slates `rows`: memory is needed for the users who met them, not for all."""
    users, place = np.unique(slates.user[rows], return_inverse=True)
    parts = (None, slates.responded[rows], slates.reward[rows])
    return _ByUser(users, np.stack([np.bincount(place, part, len(users)) for part in parts], axis=1).astype(np.float64))


def _resampled(users: NDArray[np.int32], of_arms: Sequence[_ByUser], seed: int) -> NDArray[np.float64]:
    """`[SAMPLES, arms, PARTS]`: the sums of each arm over users that are drawn with replacement from `users`."""
    places = [np.searchsorted(users, one.users) for one in of_arms]
    samples = [
        np.stack([counts[:, place] @ one.sums for place, one in zip(places, of_arms, strict=True)], axis=1)
        for counts in _draws(len(users), np.random.default_rng(seed))
    ]
    return np.concatenate(samples)


def _draws(users: int, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Parts `[some samples, users]`: how often each sample holds each user."""
    size = max(1, DRAWN_AT_ONCE // users)
    for start in range(0, SAMPLES, size):
        rows = min(size, SAMPLES - start)
        drawn = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _estimate(mean: float, drawn: NDArray[np.float64], enough: bool) -> Estimate:
    if not enough:
        return Estimate(float(mean), math.nan, math.nan)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(float(mean), float(low), float(high))
