"""Decisions are what the mix would have answered before each event."""

from collections.abc import Callable

import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER
from jaxrec.rl.logged.decisions import decide
from jaxrec.rl.logged.tables import with_reranker


@pytest.mark.parametrize("repeating", [False, True])
def test_ranks_and_candidates_are_those_of_the_evaluation(
    small_data: PreparedData, small_hybrid: Hybrid, repeating_hybrid: Hybrid, repeating: bool
) -> None:
    hybrid = repeating_hybrid if repeating else small_hybrid.with_policy(None)
    counts, cases = DecayedCounts.of(small_data), small_data.split.validation
    timed = np.arange(len(cases)) % 3 == 0
    found = decide(with_reranker(hybrid, small_data), small_data, cases, counts, timed)
    for time in (False, True):
        ranked = rank_cases(hybrid_scorer(hybrid, counts), small_data, cases, 50, time, not repeating)
        np.testing.assert_array_equal(found.rank[timed == time], ranked.ranks[timed == time])
        top = np.where(found.mix > NEVER / 2, found.items, 0)[:, : ranked.top.shape[1]]
        np.testing.assert_array_equal(top[timed == time], ranked.top[timed == time])
    np.testing.assert_array_equal(found.target, small_data.histories.items[cases.rows])
    placed = found.place >= 0
    assert placed.all()  # fewer than 100 items
    rows = np.arange(len(cases))
    np.testing.assert_array_equal(found.items[rows, found.place], found.target)
    assert np.isfinite(found.features).all()
    assert np.isfinite(found.context).all()


def test_order_of_the_cases_does_not_matter(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    hybrid = with_reranker(random_hybrid(small_data, 3, False), small_data)
    counts, cases = DecayedCounts.of(small_data), small_data.split.validation
    order = np.random.default_rng(0).permutation(len(cases))
    timed = order % 2 == 0
    found = decide(hybrid, small_data, type(cases)(cases.users[order], cases.rows[order]), counts, timed)
    again = decide(hybrid, small_data, cases, counts, np.arange(len(cases)) % 2 == 0)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other[order], np.float64), atol=1e-2)
