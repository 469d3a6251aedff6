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
    """In one of two seeds, one of four cases of the second variant has rank 3 without the request time, NDCG@10 of .5
    instead of 1, and on validation two of them. User 4 has three of the cases."""
    files: list[list[Path]] = []
    for number in range(len(ablation.VARIANTS)):
        files.append([tmp_path / f"{number}-{seed}.npz" for seed in range(2)])
        for seed, file in enumerate(files[-1]):
            validation, test = np.ones((2, 4), np.int32), np.ones((2, 4), np.int32)
            if number == 1 and seed == 1:
                test[0, 0], validation[0, :2] = 3, 3
            users, cost = np.array([4, 4, 4, 7]), {"epochs": 15 + seed, "cpu_seconds": 60.0 + 10 * seed}
            write_arrays(
                file, {"validation": validation, "test": test, "test_users": users, **cost, "data": "abcdefgh12"}
            )
    lines = ablation.table("ml-100k", files)
    assert lines[1] == "4 test cases, data of SHA-256 abcdefgh.\n"
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| |")]
    assert rows[0] == "| all of it | 1.0000 | 1.0000 |  | 15.5 | 65 |"
    # Of 16 values, NDCG@10 of 4 cases in 2 seeds without and with the time, one is .5 less, and two on validation. A
    # resample of the two users with user 4 alone has a mean of .5 / 12.
    cells = rows[1].split(" | ")
    assert cells[1:3] == ["0.9375", "0.9688"]
    assert cells[3] == "-0.0312 (-0.0417 to +0.0000)"
    assert rows[2].split(" | ")[3] == "+0.0000 (+0.0000 to +0.0000)"
    assert len(rows) == len(ablation.VARIANTS)
