"""How training is laid out over devices: batches are split over one mesh axis, the item tables over the other.

The mesh is [data, items]. With one item shard every device holds the whole model (data-parallel). With more, the rows
of the item tables (and of their optimizer moments) are split over the second axis, for catalogues that do not fit one
device: lookups and updates then stay on the shard that has the row, and `jaxrec.training.losses` the softmax as
well. The tables get more rows where they would not split evenly; such a row has no item, and the bias NEVER.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.config import MISSING_RATING
from jaxrec.data.batches import TrainBatch
from jaxrec.data.events import Events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.errors import DataError
from jaxrec.models.tables import GENRE_ROWS, ITEM_ROWS, has_rows_of

DATA_AXIS, ITEM_AXIS = "data", "items"


def data_mesh(devices: list[jax.Device] | None = None, item_shards: int = 1) -> Mesh:
    """All devices (or the given ones) as a mesh [data, items]; a single device is a mesh of one.

    They are in the order of their processes, and of their ids within one, whatever order they are given in: a row of
    the mesh has devices of one process, and the rows of a process follow each other.

    Raises DataError where the devices of a process cannot be divided into groups of `item_shards`: a group shares
    one copy of the tables, and stays within a process.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    of_one = len(devices) // len({device.process_index for device in devices})
    if of_one % item_shards:
        raise DataError(f"the items cannot be split over {item_shards} devices where a process has {of_one}")
    return Mesh(np.asarray(devices).reshape(-1, item_shards), (DATA_AXIS, ITEM_AXIS))


def building_device(item_shards: int) -> contextlib.AbstractContextManager[object]:
    """Where whole models are built and kept: in the host's memory where the items are split, else as JAX does."""
    return contextlib.nullcontext() if item_shards == 1 else jax.default_device(jax.local_devices(backend="cpu")[0])


def item_rows(item_count: int, mesh: Mesh) -> int:
    """Rows of an item table that split evenly: at least items + 1."""
    shards = mesh.shape[ITEM_AXIS]
    return -(-(item_count + 1) // shards) * shards


def map_variables(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` of each Flax variable (or plain array) of a tree, and of those at the same places of the others."""
    return jax.tree.map(function, tree, *others, is_leaf=lambda x: isinstance(x, nnx.Variable))


def with_item_rows(tree: Any, rows: int) -> Any:
    """The same variables with item tables of `rows` rows: cut, or filled up with rows that no item has."""

    def resize(variable: Any) -> Any:
        if not has_rows_of(variable, ITEM_ROWS) or variable.shape[0] == rows:
            return variable
        missing = [(0, max(0, rows - variable.shape[0])), *[(0, 0)] * (variable.ndim - 1)]
        fill = variable.get_metadata("fill")
        return variable.replace(jnp.pad(variable[...][:rows], missing, constant_values=fill))

    return map_variables(resize, tree)


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a training state: item tables over ITEM_AXIS, the others on every device."""
    with nnx.logical_axis_rules([(ITEM_ROWS, ITEM_AXIS), (GENRE_ROWS, None)]):
        return nnx.get_named_sharding(state, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The rows of a batch over DATA_AXIS."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put(tree: Any, sharding: Any) -> Any:
    """Places arrays that every process has alike; each process sends its devices only what they hold."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda leaf: sharding, tree)

    def place(leaf: Any, where: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(place, tree, sharding)


def put_batch(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """Places a batch of `TrainingData`, its rows over DATA_AXIS.

    Of several processes each has the events of its own users only. There the arrays of events get an axis [processes]
    in front, over which `whole_batch` sums; what every process knows (lengths and starts) is placed as it is.
    """
    rows, count = batch_sharding(mesh), jax.process_count()
    if count == 1:
        return jax.device_put(batch, rows)
    of_process = Mesh(mesh.devices.reshape(count, -1), ("process", "device"))
    own = NamedSharding(of_process, PartitionSpec("process"))

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(own, array[None], (count, *array.shape))

    placed = jax.tree.map(place, batch)
    events = placed.events._replace(length=put(batch.events.length, rows))
    return placed._replace(events=events, starts=put(batch.starts, rows))


def whole_batch(batch: TrainBatch, mesh: Mesh) -> TrainBatch:
    """The batch of all processes, within the compiled step; as it is where it has no axis of processes."""
    if batch.target.ndim == 2:
        return batch

    def total(of_processes: Any) -> Any:
        return jax.lax.with_sharding_constraint(of_processes.sum(axis=0), batch_sharding(mesh))

    item = total(jnp.asarray(batch.events.item))
    where = jnp.arange(item.shape[1]) < jnp.asarray(batch.events.length)[:, None]
    rating, gap, until = (total(x) for x in (batch.events.rating, batch.events.gap, batch.target_gap))
    events = Events(
        item, jnp.where(where, rating, MISSING_RATING), jnp.where(where, gap, UNKNOWN_GAP), batch.events.length
    )
    target_gap: Any = jnp.where(where, until, UNKNOWN_GAP)
    return batch._replace(
        events=events, target=total(batch.target), target_gap=target_gap, earlier=total(batch.earlier)
    )


def local_view(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on devices of this process alone: one device, or one group that shares the item tables.

    Nothing is copied: the view ends where the arrays are donated.
    """
    process = jax.process_index()
    group = next(row for row in mesh.devices if row[0].process_index == process)
    local = Mesh(group[None, :], mesh.axis_names)

    def view(array: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        if len(group) == 1:
            return shards[group[0]]
        assert isinstance(array.sharding, NamedSharding)
        sharding = NamedSharding(local, array.sharding.spec)
        return jax.make_array_from_single_device_arrays(array.shape, sharding, [shards[device] for device in group])

    return jax.tree.map(view, tree)
