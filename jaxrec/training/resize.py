"""Makes a saved training state fit: other shards of the item tables, new items, other genres.

What was known keeps its values. A new item gets what the new model has for it (its small random embedding), a new
genre likewise, and their optimizer moments are zero. What no training changes (the genre matrix) is the new data's.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.models.tables import GENRE_ROWS, ITEM_ROWS, has_rows_of
from jaxrec.training.checkpoints import Checkpoints, TrainProgress
from jaxrec.training.sharding import map_variables, put
from jaxrec.training.step import TrainState


def restored_state(
    checkpoints: Checkpoints, number: int, saved: TrainProgress, like: TrainState, now: TrainProgress
) -> TrainState:
    """The state of a checkpoint that was saved with `saved`, in the shapes and the layout of `like`, a state of the
    catalogue of `now`. Where that is another one, the learning rate restarts."""
    same_data = saved.data_version == now.data_version
    if same_data and saved.item_rows == now.item_rows:
        return checkpoints.restore(number, like)

    def other_genres(variable: Any) -> bool:
        return not same_data and has_rows_of(variable, GENRE_ROWS)

    def as_saved(variable: Any) -> Any:
        def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
            rows = (max(1, len(saved.genres)),) if other_genres(variable) else leaf.shape[:1]
            return jax.ShapeDtypeStruct((*rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)

        return jax.tree.map(shape, variable)

    restored = checkpoints.restore(number, map_variables(as_saved, like), exact=False)
    genre_sources = genre_rows(saved.genres, now.genres)

    def fit(old: Any, new: Any) -> Any:
        if has_rows_of(old, ITEM_ROWS):
            return old.replace(_first_rows(old[...], new[...], saved.items + 1))
        return old.replace(_rows_from(old[...], new[...], genre_sources)) if other_genres(old) else old

    fitted: TrainState = jax.jit(
        lambda old, new: map_variables(fit, old, new),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like),
    )(restored, like)
    fitted = fitted._replace(fixed=like.fixed)
    return fitted if same_data else fitted._replace(opt_state=_with_schedule_at_zero(fitted.opt_state))


def genre_rows(old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """[max(1, new)] int64: the place of each new genre among the old ones, -1 for one that was not there."""
    place = {genre: i for i, genre in enumerate(old)}
    return np.asarray([place.get(genre, -1) for genre in new] or [-1])


def _first_rows(old: jax.Array, new: jax.Array, count: int) -> jax.Array:
    """The first `count` rows of `old`, the others of `new`."""
    known = jnp.arange(len(new)) < count
    return jnp.where(known.reshape(-1, *[1] * (new.ndim - 1)), old, new)


def _rows_from(old: jax.Array, new: jax.Array, sources: np.ndarray) -> jax.Array:
    """Row i is row sources[i] of `old`; where that is -1, row i of `new`."""
    known = (sources >= 0).reshape(-1, *[1] * (new.ndim - 1))
    return jnp.where(known, old[np.maximum(sources, 0)], new)


def _with_schedule_at_zero(opt_state: optax.OptState) -> optax.OptState:
    """The learning rate's own step counter back to its start; Adam's stays, as its moments do."""

    def of_schedule(path: tuple[Any, ...], _: object) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    (count,) = optax.tree.get_all_with_path(opt_state, "count", filtering=of_schedule)
    return optax.tree.set(opt_state, of_schedule, count=put(np.zeros_like(count[1]), count[1].sharding))
