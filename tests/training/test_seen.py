"""Logs of repeats are recognized, and learned up to what their rule allows; a log without them loses nothing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import jaxrec
from jaxrec.config import ModelConfig, PrepareConfig, SeenItems, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.errors import DataError
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.repeat import TABLE_SIZE
from jaxrec.runs.policy import load_run
from jaxrec.training.mix import learn_mix
from jaxrec.training.seen import found_repeats
from tests.groceries import Groceries, groceries
from tests.training.test_mix import log_of, untrained

SMALL = ModelConfig(embedding=8, hidden=8, rating_width=2, time_width=4, max_length=40)
TRAINING = TrainConfig(max_epochs=1, batch_tokens=800, learning_rate=1e-2)


@pytest.fixture(scope="module")
def bought() -> Groceries:
    return groceries(users=150, items=40, staples=8, days=120, new_share=0.1, seed=0)


@pytest.fixture(scope="module")
def data(bought: Groceries) -> PreparedData:
    return prepare(bought.log, None, PrepareConfig(1, 1))


def log_with_repeats(share: float) -> PreparedData:
    """300 users with 20 of 200 items at random; a `share` of the events repeats one of the history."""
    rng = np.random.default_rng(1)
    items = np.stack([rng.choice(200, 20, replace=False) for _ in range(300)]) + 1
    for at in range(1, 20):
        again = rng.random(300) < share
        items[again, at] = items[again, rng.integers(0, at, 300)[again]]
    return log_of(items, np.sort(rng.uniform(0, 200, items.shape), axis=1))


def figure(data: PreparedData, exclude_seen: bool) -> float:
    """NDCG@10 on test of a mix of untrained models, with the request time."""
    models = untrained(data)
    hybrid = learn_mix(*models, data, exclude_seen).hybrid(*models)
    scorer = hybrid_scorer(hybrid, DecayedCounts.of(data))
    return float(ndcg(rank_cases(scorer, data, data.split.test, 8, True, exclude_seen).ranks, 10).mean())


def test_repeats_of_groceries_are_beyond_chance_and_those_of_a_random_log_are_not(data: PreparedData) -> None:
    found = found_repeats(data)
    assert found.share > 0.8
    assert found.chance < 0.5
    assert found.seen() is SeenItems.ALLOW
    # 30 users with 10 events each on 60 items at random: about a tenth of the targets repeat, as chance has it.
    rng = np.random.default_rng(2)
    at_random = log_of(rng.integers(1, 61, (30, 10)), np.sort(rng.uniform(0, 60, (30, 10)), axis=1))
    assert found_repeats(at_random).seen() is SeenItems.EXCLUDE


def test_a_log_without_repeats_excludes(small_data: PreparedData) -> None:
    found = found_repeats(small_data)
    assert found.share == 0
    assert found.seen() is SeenItems.EXCLUDE


def test_a_run_on_groceries_finds_what_their_rule_allows(
    data: PreparedData, bought: Groceries, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = jaxrec.train(data, tmp_path / "run", SMALL, TRAINING)
    assert "may be recommended again" in capsys.readouterr().out
    assert jaxrec.open_run(tmp_path / "run").train_config.seen is SeenItems.ALLOW
    evaluation = jaxrec.evaluate(run)
    assert evaluation.protocol["candidates"] == "all items"
    (hybrid,) = (row for row in evaluation.rows if row.name == "hybrid" and row.request_time)
    assert 0.95 * bought.best < hybrid.ndcg_10["mean"] < bought.best + 0.02
    every_item = data.catalog.ids.raw_ids.tolist()
    assert sorted(run.recommend(every_item[:1] * 5, k=len(every_item))["item_id"]) == sorted(every_item)
    with pytest.raises(DataError, match="--seen exclude"):
        load_run(tmp_path / "run")


def test_groceries_without_repeats_are_far_below(data: PreparedData, bought: Groceries) -> None:
    assert figure(data, exclude_seen=True) < 0.2 * bought.best


def test_few_repeats_cost_nothing() -> None:
    """7 % of the targets repeat, and the log is random but for that: what is allowed is at least as good."""
    data = log_with_repeats(0.07)
    found = found_repeats(data)
    assert found.share == pytest.approx(0.07, abs=0.04)
    assert figure(data, exclude_seen=False) > figure(data, exclude_seen=True) - 0.01


def test_a_mix_that_excludes_has_no_table(small_data: PreparedData) -> None:
    models = untrained(small_data)
    learned = learn_mix(*models, small_data)
    assert learned.repeat is None
    assert learned.hybrid(*models).repeat is None
    allowing = dataclasses.replace(learned, repeat=[0.0] * TABLE_SIZE).hybrid(*models)
    assert allowing.with_policy(None).repeat is allowing.repeat is not None
