"""Exploration: slates sampled with known probabilities, so that other policies can be evaluated from the log."""

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POOL = 100
"""So many of the best items compete, or as many as are asked for if that is more."""


@dataclass(frozen=True, slots=True)
class Slate:
    """Places in a ranking, best first."""

    places: NDArray[np.intp]
    """`[k]`"""
    log_propensities: NDArray[np.float64]
    """`[k]`, natural logarithm of each place's probability, given those above it."""


def draw(scores: NDArray[np.float32], k: int, temperature: float, random: np.random.Generator) -> Slate:
    """Draws k of the scored items without replacement, in proportion to exp(score / temperature).

    That is the Plackett-Luce model, and Gumbel top-k draws from it: the k largest of score / temperature + Gumbel
    noise (Yellott 1977; Kool et al. 2019, arXiv:1903.06059, section 2.3). The probability of the i-th is its weight
    over the weights of all that are not above it. `temperature` > 0; `scores` are `[n]`, and k is cut to n.
    """
    logits = scores.astype(np.float64) / temperature
    order = np.argsort(-(logits + random.gumbel(size=len(logits))), kind="stable")
    ordered = logits[order]
    # Summed from the end: what is left after the i-th is never the small difference of large numbers.
    left = np.logaddexp.accumulate(ordered[::-1])[::-1]
    return Slate(order[:k], (ordered - left)[:k])


class Exploration:
    """The server's way to explore: one temperature, and noise that no two threads share."""

    def __init__(self, temperature: float, pool: int = POOL, seed: int | None = None) -> None:
        """`seed` makes the noise of the first thread that draws, of the second and so on repeatable.

        Raises ValueError unless `temperature` is positive and finite.
        """
        if not 0 < temperature < np.inf:
            raise ValueError(f"expected a temperature above 0, came {temperature:g}")
        self.temperature = temperature
        self.pool = pool
        self._seeds = np.random.SeedSequence(seed)
        self._local = threading.local()

    def draw(self, scores: NDArray[np.float32], k: int, name: str = "") -> Slate:
        """As `draw`, with this thread's noise, or with that of a name, which is the same in each process."""
        if name:
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest())
            return draw(scores, k, self.temperature, np.random.default_rng(seed))
        random: np.random.Generator | None = getattr(self._local, "random", None)
        if random is None:
            random = self._local.random = np.random.default_rng(self._seeds.spawn(1)[0])
        return draw(scores, k, self.temperature, random)
