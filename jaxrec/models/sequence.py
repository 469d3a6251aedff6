"""The two sequence models: TimeRatingAwareLSTM and TimeRatingAwareContentModel.

Both read a history event by event and answer with a query vector, whose products with the item vectors (tied to the
input embedding) are the logits of the next item. An event enters with the gap since the event before it; the gap
between the last event and the request enters after the recurrence. So the state never depends on when a request
comes, one state serves requests with and without a request time, and every position of a history can be trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import ModelConfig
from jaxrec.data.events import Events
from jaxrec.models.features import Array, GapEmbedding, RatingEmbedding
from jaxrec.models.lstm import LSTM
from jaxrec.models.masks import NEVER
from jaxrec.models.tables import GENRE_ROWS, ITEM_ROWS, FixedTable, rows_of


class TimeRatingAwareLSTM(nnx.Module):
    """Movie, rating and time. `item_count` is without padding; `item_embedding` [items + 1, embedding] float32 is what
    the item embedding starts as (`jaxrec.models.neighbours.initial_embedding`), small random vectors where it is
    None."""

    def __init__(
        self, item_count: int, config: ModelConfig, *, rngs: nnx.Rngs, item_embedding: np.ndarray | None = None
    ) -> None:
        width = config.embedding
        if item_embedding is None:
            start = 0.05 * jax.random.normal(rngs.params(), (item_count + 1, width))
        elif item_embedding.shape == (item_count + 1, width):
            start = jnp.asarray(item_embedding, jnp.float32)
        else:
            raise ValueError(f"item_embedding is {item_embedding.shape}, expected {(item_count + 1, width)}")
        self.item_embedding = nnx.Param(start, **rows_of(ITEM_ROWS))
        self.item_bias_table = nnx.Param(jnp.zeros(item_count + 1), **rows_of(ITEM_ROWS, fill=NEVER))
        self.rating = RatingEmbedding(config.rating_width, rngs=rngs)
        self.gap = GapEmbedding(config.time_width, rngs=rngs)
        self.lstm = LSTM(width + config.rating_width + config.time_width, config.hidden, rngs=rngs)
        self.request_gap = GapEmbedding(config.time_width, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.request_scale = nnx.Linear(config.time_width, config.hidden, kernel_init=zeros, rngs=rngs)
        self.request_shift = nnx.Linear(config.time_width, config.hidden, kernel_init=zeros, rngs=rngs)
        self.projection = nnx.Linear(config.hidden, width, rngs=rngs)
        self.config = config

    def item_vectors(self) -> jax.Array:
        """[items + 1, embedding] float32, row 0 (padding) zero."""
        return self.item_embedding[...].at[0].set(0.0)

    def item_bias(self) -> jax.Array:
        """[items + 1] float32, padding never wins."""
        return self.item_bias_table[...].at[0].set(NEVER)

    def encode(
        self,
        events: Events,
        item_vectors: jax.Array,
        state: tuple[jax.Array, jax.Array] | None = None,
        key: jax.Array | None = None,
        starts: Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Outputs [batch, length, hidden] and the final (h, c), each [batch, hidden].

        With a key, dropout is on. `starts` [batch, length] bool: where another history begins in a row.
        """
        x = jnp.concatenate([item_vectors[events.item], self.rating(events.rating), self.gap(events.gap)], axis=-1)
        if key is not None:
            x = dropout(x, self.config.input_dropout, jax.random.fold_in(key, 0))
        outputs, state = self.lstm(x, events.where, state, starts)
        if key is not None:
            outputs = dropout(outputs, self.config.output_dropout, jax.random.fold_in(key, 1))
        return outputs, state

    def query(self, outputs: jax.Array, request_gap: Array) -> jax.Array:
        """outputs [..., hidden], request_gap [...] seconds or UNKNOWN_GAP -> query vectors [..., embedding].

        The request gap scales and shifts each feature (Perez et al. 2018, "FiLM", equation 2).
        """
        gap = self.request_gap(request_gap)
        return self.projection(outputs * (1.0 + self.request_scale(gap)) + self.request_shift(gap))


class TimeRatingAwareContentModel(TimeRatingAwareLSTM):
    """Movie, genre, rating and time: an item's vector is its own embedding plus a projection of its fixed genre vector.

    The embedding of a movie without ratings is small and only decays (AdamW's weight decay), so its genres place it.
    """

    def __init__(
        self,
        item_count: int,
        genre_matrix: np.ndarray,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        item_embedding: np.ndarray | None = None,
    ) -> None:
        super().__init__(item_count, config, rngs=rngs, item_embedding=item_embedding)
        if genre_matrix.shape[0] != item_count + 1:
            raise ValueError(f"genre_matrix has {genre_matrix.shape[0]} rows, expected {item_count + 1}")
        self.genre_matrix = FixedTable(jnp.asarray(genre_matrix, jnp.float32), **rows_of(ITEM_ROWS))
        self.genre_projection = nnx.Linear(
            genre_matrix.shape[1], config.embedding, use_bias=False, rngs=rngs, kernel_metadata=rows_of(GENRE_ROWS)
        )

    def item_vectors(self) -> jax.Array:
        """[items + 1, embedding] float32, row 0 (padding) zero."""
        genre_vectors = self.genre_projection(self.genre_matrix[...])
        return (self.item_embedding[...] + genre_vectors).at[0].set(0.0)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Inverted dropout."""
    if rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)
