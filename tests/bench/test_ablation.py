"""bench/ablation.py: what a variant's file holds, and the table by hand."""

import functools
from pathlib import Path

import numpy as np
import pytest

from bench import ablation
from bench.publish import write_arrays
from jaxrec.config import TrainConfig
from jaxrec.data.prepared import PreparedData


def test_a_variant_is_trained_and_ranked_once(
    small_data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "TrainConfig", functools.partial(TrainConfig, max_epochs=1))
    (tmp_path / "small-leave-one-out-file").mkdir()
    done = ablation.measure(tmp_path, "small", 0, small_data, 0)
    found = dict(np.load(done))
    for part, cases in (("validation", small_data.split.validation), ("test", small_data.split.test)):
        assert found[part].shape == (2, len(cases))
        np.testing.assert_array_equal(found[f"{part}_users"], cases.users)
    assert found["epochs"] == 1
    assert found["cpu_seconds"] > 0
    changed = done.stat().st_mtime_ns
    assert ablation.measure(tmp_path, "small", 0, small_data, 0) == done
    assert done.stat().st_mtime_ns == changed
    # One that was interrupted is trained from the start.
    done.unlink()
    (leftover := done.with_suffix("") / "leftover").write_text("")
    ablation.measure(tmp_path, "small", 0, small_data, 0)
    assert not leftover.exists()


def test_the_table_pairs_by_case(tmp_path: Path) -> None:
    """One of two cases of the second variant has rank 3 without the request time: NDCG@10 of .5 in one of four."""
    files = []
    for number in range(len(ablation.VARIANTS)):
        ranks = np.ones((2, 2), np.int32)
        ranks[0, 0] = 3 if number == 1 else 1
        files.append([tmp_path / f"{number}.npz"])
        arrays = {"validation": ranks, "test": ranks, "test_users": np.array([4, 7]), "epochs": 16, "cpu_seconds": 65.4}
        write_arrays(files[-1][0], {**arrays, "data": "abcdefgh12"})
    lines = ablation.table("ml-100k", files)
    assert lines[1] == "2 test cases, data of SHA-256 abcdefgh.\n"
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| |")]
    assert rows[0] == "| all of it | 1.0000 | 1.0000 |  | 16.0 | 65 |"
    assert rows[1].split(" | ")[1:4] == ["0.8750", "0.8750", "-0.1250 (-0.2500 to +0.0000)"]
    assert rows[2].split(" | ")[3] == "+0.0000 (+0.0000 to +0.0000)"
    assert len(rows) == len(ablation.VARIANTS)
