"""What runs are tracked in."""

from pathlib import Path

import pytest

from tests.once import made_once
from tests.tracked import mlflow_client


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow without runs, since MLflow takes seconds to make its tables. Shared: copy it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        mlflow_client(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    return made_once(tmp_path_factory, "mlflow", make) / "mlflow.db"
