"""The hybrid taken apart into NumPy arrays: all that an answer needs, and nothing that only training needs.

What does not depend on a request is computed here once: the item vectors with their genres, the scale that each
request gap stands for, and the mix of the two models. Both models' arrays lie side by side, the LSTM's first.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.hybrid import Hybrid, PolicyHead
from jaxrec.models.lstm import LSTM
from jaxrec.models.sequence import TimeRatingAwareLSTM


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
    """The query's shift: `inner_kernel` [width, policy], `outer_kernel` [policy, width], and their biases."""

    inner_kernel: np.ndarray
    inner_bias: np.ndarray
    outer_kernel: np.ndarray
    outer_bias: np.ndarray


@dataclasses.dataclass(frozen=True)
class Weights:
    """Float32 arrays. width = 2 * embedding; `ratings` and `times` are twice the width of one model's features.

    `item_vectors` [items + 1, width] (row 0 zero), `item_bias` [items + 1], `rating_slope`, `rating_offset`,
    `rating_missing` [ratings], `gap_vectors` [gap buckets, times], `request_scale` [gap buckets, 2 * hidden],
    `projection` [2 * hidden, width] (block-diagonal), `projection_bias` [width].
    """

    item_vectors: np.ndarray
    item_bias: np.ndarray
    rating_slope: np.ndarray
    rating_offset: np.ndarray
    rating_missing: np.ndarray
    gap_vectors: np.ndarray
    lstm: LSTMWeights
    content: LSTMWeights
    request_scale: np.ndarray
    projection: np.ndarray
    projection_bias: np.ndarray
    policy: PolicyWeights | None

    @property
    def item_count(self) -> int:
        return len(self.item_vectors) - 1

    @property
    def state_width(self) -> int:
        return 2 * self.lstm.hidden + 2 * self.content.hidden


def extract_weights(hybrid: Hybrid) -> Weights:
    """The weights of `hybrid`, with its policy if it has one."""
    models = (hybrid.lstm, hybrid.content)
    share = np.float32(hybrid.weight[...])
    shares = (share, 1 - share)
    # Accelerators multiply float32 matrices in a shorter format unless told otherwise.
    with jax.default_matmul_precision("highest"):
        item_vectors = np.asarray(hybrid.item_vectors())
        request_scale = np.concatenate([_request_scale(model) for model in models], axis=1)
    return Weights(
        item_vectors=item_vectors,
        item_bias=np.asarray(hybrid.item_bias()),
        rating_slope=_side_by_side([model.rating.slope[...] for model in models]),
        rating_offset=_side_by_side([model.rating.offset[...] for model in models]),
        rating_missing=_side_by_side([model.rating.missing[...] for model in models]),
        gap_vectors=_side_by_side([model.gap.table[...] for model in models]),
        lstm=_lstm_weights(hybrid.lstm.lstm),
        content=_lstm_weights(hybrid.content.lstm),
        request_scale=request_scale,
        projection=_block_diagonal(
            [part * np.asarray(model.projection.kernel[...]) for part, model in zip(shares, models, strict=True)]
        ),
        projection_bias=np.concatenate(
            [part * np.asarray(model.projection.bias[...]) for part, model in zip(shares, models, strict=True)]
        ),
        policy=None if hybrid.policy is None else _policy_weights(hybrid.policy),
    )


def _request_scale(model: TimeRatingAwareLSTM) -> np.ndarray:
    return np.asarray(1.0 + model.request_scale(model.request_gap.table[...]))


def _lstm_weights(lstm: LSTM) -> LSTMWeights:
    return LSTMWeights(np.asarray(lstm.kernel[...]), np.asarray(lstm.recurrent_kernel[...]), np.asarray(lstm.bias[...]))


def _policy_weights(policy: PolicyHead) -> PolicyWeights:
    return PolicyWeights(
        inner_kernel=np.asarray(policy.inner.kernel[...]),
        inner_bias=np.asarray(policy.inner.bias[...]),
        outer_kernel=np.asarray(policy.outer.kernel[...]),
        outer_bias=np.asarray(policy.outer.bias[...]),
    )


def _side_by_side(arrays: list[jax.Array]) -> np.ndarray:
    return np.asarray(jnp.concatenate(arrays, axis=-1))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    first, second = blocks
    upper = np.concatenate([first, np.zeros((first.shape[0], second.shape[1]), np.float32)], axis=1)
    lower = np.concatenate([np.zeros((second.shape[0], first.shape[1]), np.float32), second], axis=1)
    return np.concatenate([upper, lower])
