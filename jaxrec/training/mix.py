"""Tunes the mix of the two sequence models and co-occurrence on validation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.batches import case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.metrics import ndcg, rank_of_target
from jaxrec.evaluation.ranking import without_request_time
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM

WEIGHTS = np.linspace(0.0, 1.0, 21, dtype=np.float32)
COOCCURRENCE_WEIGHTS = np.array([0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64], np.float32)
ROUNDS = 2
MAX_MIX_CASES = 10_000


@dataclasses.dataclass(frozen=True)
class Mix:
    """The two weights of `jaxrec.models.hybrid.Hybrid`, and validation NDCG@10 (the mean of without and with the
    request time) of the mix and of each weight beside it, the other one being as it was in the last round."""

    weight: float
    cooccurrence_weight: float
    validation_ndcg_10: float
    by_weight: dict[str, float]
    by_cooccurrence_weight: dict[str, float]


def tune_mix(
    lstm: TimeRatingAwareLSTM, content: TimeRatingAwareContentModel, cooccurrence: CoOccurrence, data: PreparedData
) -> Mix:
    """Chooses the weights in turn, ROUNDS times: a grid for one while the other stays. Of more than MAX_MIX_CASES
    validation cases, evenly spaced ones are used."""
    cases = data.split.validation.at_most(MAX_MIX_CASES)
    weight, added = np.float32(0.5), np.float32(0.0)
    for _ in range(ROUNDS):
        of_added = _figures(lstm, content, cooccurrence, data, cases, np.array([weight]), COOCCURRENCE_WEIGHTS)
        added = COOCCURRENCE_WEIGHTS[np.argmax(of_added)]
        of_weight = _figures(lstm, content, cooccurrence, data, cases, WEIGHTS, np.array([added]))
        weight = WEIGHTS[np.argmax(of_weight)]
    return Mix(
        weight=float(weight),
        cooccurrence_weight=float(added),
        validation_ndcg_10=float(of_weight.max()),
        by_weight={f"{w:.2f}": float(f) for w, f in zip(WEIGHTS, of_weight, strict=True)},
        by_cooccurrence_weight={f"{w:g}": float(f) for w, f in zip(COOCCURRENCE_WEIGHTS, of_added, strict=True)},
    )


def _figures(
    lstm: TimeRatingAwareLSTM,
    content: TimeRatingAwareContentModel,
    cooccurrence: CoOccurrence,
    data: PreparedData,
    cases: Cases,
    weights: np.ndarray,
    added: np.ndarray,
) -> np.ndarray:
    """[max(weights, added)] validation NDCG@10 of the pairs of weights; one of the two has length 1."""
    of_lstm, of_content = sequence_scorer(lstm), sequence_scorer(content)
    of_neighbours = cooccurrence_scorer(cooccurrence)
    pairs = jnp.stack(jnp.broadcast_arrays(jnp.asarray(weights), jnp.asarray(added)), axis=1)
    per_batch = []
    for batch in case_batches(data, cases, lstm.config.max_length):
        near = of_neighbours(batch)
        asked = [batch, without_request_time(batch)]
        per_batch.append([_mix_ranks(of_lstm(b), of_content(b), near, pairs, b.target, b.exclude) for b in asked])
    ranks = np.concatenate(per_batch, axis=2)[:, :, : len(cases)]
    return np.asarray(ndcg(ranks, 10).mean(axis=(0, 2)))


@jax.jit
def _mix_ranks(lstm: Any, content: Any, near: Any, pairs: jax.Array, target: jax.Array, exclude: jax.Array) -> Any:
    """[pairs, batch] ranks."""

    def ranks(pair: jax.Array) -> jax.Array:
        return rank_of_target(pair[0] * lstm + (1 - pair[0]) * content + pair[1] * near, target, exclude)

    return jax.lax.map(ranks, pairs)
