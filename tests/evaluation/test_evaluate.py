"""Ranks of validation: read once for both ways to ask, in groups of like length, they are those of each way alone."""

from collections.abc import Iterator

import numpy as np
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.split import Cases
from jaxrec.evaluation import ranking
from jaxrec.evaluation.ranking import LENGTHS, one_behind, rank_cases, ranks_by_request_time
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.sequence import TimeRatingAwareLSTM
from tests.synthetic import random_log


def test_both_ways_at_once_rank_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "FEW_CASES", 0)
    data = prepare(random_log(users=30, items=60, max_events=50, seed=3), None, PrepareConfig(1, 1))
    max_length = 40
    model = TimeRatingAwareLSTM(len(data.catalog), ModelConfig(16, 16, max_length=max_length), rngs=nnx.Rngs(0))
    model.request_shift.kernel[...] = np.random.default_rng(0).normal(size=model.request_shift.kernel.shape)
    offsets = data.histories.offsets
    users = np.repeat(np.arange(data.histories.user_count), 2)
    rows = np.stack([offsets[:-1], offsets[1:] - 1], axis=1).ravel()  # without any history, and with all of it
    lengths = rows - offsets[users]
    assert all(wanted.any() for wanted in (lengths == 0, lengths > LENGTHS[0], lengths > max_length))
    cases = Cases(users, rows)
    found = ranks_by_request_time(model, data, cases)
    for ranks, request_time in zip(found, (False, True), strict=True):
        alone = rank_cases(sequence_scorer(model), data, cases, max_length, request_time)
        np.testing.assert_array_equal(ranks, alone.ranks)
    assert (found[0] != found[1]).any()


def test_each_value_comes_once_the_next_one_was_asked_for() -> None:
    asked: list[int] = []

    def values(count: int) -> Iterator[int]:
        for value in range(count):
            asked.append(value)
            yield value

    for value in one_behind(values(3)):
        assert asked == list(range(min(value + 2, 3)))
    assert [list(one_behind(values(count))) for count in range(3)] == [[], [0], [0, 1]]
