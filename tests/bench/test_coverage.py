"""The logs of bench/rl_coverage.py in small, and its estimators against the exact values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.intervals import student
from bench.rl_coverage import HALF_RIGHT, PAIRED, PARAMS, Visits, Worth, coverage_of, draw_visits, terms_of, worth_of
from bench.synthetic_exact import build_model, logging_policy, value

LOGS, VISITS, STEPS = 60, 200, 3


@pytest.fixture(scope="module")
def visits() -> Visits:
    return draw_visits(jax.random.key(0), LOGS, VISITS, STEPS)


@pytest.fixture(scope="module")
def worth() -> Worth:
    return worth_of(logging_policy(PARAMS._replace(sharpness=jnp.float32(8.0))), STEPS)


def test_visits_start_new_and_end_once(visits: Visits) -> None:
    assert visits.state.shape == (LOGS, VISITS, STEPS)
    assert (build_model(PARAMS).start[visits.state[..., 0]] > 0).all()
    assert visits.here[..., 0].all()
    assert not (visits.here[..., 1:] & ~visits.here[..., :-1]).any()
    assert not (visits.taken & ~visits.here).any()
    left = 1 - visits.here[..., 1].mean()
    assert left == pytest.approx(0.02, abs=4 * np.sqrt(0.02 / (LOGS * VISITS)))


def test_q_is_that_of_the_half_right_environment(worth: Worth) -> None:
    model = build_model(HALF_RIGHT)
    for step in range(STEPS):
        of_new_users = float(model.start @ np.sum(worth.policy * worth.q[step], axis=1))
        assert of_new_users == pytest.approx(value(model, worth.policy, STEPS - step))
    assert value(model, worth.policy, STEPS) < 0.95 * worth.value  # wrong where tastes matter


def test_estimates_are_the_exact_values_on_average(visits: Visits, worth: Worth) -> None:
    """Of unbiased estimators; the logs are independent. The new policy is worth more than what was logged."""
    values: dict[str, list[float]] = {"IPS": [], "doubly robust": [], "logged": []}
    for log in (Visits(*of_log) for of_log in zip(*visits, strict=True)):
        _, terms = terms_of(worth, logging_policy(PARAMS), log)
        values["IPS"].append(terms["IPS"].value())
        values["doubly robust"].append(terms["doubly robust"].value())
        values["logged"].append(log.taken.sum() / VISITS)
    for name, truth in (("IPS", worth.value), ("doubly robust", worth.value), ("logged", worth.logged)):
        mean, error = np.mean(values[name]), np.std(values[name], ddof=1) / np.sqrt(LOGS)
        assert mean == pytest.approx(truth, abs=4 * error), name
        assert 4 * error < worth.value - worth.logged, name  # so that the one is not taken for the other
    assert np.std(values["doubly robust"]) < np.std(values["IPS"])


def test_judged_intervals_hold_their_values(visits: Visits, worth: Worth) -> None:
    covered, last = coverage_of((worth, logging_policy(PARAMS), Visits(*(column[:2] for column in visits))))
    assert len(covered) == 2 * 10  # logs, and five estimators by two methods
    assert {one.truth for one in covered if one.name.startswith(PAIRED)} == {worth.value - worth.logged}
    assert {one.truth for one in covered if not one.name.startswith(PAIRED)} == {worth.value}
    assert all(one.low <= one.value <= one.high for one in covered)
    assert all(last < one.size < VISITS for one in covered)  # the last step's weights vary most


def test_student_by_hand() -> None:
    """One degree of freedom: t = tan(0.475 pi); the standard error of 1 and 3 is sqrt(2) / sqrt(2)."""
    mean, half = student([1.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(np.tan(0.475 * np.pi))
