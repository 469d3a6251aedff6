"""Weights and effective sample sizes by hand."""

import numpy as np
import pytest

from jaxrec.rl.ope.sample_size import effective_sample_size, slate_sample_size
from jaxrec.rl.ope.weights import importance_weights, slate_weights


def test_weights_by_hand() -> None:
    new, logged = np.log([0.5, 0.2, 0.9]), np.log([0.25, 0.4, 0.1])
    weights = importance_weights(new, logged)
    np.testing.assert_allclose(weights.value, [2, 0.5, 9])
    assert weights.clipped_share == 0.0
    capped = importance_weights(new, logged, cap=3.0)
    np.testing.assert_allclose(capped.value, [2, 0.5, 3])
    np.testing.assert_array_equal(capped.clipped, [False, False, True])
    assert capped.clipped_share == pytest.approx(1 / 3)


def test_cap_never_raises_a_weight_and_extremes_are_finite() -> None:
    rng = np.random.default_rng(0)
    new, logged = -rng.exponential(400, 1000), -rng.exponential(400, 1000)
    free = importance_weights(new, logged)
    assert np.isfinite(free.value).all()
    for cap in (0.1, 1.0, 50.0):
        weights = importance_weights(new, logged, cap)
        assert (weights.value <= np.minimum(free.value, cap * (1 + 1e-12))).all()
        np.testing.assert_array_equal(weights.clipped, new - logged > np.log(cap))
    assert 1 <= effective_sample_size(free) < 2  # one of these weights is larger than all others together


def test_slate_weights_by_hand() -> None:
    """Ratios 2, 3, 1/2 and, with an empty last slot, 1/2, 4: the products of the slots so far."""
    logged = np.log([[0.1, 0.1, 0.2], [0.2, 0.1, 0.5]])
    new = logged + np.log([[2, 3, 1 / 2], [1 / 2, 4, 7]])
    where = np.array([[True, True, True], [True, True, False]])
    np.testing.assert_allclose(slate_weights(new, logged, where).value, [[2, 6, 3], [0.5, 2, 2]])
    np.testing.assert_allclose(slate_weights(new, logged, where, lookback=1).value, [[2, 3, 0.5], [0.5, 4, 1]])
    np.testing.assert_allclose(slate_weights(new, logged, where, lookback=2).value, [[2, 6, 1.5], [0.5, 2, 4]])
    np.testing.assert_allclose(slate_weights(new, logged, where, cap=2.5).value, [[2, 2.5, 2.5], [0.5, 2, 2]])


def test_effective_sample_size_by_hand() -> None:
    zero = np.zeros(4)
    weights = importance_weights(np.log([0.4, 0.2, 0.2, 0.2]), np.log([0.4, 0.4, 0.4, 0.4]))  # 1, 1/2, 1/2, 1/2
    assert effective_sample_size(weights) == pytest.approx(2.5**2 / (1 + 3 / 4))
    assert effective_sample_size(weights, np.array([7, 7, 3, 3])) == pytest.approx(2.5**2 / (1.5**2 + 1))
    assert effective_sample_size(importance_weights(zero, zero)) == pytest.approx(4)
    assert effective_sample_size(importance_weights(zero - np.inf, zero)) == 0
    assert effective_sample_size(importance_weights(zero[:0], zero[:0])) == 0
    slates = slate_weights(np.log([[0.4, 0.1], [0.2, 0.4]]), np.log([[0.4, 0.1], [0.4, 0.4]]))  # 1, 1; 1/2, 1/2
    np.testing.assert_allclose(effective_sample_size(slates), [1.5**2 / 1.25] * 2)


def test_cap_does_not_raise_the_effective_sample_size() -> None:
    new, logged = np.log([0.9, 0.01, 0.01]), np.log([0.01, 0.5, 0.5])
    assert effective_sample_size(importance_weights(new, logged, cap=1.0)) == pytest.approx(
        float(effective_sample_size(importance_weights(new, logged)))
    )


def test_sample_size_of_slates_by_hand() -> None:
    assert slate_sample_size(np.array([50.0, 50.0])) == pytest.approx(50)
    assert slate_sample_size(np.array([100.0, 10.0])) == pytest.approx(2 / (1 / 100 + 1 / 10))
    assert slate_sample_size(np.array([100.0, 10.0]), np.array([2.0, 1.0])) == pytest.approx(5 / (4 / 100 + 1 / 10))
    assert slate_sample_size(np.array([100.0, 0.0])) == 0.0
    assert slate_sample_size(np.array([100.0, 0.0]), np.array([1.0, 0.0])) == pytest.approx(100)


@pytest.mark.parametrize(
    ("new", "logged", "message"),
    [
        ([-1.0, np.nan], [-1.0, -1.0], r"row \(1,\): the new log-probability is nan"),
        ([-1.0, -1.0], [-1.0, -np.inf], r"row \(1,\): the logged log-probability is -inf, expected finite"),
        ([0.5, -1.0], [-1.0, -1.0], r"row \(0,\): the new log-probability is 0.5, expected at most 0"),
        ([-1.0], [-1.0, -1.0], r"shapes \(1,\) \(new\) and \(2,\)"),
    ],
)
def test_impossible_logs_are_refused(new: list[float], logged: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(np.array(new), np.array(logged))


def test_groups_and_lookback_must_fit() -> None:
    weights = importance_weights(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="2 groups for 3 rows"):
        effective_sample_size(weights, np.array([1, 2]))
    with pytest.raises(ValueError, match="lookback is 0"):
        slate_weights(np.zeros((1, 2)), np.zeros((1, 2)), lookback=0)


def test_single_actions_and_slates_are_not_confused() -> None:
    one, many = np.zeros(3), np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"log-probabilities of shape \(3, 2\), expected \[rows\]"):
        importance_weights(many, many)
    with pytest.raises(ValueError, match=r"log-probabilities of shape \(3,\), expected \[rows, slots\]"):
        slate_weights(one, one)
    with pytest.raises(ValueError, match=r"where of shape \(3, 1\), expected \(3, 2\)"):
        slate_weights(many, many, np.ones((3, 1), bool))


def test_discounts_and_caps_must_make_sense() -> None:
    for wrong in ([1.0], [0.0, 0.0], [1.0, np.nan], [1.0, -1.0]):
        with pytest.raises(ValueError, match="discounts"):
            slate_sample_size(np.array([5.0, 5.0]), np.array(wrong))
    for cap in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="expected above 0"):
            importance_weights(np.zeros(2), np.zeros(2), cap)


def test_weights_say_what_biases_them() -> None:
    ratio = np.log(np.full((2, 3), 0.25))
    assert slate_weights(ratio, ratio).bias == ""
    assert slate_weights(ratio, ratio, cap=2.0).bias == ""  # nothing reaches it
    assert slate_weights(ratio, ratio, lookback=3).bias == ""
    assert slate_weights(ratio, ratio - 1.0, cap=2.0).bias == "100.0% of the weights are capped"
    assert slate_weights(ratio, ratio, lookback=2).bias == "the weights look back over 2 slot(s) of the slate"
