"""The bench of diversity, with a small model of random weights."""

from pathlib import Path

import numpy as np
import pytest

from bench.diversity import CANDIDATES, DIVERSITIES, K, figures, name_of, table, ways
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.metrics import MISS
from serve.model.directory import read_artifact
from serve.model.recommender import Recommender


@pytest.fixture(scope="module")
def arrays(small_data: PreparedData, model_directory: Path) -> dict[str, np.ndarray]:
    return figures(small_data, Recommender(read_artifact(model_directory), "cpu"))


def test_without_diversity_the_answer_is_the_models_own(arrays: dict[str, np.ndarray]) -> None:
    plain = arrays[f"{name_of(CANDIDATES, 0.0)}|ranks"]
    np.testing.assert_array_equal(plain, np.where(arrays["place"] <= K, arrays["place"], MISS))
    assert (plain <= K).any()
    # Each user's target is new to the user, and all other items are candidates.
    assert (arrays["place"] <= 60).all()


def test_more_diversity_is_less_likeness(arrays: dict[str, np.ndarray]) -> None:
    likeness = [arrays[f"{name_of(CANDIDATES, one)}|cosine"].mean() for one in DIVERSITIES]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[0] > likeness[-1] + 0.05


def test_the_table_has_a_row_for_each_way(arrays: dict[str, np.ndarray]) -> None:
    lines = table("small", arrays)
    assert len(lines) == 4 + len(ways())
    assert lines[1].startswith(f"{len(arrays['users'])} users, 60 items.")
    assert lines[4].startswith(f"| {CANDIDATES} | 0 | ")
    assert "| +0.0000 (+0.0000 to +0.0000) |" in lines[4]
