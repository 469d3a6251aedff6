"""A policy judged by a log that is small enough for its true gain to be summed up."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.rl.served.evaluate import LogEvaluation, evaluate_on_log
from jaxrec.rl.served.states import ServedStates
from tests.rl.served.logged_world import CONFIG, SLOTS, World, draw, new_world, value

USERS, LOGS = 100, 30


@pytest.fixture(scope="module")
def world() -> World:
    return new_world()


def evaluated(world: World, training: ServedStates, evaluation: ServedStates) -> LogEvaluation:
    policies = world.graphdef, world.new, world.current, world.scoring
    return evaluate_on_log(*policies, training, evaluation, CONFIG)


def no_hits(log: ServedStates) -> ServedStates:
    return log._replace(terms=log.terms._replace(hit=np.zeros_like(log.terms.hit)))


def test_over_many_logs_the_doubly_robust_gain_is_the_true_one(world: World) -> None:
    truth = value(world, world.new) - value(world, world.current)
    logs = draw(world, 2 * USERS * LOGS, seed=4)
    gains = []
    for log in range(LOGS):
        first = 2 * USERS * log
        training, evaluation = (logs.at(np.arange(at, at + USERS)) for at in (first, first + USERS))
        found = evaluated(world, training, evaluation)
        assert found.doubly_robust is not None
        gains.append(found.doubly_robust)
    values = np.array([gain.value for gain in gains])
    error = values.std() / np.sqrt(LOGS)
    assert abs(values.mean() - truth) < 3 * error < truth / 3
    assert np.mean([gain.low <= truth <= gain.high for gain in gains]) > 0.85


def test_where_nothing_is_earned_nothing_is_gained(world: World) -> None:
    training, evaluation = (no_hits(draw(world, USERS, seed)) for seed in (1, 2))
    decision, robust = evaluated(world, training, evaluation)
    assert robust is not None
    assert (robust.value, robust.low, robust.high) == (0.0, 0.0, 0.0)
    assert not decision.used
    assert decision.reason.endswith("; the doubly robust gain is 0.0000 (0.0000 to 0.0000)")


def test_the_reward_model_is_fitted_to_the_training_rows_alone(world: World) -> None:
    """Where they earned nothing the model says 0, and doubly robust is self-normalized RIPS."""
    training, evaluation = no_hits(draw(world, USERS, seed=1)), draw(world, USERS, seed=2)
    decision, robust = evaluated(world, training, evaluation)
    assert robust is not None
    assert decision.gain is not None
    assert robust.value == pytest.approx(decision.gain.value, abs=1e-12)
    fitted = evaluated(world, draw(world, USERS, seed=1), evaluation)
    assert fitted.decision.gain == decision.gain
    assert fitted.doubly_robust is not None
    assert fitted.doubly_robust.value != pytest.approx(robust.value, abs=1e-4)


def test_too_few_training_rows_are_reported(world: World) -> None:
    training, evaluation = draw(world, 1, seed=1), draw(world, USERS, seed=2)
    decision, robust = evaluated(world, training, evaluation)
    assert robust is None
    assert decision.gain is not None
    assert decision.reason.endswith("; no doubly robust gain: 1 recommendation(s) trained, expected at least two")


def test_a_new_policy_that_does_nothing_of_what_was_logged_has_no_gain(world: World) -> None:
    """Item 1 is all that was shown first, and the new policy never shows it."""
    evaluation = draw(world, 2000, seed=2)
    evaluation = evaluation.at(np.flatnonzero(evaluation.slate[:, 0] == 1)[:USERS])
    never = world._replace(new={**world.new, "item_bias": jnp.asarray([0, -1e4, 0, 0, 0, 0], jnp.float32)})
    decision, robust = evaluated(never, draw(world, USERS, seed=1), evaluation)
    assert "the mean weight over 100 decisions of 100 users is 0.000" in decision.reason
    assert decision.gain is robust is None
    assert decision.reason.endswith("; for the same reason there is no doubly robust gain")


def test_empty_slots_change_nothing(world: World) -> None:
    """A slot that is empty in every row, as where another row of the log was wider."""
    logs = [draw(world, USERS, seed) for seed in (1, 2)]
    wider = []
    for log in logs:
        pad = [(0, 0), (0, 1)]
        terms = log.terms._replace(**{name: np.pad(term, pad) for name, term in log.terms._asdict().items()})
        slate, propensities = np.pad(log.slate, pad), np.pad(log.log_propensities, pad)
        wider.append(log._replace(slate=slate, log_propensities=propensities, terms=terms))
    narrow, wide = evaluated(world, *logs).doubly_robust, evaluated(world, *wider).doubly_robust
    assert narrow is not None
    assert wide is not None
    assert wide.value == pytest.approx(narrow.value, rel=1e-4)
    assert SLOTS == 2
