"""Top-K off-policy correction: by hand, against exact gradients, and at extreme log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER
from jaxrec.rl.losses.off_policy import capped_importance_weights, top_k_multiplier, top_k_off_policy_loss

LOGITS = jnp.array([NEVER, 0.5, -0.3, 0.0, 1.0])
REWARDS = jnp.array([0.4, 0.9, 0.3, 0.5])  # of items 1 to 4
BETA = jnp.array([0.1, 0.2, 0.3, 0.4])
ITEMS = jnp.arange(1, 5)


def enumerated_gradient(k: int, cap: float | None = None) -> jax.Array:
    """E_β of minus the loss's gradient: every item is logged once, and counts β."""

    def loss(logits: jax.Array, item: jax.Array) -> jax.Array:
        logprob = jax.nn.log_softmax(logits)[item]
        one = jnp.ones((), bool)
        return top_k_off_policy_loss(logprob, jnp.log(BETA[item - 1]), REWARDS[item - 1], one, k, cap)

    return -BETA @ jax.vmap(jax.grad(loss), (None, 0))(LOGITS, ITEMS)


@pytest.mark.parametrize("k", [1, 2, 16])
def test_expected_gradient_is_that_of_the_reward_of_k_draws(k: int) -> None:
    """Each item earns its reward when it is among k draws from π: J = sum_a r(a) (1 - (1 - π(a))^k)."""

    def value(logits: jax.Array) -> jax.Array:
        return jnp.sum(REWARDS * (1 - (1 - jax.nn.softmax(logits)[1:]) ** k))

    np.testing.assert_allclose(enumerated_gradient(k), jax.grad(value)(LOGITS), rtol=1e-5, atol=1e-7)


def test_with_beta_equal_to_pi_it_is_the_policy_gradient() -> None:
    def loss(logits: jax.Array) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits)[1:]
        return top_k_off_policy_loss(logprobs, logprobs, REWARDS, jnp.ones(4, bool), 1)

    def reinforce(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(logits)[1:] * REWARDS)

    np.testing.assert_allclose(jax.grad(loss)(LOGITS), jax.grad(reinforce)(LOGITS), rtol=1e-6)


def test_weights_by_hand() -> None:
    pi, beta = jnp.log(jnp.array([0.5, 0.2, 0.9])), jnp.log(jnp.array([0.25, 0.4, 0.1]))
    weights, clipped = capped_importance_weights(pi, beta)
    np.testing.assert_allclose(weights, [0.5 / 0.25, 0.2 / 0.4, 0.9 / 0.1], rtol=1e-6)
    assert not clipped.any()
    weights, clipped = capped_importance_weights(pi, beta, cap=3.0)
    np.testing.assert_allclose(weights, [2.0, 0.5, 3.0], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [False, False, True])


def test_multiplier_by_hand() -> None:
    """K (1 - π)^(K - 1): K = 3 at π = 0, 1/2, 2/3, 1."""
    logprobs = jnp.log(jnp.array([0.0, 0.5, 2 / 3, 1.0]))
    np.testing.assert_allclose(top_k_multiplier(logprobs, 3), [3, 3 * 0.5**2, 3 / 3**2, 0], rtol=1e-5)
    np.testing.assert_array_equal(top_k_multiplier(logprobs, 1), 1.0)


def test_loss_by_hand() -> None:
    """π = 1/2, β = 1/4, R = 3, K = 2, and an entry that does not count: -(1/2)/(1/4) * 2 (1/2) * 3 * log(1/2)."""
    pi, beta = jnp.log(jnp.array([0.5, 0.0])), jnp.log(jnp.array([0.25, 0.0]))
    where = jnp.array([True, False])
    assert float(top_k_off_policy_loss(pi, beta, jnp.array([3.0, jnp.nan]), where, 2)) == pytest.approx(6 * np.log(2))
    assert float(top_k_off_policy_loss(pi, beta, jnp.array([3.0, 1.0]), where, 2, cap=1.5)) == pytest.approx(
        1.5 * 1 * 3 * np.log(2)
    )
    assert float(top_k_off_policy_loss(pi, beta, jnp.ones(2), jnp.zeros(2, bool), 2)) == 0.0


@pytest.mark.parametrize("k", [1, 2])
def test_entries_that_do_not_count_may_hold_anything(k: int) -> None:
    where, bad = jnp.array([True, False]), jnp.array([-1.0, jnp.nan])
    value, gradient = jax.value_and_grad(top_k_off_policy_loss)(bad, bad, bad, where, k, 10.0)
    expected, expected_gradient = jax.value_and_grad(top_k_off_policy_loss)(*[bad[:1]] * 3, where[:1], k, 10.0)
    assert float(value) == pytest.approx(float(expected))
    np.testing.assert_allclose(gradient, [expected_gradient[0], 0.0])


@pytest.mark.parametrize("cap", [0.5, 1.0, 10.0, 1e6])
def test_cap_never_raises_a_weight(cap: float) -> None:
    pi, beta = jax.random.normal(jax.random.key(0), (2, 1000)) * 10
    free, _ = capped_importance_weights(pi, beta)
    weights, clipped = capped_importance_weights(pi, beta, cap)
    assert (weights <= free).all()
    assert (weights <= cap * (1 + 1e-6)).all()
    np.testing.assert_array_equal(weights[~clipped], free[~clipped])
    np.testing.assert_array_equal(clipped, pi - beta > np.log(cap))


@pytest.mark.parametrize("logprob", [0.0, -1e-8, -1e-3, -100.0, -1e30])
def test_extremes_are_finite(logprob: float) -> None:
    def loss(pi: jax.Array) -> jax.Array:
        return top_k_off_policy_loss(pi, jnp.float32(-1e30), jnp.float32(1.0), jnp.ones((), bool), 10, cap=20.0)

    value, gradient = jax.value_and_grad(loss)(jnp.float32(logprob))
    assert np.isfinite(value)
    assert np.isfinite(gradient)
    exact = 10 * -(np.expm1(np.float64(np.float32(logprob))) ** 1)  # 10 (1 - π), before the power of 9
    assert float(top_k_multiplier(jnp.float32(logprob), 2)) == pytest.approx(exact / 5, rel=1e-5)
