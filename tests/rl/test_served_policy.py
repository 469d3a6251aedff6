"""The policy as the server plays it, against the server's own drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import RLConfig
from jaxrec.metrics import exclude_items
from jaxrec.models.cooccurrence import RECENT
from jaxrec.models.sequence import NEVER
from jaxrec.rl.learner import new_head
from jaxrec.rl.log_states import LogStates
from jaxrec.rl.policy import sample_slates
from jaxrec.rl.rewards import RewardTables, RewardTerms
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served_policy import POOL, Fit, fit_temperature, own_share, served_logits, served_logprobs
from jaxrec.rl.train_from_log import judge_from_log
from serve import exploration

ITEMS, SLOTS, TEMPERATURE = 150, 5, 0.7


def scores() -> np.ndarray:
    """[items + 1]: padding never, and two items that were excluded."""
    drawn = np.random.default_rng(0).normal(size=ITEMS + 1).astype(np.float32)
    drawn[[0, 7, 9]] = NEVER
    return drawn


def test_propensities_are_those_of_the_server() -> None:
    assert POOL == exploration.POOL
    logits, rng = scores(), np.random.default_rng(1)
    best = np.argsort(-logits)[:POOL]
    slates, expected = [], []
    for _ in range(20):
        drawn = exploration.draw(logits[best], SLOTS, TEMPERATURE, rng)
        slates.append(best[drawn.places])
        expected.append(drawn.log_propensities)
    batch = jnp.broadcast_to(logits, (20, ITEMS + 1))
    found = served_logprobs(served_logits(batch, TEMPERATURE, SLOTS), jnp.asarray(slates))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    logged = batch, jnp.asarray(slates), jnp.asarray(expected)
    temperature, error = fit_temperature(*logged)
    assert abs(temperature - TEMPERATURE) < 1e-3
    assert error < 1e-4
    assert fit_temperature(*logged, 2.0)[1] > 0.1
    assert own_share(*logged, temperature) == 1.0
    of_others = jnp.asarray(expected).at[:5].add(0.1)
    assert own_share(*logged[:2], of_others, temperature) == 0.75


def test_what_is_not_drawn_from_has_no_probability_and_empty_slots_count_nothing() -> None:
    logits = scores()
    order = np.argsort(-logits)
    slate = jnp.asarray([[order[0], order[POOL], 0]])  # the best, the first outside of the pool, and an empty slot
    found = np.asarray(served_logprobs(served_logits(jnp.asarray(logits)[None], TEMPERATURE, 3), slate))[0]
    assert np.isfinite(found[0])
    assert found[0] < 0
    assert found[1] == np.float32(NEVER)
    assert found[2] == 0


def test_the_pool_is_as_wide_as_the_slate() -> None:
    wide = served_logits(jnp.asarray(scores())[None], TEMPERATURE, 120)
    assert int((wide > NEVER / 2).sum()) == 120
    all_of_them = served_logits(jnp.asarray(scores())[None], TEMPERATURE, 1000)
    assert int((all_of_them > NEVER / 2).sum()) == ITEMS - 2


def test_the_gate_judges_by_what_the_policy_in_use_showed_itself() -> None:
    """Half of the users were served by another policy: they count only where the others are too few."""
    width, users = 4, 40
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.normal(size=(ITEMS + 1, width)), jnp.float32)
    half, nobody = jnp.full(ITEMS + 1, 0.5), jnp.zeros((ITEMS + 1, 1))
    tables = RewardTables(jnp.zeros((ITEMS + 1, 1)), half, half, half)
    scoring = Scoring(items, jnp.zeros(ITEMS + 1).at[0].set(NEVER), nobody.astype(jnp.int32), nobody, tables)
    config = RLConfig(policy_width=4)
    graphdef, head = new_head(width, ITEMS, config)
    query = rng.normal(size=(users, width)).astype(np.float32)
    others = np.arange(users) % 2
    shift = 0.5 * others[:, None] * np.sin(np.arange(ITEMS + 1)).astype(np.float32)
    logits = exclude_items(query @ items.T + shift, jnp.zeros((users, 1), jnp.int32))
    drawn_from = served_logits(logits, TEMPERATURE, SLOTS)
    slates = sample_slates(jax.random.key(0), drawn_from, SLOTS)
    terms = RewardTerms(*(rng.random((users, SLOTS)).astype(np.float32) for _ in RewardTerms._fields))
    states = LogStates(
        query=query,
        recent=np.zeros((users, RECENT), np.int32),
        exclude=np.zeros((users, 1), np.int32),
        slate=np.asarray(slates),
        log_propensities=np.asarray(served_logprobs(drawn_from, slates)),
        terms=terms,
        user=np.arange(users, dtype=np.int32),
    )
    same = graphdef, head, head, scoring, states, config, Fit(TEMPERATURE, 0.0, 0.5)
    by_itself = judge_from_log(*same, minimum_effective=15.0)
    assert (by_itself.rows, by_itself.groups) == (20, 20)
    assert by_itself.effective_sample_size == pytest.approx(20, rel=1e-3)
    assert by_itself.gain is not None
    assert by_itself.gain.value == pytest.approx(0.0, abs=1e-4)
    assert not by_itself.used
    assert judge_from_log(*same, minimum_effective=21.0).rows == users
