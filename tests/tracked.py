"""MLflow's client, imported when it is asked for: that takes seconds, and most processes of tests do not need it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def mlflow_client(uri: str) -> "MlflowClient":
    """The client of a tracking store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
