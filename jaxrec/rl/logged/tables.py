"""What a reranker looks up, fitted on the training events of a run's data."""

import jax.numpy as jnp
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.linear import fit_linear
from jaxrec.models.reranker import CONTEXT, FEATURES, Reranker, RerankerTables, RerankerWeights, Scales
from jaxrec.rl.reward_tables import genre_directions, shrunk_item_ratings


def with_reranker(hybrid: Hybrid, data: PreparedData) -> Hybrid:
    """The hybrid with a reranker that changes nothing yet: its weights are zero, its scales one.

    Args:
        hybrid: A mix without a reranker.
        data: That its models were trained on; only training events count.
    """
    of_lstm, of_content, _ = hybrid.mix_weights()
    biases = of_lstm * hybrid.lstm.item_bias_table[...], of_content * hybrid.content.item_bias_table[...]
    rows = data.split.train_rows(data.histories)
    ratings = shrunk_item_ratings(data.histories.items[rows], data.unit_ratings(rows), len(data.catalog))
    tables = RerankerTables(
        *fit_linear(data),
        jnp.stack(biases, axis=1),
        genre_directions(data.catalog.genre_matrix()),
        ratings,
    )
    scales = Scales(np.ones(len(FEATURES)), np.zeros(len(CONTEXT)), np.ones(len(CONTEXT)))
    weights = RerankerWeights(np.zeros(len(FEATURES)), np.zeros((len(CONTEXT), len(FEATURES))))
    return hybrid.with_reranker(Reranker(tables, scales, weights))
