"""Parts of prepared data: their batches add up to those of all, and gathering them says what it lacks."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.batches import TrainBatch, TrainingData
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.shares import joined, share_of
from jaxrec.errors import DataError
from jaxrec.training.sharding import data_mesh, whole_batch
from tests.synthetic import random_log


@pytest.fixture(scope="module")
def data() -> PreparedData:
    """30 users with 3 to 40 events."""
    return prepare(random_log(users=30, items=25, max_events=40, seed=3), None, PrepareConfig(3, 1))


def batches(data: PreparedData, index: int, count: int, rows: int) -> list[TrainBatch]:
    windows = TrainingData(share_of(data, index, count), max_length=8, batch_tokens=64, multiple_of=rows)
    return list(windows.epoch(seed=1, epoch=2))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 200])
def test_the_batches_of_all_shares_add_up_to_those_of_all_users(count: int, data: PreparedData) -> None:
    mesh = data_mesh()
    whole, *shares = (batches(data, *share, mesh.size) for share in [(0, 1), *((i, count) for i in range(count))])
    assert len(whole) > 3
    for expected, *parts in zip(whole, *shares, strict=True):
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
        of_all = stacked._replace(events=stacked.events._replace(length=parts[0].events.length), starts=parts[0].starts)
        for ours, theirs in zip(jax.tree.leaves(whole_batch(of_all, mesh)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_gathering_names_the_folder_that_cannot_be_written(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [share_of(data, index, 2).parts[0] for index in range(2)]
    np.testing.assert_array_equal(joined(parts).histories.items, data.histories.items)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    needed = 16 * data.histories.event_count + 8 * (len(data.users) + 1)
    with pytest.raises(DataError, match=rf"missing: cannot be written .*needs {needed} bytes there; .*TMPDIR"):
        joined(parts)
