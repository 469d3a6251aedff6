"""What `serve` needs to rank items that come after the export: their vectors and biases from their features.

The features of an item are those of `jaxrec.data.content`, in the same order: genres, the columns of `--features`, the
year of the title. Its row is the sum of the rows of its features and of the last row, which every item has.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxrec.data.content import ItemContent
from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.training.content_head import ContentHead


class ContentHeads(NamedTuple):
    """The content heads of both models, the features that they read, and what is added to the logits of the items that
    they place (`jaxrec.training.new_items`)."""

    lstm: ContentHead
    content: ContentHead
    features: ItemContent
    shift: float


@dataclasses.dataclass(frozen=True)
class AddedItems:
    """`rows` [features + 1, width + 1] float32: what each feature adds to an item's vector, and last to its bias; the
    last row is added for every item. `features` None: there are none."""

    rows: np.ndarray
    features: ItemContent | None

    def encoding(self) -> dict[str, Any]:
        """How an item's features are found, for the manifest: the kinds, categories and bins of the columns of
        `--features`, and the first year of each bin of years in titles."""
        columns, years = ((), None) if self.features is None else (self.features.columns, self.features.title_years)
        return {
            "genres": self.features is not None,
            "columns": [
                {
                    "name": column.name,
                    "kind": column.kind.value,
                    "categories": list(column.categories),
                    "starts": list(column.starts),
                }
                for column in columns
            ],
            "title_years": [] if years is None else list(years.starts),
        }


def added_items(hybrid: Hybrid, data: PreparedData, heads: ContentHeads | None) -> AddedItems:
    """What ranks items that come after the export.

    Args:
        hybrid: With the mix's weights.
        data: That it was trained on.
        heads: None: every added item has a vector of zeros and the least bias of the items with training events.
    """
    if heads is None:
        known = data.train_popularity() > 0
        rows = np.zeros((1, hybrid.item_vectors().shape[1] + 1), np.float32)
        rows[0, -1] = np.asarray(hybrid.supervised_bias())[known].min()
        return AddedItems(rows, None)
    weights = hybrid.mix_weights()
    (of_lstm, lstm_bias), (of_content, content_bias) = map(_split, (heads.lstm, heads.content))
    bias = weights.lstm * lstm_bias + weights.content * content_bias
    bias[-1] += heads.shift
    rows = np.concatenate([of_lstm, of_content, bias], axis=1, dtype=np.float32)
    return AddedItems(rows, heads.features)


def _split(head: ContentHead) -> tuple[np.ndarray, np.ndarray]:
    """What features and, last, the offset add: [features + 1, embedding] to vectors, [features + 1, 1] to biases."""
    rows = np.concatenate([head.kernel, np.asarray(head.offset)[None]])
    return rows[:, :-1], rows[:, -1:]
