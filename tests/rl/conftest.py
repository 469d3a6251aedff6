"""A run directory on random models in place of trained ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrec.config import TrainConfig, to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import write_prepared
from jaxrec.files import sha256
from jaxrec.models.hybrid import Hybrid
from jaxrec.runs.train import SCHEMA_VERSION


@pytest.fixture(scope="session")
def new_run(small_data: PreparedData) -> Callable[[Path, Hybrid], Path]:
    """Writes FOLDER/data and FOLDER/run, which says that `hybrid` was trained there, and returns the latter."""

    def write(folder: Path, hybrid: Hybrid) -> Path:
        write_prepared(small_data, folder / "data")
        description = {
            "schema_version": SCHEMA_VERSION,
            "data": str(folder / "data"),
            "data_sha256": sha256(folder / "data/prepared.json"),
            "data_version": 0,
            "items": len(small_data.catalog),
            "items_sha256": "",
            "model": to_json(hybrid.lstm.config),
            "train": to_json(TrainConfig()),
        }
        (folder / "run").mkdir()
        (folder / "run/run.json").write_text(json.dumps(description))
        return folder / "run"

    return write
