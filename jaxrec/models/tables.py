"""Tables of a model, and what their rows stand for: Flax's partitioning metadata, which training reads.

Training splits the rows of items over devices, and resizes a table when the data has new items or genres. A table says
in its metadata which one it is, so that no code knows it by its name. Its optimizer moments carry the same metadata.
"""

from typing import Any

from flax import nnx

ITEM_ROWS, GENRE_ROWS = "items", "genres"


class FixedTable(nnx.Variable):
    """A table that is part of the model and is never trained."""


def rows_of(kind: str, fill: float = 0.0) -> dict[str, Any]:
    """Metadata of a variable with a row for each item (plus padding) or genre.

    Args:
        kind: ITEM_ROWS or GENRE_ROWS.
        fill: the value of rows that no item has, where a table needs more rows to split evenly.
    """
    # Not eager: training lays the table out, and a model is built before it is known over which devices.
    return {"out_sharding": (kind,), "eager_sharding": False, "fill": fill}


def has_rows_of(variable: Any, kind: str) -> bool:
    """Whether a leaf of a training state (a Flax variable, or a plain array) was declared with `rows_of(kind)`."""
    return isinstance(variable, nnx.Variable) and variable.get_metadata("out_sharding", None) == (kind,)
