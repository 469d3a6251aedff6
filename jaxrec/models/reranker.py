"""A second stage of ranking: it reranks the best items of the mix, with weights that depend on the request.

For the CANDIDATES items with the highest logits m of the mix it computes features x [candidates, FEATURES] and, of the
request, a context c [CONTEXT], and scores

    s_i = m_i + x_i (w + c W)

The mix's probability of all candidates together is kept, and s divides it among them:

    logit_i = s_i - logsumexp(s) + logsumexp(m)

So all logits together stay those of a distribution over the catalogue, w = W = 0 changes nothing, and items that are no
candidates keep theirs. w and W are learned by `jaxrec.rl.logged`; `jaxrec.rl.served` learns shifts of both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.features import Array
from jaxrec.models.masks import NEVER
from jaxrec.models.summary import Summary
from jaxrec.models.tables import FixedTable

CANDIDATES = 100
FEATURES = (
    "mix",
    "lstm",
    "content",
    "cooccurrence",
    "log_cooccurrence",
    "trend",
    "linear",
    "linear_recent",
    "genre_last",
    "genre_recent",
    "rating",
)
"""Of a candidate: its logit in the mix, what the parts of the mix add to it (co-occurrence also as a logarithm), the
scores of the linear autoencoder for the whole and for the recent history, its genres' cosine with those of the last and
of the recent items, and its mean rating."""
CONTEXT = (
    "timed",
    "log_request_gap",
    "log_events",
    "log_gap",
    "log_session",
    "user_rating",
    "last_rating",
    "lstm_entropy",
    "content_entropy",
    "disagreement",
)
"""Of a request: whether it has a time, and the logarithm of its gap; of the history the logarithms of its number of
events, of its last gap and of its session's number of events, and the user's mean and last rating; of the two models
the entropies over the candidates, in nats, and how far their log-probabilities differ for the first COMPARED."""
COMPARED = 10
FEATURE_LIMIT, CONTEXT_LIMIT = 6.0, 4.0  # in standard deviations
LEAST_COOCCURRENCE = 1e-3
RATING_PRIOR = 10.0  # ratings that the mean of all ratings counts as in a user's mean


class Scales(NamedTuple):
    """What features and context are divided by; the context's mean is subtracted before."""

    features: Array
    context_mean: Array
    context: Array


class RerankerWeights(NamedTuple):
    """`direct` w [FEATURES] and `by_context` W [CONTEXT, FEATURES], of scaled features and context."""

    direct: Array
    by_context: Array


class RerankerTables(NamedTuple):
    """What features look up.

    Attributes:
        encoder, decoder: [items + 1, rank] float32, `jaxrec.models.linear`.
        part_bias: [items + 1, 2] float32, the biases of the LSTM and of the content model, each times its weight.
        genres: [items + 1, genres] float32, rows of length 1, or zero for items without genres.
        item_rating: [items + 1] float32, shrunk mean of the unit ratings; row 0: the mean of all.
    """

    encoder: Array
    decoder: Array
    part_bias: Array
    genres: Array
    item_rating: Array


class Mixed(NamedTuple):
    """The mix's answer to requests [batch], with its parts.

    Attributes:
        logits: [batch, items + 1], NEVER at items that are no candidates.
        cooccurrence: [batch, items + 1], what co-occurrence adds to them.
        trend: [items + 1] or [batch, items + 1], what the trend adds to them.
        query: [batch, width], the supervised query: the LSTM's half and that of the content model.
        request_gap: [batch], seconds from the last event; UNKNOWN_GAP: not known.
        recent: [batch, RECENT_ITEMS] int32, the most recent items, the last one first; 0 = none.
        summary: [batch], of the history; None where there is no reranker.
    """

    logits: jax.Array
    cooccurrence: jax.Array
    trend: jax.Array
    query: jax.Array
    request_gap: jax.Array
    recent: jax.Array
    summary: Summary | None


class Changes(NamedTuple):
    """What a reranker adds to the mix's logits: `amounts` [..., candidates] float32 to those of the `items` [...,
    candidates] int32, which differ."""

    items: Array
    amounts: Array

    def added_to(self, logits: jax.Array) -> jax.Array:
        """The logits [batch, items + 1] with the amounts added."""
        rows = jnp.arange(len(logits))[:, None]
        return logits.at[rows, jnp.asarray(self.items)].add(jnp.asarray(self.amounts))


class Candidates(NamedTuple):
    """`items` [batch, candidates] int32, best first, with their logits in the `mix`; where these are NEVER there is no
    candidate. `features` [batch, candidates, FEATURES], centred within the request, and `context` [batch, CONTEXT];
    both are not scaled."""

    items: jax.Array
    mix: jax.Array
    features: jax.Array
    context: jax.Array

    @property
    def where(self) -> jax.Array:
        """[batch, candidates] bool: the real ones."""
        return self.mix > NEVER / 2


def candidates(mixed: Mixed, item_vectors: Array, tables: RerankerTables) -> Candidates:
    """The best items of the mix with their features.

    Args:
        mixed: The mix's answer.
        item_vectors: [items + 1, width], of both models side by side.
        tables: What features look up.

    Returns:
        min(CANDIDATES, items) candidates for each request.
    """
    assert mixed.summary is not None
    batch = len(mixed.logits)
    mix, items = jax.lax.top_k(mixed.logits[:, 1:], min(CANDIDATES, mixed.logits.shape[1] - 1))
    items = items + 1
    where = mix > NEVER / 2

    def at(scores: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.broadcast_to(scores, mixed.logits.shape), items, axis=1)

    tables = jax.tree.map(jnp.asarray, tables)
    halves = jnp.einsum(
        "bcpe,bpe->bcp",
        jnp.asarray(item_vectors)[items].reshape(batch, items.shape[1], 2, -1),
        mixed.query.reshape(batch, 2, -1),
    )
    lstm, content = jnp.moveaxis(halves + tables.part_bias[items], -1, 0)
    cooccurrence = at(mixed.cooccurrence)
    decoder, genres = tables.decoder[items], tables.genres[items]
    recent = mixed.recent
    of_recent = tables.genres[recent].sum(axis=1) / jnp.maximum(jnp.sum(recent > 0, axis=1, keepdims=True), 1)
    features = jnp.stack(
        [
            jnp.where(where, mix, 0.0),
            lstm,
            content,
            cooccurrence,
            jnp.log(cooccurrence + LEAST_COOCCURRENCE),
            at(mixed.trend),
            jnp.einsum("bcr,br->bc", decoder, mixed.summary.code),
            jnp.einsum("bcr,br->bc", decoder, mixed.summary.decayed_code),
            jnp.einsum("bcg,bg->bc", genres, tables.genres[recent[:, 0]]),
            jnp.einsum("bcg,bg->bc", genres, of_recent),
            tables.item_rating[items],
        ],
        axis=-1,
    )
    real = where[..., None]
    means = jnp.sum(jnp.where(real, features, 0.0), axis=1, keepdims=True) / jnp.maximum(
        jnp.sum(real, axis=1, keepdims=True), 1
    )
    return Candidates(
        items, mix, jnp.where(real, features - means, 0.0), _context(mixed, lstm, content, where, tables.item_rating[0])
    )


def _context(mixed: Mixed, lstm: jax.Array, content: jax.Array, where: jax.Array, mean_rating: jax.Array) -> jax.Array:
    """[batch, CONTEXT] of the models' logits [batch, candidates]."""
    history = mixed.summary
    assert history is not None
    timed = mixed.request_gap >= 0
    user_rating = (history.ratings + RATING_PRIOR * mean_rating) / (history.rated + RATING_PRIOR)
    of_lstm, of_content = (jax.nn.log_softmax(jnp.where(where, x, NEVER)) for x in (lstm, content))
    first = where[:, :COMPARED]
    apart = jnp.where(first, jnp.abs(of_lstm - of_content)[:, :COMPARED], 0.0)
    return jnp.stack(
        [
            timed.astype(jnp.float32),
            jnp.log1p(jnp.where(timed, mixed.request_gap, 0.0)),
            jnp.log1p(history.events),
            jnp.log1p(history.gap),
            jnp.log1p(history.session),
            user_rating,
            jnp.where(history.last_rating >= 0, history.last_rating, user_rating),
            *(-jnp.sum(jnp.where(where, jnp.exp(p) * p, 0.0), axis=1) for p in (of_lstm, of_content)),
            jnp.sum(apart, axis=1) / jnp.maximum(jnp.sum(first, axis=1), 1),
        ],
        axis=-1,
    )


def scaled(found: Candidates, scales: Scales) -> tuple[jax.Array, jax.Array]:
    """Features [batch, candidates, FEATURES] and context [batch, CONTEXT] as the weights want them."""
    features = jnp.clip(found.features / scales.features, -FEATURE_LIMIT, FEATURE_LIMIT)
    context = jnp.clip((found.context - scales.context_mean) / scales.context, -CONTEXT_LIMIT, CONTEXT_LIMIT)
    return features, context


def scores(weights: RerankerWeights, mix: jax.Array, features: jax.Array, context: jax.Array) -> jax.Array:
    """s of the module's text [batch, candidates], of scaled features and context."""
    return mix + jnp.einsum("bcf,bf->bc", features, weights.direct + context @ weights.by_context)


def changes(found: Candidates, scores: jax.Array) -> Changes:
    """What is added to the logits of the candidates so that they are ranked by `scores` [batch, candidates]."""
    where = found.where
    of_scores, of_mix = (
        jax.nn.logsumexp(jnp.where(where, x, NEVER), axis=1, keepdims=True) for x in (scores, found.mix)
    )
    return Changes(found.items, jnp.where(where, scores - of_scores + of_mix - found.mix, 0.0))


class Reranked(NamedTuple):
    """Candidates as a reranker scores them, with what other weights would score them by.

    `items` [..., candidates] int32 with their logits in the `mix` (NEVER where there is no candidate) and their
    `scores`; `features` [..., candidates, FEATURES] and `context` [..., CONTEXT] are scaled.
    """

    items: Array
    mix: Array
    scores: Array
    features: Array
    context: Array

    def changes(self, shift: RerankerWeights | None = None) -> Changes:
        """What is added to the logits so that the candidates [batch, candidates] are ranked by their scores, or by
        those of weights that differ from the reranker's by `shift`.

        Only the shift is multiplied by the features, so that without one it does not matter how exact these are.
        """
        found = Candidates(*map(jnp.asarray, (self.items, self.mix, self.features, self.context)))
        new = jnp.asarray(self.scores)
        if shift is not None:
            new = scores(shift, new, found.features.astype(jnp.float32), found.context)
        return changes(found, new)


class Reranker(nnx.Module):
    """The second stage of a hybrid, with all that it looks up."""

    def __init__(self, tables: RerankerTables, scales: Scales, weights: RerankerWeights) -> None:
        self._tables = nnx.data([*map(_fixed, tables)])
        self._scales = nnx.data([*map(_fixed, scales)])
        self._weights = nnx.data([*map(_fixed, weights)])

    @property
    def tables(self) -> RerankerTables:
        """As arrays."""
        return RerankerTables(*(table[...] for table in self._tables))

    @property
    def scales(self) -> Scales:
        """As arrays."""
        return Scales(*(scale[...] for scale in self._scales))

    @property
    def weights(self) -> RerankerWeights:
        """As arrays."""
        return RerankerWeights(*(weight[...] for weight in self._weights))

    def reranked(self, mixed: Mixed, item_vectors: jax.Array) -> Reranked:
        """The candidates of the mix's answer; `item_vectors` [items + 1, width] are those of both models."""
        found = candidates(mixed, item_vectors, self.tables)
        features, context = scaled(found, self.scales)
        return Reranked(found.items, found.mix, scores(self.weights, found.mix, features, context), features, context)


def _fixed(array: Array) -> FixedTable:
    return FixedTable(jnp.asarray(array, jnp.float32))
