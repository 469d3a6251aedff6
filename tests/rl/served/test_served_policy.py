"""The policy as the server draws from it, against the server's own drawing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.errors import DataError
from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.rl.config import ServedConfig
from jaxrec.rl.policy import sample_slates
from jaxrec.rl.rewards import RewardTables, RewardTerms
from jaxrec.rl.scoring import Scoring, new_head
from jaxrec.rl.served.evaluate import evaluate_on_log, own_versions
from jaxrec.rl.served.policy import EXACT, POOL, reproduced_versions, served_logits, served_logprobs, slot_logprobs
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.served.train import split_users
from jaxrec.rl.states import PolicyState
from serve.model import exploration

ITEMS, SLOTS, TEMPERATURE = 150, 5, 0.7
SAME = jnp.full(1, TEMPERATURE)


def scores() -> np.ndarray:
    """[items + 1]: padding never, and two items that were excluded."""
    drawn = np.random.default_rng(0).normal(size=ITEMS + 1).astype(np.float32)
    drawn[[0, 7, 9]] = NEVER
    return drawn


def test_propensities_are_those_of_the_server() -> None:
    """Each at its own temperature."""
    assert POOL == exploration.POOL
    logits, rng = scores(), np.random.default_rng(1)
    best = np.argsort(-logits)[:POOL]
    slates, expected = [], []
    temperatures = np.tile([TEMPERATURE, 2.0], 10).astype(np.float32)
    for temperature in temperatures:
        drawn = exploration.draw(logits[best], SLOTS, float(temperature), rng)
        slates.append(best[drawn.places])
        expected.append(drawn.log_propensities)
    batch = jnp.broadcast_to(logits, (20, ITEMS + 1))
    shown = jnp.asarray(slates)
    found = served_logprobs(served_logits(batch, jnp.asarray(temperatures), jnp.full(20, SLOTS), SLOTS), shown)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_version_is_the_policy_in_use_where_the_median_row_is_reproduced() -> None:
    """Of three rows one may be odd; the slot that is furthest counts; and an unknown version has no row at all."""
    logged = np.full((8, 2), -1.0)
    distance = [[0, 0.9], [0, 0], [EXACT / 2, 0], [0.9, 0], [0, 0.9], [0, 0], [0, 2 * EXACT], [0, 0.9]]
    version = np.array([0, 0, 0, 1, 1, 1, 3, 3])
    found = reproduced_versions(logged + distance, logged, version, count=4)
    assert found.tolist() == [True, False, False, False]


def test_what_is_not_drawn_from_has_no_probability_and_empty_slots_count_nothing() -> None:
    logits = scores()
    order = np.argsort(-logits)
    slate = jnp.asarray([[order[0], order[POOL], 0]])  # the best, the first outside of the pool, and an empty slot
    found = np.asarray(served_logprobs(served_logits(jnp.asarray(logits)[None], SAME, jnp.full(1, 2), 3), slate))[0]
    assert np.isfinite(found[0])
    assert found[0] < 0
    assert found[1] == np.float32(NEVER)
    assert found[2] == 0


def test_the_pool_is_as_wide_as_the_answer() -> None:
    """Its own, however wide others of the batch are."""
    answered = jnp.asarray([120, 1000, 3])
    found = served_logits(jnp.broadcast_to(scores(), (3, ITEMS + 1)), jnp.full(3, TEMPERATURE), answered, 1000)
    assert (found > NEVER / 2).sum(axis=1).tolist() == [120, ITEMS - 2, POOL]


def test_a_slate_of_which_few_were_shown_is_drawn_from_the_pool_of_the_whole_answer() -> None:
    """Of 120 items that were answered 4 were shown: all 120 competed, and not the best 100."""
    logits, rng, answered, shown = scores(), np.random.default_rng(2), 120, 4
    best = np.argsort(-logits)[:answered]
    drawn = [exploration.draw(logits[best], answered, TEMPERATURE, rng) for _ in range(20)]
    rows = len(drawn)
    slates = np.zeros((rows, answered), np.int32)
    slates[:, :shown] = [best[one.places[:shown]] for one in drawn]
    expected = [one.log_propensities[:shown] for one in drawn]
    empty = np.zeros((rows, 1), np.float32)
    states = ServedStates(
        state=PolicyState(empty, empty),
        exclude=empty,
        slate=slates,
        log_propensities=empty,
        temperature=np.full(rows, TEMPERATURE, np.float32),
        answered=np.full(rows, answered, np.int32),
        terms=RewardTerms(*[empty] * len(RewardTerms._fields)),
        user=empty,
        version=empty,
        moment=empty,
    )
    found = np.asarray(slot_logprobs(jnp.broadcast_to(logits, (rows, ITEMS + 1)), states))
    np.testing.assert_allclose(found[:, :shown], expected, atol=1e-5)
    assert (found[:, shown:] == 0).all()


def test_the_gate_uses_recommendations_of_the_policy_in_use_alone() -> None:
    """Half of the users were served by another policy: they train, and do not evaluate."""
    width, users = 4, 40
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.normal(size=(ITEMS + 1, width)), jnp.float32)
    half, nobody = jnp.full(ITEMS + 1, 0.5), jnp.zeros((ITEMS + 1, 1))
    tables = RewardTables(jnp.zeros((ITEMS + 1, 1)), half, half, half)
    scoring = Scoring(items, jnp.zeros(ITEMS + 1).at[0].set(NEVER), nobody.astype(jnp.int32), nobody, tables)
    config = ServedConfig(minimum_effective=5.0)
    graphdef, head = new_head(width, ITEMS, hidden=4, seed=0)
    query = rng.normal(size=(users, width)).astype(np.float32)
    others = np.arange(users) % 2
    shift = 0.5 * others[:, None] * np.sin(np.arange(ITEMS + 1)).astype(np.float32)
    logits = exclude_items(query @ items.T + shift, jnp.zeros((users, 1), jnp.int32))
    temperature = np.full(users, TEMPERATURE, np.float32)
    drawn_from = served_logits(logits, jnp.asarray(temperature), jnp.full(users, SLOTS), SLOTS)
    slates = sample_slates(jax.random.key(0), drawn_from, SLOTS)
    terms = RewardTerms(*(rng.random((users, SLOTS)).astype(np.float32) for _ in RewardTerms._fields))
    states = ServedStates(
        state=PolicyState(query, np.zeros((users, RECENT_ITEMS), np.int32)),
        exclude=np.zeros((users, 1), np.int32),
        slate=np.asarray(slates),
        log_propensities=np.asarray(served_logprobs(drawn_from, slates)),
        temperature=temperature,
        answered=np.full(users, SLOTS, np.int32),
        terms=terms,
        user=np.arange(users, dtype=np.int32),
        version=others.astype(np.int32),
        moment=np.zeros(users, np.int32),
    )
    in_use = own_versions(graphdef, head, scoring, states, 3)
    assert in_use.tolist() == [True, False, False]
    own = in_use[states.version]
    names = [f"user {user}" for user in range(users)]
    training, evaluation = split_users(states.user, names, own)
    assert own[evaluation].all()
    assert not own[training].all()
    assert not set(states.user[training]) & set(states.user[evaluation])
    kept = states.at(evaluation)
    found = evaluate_on_log(graphdef, head, head, scoring, states.at(training), kept, config).decision
    assert (found.rows, found.groups) == (len(evaluation), len(evaluation))
    assert found.effective_sample_size == pytest.approx(len(evaluation), rel=1e-3)
    assert found.gain is not None
    assert found.gain.value == pytest.approx(0.0, abs=1e-4)
    assert not found.used
    with pytest.raises(DataError, match=r"of 40 users: \d+ for training and 0, served by the policy in use, for"):
        split_users(states.user, names, np.zeros(users, bool))
