"""The mix of the two sequence models, co-occurrence and the trend, and the policy on top of it, as one scorer.

A mix of log-probabilities differs from the mix of logits by a constant per request, so the two sequence models are one
inner product: the weighted query vectors side by side, against both models' item vectors side by side. The scores of
co-occurrence are added with a weight of their own, and so is the trend, which is the same for all requests of a moment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.events import Events
from jaxrec.models.cooccurrence import RECENT_ITEMS, CoOccurrence, recent_items
from jaxrec.models.features import Array
from jaxrec.models.lstm import State
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.models.new_items import capped_logits
from jaxrec.models.repeat import Repeat, SeenScores
from jaxrec.models.reranker import CONTEXT, FEATURES, Mixed, Reranker, RerankerWeights
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.summary import Summary, last_summary
from jaxrec.models.tables import FixedTable
from jaxrec.models.trend import Trend

MAX_ITEMS = 2**24  # larger indices are not exact as float32, which is what the recurrent state is made of


class PolicyHead(nnx.Module):
    """Shifts the query, the item biases and, with `reranks`, the weights of the reranker. All shifts start at zero: the
    policy starts as the supervised one."""

    def __init__(self, width: int, hidden: int, item_count: int, reranks: bool = False, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(width, hidden, rngs=rngs)
        self.outer = nnx.Linear(hidden, width, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.item_bias = nnx.Param(jnp.zeros(item_count + 1))
        self.direct = nnx.Param(jnp.zeros(len(FEATURES))) if reranks else None
        self.by_context = nnx.Param(jnp.zeros((len(CONTEXT), len(FEATURES)))) if reranks else None

    def __call__(self, query: jax.Array) -> jax.Array:
        """[..., width] -> [..., width]."""
        return query + self.outer(jax.nn.relu(self.inner(query)))

    @property
    def reranker_shift(self) -> RerankerWeights | None:
        """What is added to the reranker's weights; None: nothing is."""
        if self.direct is None or self.by_context is None:
            return None
        return RerankerWeights(self.direct[...], self.by_context[...])


class MixWeights(NamedTuple):
    """What the logits of each model, and one unit of co-occurrence, add to the mix's logits; none is negative."""

    lstm: float
    content: float
    cooccurrence: float


class Hybrid(nnx.Module):
    """The mix by `weights`; `trend` None adds nothing, and `policy` None means the supervised policy. `new_items`
    [items + 1] bool: those that never come before the first places of the others (`jaxrec.models.new_items`); None:
    there are none. With `repeat` items of the history may be recommended again, without it they are excluded.

    The recurrent state is [batch, 4 * hidden + RECENT_ITEMS] float32: h and c of the LSTM and of the content model, and
    the most recent items, the last one first. With a `reranker` the summary of the history stands before these.
    """

    def __init__(
        self,
        lstm: TimeRatingAwareLSTM,
        content: TimeRatingAwareContentModel,
        cooccurrence: CoOccurrence,
        weights: MixWeights,
        trend: Trend | None = None,
        policy: PolicyHead | None = None,
        new_items: np.ndarray | None = None,
        repeat: Repeat | None = None,
        reranker: Reranker | None = None,
    ) -> None:
        for name, weight in weights._asdict().items():
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"the mix's weight of {name} is {weight}, expected a number of at least 0")
        self.lstm = lstm
        self.content = content
        self.cooccurrence = cooccurrence
        self.trend = Trend.none() if trend is None else trend
        self.weights = FixedTable(jnp.asarray(weights, jnp.float32))  # in the order of MixWeights
        self.policy = policy
        self.new_items = None if new_items is None else FixedTable(jnp.asarray(new_items, bool))
        self.repeat = repeat
        self.reranker = reranker
        if len(self.item_bias()) > MAX_ITEMS:
            raise ValueError(f"{len(self.item_bias()) - 1} items, expected fewer than {MAX_ITEMS}")

    def with_policy(self, policy: PolicyHead | None) -> "Hybrid":
        """The same supervised models under `policy`, or under none."""
        new_items = None if self.new_items is None else np.asarray(self.new_items[...])
        models = self.lstm, self.content, self.cooccurrence
        return Hybrid(*models, self.mix_weights(), self.trend, policy, new_items, self.repeat, self.reranker)

    def with_reranker(self, reranker: Reranker | None) -> "Hybrid":
        """The same models and policy under another reranker, or under none."""
        new_items = None if self.new_items is None else np.asarray(self.new_items[...])
        models = self.lstm, self.content, self.cooccurrence
        return Hybrid(*models, self.mix_weights(), self.trend, self.policy, new_items, self.repeat, reranker)

    def mix_weights(self) -> MixWeights:
        """The weights as numbers."""
        return MixWeights(*map(float, self.weights[...]))

    def without_new_items(self) -> "Hybrid":
        """The same without a cap, for an index, which cannot cap: in each of the two models the vectors of new items
        are zero, and their bias is the least of the known items' biases.

        So a new item's score is the same for every history. It ranks low, but above known items with a lower score. The
        trend of events since the training lifts it; in a mix without a trend it stays so until the next training.
        """
        if self.new_items is None:
            return self
        new, models = self.new_items[...], (nnx.clone(self.lstm), nnx.clone(self.content))
        for model in models:
            own = model.item_embedding[...]
            model.item_embedding[...] = jnp.where(new[:, None], own - model.item_vectors(), own)
            bias = model.item_bias_table[...]
            model.item_bias_table[...] = jnp.where(new, jnp.min(jnp.where(new, jnp.inf, bias)), bias)
        return Hybrid(*models, self.cooccurrence, self.mix_weights(), self.trend, self.policy, repeat=self.repeat)

    def item_vectors(self) -> jax.Array:
        """[items + 1, 2 * embedding] float32."""
        return jnp.concatenate([self.lstm.item_vectors(), self.content.item_vectors()], axis=1)

    def item_bias(self) -> jax.Array:
        """[items + 1] float32, with the policy's shift."""
        bias = self.supervised_bias()
        return bias if self.policy is None else bias + self.policy.item_bias[...]

    def supervised_bias(self) -> jax.Array:
        """`item_bias` without the policy."""
        of_lstm, of_content, _ = self.weights[...]
        return (of_lstm * self.lstm.item_bias() + of_content * self.content.item_bias()).at[0].set(NEVER)

    def query_at(self, outputs: tuple[jax.Array, jax.Array], request_gap: jax.Array) -> jax.Array:
        """Both models' outputs [..., hidden] and request_gap [...] -> [..., 2 * embedding], with the policy's shift."""
        query = self.supervised_query(outputs, request_gap)
        return query if self.policy is None else self.policy(query)

    def supervised_query(self, outputs: tuple[jax.Array, jax.Array], request_gap: jax.Array) -> jax.Array:
        """`query_at` without the policy."""
        lstm_weight, content_weight, _ = self.weights[...]
        of_lstm = lstm_weight * self.lstm.query(outputs[0], request_gap)
        of_content = content_weight * self.content.query(outputs[1], request_gap)
        return jnp.concatenate([of_lstm, of_content], axis=-1)

    def cooccurrence_logits(self, recent: jax.Array) -> jax.Array:
        """recent [batch, RECENT_ITEMS] int32 -> [batch, items + 1]: what co-occurrence adds to the logits."""
        return self.weights[...][2] * self.cooccurrence.scores(recent)

    def encode(self, events: Events, state: jax.Array | None = None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Both models' outputs, each [batch, length, hidden], and the state after the last real event."""
        states: tuple[State | None, State | None] = (None, None)
        recent = before = None
        if state is not None:
            h_lstm, c_lstm, h_content, c_content, recent = self.split_state(state)
            states = ((h_lstm, c_lstm), (h_content, c_content))
            before = self.summary_of(state)
        of_lstm, lstm_state = self.lstm.encode(events, self.lstm.item_vectors(), states[0])
        of_content, content_state = self.content.encode(events, self.content.item_vectors(), states[1])
        recent = recent_items(events.item, events.length, recent).astype(jnp.float32)
        parts = [*lstm_state, *content_state]
        if self.reranker is not None:
            parts.append(last_summary(events, self.reranker.tables.encoder, before).flat())
        return (of_lstm, of_content), jnp.concatenate([*parts, recent], axis=1)

    def split_state(self, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """state [batch, 4 * hidden + RECENT_ITEMS] -> h and c of the LSTM and of the content model, recent items."""
        parts = jnp.split(state[:, : 4 * self.lstm.config.hidden], 4, axis=1)
        return *parts, state[:, -RECENT_ITEMS:].astype(jnp.int32)  # type: ignore[return-value]

    def summary_of(self, state: jax.Array) -> Summary | None:
        """The summary of the history in a state [batch, ...]; None without a reranker."""
        if self.reranker is None:
            return None
        return Summary.from_flat(state[:, 4 * self.lstm.config.hidden : -RECENT_ITEMS])

    def logits(
        self,
        events: Events,
        request_gap: jax.Array,
        state: jax.Array | None = None,
        exclude: Array | None = None,
        trend: jax.Array | float = 0.0,
        seen: SeenScores | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """After each row's last event: logits [batch, items + 1] of the next item, and the state.

        `exclude` [batch, width] int32 (0 = nothing): items that are not recommended. They keep their logits, but are
        not among the first places, below which new items are. `trend` [items + 1], or [batch, items + 1]: what
        `Hybrid.trend` says at the moment of the requests; an item with a trend is not new. `seen`: items of the
        histories and the amounts that are added to their logits, from `Repeat.scores_of`; None adds nothing.
        """
        _, state = self.encode(events, state)
        h_lstm, _, h_content, _, recent = self.split_state(state)
        asked = (h_lstm, h_content), recent, self.summary_of(state), request_gap
        return self.logits_after(*asked, exclude, trend, seen), state

    def logits_after(
        self,
        outputs: tuple[jax.Array, jax.Array],
        recent: jax.Array,
        summary: Summary | None,
        request_gap: jax.Array,
        exclude: Array | None = None,
        trend: jax.Array | float = 0.0,
        seen: SeenScores | None = None,
    ) -> jax.Array:
        """The logits [batch, items + 1] that `logits` gives, from what is known of the histories: both models' last
        `outputs` [batch, hidden], the `recent` items [batch, RECENT_ITEMS] and, with a reranker, the `summary`
        [batch]."""
        query = self.supervised_query(outputs, request_gap)
        logits, mixed = self.mixed(query, request_gap, recent, summary, exclude, trend, seen)
        if self.reranker is not None:
            shift = None if self.policy is None else self.policy.reranker_shift
            logits = self.reranker.reranked(mixed, self.item_vectors()).changes(shift).added_to(logits)
        if self.policy is not None:
            logits += (self.policy(query) - query) @ self.item_vectors().T + self.policy.item_bias[...]
        if self.new_items is not None:
            logits = capped_logits(logits, self._new(trend), exclude)
        return logits

    def mixed(
        self,
        query: jax.Array,
        request_gap: jax.Array,
        recent: jax.Array,
        summary: Summary | None,
        exclude: Array | None = None,
        trend: jax.Array | float = 0.0,
        seen: SeenScores | None = None,
    ) -> tuple[jax.Array, Mixed]:
        """The mix's logits [batch, items + 1], and the input of the reranker.

        `query` [batch, 2 * embedding] is that of `supervised_query`; `recent` and `summary` are of the state; the rest
        is as for `logits`. New items are no candidates of the reranker.
        """
        cooccurrence = self.cooccurrence_logits(recent)
        logits = query @ self.item_vectors().T + self.supervised_bias() + cooccurrence + trend
        if seen is not None:
            logits = logits.at[jnp.arange(len(logits))[:, None], seen.items].add(seen.scores)
        allowed = logits if exclude is None else exclude_items(logits, jnp.asarray(exclude))
        if self.new_items is not None:
            allowed = jnp.where(self._new(trend), NEVER, allowed)
        return logits, Mixed(allowed, cooccurrence, jnp.asarray(trend), query, request_gap, recent, summary)

    def parts(self, state: Array, request_gap: Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """What the parts of the model add to the logits of requests [batch] after a state [batch, ...]: the LSTM, the
        content model, the policy head and co-occurrence, each [batch, items + 1]. The trend, items of the history, a
        reranker and what holds new items down are the rest."""
        h_lstm, _, h_content, _, recent = self.split_state(jnp.asarray(state))
        query = self.supervised_query((h_lstm, h_content), jnp.asarray(request_gap))
        (of_lstm, of_content), weights = jnp.split(query, 2, axis=1), self.weights[...]
        lstm = of_lstm @ self.lstm.item_vectors().T + weights[0] * self.lstm.item_bias()
        content = of_content @ self.content.item_vectors().T + weights[1] * self.content.item_bias()
        policy = jnp.zeros_like(lstm)
        if self.policy is not None:
            policy = (self.policy(query) - query) @ self.item_vectors().T + self.policy.item_bias[...]
        return lstm, content, policy, self.cooccurrence_logits(recent)

    def _new(self, trend: jax.Array | float) -> jax.Array:
        """[items + 1] or [batch, items + 1] bool. An item with a trend has recent events: it is not new any more."""
        assert self.new_items is not None
        return self.new_items[...] & (trend == 0)
