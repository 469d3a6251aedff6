"""The trend: decayed counts of each item's events, and how they decay.

An event at t counts 0.5 ** ((now - t) / half-life) at a later time, once for each half-life.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HALF_LIVES_S = (21_600, 86_400, 259_200, 604_800, 2_592_000, 7_776_000)
"""6 hours, 1, 3, 7, 30 and 90 days. Stores keep counts for these, so models must have been trained with them."""
COUNTED_S = (*HALF_LIVES_S, 3_600)
"""The half-lives of the counts in stores: an hour too, which no model uses, but Trending."""


class Counted(NamedTuple):
    """Which events are in the counts of a live trend, so that they can be computed again."""

    time: int
    """As of when they were decayed, in seconds since 1970-01-01T00:00Z."""
    arrival: int | None
    """Of the last event that the store had counted when they were read; None: they are those of the export alone."""


@dataclass(frozen=True, slots=True)
class TrendFiles:
    """What a model directory says about the trend."""

    graph: bytes
    """`trend.onnx`: counts `[half-lives, items+1]` -> what is added to the items' logits `[items+1]`, both float32."""
    counts: NDArray[np.float32]
    """`[half-lives, items+1]`, not writeable; column 0 is zeros. Of the events that the model was exported with."""
    counted_until: int
    """As of when, in seconds since 1970-01-01T00:00Z."""

    def at(self, now: float) -> NDArray[np.float32]:
        """The counts decayed to a later time.

        Args:
            now: Seconds since 1970-01-01T00:00Z; what is before `counted_until` counts as that.

        Returns:
            `[half-lives, items+1]` float32.
        """
        return self.counts * halved(np.array(now - self.counted_until)).astype(np.float32)[:, None]


def halved(seconds: NDArray[np.float64], half_lives: Sequence[int] = HALF_LIVES_S) -> NDArray[np.float64]:
    """What is left of 1 after some time.

    >>> halved(np.array([0.0, 86_400.0])).tolist()[1][:2]
    [0.0625, 0.5]

    Args:
        seconds: `[...]`; what is below 0 counts as 0.
        half_lives: In seconds.

    Returns:
        `[..., half-lives]` float64, 0..1.
    """
    return np.exp2(np.maximum(seconds, 0.0)[..., None] / -np.array(half_lives, np.float64))
