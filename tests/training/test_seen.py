"""Logs of repeats are recognized, and learned up to what their rule allows; a log without them loses nothing."""

import dataclasses
import math
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
from jaxrec.training.seen import FoundRepeats, found_repeats
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


def test_share_chance_and_standard_errors_of_a_small_log() -> None:
    """Of the third events, which are for validation, two repeat an item; training has the two before them."""
    items = np.array([[1, 2, 1, 3], [1, 2, 3, 4], [5, 1, 5, 5], [1, 2, 3, 3]])
    found = found_repeats(log_of(items, np.tile(np.arange(4.0), (4, 1))))
    assert found.share == 2 / 4
    # Of 8 training events 4 are of item 1, 3 of item 2 and 1 of item 5.
    assert found.chance == pytest.approx((3 * (4 + 3) / 8 + (1 + 4) / 8) / 4)
    # 0, 0, 1 and 1 have the mean 1/2 and the standard deviation sqrt(1/3).
    assert found.z == pytest.approx(0.5 / math.sqrt(1 / 3 / 4))
    assert found.choice() is SeenItems.EXCLUDE


def test_users_who_all_repeat_equally_are_no_chance() -> None:
    """32 users, each of whom buys one item of their own 20 times: without a deviation there is no error."""
    found = found_repeats(log_of(np.tile(np.arange(1, 33)[:, None], 20), np.tile(np.arange(20.0), (32, 1))))
    assert found == FoundRepeats(1.0, pytest.approx(1 / 32), math.inf)
    assert found.choice() is SeenItems.ALLOW


@pytest.mark.parametrize(
    ("share", "chance", "z", "choice"),
    [
        (0.03, 0.039, 3.0, SeenItems.ALLOW),
        (0.029, 0.0, 9.0, SeenItems.EXCLUDE),  # too few
        (0.05, 0.11, 9.0, SeenItems.EXCLUDE),  # far less than by chance: they are avoided
        (0.089, 0.12, 9.0, SeenItems.EXCLUDE),
        (0.091, 0.12, 9.0, SeenItems.ALLOW),
        (0.05, 0.1, 2.9, SeenItems.EXCLUDE),  # of a few users
        (0.2, 0.2, 9.0, SeenItems.ALLOW),  # neither sought nor avoided
        (0.0, 0.18, 0.0, SeenItems.EXCLUDE),  # ratings of films
    ],
)
def test_the_rule_at_its_limits(share: float, chance: float, z: float, choice: SeenItems) -> None:
    assert FoundRepeats(share, chance, z).choice() is choice


def test_repeats_of_groceries_are_found(data: PreparedData) -> None:
    found = found_repeats(data)
    assert found.share > 0.8
    assert found.chance < 0.5
    assert found.choice() is SeenItems.ALLOW


def test_users_who_neither_seek_nor_avoid_what_they_know_lose_by_its_exclusion() -> None:
    """100 users draw 12 events from 60 items of unequal popularity: two fifths of the targets repeat, as by chance."""
    rng, popularity = np.random.default_rng(0), 0.9 ** np.arange(60)
    items = 1 + rng.choice(60, (100, 12), p=popularity / popularity.sum())
    data = log_of(items, np.sort(rng.uniform(0, 200, items.shape), axis=1))
    found = found_repeats(data)
    assert found.share == pytest.approx(found.chance, abs=0.1)
    assert found.choice() is SeenItems.ALLOW
    assert figure(data, exclude_seen=False) > 1.15 * figure(data, exclude_seen=True)


def test_a_log_without_repeats_excludes(small_data: PreparedData) -> None:
    found = found_repeats(small_data)
    assert found.share == 0
    assert found.chance > 0.1
    assert found.choice() is SeenItems.EXCLUDE


def test_a_run_on_groceries_finds_what_their_rule_allows(
    data: PreparedData, bought: Groceries, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = jaxrec.train(data, tmp_path / "run", SMALL, TRAINING)
    assert "may be recommended again" in capsys.readouterr().out
    assert jaxrec.open_run(tmp_path / "run").train_config.seen is SeenItems.ALLOW
    evaluation = jaxrec.evaluate(run)
    assert evaluation.protocol["candidates"] == "all items"
    assert evaluation.protocol["repeated_test_share"] > 0.8
    # Without a time, as popularity; it knows of no periods.
    (own,) = (row for row in evaluation.rows if row.name == "user's own items")
    assert not own.request_time
    assert 0.3 * bought.best < own.ndcg_10["mean"] < 0.9 * bought.best
    (hybrid,) = (row for row in evaluation.rows if row.name == "hybrid" and row.request_time)
    assert 0.95 * bought.best < hybrid.ndcg_10["mean"] < bought.best + 0.02
    every_item = data.catalog.ids.raw_ids.tolist()
    assert sorted(run.recommend(every_item[:1] * 5, k=len(every_item))["item_id"]) == sorted(every_item)
    with pytest.raises(DataError, match="--seen exclude"):
        load_run(tmp_path / "run")


def test_groceries_without_repeats_are_far_below(data: PreparedData, bought: Groceries) -> None:
    assert figure(data, exclude_seen=True) < 0.2 * bought.best


def test_few_repeats_cost_nothing() -> None:
    """7 % of the targets repeat, and the log is random but for that: to allow them costs next to nothing."""
    data = log_with_repeats(0.07)
    found = found_repeats(data)
    assert found.share == pytest.approx(0.07, abs=0.04)
    assert found.choice() is SeenItems.ALLOW
    allow, exclude = (figure(data, exclude_seen) for exclude_seen in (False, True))
    assert allow >= 0.97 * max(allow, exclude) > 0


def test_a_mix_that_excludes_has_no_table(small_data: PreparedData) -> None:
    models = untrained(small_data)
    learned = learn_mix(*models, small_data)
    assert learned.repeat is None
    assert learned.hybrid(*models).repeat is None
    allowing = dataclasses.replace(learned, repeat=[0.0] * TABLE_SIZE).hybrid(*models)
    assert allowing.with_policy(None).repeat is allowing.repeat is not None
