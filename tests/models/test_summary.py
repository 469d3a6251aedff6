"""Summaries of histories, by hand and in pieces."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import MISSING_RATING
from jaxrec.data.events import Events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.models.summary import Summary, last_summary, summaries

ENCODER = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], np.float32)
EVENTS = Events(
    np.array([[1, 2, 3], [3, 0, 0]], np.int32),
    np.array([[0.5, MISSING_RATING, 1.0], [MISSING_RATING, 0.0, 0.0]], np.float32),
    np.array([[UNKNOWN_GAP, 60.0, 7200.0], [UNKNOWN_GAP, 0.0, 0.0]], np.float32),
    np.array([3, 1], np.int32),
)


def test_by_hand() -> None:
    found = last_summary(EVENTS, ENCODER)
    np.testing.assert_allclose(found.code, [[4.0, 3.0], [3.0, 1.0]])
    np.testing.assert_allclose(found.decayed_code, [[3 + 0.93**2, 1 + 2 * 0.93], [3.0, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(found.events, [3, 1])
    np.testing.assert_array_equal(found.session, [1, 1])  # two hours after the second event
    np.testing.assert_array_equal(found.gap, [7200, 0])
    np.testing.assert_array_equal(found.rated, [2, 0])
    np.testing.assert_array_equal(found.ratings, [1.5, 0])
    np.testing.assert_array_equal(found.last_rating, [1.0, MISSING_RATING])
    assert summaries(EVENTS, ENCODER).session[0].tolist() == [1, 2, 1]


def test_in_pieces_is_the_same_as_at_once_and_flat_keeps_all() -> None:
    at_once = last_summary(EVENTS, ENCODER)
    first = Events(*(column[:, :1] for column in EVENTS[:3]), np.array([1, 1], np.int32))
    rest = Events(*(column[:, 1:] for column in EVENTS[:3]), np.array([2, 0], np.int32))
    in_pieces = last_summary(rest, ENCODER, Summary.from_flat(last_summary(first, ENCODER).flat()))
    jax.tree.map(np.testing.assert_array_equal, in_pieces, at_once)
    assert at_once.flat().shape == (2, 2 * 2 + 6)
    assert jnp.isfinite(at_once.flat()).all()
