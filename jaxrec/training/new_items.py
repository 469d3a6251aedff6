"""Puts new items, those without training events, into trained models, and chooses how high they rank.

Items may also be new after the training: a server learns of them from its catalogue. How high those rank is chosen on
known items that are hidden: they get their rows from the heads, and no co-occurrence and no trend, as if nobody had
interacted with them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.evaluation.metrics import rank_of_target
from jaxrec.evaluation.ranking import batch_size, in_time, without_request_time
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.new_items import FIRST_PLACES
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.mix import MAX_MIX_CASES

TOP = 50
LEAST_KEPT = 0.975
"""Of the known items' validation HR@50 so much stays beside new items."""
HIDDEN_SHARE = 0.1
"""Of the items with training events so many are hidden."""
SHIFTS = np.arange(-200, 41) / 20
"""The candidates. With a shift above 2, a catalogue with only a few new items would have all of them in every answer,
since so few items cost little HR@50."""


@dataclasses.dataclass(frozen=True)
class NewItems:
    """What is added to every new item's logit, and validation HR@50 of known items (the mean of without and with the
    request time) without new items among the candidates, and with them."""

    count: int
    shift: float
    validation_hr_50_without: float
    validation_hr_50: float


def new_items(data: PreparedData) -> np.ndarray | None:
    """[items + 1] bool: items without training events; None if there are none."""
    new = data.train_popularity() == 0
    new[0] = False
    return new if new.any() else None


def place_rows(model: TimeRatingAwareLSTM, new: np.ndarray, rows: np.ndarray) -> None:
    """Gives the items of `new` [items + 1] bool their vectors and biases of `rows` [items + 1, embedding + 1]; all
    others keep theirs, bit for bit."""
    where = jnp.asarray(new)
    of_content = model.item_vectors() - model.item_embedding[...]
    model.item_embedding[...] = jnp.where(where[:, None], rows[:, :-1] - of_content, model.item_embedding[...])
    model.item_bias_table[...] = jnp.where(where, rows[:, -1], model.item_bias_table[...])


def shift_logits(hybrid: Hybrid, new: np.ndarray, shift: float) -> None:
    """Adds to the biases of the items of `new` in both models, so that their logits in the mix grow by `shift`."""
    weights = hybrid.mix_weights()
    shift /= max(weights.lstm + weights.content, 1e-6)
    for model in (hybrid.lstm, hybrid.content):
        table = model.item_bias_table
        table[...] = jnp.where(jnp.asarray(new), table[...] + jnp.float32(shift), table[...])


def tune_shift(
    hybrid: Hybrid,
    new: np.ndarray,
    data: PreparedData,
    exclude_seen: bool = True,
    before_batch: Callable[[], None] = lambda: None,
    counts: DecayedCounts | None = None,
) -> NewItems:
    """The largest of SHIFTS with LEAST_KEPT of the validation HR@50 of known items.

    Args:
        hybrid: Without a cap of these new items, which have the heads' rows.
        new: [items + 1] bool.
        data: Whose validation cases decide, MAX_MIX_CASES at most. Cases of new items are left out: of their hits there
            are too few to weigh against others'.
        exclude_seen: Whether items of the history are no candidates.
        before_batch: Called before each batch of cases; what it raises ends the call.
        counts: Of the events that make the trend; None: all events of `data`.

    Returns:
        The shift, and what it costs; 0 where no known item is among the first TOP.
    """
    cases, _ = in_time(data, data.split.validation.at_most(MAX_MIX_CASES))
    max_length, size = hybrid.lstm.config.max_length, batch_size(len(cases), len(data.catalog))
    scorer, where = hybrid_scorer(hybrid, counts or DecayedCounts.of(data)), jnp.asarray(new)

    def largest_shifts(asked: Callable[[CaseBatch], CaseBatch]) -> np.ndarray:
        found = []
        for batch in map(asked, case_batches(data, cases, max_length, size, exclude_seen)):
            before_batch()
            found.append(np.asarray(_largest_shifts(scorer(batch), where, batch.target, batch.exclude)))
        return np.concatenate([np.empty(0), *found])[: len(cases)]

    known = ~new[data.histories.items[cases.rows]]
    largest = np.stack([largest_shifts(asked) for asked in (lambda batch: batch, without_request_time)])[:, known]
    without = float((largest > -np.inf).mean()) if largest.size else 0.0
    rates = (largest[..., None] > SHIFTS).mean(axis=(0, 1)) if largest.size else np.zeros(len(SHIFTS))
    allowed = SHIFTS <= 0 if without == 0 else rates >= LEAST_KEPT * without
    place = int(np.flatnonzero(allowed).max(initial=0))
    return NewItems(int(new.sum()), float(SHIFTS[place]), without, float(rates[place]))


def hidden_items(data: PreparedData, seed: int) -> np.ndarray:
    """[items + 1] bool: HIDDEN_SHARE of the items with training events, at least one, chosen by `seed`."""
    known = np.flatnonzero(data.train_popularity() > 0)
    count = max(1, round(HIDDEN_SHARE * len(known)))
    hidden = np.zeros(len(data.catalog) + 1, bool)
    hidden[np.random.default_rng(seed).choice(known, count, replace=False)] = True
    return hidden


def without_events_of(hybrid: Hybrid, hidden: np.ndarray, rows: Sequence[np.ndarray]) -> Hybrid:
    """A copy of a hybrid that never saw some items.

    Args:
        hybrid: Without a reranker and a policy.
        hidden: [items + 1] bool: the items.
        rows: For the LSTM and the content model, [items + 1, embedding + 1] each: what the heads say of the items.
    """
    models = nnx.clone(hybrid.lstm), nnx.clone(hybrid.content)
    for model, of_model in zip(models, rows, strict=True):
        place_rows(model, hidden, of_model)
    item = np.asarray(hybrid.cooccurrence.neighbour_item[...])
    weight = np.where(hidden[item] | hidden[:, None], 0, np.asarray(hybrid.cooccurrence.neighbour_weight[...]))
    cooccurrence = CoOccurrence(Neighbours(item, weight))
    new = None if hybrid.new_items is None else np.asarray(hybrid.new_items[...])
    return Hybrid(*models, cooccurrence, hybrid.mix_weights(), hybrid.trend, new_items=new, repeat=hybrid.repeat)


def counts_without(data: PreparedData, hidden: np.ndarray) -> DecayedCounts:
    """Of all events of prepared data but those on the items of `hidden` [items + 1] bool."""
    items = np.asarray(data.histories.items)
    kept = ~hidden[items]
    return DecayedCounts(items[kept], np.asarray(data.histories.times)[kept], len(data.catalog))


@jax.jit
def _largest_shifts(logits: jax.Array, new: jax.Array, target: jax.Array, exclude: jax.Array) -> jax.Array:
    """For each case the shift of the new items' logits from which on the target is no longer among the first TOP.

    New items never rank among the FIRST_PLACES. A target at place r among the known items leaves the first TOP when
    TOP + 1 - r new items have a higher logit.

    Args:
        logits: [batch, items + 1] float32, with a shift of 0.
        new: [items + 1] bool.
        target: [batch] int32, known items.
        exclude: [batch, width] int32, items that are no candidates (0 = nothing).

    Returns:
        [batch] float32; -inf where the target is not among the first TOP at any shift, inf where it always is.
    """
    candidates = exclude_items(logits, exclude)
    ranks = rank_of_target(jnp.where(new, NEVER, logits), target, exclude)
    best = jax.lax.top_k(jnp.where(new, candidates, NEVER), min(TOP - FIRST_PLACES, logits.shape[1]))[0]
    own = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    place = TOP - ranks  # of the new item that pushes it out, from 0
    passing = jnp.take_along_axis(best, jnp.clip(place, 0, best.shape[1] - 1)[:, None], axis=1)[:, 0]
    enough = (place < best.shape[1]) & (passing > NEVER / 2)
    shift = jnp.where((ranks > FIRST_PLACES) & enough, own - passing, jnp.inf)
    return jnp.where(ranks <= TOP, shift, -jnp.inf)
