"""When two answers are the same but for rounding."""

from collections.abc import Sequence

import numpy as np

from serve.client import Status
from serve.model.recommender import Answer
from serve.pb.recommender_pb2 import RecommendResponse


def answered(results: Sequence[RecommendResponse | Status]) -> list[RecommendResponse]:
    """The answers of a batch, of which no question failed."""
    answers = [one for one in results if isinstance(one, RecommendResponse)]
    assert len(answers) == len(results), results
    return answers


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.policy == expected.policy
    assert found.ignored_event_count == expected.ignored_event_count
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    # Where scores are further apart than rounding, so are the items.
    clear = np.abs(np.diff(expected.scores)) > 2e-4
    alone = np.r_[True, clear] & np.r_[clear, True]
    alone[-1:] = False
    np.testing.assert_array_equal(found.items[alone], expected.items[alone])
