"""The ablation of the mix: its first row is what training learns, and each row has its parts."""

import numpy as np
import pytest

from bench import mix
from bench.publish import write_arrays
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.training.mix import learn_mix


@pytest.fixture(scope="module")
def found(small_data: PreparedData, small_hybrid: Hybrid) -> dict[str, np.ndarray]:
    return mix.rank_variants(small_hybrid, small_data)


def test_all_parts_are_the_mix_that_training_learns(
    found: dict[str, np.ndarray], small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    learned = learn_mix(*models, small_data)
    trend_helped = np.any(learned.trend)
    row = "all parts" if trend_helped else "without the trend"
    np.testing.assert_allclose(
        found[f"{row}|weights"], [learned.lstm, learned.content, learned.cooccurrence], rtol=1e-5
    )
    scorer = hybrid_scorer(learned.hybrid(*models), DecayedCounts.of(small_data) if trend_helped else None)
    for time in (False, True):
        ranked = rank_cases(scorer, small_data, small_data.split.test, small_hybrid.lstm.config.max_length, time)
        assert (found[f"{row}|{time}"] == ranked.ranks).mean() > 0.95  # but for rounding between close scores


def test_each_row_has_its_parts(found: dict[str, np.ndarray], small_data: PreparedData) -> None:
    for variant in mix.VARIANTS:
        assert len(found[f"{variant.name}|weights"]) == len(variant.parts)
        for time in (False, True):
            assert found[f"{variant.name}|{time}"].shape == (len(small_data.split.test),)
    ranks = [found[f"{variant.name}|False"].tolist() for variant in mix.VARIANTS]
    assert len({tuple(row) for row in ranks}) == len(ranks)


def test_the_table_pairs_by_case(tmp_path, found: dict[str, np.ndarray]) -> None:
    worse = {name: np.full(4, 2 if name.startswith("without the trend") else 1) for name in found}
    write_arrays(tmp_path / "mix-0.npz", {"users": np.arange(4), **worse})
    lines = mix.table("small", [tmp_path / "mix-0.npz"])
    same, less = "+0.0000 (+0.0000 to +0.0000)", "-0.3691 (-0.3691 to -0.3691)"
    assert f"| with EASE | 1.0000 | {same} | 1.0000 | {same} |" in lines
    assert f"| without the trend | 0.6309 | {less} | 0.6309 | {less} |" in lines
