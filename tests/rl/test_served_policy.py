"""The policy as the server plays it, against the server's own drawing."""

import jax.numpy as jnp
import numpy as np

from jaxrec.models.sequence import NEVER
from jaxrec.rl.served_policy import POOL, fit_temperature, own_share, served_logits, served_logprobs
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
