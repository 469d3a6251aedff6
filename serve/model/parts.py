"""What each part of a model gave to the score of an item."""

from collections.abc import Mapping
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Part(IntEnum):
    """What a score is the sum of."""

    LSTM = 1
    CONTENT = 2
    COOCCURRENCE = 3
    TREND = 4
    REPEAT = 5
    """How often and when the item was in the history, of models that may answer it again."""
    POLICY = 6
    """What was learned on top of the others: a shift of the query, or a reranker's change of the mix."""
    PLACE = 7
    """What holds an item below others: a new one below the first places, one that only a rule made a candidate below
    the model's own candidates."""
    BOOST = 8
    POPULARITY = 9


OF_GRAPH = (Part.LSTM, Part.CONTENT, Part.POLICY, Part.COOCCURRENCE)
"""The columns of what `parts.onnx` answers."""
ROUNDING = 1e-4
"""What the parts of a score may differ from it, relative to a score above 1."""
ROUNDING_CUDA = 1e-2
"""The same where scores were computed on a GPU, with TF32's 10 bits after the point, and their parts on the CPU."""

Parts = Mapping[Part, float]
"""Without those that add nothing."""


def parts_of_logits(
    scores: NDArray[np.float32],
    given: Mapping[Part, NDArray[np.float32]],
    reranked: NDArray[np.bool_],
    rounding: float = ROUNDING,
) -> list[Parts]:
    """The parts of logits.

    Args:
        scores: `[n]`, as they are answered.
        given: `[n]` each, what is known of the parts.
        reranked: `[n]`, whether the rest is what a reranker changed; else it is that of the item's place.
        rounding: Another rest of no more, relative to a score above 1, is of no part.

    Returns:
        Parts whose sum is the score, up to `rounding`.
    """
    rest = scores.astype(np.float64) - sum(part.astype(np.float64) for part in given.values())
    rest[~reranked & (np.abs(rest) <= rounding * np.maximum(1, np.abs(scores)))] = 0
    none = np.zeros_like(scores)
    of_policy = given.get(Part.POLICY, none) + np.where(reranked, rest, 0)
    of_place = given.get(Part.PLACE, none) + np.where(reranked, 0, rest)
    all_parts = {**given, Part.POLICY: of_policy, Part.PLACE: of_place}
    columns = sorted((part, values.tolist()) for part, values in all_parts.items())
    return [{part: values[at] for part, values in columns if values[at]} for at in range(len(scores))]


def parts_of_popularity(scores: NDArray[np.float32], factors: NDArray[np.float64]) -> list[Parts]:
    """The parts of numbers of events.

    Args:
        scores: `[n]`, as they are answered.
        factors: `[n]`, what boosts multiplied them with.
    """
    before = scores / factors
    return [
        {part: value for part, value in ((Part.BOOST, added), (Part.POPULARITY, own)) if value}
        for own, added in zip(before.tolist(), (scores - before).tolist(), strict=True)
    ]
