"""The behaviour model where the propensities are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.estimators import ips
from jaxrec.rl.logged.behaviour import (
    Behaviour,
    BehaviourConfig,
    Choices,
    calibration,
    chosen_logprobs,
    fit_behaviour,
    log_likelihood,
)
from jaxrec.rl.ope.weights import importance_weights

ITEMS, WIDTH = 8, 3
CONFIG = BehaviourConfig(batch_size=128, max_epochs=20)


def true_beta() -> Behaviour:
    kernel, bias = jax.random.split(jax.random.key(3))
    return Behaviour(0.5 * jax.random.normal(kernel, (WIDTH, ITEMS + 1)), 0.5 * jax.random.normal(bias, (ITEMS + 1,)))


def draw(rows: int, seed: int) -> tuple[Choices, np.ndarray]:
    """Choices by the true β, one item excluded in each row, and their true log-propensities."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    exclude = rng.integers(1, ITEMS + 1, (rows, 1)).astype(np.int32)
    logprobs = np.asarray(true_beta().logprobs(jnp.asarray(features), jnp.asarray(exclude)), np.float64)
    action = (logprobs + rng.gumbel(size=logprobs.shape)).argmax(axis=1).astype(np.int32)
    return Choices(features, action, exclude), logprobs[np.arange(rows), action]


@pytest.fixture(scope="module")
def training() -> Choices:
    return draw(6000, 0)[0]


@pytest.fixture(scope="module")
def held_out() -> Choices:
    return draw(2000, 1)[0]


def test_logprobs_by_hand() -> None:
    """Logits 2 x 1 + 0, 2 x 0 + 1 and an excluded item: log softmax of (2, 1)."""
    beta = Behaviour(jnp.array([[0.0, 1.0, 0.0, 5.0]]), jnp.array([0.0, 0.0, 1.0, 0.0]))
    logprobs = beta.logprobs(jnp.array([[2.0]]), jnp.array([[3]], jnp.int32))[0]
    np.testing.assert_allclose(logprobs[1:3], np.array([2, 1]) - np.log(np.exp(2) + np.exp(1)), rtol=1e-6)
    assert np.exp(logprobs[0]) == np.exp(logprobs[3]) == 0


def test_fit_comes_near_the_true_propensities(training: Choices, held_out: Choices) -> None:
    beta, fit = fit_behaviour(training, held_out, ITEMS, CONFIG)
    reported = held_out.rows(np.arange(1000, 2000))
    best = log_likelihood(true_beta(), reported)
    assert best - 0.02 < fit.log_likelihood < best + 0.005  # more than the truth would be leakage
    assert fit.frequency_log_likelihood < fit.log_likelihood - 0.05
    assert fit.uniform_log_likelihood == pytest.approx(-np.log(ITEMS - 1), rel=1e-5)
    assert fit.calibration_error < 0.05
    assert fit.log_likelihood == pytest.approx(log_likelihood(beta, reported))
    assert 1 <= fit.epochs <= 20


def test_weights_by_the_model_give_the_value_that_known_propensities_give(training: Choices, held_out: Choices) -> None:
    """A uniform policy among the candidates, judged by IPS with fitted and with known propensities."""
    beta, _ = fit_behaviour(training, held_out, ITEMS, CONFIG)
    choices, known = draw(4000, 2)
    reward = (choices.action % 3 == 0).astype(float)
    uniform = np.full(len(reward), -np.log(ITEMS - 1))
    value = np.mean([(np.setdiff1d(np.arange(1, ITEMS + 1), row) % 3 == 0).mean() for row in choices.exclude])
    fitted = ips(importance_weights(uniform, chosen_logprobs(beta, choices)), reward).value()
    assert ips(importance_weights(uniform, known), reward).value() == pytest.approx(value, abs=0.05)
    assert fitted == pytest.approx(value, abs=0.05)


def test_shuffled_choices_teach_nothing_beyond_frequencies(training: Choices, held_out: Choices) -> None:
    rng = np.random.default_rng(0)
    free = np.zeros_like(training.exclude), np.zeros_like(held_out.exclude)
    shuffled = Choices(training.features, rng.permutation(training.action), free[0])
    other = Choices(held_out.features, rng.permutation(held_out.action), free[1])
    _, fit = fit_behaviour(shuffled, other, ITEMS, CONFIG)
    assert fit.log_likelihood < fit.frequency_log_likelihood + 0.005


def test_calibration_by_hand() -> None:
    """Without features: items are said to be chosen with 0.75 and 0.25, and are with 0.5 each. A quarter is amiss."""
    beta = Behaviour(jnp.zeros((1, 3)), jnp.log(jnp.array([1.0, 0.75, 0.25])))
    choices = Choices(np.zeros((4, 1), np.float32), np.array([1, 1, 2, 2], np.int32), np.zeros((4, 1), np.int32))
    table = calibration(beta, choices, batch_size=3)
    assert table.error == pytest.approx(0.25)
    assert table.predicted.sum() == pytest.approx(1)
    assert table.chosen.sum() == pytest.approx(1)
    assert sorted(table.predicted[table.predicted > 0]) == pytest.approx([0.25, 0.75])


def test_true_model_is_calibrated(held_out: Choices) -> None:
    assert calibration(true_beta(), held_out).error < 0.05


def test_features_receive_no_gradient() -> None:
    exclude = jnp.zeros((2, 1), jnp.int32)
    gradient = jax.grad(lambda x: true_beta().logprobs(x, exclude)[:, 1].sum())(jnp.ones((2, WIDTH)))
    np.testing.assert_array_equal(gradient, 0.0)


def test_figures_are_of_rows_that_chose_nothing(training: Choices, held_out: Choices) -> None:
    """Other choices in the second half of the held-out rows: the same model in the same epoch, and other figures."""
    second = np.arange(2000) >= 1000
    other = held_out._replace(action=np.where(second, draw_other(held_out), held_out.action))
    config = BehaviourConfig(batch_size=128, max_epochs=6, patience=1)
    (first, fit), (again, fit_other) = (fit_behaviour(training, rows, ITEMS, config) for rows in (held_out, other))
    np.testing.assert_array_equal(first.kernel, again.kernel)
    assert fit.epochs == fit_other.epochs > 0
    assert fit_other.log_likelihood < fit.log_likelihood - 0.1


def draw_other(choices: Choices) -> np.ndarray:
    """[rows] int32: the candidates that the true β likes least."""
    logprobs = np.asarray(true_beta().logprobs(jnp.asarray(choices.features), jnp.asarray(choices.exclude)))
    return np.where(logprobs < -50.0, 0.0, logprobs).argmin(axis=1).astype(np.int32)


def test_same_seed_same_model(training: Choices, held_out: Choices) -> None:
    config = BehaviourConfig(batch_size=128, max_epochs=2)
    models = [fit_behaviour(training, held_out, ITEMS, config)[0] for _ in range(2)]
    np.testing.assert_array_equal(models[0].kernel, models[1].kernel)


def test_impossible_choices_are_refused(training: Choices, held_out: Choices) -> None:
    nothing = training.rows(np.arange(0))
    with pytest.raises(ValueError, match="0 training choices, expected at least 1"):
        fit_behaviour(nothing, held_out, ITEMS)
    with pytest.raises(ValueError, match="1 held-out choices, expected at least 2"):
        fit_behaviour(training, held_out.rows(np.arange(1)), ITEMS)
    wrong = training._replace(exclude=np.where(np.arange(6000)[:, None] == 5, training.action[:, None], 0))
    with pytest.raises(ValueError, match=r"training row 5: item \d was chosen"):
        fit_behaviour(wrong, held_out, ITEMS)
    with pytest.raises(ValueError, match=r"expected a candidate of 1\.\.3"):
        fit_behaviour(training, held_out, 3)


@pytest.mark.parametrize("item", [-1, ITEMS + 1])
def test_excluded_items_must_exist(training: Choices, held_out: Choices, item: int) -> None:
    """-1 would take away the last item of the row without a word."""
    wrong = held_out._replace(exclude=np.where(np.arange(2000)[:, None] == 7, item, 0).astype(np.int32))
    with pytest.raises(ValueError, match=r"held-out row 7: an excluded item is not of 0\.\.8"):
        fit_behaviour(training, wrong, ITEMS)


def test_features_and_likelihoods_must_be_finite(training: Choices, held_out: Choices) -> None:
    features = training.features.copy()
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="training row 3: a feature is not finite"):
        fit_behaviour(training._replace(features=features), held_out, ITEMS)
    diverging = BehaviourConfig(batch_size=128, learning_rate=1e38)
    with pytest.raises(ValueError, match="epoch 1: the held-out log-likelihood is nan"):
        fit_behaviour(training, held_out, ITEMS, diverging)
