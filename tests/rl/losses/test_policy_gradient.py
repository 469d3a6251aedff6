"""The gradient estimators against the exact gradient, and the losses by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.policy_gradient import baseline_loss, plackett_luce_loss, reinforce_loss
from jaxrec.rl.policy import sample_slates, slate_logprobs
from jaxrec.rl.scoring import returns
from tests.rl.enumeration import all_slates, expected_reward

ITEMS, SLOTS, DRAWS = 4, 2, 20_000
LOGITS = jnp.array([NEVER, 0.5, -0.3, 0.0, 1.0])
REWARDS = jnp.array([0.0, 0.4, 0.9, 0.3, 0.5])  # of each item


def gradient_samples(baseline: jax.Array) -> np.ndarray:
    """[DRAWS, items + 1]: one estimate of the policy gradient per drawn slate; `baseline` [slots]."""

    def estimate(key: jax.Array) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            slates = jax.lax.stop_gradient(sample_slates(key, logits, SLOTS))
            where = jnp.ones((1, SLOTS), bool)
            return reinforce_loss(slate_logprobs(logits, slates), returns(REWARDS[slates]), baseline[None], where)

        return -jax.grad(loss)(LOGITS[None])[0]

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), DRAWS)))


def good_baseline() -> jax.Array:
    """The mean return of each slot under the policy, exact: what a learned baseline goes to."""
    slates = all_slates(ITEMS, SLOTS)
    probabilities = jnp.exp(slate_logprobs(jnp.broadcast_to(LOGITS, (len(slates), ITEMS + 1)), slates).sum(axis=1))
    return probabilities @ returns(REWARDS[slates])


@pytest.mark.parametrize("with_baseline", [False, True])
def test_gradient_estimates_average_to_the_exact_gradient(with_baseline: bool) -> None:
    exact = np.asarray(jax.grad(expected_reward)(LOGITS, REWARDS, SLOTS))
    samples = gradient_samples(good_baseline() if with_baseline else jnp.zeros(SLOTS))
    standard_error = samples.std(axis=0) / np.sqrt(DRAWS)
    assert np.linalg.norm(exact) > 20 * standard_error.max()  # precise enough to tell it from zero
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - exact)[1:], 4 * standard_error[1:])


def test_baseline_lowers_the_variance() -> None:
    plain, centred = gradient_samples(jnp.zeros(SLOTS)), gradient_samples(good_baseline())
    assert centred.var(axis=0).sum() < 0.5 * plain.var(axis=0).sum()


def test_losses_count_only_slots_that_hold_an_item() -> None:
    logprobs, achieved = jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([[1.0, 0.5], [0.25, 9.0]])
    values, where = jnp.array([[0.5, 0.5], [0.0, 0.0]]), jnp.array([[True, True], [True, False]])
    assert float(reinforce_loss(logprobs, achieved, values, where)) == pytest.approx(
        -((-1.0 * 0.5 + -2.0 * 0.0) + (-3.0 * 0.25)) / 2
    )
    assert float(baseline_loss(values, achieved, where)) == pytest.approx((0.5**2 + 0.0**2 + 0.25**2) / 3)


def test_rows_without_an_item_do_not_dilute_the_loss() -> None:
    """A third row that holds nothing: the mean stays that of two; of no row at all it is 0."""
    logprobs, achieved = jnp.array([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]), jnp.ones((3, 2))
    where = jnp.array([[True, True], [True, False], [False, False]])
    assert float(reinforce_loss(logprobs, achieved, 0 * achieved, where)) == pytest.approx((1 + 2 + 3) / 2)
    assert float(reinforce_loss(logprobs, achieved, 0 * achieved, jnp.zeros((3, 2), bool))) == 0.0


def test_slots_without_an_item_may_hold_anything() -> None:
    """NaN in every input of the slots that do not count: value and gradients are finite, and 0 there."""
    where = jnp.array([[True, False], [False, False]])
    logprobs, achieved = jnp.where(where, -2.0, jnp.nan), jnp.where(where, 3.0, jnp.nan)
    values = jnp.where(where, 0.5, jnp.nan)
    value, gradient = jax.value_and_grad(reinforce_loss)(logprobs, achieved, values, where)
    assert float(value) == pytest.approx(2.0 * 2.5)
    np.testing.assert_array_equal(gradient, [[-2.5, 0], [0, 0]])
    value, gradient = jax.value_and_grad(baseline_loss)(values, achieved, where)
    assert float(value) == pytest.approx(2.5**2)
    np.testing.assert_array_equal(gradient, [[-2 * 2.5, 0], [0, 0]])
    samples, rewards = jnp.stack([logprobs, 2 * logprobs]), jnp.stack([achieved, 0 * achieved])
    value, gradient = jax.value_and_grad(plackett_luce_loss)(samples, rewards, where)
    assert float(value) == pytest.approx(-(-2.0 * 3 + -4.0 * -3) / 2)
    np.testing.assert_array_equal(gradient, [[[-1.5, 0], [0, 0]], [[1.5, 0], [0, 0]]])


def test_returns_and_baselines_are_constants() -> None:
    """What a slate earned is no function of the parameters here: a gradient of it would be learned as if it were."""
    logprobs, achieved = -jnp.array([[1.0, 2.0], [4.0, 8.0]]), jnp.array([[1.0, 2.0], [3.0, 5.0]])
    where = jnp.ones((2, 2), bool)
    for gradient in (
        *jax.grad(reinforce_loss, (1, 2))(logprobs, achieved, 0.5 * achieved, where),
        jax.grad(baseline_loss, 1)(0.5 * achieved, achieved, where),
        jax.grad(plackett_luce_loss, 1)(logprobs, achieved, jnp.ones(2, bool)),
    ):
        np.testing.assert_array_equal(gradient, 0.0)


def leave_one_out_samples(samples: int, of_slots: bool) -> np.ndarray:
    """[DRAWS, items + 1]: policy-gradient estimates from `samples` slates each; of whole slates, or slot by slot."""

    def estimate(key: jax.Array) -> jax.Array:
        def loss(logits: jax.Array) -> jax.Array:
            logits = jnp.broadcast_to(logits, (samples, 1, ITEMS + 1))
            slates = jax.lax.stop_gradient(sample_slates(key, logits, SLOTS))
            logprobs, achieved = slate_logprobs(logits, slates), returns(REWARDS[slates])
            if of_slots:
                return plackett_luce_loss(logprobs, achieved, jnp.ones((1, SLOTS), bool))
            return plackett_luce_loss(logprobs.sum(axis=-1), achieved[..., 0], jnp.ones(1, bool))

        return -jax.grad(loss)(LOGITS)

    return np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), DRAWS)))


@pytest.mark.parametrize("of_slots", [False, True])
def test_leave_one_out_averages_to_the_exact_gradient(of_slots: bool) -> None:
    exact = np.asarray(jax.grad(expected_reward)(LOGITS, REWARDS, SLOTS))
    samples = leave_one_out_samples(3, of_slots)
    standard_error = samples.std(axis=0) / np.sqrt(DRAWS)
    assert np.linalg.norm(exact) > 20 * standard_error.max()
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - exact)[1:], 4 * standard_error[1:])


def test_leave_one_out_has_less_variance_than_no_baseline() -> None:
    """Four slates with the others' mean as baseline, against four without a baseline."""
    plain = gradient_samples(jnp.zeros(SLOTS)).reshape(DRAWS // 4, 4, -1).mean(axis=1)
    assert leave_one_out_samples(4, True).var(axis=0).sum() < 0.7 * plain.var(axis=0).sum()


def test_leave_one_out_by_hand() -> None:
    """Three samples of two states, of which the second does not count: baselines are the means of the other two."""
    logprobs = jnp.array([[-1.0, -9.0], [-2.0, -9.0], [-3.0, -9.0]])
    rewards = jnp.array([[1.0, jnp.nan], [0.0, 5.0], [0.5, 5.0]])
    expected = -(-1 * (1 - 0.25) - 2 * (0 - 0.75) - 3 * (0.5 - 0.5)) / 3
    assert float(plackett_luce_loss(logprobs, rewards, jnp.array([True, False]))) == pytest.approx(expected)
    slots, where = jnp.stack([logprobs] * 2, axis=-1), jnp.array([[True, False], [False, False]])
    assert float(plackett_luce_loss(slots, jnp.stack([rewards] * 2, axis=-1), where)) == pytest.approx(expected)


def test_equal_rewards_teach_nothing() -> None:
    logprobs = jnp.array([[-1.0], [-2.0]])
    gradient = jax.grad(plackett_luce_loss)(logprobs, jnp.full((2, 1), 0.7), jnp.ones(1, bool))
    np.testing.assert_array_equal(gradient, 0.0)


def test_one_sample_has_no_others() -> None:
    with pytest.raises(ValueError, match=r"1 sample\(s\)"):
        plackett_luce_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones(2, bool))


def test_mask_of_samples_must_fit() -> None:
    """A mask [batch] beside slots [samples, batch, k] would mask slots as if they were states."""
    slots = -jnp.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"where \(2,\), expected"):
        plackett_luce_loss(slots, slots, jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"returns \(3, 2\)"):
        plackett_luce_loss(slots, slots[..., 0], jnp.ones((2, 2), bool))
