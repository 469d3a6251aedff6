"""The models' forward pass: against plain NumPy, under masks, with and without a request time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import ModelConfig
from jaxrec.data.events import Events
from jaxrec.models.cooccurrence import RECENT_ITEMS, CoOccurrence, recent_items
from jaxrec.models.features import GAP_BUCKETS, RatingEmbedding, gap_bucket
from jaxrec.models.hybrid import Hybrid, MixWeights, PolicyHead
from jaxrec.models.lstm import LSTM
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM

ITEMS = 12
CONFIG = ModelConfig(embedding=6, hidden=5, rating_width=3, time_width=2, max_length=8)
NEIGHBOURS = Neighbours(
    np.vstack([np.zeros(2), np.random.default_rng(1).integers(1, ITEMS + 1, (ITEMS, 2))]).astype(np.int32),
    np.vstack([np.zeros(2), np.random.default_rng(2).random((ITEMS, 2))]).astype(np.float32),
)
GENRES = np.vstack([np.zeros(3), np.random.default_rng(0).integers(0, 2, (ITEMS, 3))]).astype(np.float32)


def random_events(batch: int, length: int, seed: int) -> Events:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, batch).astype(np.int32)
    where = np.arange(length) < lengths[:, None]
    return Events(
        np.where(where, rng.integers(1, ITEMS + 1, where.shape), 0).astype(np.int32),
        np.where(where, rng.choice([-1.0, 0.0, 0.5, 1.0], where.shape), -1).astype(np.float32),
        np.where(where, rng.choice([-1.0, 0.0, 1.0, 4095.0, 1e9], where.shape), -1).astype(np.float32),
        lengths,
    )


def make_hybrid(policy: bool = False) -> Hybrid:
    rngs = nnx.Rngs(0)
    return Hybrid(
        TimeRatingAwareLSTM(ITEMS, CONFIG, rngs=rngs),
        TimeRatingAwareContentModel(ITEMS, GENRES, CONFIG, rngs=rngs),
        CoOccurrence(NEIGHBOURS),
        MixWeights(0.3, 0.7, 2.0),
        policy=PolicyHead(12, 4, ITEMS, rngs=rngs) if policy else None,
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_lstm_equals_the_textbook() -> None:
    lstm = LSTM(3, 2, rngs=nnx.Rngs(1))
    x = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
    outputs, (h_n, c_n) = lstm(jnp.asarray(x), jnp.ones((1, 4), bool))
    kernel, recurrent, bias = (np.asarray(p[...]) for p in (lstm.kernel, lstm.recurrent_kernel, lstm.bias))
    assert bias.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    h, c = np.zeros(2), np.zeros(2)
    for t in range(4):
        i, f, g, o = np.split(x[0, t] @ kernel + h @ recurrent + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        np.testing.assert_allclose(outputs[0, t], h, atol=1e-6)
    np.testing.assert_allclose(h_n[0], h, atol=1e-6)
    np.testing.assert_allclose(c_n[0], c, atol=1e-6)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (-1, 0),
        (0, 1),
        (0.5, 1),
        (1, 2),
        (1.9, 2),
        (2, 3),
        (3, 3),
        (4, 4),
        (1023, 11),
        (1024, 12),
        (2.0**29, 31),
        (9e9, 31),
    ],
)
def test_gap_buckets_by_hand(seconds: float, bucket: int) -> None:
    assert int(gap_bucket(jnp.float32(seconds))) == bucket
    assert bucket < GAP_BUCKETS


def test_a_missing_rating_is_not_a_rating_of_zero() -> None:
    embedding = RatingEmbedding(2, rngs=nnx.Rngs(0))
    embedding.missing[...] = jnp.array([7.0, 7.0])
    embedding.offset[...] = jnp.array([1.0, 2.0])
    embedding.slope[...] = jnp.array([10.0, 20.0])
    assert embedding(jnp.array([-1.0, 0.0, 0.5])).tolist() == [[7, 7], [1, 2], [6, 12]]


def test_content_vector_of_an_item_adds_its_genres() -> None:
    model = TimeRatingAwareContentModel(ITEMS, GENRES, CONFIG, rngs=nnx.Rngs(0))
    expected = model.item_embedding[...][3] + GENRES[3] @ model.genre_projection.kernel[...]
    np.testing.assert_allclose(model.item_vectors()[3], expected, atol=1e-6)
    assert model.item_vectors()[0].tolist() == [0] * 6
    assert "genre_matrix" not in nnx.to_pure_dict(nnx.state(model, nnx.Param))  # fixed, not trained


def test_padding_changes_nothing() -> None:
    hybrid, events = make_hybrid(), random_events(5, 8, seed=1)
    gap = jnp.array([-1.0, 0.0, 3.0, 1e6, 50.0])
    logits, state = hybrid.logits(events, gap)
    longer = Events(
        *(np.pad(x, ((0, 0), (0, 3)), constant_values=1) for x in (events.item, events.rating, events.gap)),
        events.length,
    )
    logits_longer, state_longer = hybrid.logits(longer, gap)
    np.testing.assert_allclose(logits_longer, logits, atol=1e-5)
    np.testing.assert_allclose(state_longer, state, atol=1e-6)


def test_histories_packed_into_a_row_do_not_see_each_other() -> None:
    model = make_hybrid().content
    events = random_events(2, 8, seed=7)
    first, second = (int(n) for n in events.length)
    packed = Events(
        *(np.concatenate([x[0, :first], x[1, :second]])[None] for x in (events.item, events.rating, events.gap)),
        np.array([first + second]),
    )
    starts = np.zeros((1, first + second), bool)
    starts[0, [0, first]] = True
    alone, _ = model.encode(events, model.item_vectors())
    together, _ = model.encode(packed, model.item_vectors(), starts=starts)
    np.testing.assert_allclose(together[0, :first], alone[0, :first], atol=1e-6)
    np.testing.assert_allclose(together[0, first:], alone[1, :second], atol=1e-6)


def test_batch_equals_single() -> None:
    hybrid, events = make_hybrid(), random_events(4, 8, seed=2)
    gap = jnp.array([-1.0, 0.0, 3.0, 1e6])
    together, _ = hybrid.logits(events, gap)
    for row in range(4):
        alone, _ = hybrid.logits(Events(*(x[row : row + 1] for x in events)), gap[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_event_by_event_equals_the_whole_history() -> None:
    hybrid, events = make_hybrid(), random_events(1, 8, seed=3)
    length, gap = int(events.length[0]), jnp.array([60.0])
    logits, state = hybrid.logits(events, gap)
    step_state = jnp.zeros_like(state)
    for t in range(length):
        one = Events(events.item[:, t : t + 1], events.rating[:, t : t + 1], events.gap[:, t : t + 1], np.array([1]))
        step_logits, step_state = hybrid.logits(one, gap, step_state)
    np.testing.assert_allclose(step_state, state, atol=1e-6)
    np.testing.assert_allclose(step_logits, logits, atol=1e-5)


def test_the_mix_of_logits_ranks_as_the_mix_of_log_probabilities() -> None:
    hybrid, events = make_hybrid(), random_events(3, 8, seed=4)
    gap = jnp.full(3, -1.0)
    mixed, _ = hybrid.logits(events, gap)
    alone = []
    for model in (hybrid.lstm, hybrid.content):
        _, (h, _) = model.encode(events, model.item_vectors())
        alone.append(jax.nn.log_softmax(model.query(h, gap) @ model.item_vectors().T + model.item_bias()))
    near = hybrid.cooccurrence.scores(recent_items(events.item, events.length))
    expected = 0.3 * alone[0] + 0.7 * alone[1] + 2.0 * near
    np.testing.assert_allclose(jax.nn.log_softmax(mixed)[:, 1:], jax.nn.log_softmax(expected)[:, 1:], atol=1e-4)


def test_a_new_policy_is_the_supervised_one() -> None:
    events, gap = random_events(3, 8, seed=5), jnp.full(3, -1.0)
    np.testing.assert_array_equal(make_hybrid(policy=True).logits(events, gap)[0], make_hybrid().logits(events, gap)[0])


def test_the_request_time_does_not_touch_the_state() -> None:
    hybrid, events = make_hybrid(), random_events(3, 8, seed=6)
    hybrid.lstm.request_scale.kernel[...] = jnp.ones_like(hybrid.lstm.request_scale.kernel[...])
    soon, state_soon = hybrid.logits(events, jnp.zeros(3))
    late, state_late = hybrid.logits(events, jnp.full(3, 1e7))
    np.testing.assert_array_equal(state_soon, state_late)
    assert not np.allclose(soon, late)


def test_cooccurrence_scores_by_the_neighbours_of_the_last_events() -> None:
    """Items 1, 2, 1 in this order: 1 twice, as the last (weight 1) and the third last (0.75 ** 2), 2 in between."""
    neighbours = Neighbours(
        np.array([[0, 0], [2, 3], [3, 0]], np.int32), np.array([[0, 0], [8, 4], [1, 0]], np.float32)
    )
    padded = Neighbours(*(np.pad(table, ((0, 1), (0, 0))) for table in neighbours))
    recent = recent_items(np.array([[1, 2, 1, 0]], np.int32), np.array([3], np.int32))
    np.testing.assert_array_equal(recent, [[1, 2, 1] + [0] * (RECENT_ITEMS - 3)])
    scores = CoOccurrence(padded).scores(recent)
    np.testing.assert_allclose(scores, [[0, 0, 8 * (1 + 0.75**2), 4 * (1 + 0.75**2) + 1 * 0.75]], rtol=1e-6)


def test_recent_items_go_on_where_they_stopped() -> None:
    items = np.arange(1, 15, dtype=np.int32)[None]
    whole = recent_items(items, np.array([14]))
    np.testing.assert_array_equal(whole, [np.arange(14, 4, -1)])
    before = recent_items(items[:, :9], np.array([9]))
    np.testing.assert_array_equal(recent_items(items[:, 9:], np.array([5]), before), whole)
    np.testing.assert_array_equal(recent_items(items[:, 9:], np.array([0]), before), before)


def test_cooccurrence_adds_to_the_logits_by_its_weight() -> None:
    hybrid, events = make_hybrid(), random_events(5, 8, seed=3)
    gap = jnp.full(5, -1.0)
    without = Hybrid(hybrid.lstm, hybrid.content, hybrid.cooccurrence, MixWeights(0.3, 0.7, 0.0))
    scores = hybrid.cooccurrence.scores(recent_items(events.item, events.length))
    assert float(scores.max()) > 0
    np.testing.assert_allclose(
        hybrid.logits(events, gap)[0], without.logits(events, gap)[0] + 2.0 * scores, rtol=1e-5, atol=1e-5
    )


def test_bad_arguments_are_named() -> None:
    hybrid = make_hybrid()
    for name, weights in {"lstm": (-0.5, 0.5, 1.0), "cooccurrence": (0.5, 0.5, float("nan"))}.items():
        with pytest.raises(ValueError, match=f"the mix's weight of {name} is .*, expected a number of at least 0"):
            Hybrid(hybrid.lstm, hybrid.content, hybrid.cooccurrence, MixWeights(*weights))
    with pytest.raises(ValueError, match=r"item_embedding is \(3, 6\), expected \(13, 6\)"):
        TimeRatingAwareLSTM(ITEMS, CONFIG, rngs=nnx.Rngs(0), item_embedding=np.zeros((3, 6), np.float32))
    with pytest.raises(ValueError, match="genre_matrix has 4 rows, expected 13"):
        TimeRatingAwareContentModel(ITEMS, GENRES[:4], CONFIG, rngs=nnx.Rngs(0))
