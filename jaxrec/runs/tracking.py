"""Tracks a run with MLflow (`--mlflow URI`): its configuration, its metrics by step, and the exported model.

MLflow is the extra `mlflow`, and is imported when a run is tracked. The experiment is that of the variable
MLFLOW_EXPERIMENT_NAME, or `jaxrec`. RUN/mlflow.json says which run of MLflow it is; it holds no URI, since that may
hold a password.
"""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from jaxrec.config import to_json
from jaxrec.errors import TrackingError, TrainingStopped
from jaxrec.files import read_json, write_text
from jaxrec.runs.directory import MLFLOW_FILE, Run
from jaxrec.training.log import Track
from jaxrec.training.processes import in_first

EXPERIMENT = "jaxrec"
MODEL_PATH = "model"
SENT_AT_ONCE = 500  # values; MLflow takes 1000
SEND_S, SEND_AGAIN_S = 5.0, 300.0  # after a failure, which may have taken half a minute
# MLflow would ask a server that is gone for minutes, and reports its use to its makers.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Tracker:
    """A tracking server or store that answered, and what is still to be sent to it."""

    def __init__(self, uri: str) -> None:
        """Connects, and looks up the experiment or makes it.

        Args:
            uri: As MLflow takes it, such as http://localhost:5000 or sqlite:///mlflow.db.

        Raises:
            TrackingError: MLflow is not installed, the URI is none, or the server does not answer.
        """
        if find_spec("mlflow") is None:
            raise TrackingError('tracking needs mlflow, which is not installed: pip install "jaxrec[mlflow]"')
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._uri, self._name = uri, _without_password(uri)
        self._run_id = ""
        self._waiting: list[tuple[str, float, int, int]] = []
        self._send_at = 0.0
        self._fails = self._said = False
        with self._refusing():
            self._client = MlflowClient(tracking_uri=uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id

    def begin(self, run: Run) -> str:
        """Finds the run of MLflow for `run`, or makes one for each version of its data. Returns its id.

        Raises:
            TrackingError: It was tracked elsewhere, or the server does not answer any more.
        """
        path = run.folder / MLFLOW_FILE
        known = read_json(path, "expected what `jaxrec train --mlflow` wrote") if path.is_file() else {}
        with self._refusing():
            if known.get("data_version") == run.data_version:
                self._run_id = self._client.get_run(known["run_id"]).info.run_id
                return self._run_id
            self._run_id = self._client.create_run(self._experiment, run_name=run.folder.name).info.run_id
            for name, value in _parameters(run).items():
                self._client.log_param(self._run_id, name, value)
        write_text(path, json.dumps({"run_id": self._run_id, "data_version": run.data_version}) + "\n")
        return self._run_id

    def metric(self, name: str, value: float, step: int) -> None:
        """Notes a metric, and sends all that were noted after some seconds. Raises nothing."""
        self._waiting.append((name, float(value), int(time.time() * 1000), step))
        if time.monotonic() >= self._send_at or (len(self._waiting) >= SENT_AT_ONCE and not self._fails):
            self._send()

    def status(self, status: str) -> None:
        """Sends what was noted, and how the run stands: RUNNING, FINISHED, KILLED or FAILED. Raises nothing."""
        self._send()
        self._attempt(lambda: self._client.update_run(self._run_id, status=status))

    def log_model(self, directory: Path, metrics: Mapping[str, Any]) -> None:
        """Keeps an exported model directory as the artifact `model`, which `mlflow.pyfunc.load_model` reads.

        Args:
            directory: By `jaxrec export`.
            metrics: Those of its manifest; the means of the rows are kept, too.

        Raises:
            TrackingError: The server does not take it.
        """
        with self._refusing(), tempfile.TemporaryDirectory(prefix="jaxrec-mlflow-") as folder:
            save_model(directory, Path(folder) / MODEL_PATH)
            self._client.log_artifacts(self._run_id, str(Path(folder) / MODEL_PATH), MODEL_PATH)
            for name, value in _test_metrics(metrics).items():
                self._client.log_metric(self._run_id, name, value)

    def _send(self) -> None:
        while self._waiting:
            some = self._waiting[:SENT_AT_ONCE]
            if not self._attempt(lambda some=some: self._log(some)):  # type: ignore[misc]
                break
            del self._waiting[: len(some)]
        self._send_at = time.monotonic() + (SEND_AGAIN_S if self._waiting else SEND_S)

    def _log(self, values: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run_id, metrics=[Metric(*one) for one in values])

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether it was done; a line says once that it was not."""
        try:
            work()
        except Exception as error:  # of MLflow, its client of HTTP or the driver of a database: training goes on
            if not self._said:
                tqdm.write(f"MLflow at {self._name} fails, and training goes on: {self._reason(error)}")
            self._fails = self._said = True
            return False
        self._fails = False
        return True

    def _reason(self, error: Exception) -> str:
        """The first line of an error, without the password of the URI."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0].replace(self._uri.rstrip("/"), self._name)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise TrackingError(f"MLflow at {self._name}: {self._reason(error)}") from error


def connect(uri: str | None) -> Tracker | None:
    """The tracker of the first process; None in the others, and where there is no URI.

    Raises, in every process, TrainingError where there can be none; in the first one it is a TrackingError.
    """
    found: list[Tracker] = []
    if uri is not None:
        in_first(lambda: found.append(Tracker(uri)))
    return found[0] if found else None


@contextmanager
def tracked(tracker: Tracker | None, run: Run) -> Iterator[Track | None]:
    """What takes the metrics of a training under way (None: nothing does); then MLflow learns how it ended.

    Raises TrackingError, before training, where the run of MLflow cannot be had.
    """
    if tracker is None:
        yield None
        return
    tracker.begin(run)
    tracker.status("RUNNING")
    try:
        yield tracker.metric
    except BaseException as error:
        tracker.status("KILLED" if isinstance(error, TrainingStopped | KeyboardInterrupt) else "FAILED")
        raise
    tracker.status("FINISHED")


def save_model(directory: Path, out: Path) -> None:
    """Writes a model of MLflow that answers as `serve` does (`serve.pyfunc`) around an exported model directory."""
    events = [("user_id", "string", True), ("item_id", "string", True)]
    events += [("rating", "double", False), ("timestamp", "long", True)]
    answers = [("user_id", "string"), ("rank", "long"), ("item_id", "string"), ("title", "string"), ("score", "double")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of type hints of its own, and of a signature without an example
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

        mlflow.pyfunc.save_model(
            path=str(out),
            loader_module="serve.pyfunc",
            data_path=str(directory),
            pip_requirements=[f"jaxrec[mlflow,serve-cpu]=={version('jaxrec')}"],
            signature=ModelSignature(
                Schema([ColSpec(kind, name, required) for name, kind, required in events]),
                Schema([ColSpec(kind, name) for name, kind in answers]),
                ParamSchema([ParamSpec("k", "long", 10)]),
            ),
        )


def _parameters(run: Run) -> dict[str, Any]:
    """The configuration of a run by name, such as `train.learning_rate`."""
    parts = {"model": to_json(run.model_config), "train": to_json(run.train_config)}
    values = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {**values, "data.sha256": run.data_digest, "data.version": run.data_version}


def _test_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The means of an evaluation by scorer and metric, such as `test/hybrid/with_request_time/ndcg_10`."""
    found = {}
    for row in metrics.get("rows", ()):
        time_known = "with" if row["request_time"] else "without"
        for name, value in row.items():
            if isinstance(value, Mapping) and "mean" in value:
                found[f"test/{row['name']}/{time_known}_request_time/{name}"] = float(value["mean"])
    return found


def _without_password(uri: str) -> str:
    """A URI for messages.

    Examples:
        >>> _without_password("https://me:secret@example.org/mlflow")
        'https://example.org/mlflow'
    """
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else uri
