"""Training split over devices, in one process or in two, is the training of one device."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import CheckpointConfig, ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.tables import GENRE_ROWS, ITEM_ROWS, has_rows_of
from jaxrec.training.log import read_steps
from jaxrec.training.loop import TrainedModel, train_model
from jaxrec.training.sharding import data_mesh
from jaxrec.training.stopping import StopRequested, never
from tests.ports import reserved_port
from tests.synthetic import random_log

ITEMS, EPOCHS = 20, 3
MODEL = ModelConfig(embedding=16, hidden=32, max_length=8, output_dropout=0.1)
DEADLINE_SECONDS = 300


def small_data() -> PreparedData:
    return prepare(random_log(users=40, items=ITEMS, max_events=20, seed=5), None, PrepareConfig(1, 1))


def train(folder: Path, item_shards: int = 1, stop: StopRequested = never) -> TrainedModel[TimeRatingAwareContentModel]:
    """A content model with genres, so that a table that is never trained is split as well."""
    genres = np.eye(ITEMS + 1, 4, k=-1, dtype=np.float32)
    model = TimeRatingAwareContentModel(ITEMS, genres, MODEL, rngs=nnx.Rngs(0))
    config = TrainConfig(max_epochs=EPOCHS, patience=99, batch_tokens=64)
    mesh = data_mesh(item_shards=item_shards)
    return train_model(model, small_data(), config, folder, "test", mesh, CheckpointConfig(seconds=0.5), stop=stop)


def variables(model: TimeRatingAwareLSTM) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_steps(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedModel]:
    """The run of one device. A batch holds 8 rows there as well."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder)


def assert_as_alone(folder: Path, alone: tuple[Path, TrainedModel], saved: Path) -> None:
    """`saved`: the variables of the best epoch."""
    np.testing.assert_allclose(losses(folder), losses(alone[0]), atol=1e-5)
    with np.load(saved) as arrays:
        for name, theirs in zip(arrays.files, variables(alone[1].model), strict=True):
            np.testing.assert_allclose(arrays[name], theirs, atol=2e-5)


EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from jaxrec.errors import TrainingStopped
from tests.training.test_train_sharding import train, variables

assert len(jax.devices()) == 8
folder = Path(sys.argv[1])
asked = iter(range(100))
try:
    train(folder / "moved", 2, stop=lambda: next(asked) == 3)
except TrainingStopped:
    np.savez(folder / "moved.npz", *variables(train(folder / "moved", 4).model))
"""


def start_python(code: str, devices: int, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_eight_devices_train_as_one(tmp_path: Path, alone: tuple[Path, TrainedModel]) -> None:
    # Stopped in the first epoch on a mesh [data, items] of 4 x 2, then resumed on 2 x 4; 8 x 1: tests/test_train.py.
    process = start_python(EIGHT_DEVICES, 8, tmp_path)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert_as_alone(tmp_path / "moved", alone, tmp_path / "moved.npz")


NO_WHOLE_TABLE = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jaxrec.data.batches import TrainingData
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.sharding import batch_sharding, data_mesh, item_rows, state_sharding
from jaxrec.training.step import initial_state, make_optimizer, make_train_step
from tests.training.test_train_sharding import MODEL, small_data

mesh, items = data_mesh(item_shards=4), 9998
optimizer = make_optimizer(TrainConfig(), 100)
model = TimeRatingAwareLSTM(items, MODEL, rngs=nnx.Rngs(0))
graphdef, state = initial_state(model, optimizer, item_rows(items, mesh))
state = jax.device_put(state, state_sharding(state, mesh))
batch = next(TrainingData(small_data(), 8, 64, 2).epoch(0, 0))
batch = jax.device_put(batch, batch_sharding(mesh))
compiled = make_train_step(graphdef, optimizer, mesh, 0.5).lower(state, batch, jax.random.key(0)).compile()
print(compiled.as_text())
"""


def test_no_device_holds_a_whole_table() -> None:
    process = start_python(NO_WHOLE_TABLE, 8)
    program, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, program
    widths = {int(size) for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", program) for size in shape.split(",")}
    assert 2500 in widths  # a quarter of the rows
    assert max(widths) < 9999


def test_every_table_with_a_row_per_item_is_known_as_one() -> None:
    def variables(items: int, genres: int) -> dict[tuple[str, ...], nnx.Variable]:
        table = np.zeros((items + 1, genres), np.float32)
        model = TimeRatingAwareContentModel(items, table, MODEL, rngs=nnx.Rngs(0))
        return dict(nnx.to_flat_state(nnx.state(model)))

    fewer, other_sizes = variables(20, 4), {ITEM_ROWS: variables(21, 4), GENRE_ROWS: variables(20, 5)}
    for kind, more in other_sizes.items():
        changed = {path for path, variable in fewer.items() if more[path].shape[0] != variable.shape[0]}
        assert changed
        assert {path for path, variable in fewer.items() if has_rows_of(variable, kind)} == changed


def test_a_mesh_has_the_devices_in_one_order() -> None:
    assert data_mesh(jax.devices()[::-1]) == data_mesh()


def test_shards_have_to_fit_the_devices() -> None:
    count = len(jax.devices())
    with pytest.raises(DataError, match=f"cannot be split over {count + 1} devices where a process has {count}"):
        data_mesh(item_shards=count + 1)


ONE_OF_TWO = """
import os, signal, sys
from pathlib import Path
import jax, numpy as np
from jaxrec.training.processes import ProcessLost, is_first, join, leave, leave_at_once
from jaxrec.training.sharding import data_mesh
from tests.training.test_train_sharding import train, variables

folder, port, index, killed = Path(sys.argv[1]), *map(int, sys.argv[2:])
join(f"127.0.0.1:{port}", 2, index)
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mixed = data_mesh(jax.devices()[::2] + jax.devices()[1::2], item_shards=2)
assert [[device.process_index for device in row] for row in mixed.devices] == [[0, 0], [1, 1]]
asked = iter(range(100))

def kill_in_the_last_epoch():
    if next(asked) == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return False

try:
    model = train(folder / "two", item_shards=2, stop=kill_in_the_last_epoch).model
except ProcessLost as lost:
    print("the other process is gone:", lost)
    leave_at_once()
if is_first():
    np.savez(folder / "two.npz", *variables(model))
leave()
"""


def two_processes(folder: Path, killed: int) -> tuple[list[int], list[str]]:
    """Exit statuses and outputs of two processes of one run; the second dies at question `killed` whether to stop."""
    with reserved_port() as port:
        processes = [start_python(ONE_OF_TWO, 2, folder, port, i, killed if i else -1) for i in (0, 1)]
        outputs = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_two_processes_train_as_one_and_end_when_one_is_killed(
    tmp_path: Path, alone: tuple[Path, TrainedModel]
) -> None:
    # The questions: before each epoch and at its end. The fifth comes when two epochs are over.
    statuses, outputs = two_processes(tmp_path, killed=4)
    assert statuses == [1, -signal.SIGKILL], outputs
    assert "the other process is gone: " in outputs[0]
    assert any(path.name.isdigit() for path in (tmp_path / "two/checkpoints").iterdir())
    statuses, outputs = two_processes(tmp_path, killed=-1)
    assert statuses == [0, 0], outputs
    assert_as_alone(tmp_path / "two", alone, tmp_path / "two.npz")
