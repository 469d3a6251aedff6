"""Plackett-Luce slates against enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.rl.policy import entropy, greedy_slates, kl_divergence, sample_slates, slate_logprobs

# Padding, then three items that are drawn with probabilities 1/2, 1/3, 1/6.
LOGITS = np.array([NEVER, math.log(3), math.log(2), math.log(1)], np.float32)
# p(a, b) = p(a) * p(b) / (1 - p(a))
PAIRS = {
    (1, 2): 1 / 2 * (1 / 3) / (1 / 2),
    (1, 3): 1 / 2 * (1 / 6) / (1 / 2),
    (2, 1): 1 / 3 * (1 / 2) / (2 / 3),
    (2, 3): 1 / 3 * (1 / 6) / (2 / 3),
    (3, 1): 1 / 6 * (1 / 2) / (5 / 6),
    (3, 2): 1 / 6 * (1 / 3) / (5 / 6),
}


def slate_logprob(logits: np.ndarray, slate: tuple[int, ...]) -> float:
    return float(slate_logprobs(jnp.asarray(logits), jnp.array(slate, jnp.int32)).sum())


@pytest.mark.parametrize("slate", PAIRS)
def test_logprob_of_pairs_by_hand(slate: tuple[int, int]) -> None:
    assert sum(PAIRS.values()) == pytest.approx(1.0)
    assert slate_logprob(LOGITS, slate) == pytest.approx(math.log(PAIRS[slate]), abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_probabilities_of_all_slates_sum_to_one(k: int) -> None:
    slates = itertools.permutations((1, 2, 3), k)
    assert sum(math.exp(slate_logprob(LOGITS, slate)) for slate in slates) == pytest.approx(1.0, abs=1e-6)


def test_logprob_survives_logits_of_every_size() -> None:
    """After the dominant item is drawn, the others still share what is left: 1 - p(first) has no digits in float32."""
    logits = np.array([NEVER, 100.0, 1.0, 0.0], np.float32)
    logprobs = slate_logprobs(jnp.asarray(logits), jnp.array([1, 3, 2], jnp.int32))
    np.testing.assert_allclose(logprobs, [0.0, -math.log(1 + math.e), 0.0], atol=1e-6)
    gradient = jax.grad(lambda x: slate_logprobs(x, jnp.array([1, 3, 2], jnp.int32)).sum())(jnp.asarray(logits))
    assert np.isfinite(gradient).all()


def test_samples_are_as_frequent_as_their_probability() -> None:
    draws = 20_000
    slates = sample_slates(jax.random.key(0), jnp.broadcast_to(LOGITS, (draws, 4)), 2)
    for pair, probability in PAIRS.items():
        frequency = float(np.mean(np.all(np.asarray(slates) == pair, axis=1)))
        standard_error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(frequency - probability) < 4 * standard_error, pair


def test_excluded_items_are_never_drawn() -> None:
    logits = exclude_items(jnp.zeros((500, 9)), jnp.tile(jnp.array([[3, 5]], jnp.int32), (500, 1)))
    slates = np.asarray(sample_slates(jax.random.key(1), logits, 6))
    assert {tuple(sorted(slate)) for slate in slates.tolist()} == {(1, 2, 4, 6, 7, 8)}


def test_slots_without_an_item_left_count_nothing() -> None:
    logits = jnp.array([[NEVER, 0.0, NEVER, 1.0]])
    slates = sample_slates(jax.random.key(0), logits, 3)
    logprobs = slate_logprobs(logits, slates)
    assert set(np.asarray(slates)[0, :2].tolist()) == {1, 3}
    assert float(logprobs[0, 2]) == 0.0
    probability = (1 if slates[0, 0] == 1 else math.e) / (1 + math.e)
    assert float(logprobs.sum()) == pytest.approx(math.log(probability), abs=1e-6)


def test_greedy_slates_are_sorted_by_logit() -> None:
    np.testing.assert_array_equal(greedy_slates(jnp.array([[NEVER, 0.1, 3.0, -1.0]]), 3), [[2, 1, 3]])


def test_kl_and_entropy_by_hand() -> None:
    other = np.array([NEVER, 0.0, 0.0, 0.0], np.float32)
    expected = 1 / 2 * math.log((1 / 2) / (1 / 3)) + 1 / 3 * math.log(1) + 1 / 6 * math.log((1 / 6) / (1 / 3))
    assert float(kl_divergence(jnp.asarray(LOGITS), jnp.asarray(other))) == pytest.approx(expected, abs=1e-6)
    reverse = 1 / 3 * (math.log((1 / 3) / (1 / 2)) + math.log(1) + math.log((1 / 3) / (1 / 6)))
    assert float(kl_divergence(jnp.asarray(other), jnp.asarray(LOGITS))) == pytest.approx(reverse, abs=1e-6)
    assert float(kl_divergence(jnp.asarray(LOGITS), jnp.asarray(LOGITS + 7))) == pytest.approx(0.0, abs=1e-6)
    surprise = 1 / 2 * math.log(2) + 1 / 3 * math.log(3) + 1 / 6 * math.log(6)
    assert float(entropy(jnp.asarray(LOGITS))) == pytest.approx(surprise, abs=1e-6)
