"""A summary of a history for the reranker: sums and counts that each further event updates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrec.data.events import Events
from jaxrec.models.features import Array

SESSION_S = 3600.0
"""An event that comes later than this after the one before begins a session."""
DECAY = 0.93
"""The factor by which the decayed code shrinks with each further event."""


class Summary(NamedTuple):
    """Of histories [...]; all is 0 before the first event.

    Attributes:
        code: [..., rank] float32, the sum of the encoder's rows (`jaxrec.models.linear`) of the events' items.
        decayed_code: [..., rank] float32, the same where an event counts DECAY ** (how many came later).
        events: [...] float32, their number.
        session: [...] float32, how many of the last of them are of one session.
        gap: [...] float32, seconds between the last two; 0 where there are no two.
        rated: [...] float32, how many of them have a rating.
        ratings: [...] float32, the sum of their unit ratings.
        last_rating: [...] float32, that of the last event; MISSING_RATING: none.
    """

    code: jax.Array
    decayed_code: jax.Array
    events: jax.Array
    session: jax.Array
    gap: jax.Array
    rated: jax.Array
    ratings: jax.Array
    last_rating: jax.Array

    def flat(self) -> jax.Array:
        """[..., 2 * rank + NUMBERS]: as a recurrent state holds it."""
        return jnp.concatenate([self.code, self.decayed_code, jnp.stack(self[2:], axis=-1)], axis=-1)

    @classmethod
    def from_flat(cls, flat: jax.Array) -> "Summary":
        """The inverse of `flat`."""
        code, decayed_code = jnp.split(flat[..., :-NUMBERS], 2, axis=-1)
        return cls(code, decayed_code, *jnp.moveaxis(flat[..., -NUMBERS:], -1, 0))


NUMBERS = len(Summary._fields) - 2


def summaries(events: Events, encoder: Array, before: Summary | None = None) -> Summary:
    """The summaries after each event.

    Args:
        events: [batch, length]; what follows a row's last event changes nothing.
        encoder: [items + 1, rank] float32, row 0 zero.
        before: [batch], the summary of the events before them; None: there were none.

    Returns:
        [batch, length, ...].
    """
    item, rating, gap = (jnp.asarray(column) for column in events[:3])
    if before is None:
        before = Summary.from_flat(jnp.zeros((item.shape[0], 2 * encoder.shape[1] + NUMBERS)))
    columns = (jnp.asarray(encoder)[item], rating, gap, jnp.asarray(events.where))

    def after(last: Summary, event: tuple[jax.Array, ...]) -> tuple[Summary, Summary]:
        code, rating, gap, is_event = event
        new = updated(last, code, rating, gap)
        kept = jax.tree.map(lambda x, y: jnp.where(is_event.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, last)
        return kept, kept

    _, found = jax.lax.scan(after, before, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), columns))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def last_summary(events: Events, encoder: Array, before: Summary | None = None) -> Summary:
    """The summary [batch] after the last event of each row; as `before` where a row has none."""
    return jax.tree.map(lambda x: x[:, -1], summaries(events, encoder, before))


def updated(before: Summary, code: jax.Array, rating: jax.Array, gap: jax.Array) -> Summary:
    """The summary [batch] after one more event: its `code` [batch, rank], its unit `rating` and its `gap` [batch]."""
    is_rated = (rating >= 0).astype(jnp.float32)
    continues = (gap >= 0) & (gap <= SESSION_S)
    return Summary(
        before.code + code,
        DECAY * before.decayed_code + code,
        before.events + 1,
        jnp.where(continues, before.session, 0.0) + 1,
        jnp.maximum(gap, 0.0),
        before.rated + is_rated,
        before.ratings + is_rated * rating,
        rating,
    )
