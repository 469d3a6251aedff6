"""The hybrid taken apart into NumPy arrays: what an answer needs, without what only training needs.

What does not depend on a request is computed here once: the item vectors with their genres, the scale and the shift
that each request gap stands for, and the mix of the models. Both models' arrays lie side by side, the LSTM's first.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxrec.errors import ExportError
from jaxrec.models.cooccurrence import RECENT_DECAY, RECENT_ITEMS
from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.models.lstm import LSTM
from jaxrec.models.reranker import Reranker, RerankerWeights, Scales
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.models.summary import NUMBERS

RECENT_WEIGHTS = RECENT_DECAY ** np.arange(RECENT_ITEMS, dtype=np.float32)
"""What the neighbours of the last event, the one before it, and so on, count."""


@dataclasses.dataclass(frozen=True)
class LSTMWeights:
    """`kernel` [inputs, 4 * hidden], `recurrent_kernel` [hidden, 4 * hidden], `bias` [4 * hidden]; gates i, f, g, o."""

    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray

    @property
    def hidden(self) -> int:
        return self.recurrent_kernel.shape[0]


@dataclasses.dataclass(frozen=True)
class PolicyWeights:
    """The query's shift: `inner_kernel` [width, policy], `outer_kernel` [policy, width], and their biases; that of the
    items is `item_bias` [items + 1]."""

    inner_kernel: np.ndarray
    inner_bias: np.ndarray
    outer_kernel: np.ndarray
    outer_bias: np.ndarray
    item_bias: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrendWeights:
    """`views` [VIEWS, half-lives] and `typical` [half-lives] of `jaxrec.models.trend.Trend`."""

    views: np.ndarray
    typical: np.ndarray


class RerankerItems(NamedTuple):
    """What a reranker looks up.

    `encoder` and `decoder` [items + 1, rank]; `attributes` [items + 1, genres + 3]: genres, the biases of the parts and
    the mean rating side by side, since one lookup costs less than three.
    """

    encoder: np.ndarray
    decoder: np.ndarray
    attributes: np.ndarray


@dataclasses.dataclass(frozen=True)
class RerankerArrays:
    """`jaxrec.models.reranker`: what it looks up, `rank` of its codes, the mean rating, the scales, and the weights."""

    items: RerankerItems
    rank: int
    mean_rating: float
    scales: Scales
    weights: RerankerWeights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Float32 arrays. width = 2 * embedding; `ratings` and `times` are twice the width of one model's features.

    `item_vectors` [items + 1, width] (row 0 zero), `item_bias` [items + 1] (with the policy's, unless there is a
    reranker: it ranks what the mix ranks best, and the policy comes after it), `part_bias` [items + 1, 3]: those of the
    LSTM, of the content model and of the policy (row 0 zero), `rating_slope`, `rating_offset`,
    `rating_missing` [ratings], `gap_vectors` [gap buckets, times], `request_scale` and `request_shift`
    [gap buckets, 2 * hidden],
    `projection` [2 * hidden, width] (block-diagonal), `projection_bias` [width], `neighbour_item` int32 and
    `neighbour_weight` [items + 1, neighbours] of the co-occurrence, the weights as they are added to the logits;
    `new_items` [items + 1] bool (`jaxrec.models.new_items`), None where there are none; `allow_seen`: items of the
    history are candidates, and what is added to their logits is an input; `reranker` None: there is none.
    """

    item_vectors: np.ndarray
    item_bias: np.ndarray
    part_bias: np.ndarray
    rating_slope: np.ndarray
    rating_offset: np.ndarray
    rating_missing: np.ndarray
    gap_vectors: np.ndarray
    lstm: LSTMWeights
    content: LSTMWeights
    request_scale: np.ndarray
    request_shift: np.ndarray
    projection: np.ndarray
    projection_bias: np.ndarray
    neighbour_item: np.ndarray
    neighbour_weight: np.ndarray
    policy: PolicyWeights | None
    trend: TrendWeights
    new_items: np.ndarray | None = None
    allow_seen: bool = False
    reranker: RerankerArrays | None = None

    @property
    def item_count(self) -> int:
        return len(self.item_vectors) - 1

    @property
    def width(self) -> int:
        return self.item_vectors.shape[1]

    @property
    def state_width(self) -> int:
        return self.recurrent_width + self.summary_width + RECENT_ITEMS

    @property
    def recurrent_width(self) -> int:
        return 2 * self.lstm.hidden + 2 * self.content.hidden

    @property
    def summary_width(self) -> int:
        return 0 if self.reranker is None else 2 * self.reranker.rank + NUMBERS


def extract_weights(hybrid: Hybrid) -> Weights:
    """The weights of `hybrid`, with its policy if it has one. Raises ExportError on NaN, infinity and unlike models."""
    for path, value in jax.tree.leaves_with_path(nnx.state(hybrid)):
        if not np.isfinite(value).all():
            raise ExportError(f"{jax.tree_util.keystr(path)} of the model holds NaN or infinity")
    models = (hybrid.lstm, hybrid.content)
    for width in ("embedding", "hidden", "rating_width", "time_width"):
        of_lstm, of_content = (getattr(model.config, width) for model in models)
        if of_lstm != of_content:
            raise ExportError(f"the two models differ in {width}: {of_lstm} and {of_content}")
    # Accelerators multiply float32 matrices in a shorter format by default.
    with jax.default_matmul_precision("highest"):
        item_vectors = np.asarray(hybrid.item_vectors())
        views = [_request_views(model) for model in models]
        request_scale, request_shift = (np.concatenate(of_both, axis=1) for of_both in zip(*views, strict=True))
    of_lstm, of_content, of_neighbours = np.asarray(hybrid.weights[...])
    projections = [_linear(model.projection) for model in models]
    return Weights(
        item_vectors=item_vectors,
        item_bias=np.asarray(hybrid.item_bias() if hybrid.reranker is None else hybrid.supervised_bias()),
        part_bias=_part_bias(hybrid),
        rating_slope=np.concatenate([model.rating.slope[...] for model in models]),
        rating_offset=np.concatenate([model.rating.offset[...] for model in models]),
        rating_missing=np.concatenate([model.rating.missing[...] for model in models]),
        gap_vectors=np.concatenate([model.gap.table[...] for model in models], axis=1),
        lstm=_lstm_weights(hybrid.lstm.lstm),
        content=_lstm_weights(hybrid.content.lstm),
        request_scale=request_scale,
        request_shift=request_shift,
        projection=_block_diagonal(of_lstm * projections[0][0], of_content * projections[1][0]),
        projection_bias=np.concatenate([of_lstm * projections[0][1], of_content * projections[1][1]]),
        neighbour_item=np.asarray(hybrid.cooccurrence.neighbour_item[...]),
        neighbour_weight=np.asarray(of_neighbours * hybrid.cooccurrence.neighbour_weight[...], np.float32),
        policy=None
        if hybrid.policy is None
        else PolicyWeights(
            *_linear(hybrid.policy.inner), *_linear(hybrid.policy.outer), np.asarray(hybrid.policy.item_bias[...])
        ),
        trend=TrendWeights(np.asarray(hybrid.trend.weights[...]), np.asarray(hybrid.trend.typical[...])),
        new_items=None if hybrid.new_items is None else np.asarray(hybrid.new_items[...]),
        allow_seen=hybrid.repeat is not None,
        reranker=None if hybrid.reranker is None else _reranker_arrays(hybrid.reranker, hybrid.policy),
    )


def _part_bias(hybrid: Hybrid) -> np.ndarray:
    of_lstm, of_content, _ = np.asarray(hybrid.weights[...])
    biases = [of_lstm * np.asarray(hybrid.lstm.item_bias()), of_content * np.asarray(hybrid.content.item_bias())]
    biases.append(np.zeros_like(biases[0]) if hybrid.policy is None else np.asarray(hybrid.policy.item_bias[...]))
    stacked = np.stack(biases, axis=1).astype(np.float32)
    stacked[0] = 0
    return stacked


def _reranker_arrays(reranker: Reranker, policy: PolicyHead | None) -> RerankerArrays:
    """With the policy's shift of the weights."""
    tables, scales, weights = jax.tree.map(np.asarray, (reranker.tables, reranker.scales, reranker.weights))
    if policy is not None and policy.reranker_shift is not None:
        weights = jax.tree.map(np.add, weights, policy.reranker_shift)
    attributes = tables.genres, tables.part_bias, tables.item_rating[:, None]
    items = RerankerItems(tables.encoder, tables.decoder, np.concatenate(attributes, axis=1))
    return RerankerArrays(items, tables.encoder.shape[1], float(tables.item_rating[0]), scales, weights)


def _request_views(model: TimeRatingAwareLSTM) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift for each gap bucket."""
    gaps = model.request_gap.table[...]
    return np.asarray(1.0 + model.request_scale(gaps)), np.asarray(model.request_shift(gaps))


def _lstm_weights(lstm: LSTM) -> LSTMWeights:
    return LSTMWeights(*(np.asarray(x[...]) for x in (lstm.kernel, lstm.recurrent_kernel, lstm.bias)))


def _linear(layer: nnx.Linear) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias."""
    kernel = np.asarray(layer.kernel[...])
    return kernel, np.zeros(kernel.shape[1], np.float32) if layer.bias is None else np.asarray(layer.bias[...])


def _block_diagonal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    blocks = np.zeros(np.add(first.shape, second.shape), np.float32)
    blocks[: first.shape[0], : first.shape[1]] = first
    blocks[first.shape[0] :, first.shape[1] :] = second
    return blocks
