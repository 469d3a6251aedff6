"""Tracks a run with MLflow (`--mlflow URI`): its configuration, its metrics by step, and the exported model.

MLflow is the extra `mlflow`, and is imported when a run is tracked. The experiment is that of the variable
MLFLOW_EXPERIMENT_NAME, or `jaxrec`. RUN/mlflow.json says which run of MLflow it is; it holds no URI, since that may
hold a password.
"""

import itertools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from jaxrec.config import to_json
from jaxrec.errors import TrackingError, TrainingStopped
from jaxrec.files import read_json, write_text
from jaxrec.runs.directory import MLFLOW_FILE, RUN_FILE, Run
from jaxrec.training.log import Track
from jaxrec.training.processes import in_first
from jaxrec.training.stopping import StopRequested

EXPERIMENT = "jaxrec"
MODEL_PATH, DATA_NAME = "model", "model_directory"
RUN_NAME, VERSION_TAG = "mlflow.runName", "jaxrec.model_version"  # tags; the first is MLflow's own
SENT_AT_ONCE = 500  # values; MLflow takes 1000
MOST_WAITING = 100_000  # values
SEND_S, SEND_AGAIN_S = 5.0, 300.0
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
REFUSE_S, TRY_S = "30", "5"  # how long a request may take before training, and while it goes on
# By drivers of a database: how long it may take to connect (s), and to acknowledge what it was sent (ms).
LIMITS = {
    ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"): "connect_timeout=5&tcp_user_timeout=5000",
    ("mysql", "mysql+mysqldb", "mysql+pymysql"): "connect_timeout=5",
}
EXPECTED = (
    "expected the URI of MLflow, such as http://localhost:5000 or sqlite:///mlflow.db, with %40 for an @ in a "
    "password, and likewise for other special characters"
)


class Tracker:
    """A tracking server or store that answered, and what is still to be sent to it."""

    def __init__(self, uri: str) -> None:
        """Connects, and looks up the experiment or makes it.

        Args:
            uri: As MLflow takes it, such as http://localhost:5000 or sqlite:///mlflow.db.

        Raises:
            TrackingError: MLflow is not installed, the URI is none, or the server does not answer.
        """
        self._uri, self._name = with_limits(uri), check(uri)
        self._run_id, self._begun = "", False
        self._last: dict[str, int] = {}
        self._waiting: deque[tuple[str, float, int, int]] = deque()
        self._send_at = 0.0
        self._lost = 0
        self._fails = self._said = False
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when MLflow is imported
        with self._refusing():
            from mlflow import MlflowClient

            _ask_database(self._uri)
            self._client = MlflowClient(tracking_uri=self._uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            self._experiment = self._client.create_experiment(name) if found is None else found.experiment_id

    def find(self, run: Run) -> bool:
        """Looks for the run of MLflow that RUN/mlflow.json names for this version of the data.

        Returns:
            Whether there is one, and it has the configuration, which `begin` sends last.

        Raises:
            TrackingError: It was tracked elsewhere, or the server does not answer any more.
        """
        path = run.folder / MLFLOW_FILE
        if not (path.is_file() and (run.folder / RUN_FILE).is_file()):  # no run: of one that could not be begun
            return False
        with self._refusing():
            known = read_json(path, "expected what `jaxrec train --mlflow` wrote")
            if known["data_version"] != run.data_version:
                return False
            found = self._client.get_run(known["run_id"])
            self._run_id = found.info.run_id
            for name in found.data.metrics:  # what a run logged after its last checkpoint comes again
                self._last[name] = max(one.step for one in self._client.get_metric_history(self._run_id, name))
            self._begun = bool(found.data.params)
        return self._begun

    def begin(self, run: Run, status: str = "RUNNING", tags: Mapping[str, str] = {}) -> None:
        """Finds the run of MLflow for `run`, or makes one for each version of its data.

        If it fails after it has made one, that is FAILED if MLflow takes it, and a later call completes it.

        Args:
            run: What is tracked.
            status: Of a run that is made.
            tags: Likewise; its name is that of the folder, unless they have the tag `mlflow.runName`.

        Raises:
            TrackingError: As `find`.
        """
        if self._begun or self.find(run):
            return
        with self._refusing():
            from mlflow.entities import Param

            if not self._run_id:
                named = {RUN_NAME: run.folder.name, **tags}
                self._run_id = self._client.create_run(self._experiment, tags=named).info.run_id
                content = {"run_id": self._run_id, "data_version": run.data_version}
                write_text(run.folder / MLFLOW_FILE, json.dumps(content) + "\n")
            try:
                self._client.update_run(self._run_id, status=status)
                parameters = [Param(name, str(value)) for name, value in _parameters(run).items()]
                self._client.log_batch(self._run_id, params=parameters)
            except Exception:
                with suppress(Exception):
                    self._client.update_run(self._run_id, status="FAILED")
                raise
            self._begun = True

    def metric(self, name: str, value: float, step: int) -> None:
        """Notes a metric, unless MLflow has this step, and sends all that were noted after some seconds.

        Raises nothing.
        """
        if step <= self._last.get(name, -1):
            return
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append((name, float(value), int(time.time() * 1000), step))
        if time.monotonic() >= self._send_at or (len(self._waiting) >= SENT_AT_ONCE and not self._fails):
            self._send()

    def status(self, status: str) -> None:
        """Tells how the run stands: RUNNING, FINISHED, KILLED or FAILED; then sends what was noted. Raises nothing.

        A server that does not answer is asked once. A line says what it did not get.
        """
        known = self._attempt(lambda: self._client.update_run(self._run_id, status=status))
        if known:
            self._send()
        lost = self._lost + len(self._waiting)
        if status != "RUNNING" and (lost or not known):
            self._say(f"does not have {lost} values of this run" + ("" if known else f", nor that it is {status}"))

    def log_model(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Keeps an exported model directory as the artifact `model`, which `mlflow.pyfunc.load_model` reads.

        Args:
            directory: By `jaxrec export`. It replaces the one that MLflow has of this run.
            manifest: Its own; its version is kept as the tag `jaxrec.model_version`, and the means of its metrics.

        Raises:
            TrackingError: The server does not take it.
        """
        with self._refusing(), tempfile.TemporaryDirectory(prefix="jaxrec-mlflow-") as folder:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            save_model(directory, Path(folder) / MODEL_PATH)
            if any(one.path == MODEL_PATH for one in self._client.list_artifacts(self._run_id)):
                place = self._client.get_run(self._run_id).info.artifact_uri
                get_artifact_repository(place, tracking_uri=self._uri).delete_artifacts(MODEL_PATH)
            self._client.log_artifacts(self._run_id, str(Path(folder) / MODEL_PATH), MODEL_PATH)
            self._client.set_tag(self._run_id, VERSION_TAG, manifest["model_version"])
            for name, value in _test_metrics(manifest["metrics"]).items():
                self._client.log_metric(self._run_id, name, value)

    def _send(self) -> None:
        while self._waiting:
            some = list(itertools.islice(self._waiting, SENT_AT_ONCE))
            if not self._attempt(lambda some=some: self._log(some)):  # type: ignore[misc]
                break
            for _ in some:
                self._waiting.popleft()
        self._send_at = time.monotonic() + (SEND_AGAIN_S if self._waiting else SEND_S)

    def _log(self, values: list[tuple[str, float, int, int]]) -> None:
        """Sends values. Those that MLflow calls invalid are lost: they would stand before all later ones."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, metrics=[Metric(*one) for one in values])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            self._lost += len(values)

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether it was done; a line says once that it was not."""
        try:
            with _settings(TRY_S):
                work()
        except Exception as error:  # of MLflow, its client of HTTP or the driver of a database: training goes on
            if not self._said:
                self._say(f"fails, and training goes on: {self._reason(error)}")
            self._fails = self._said = True
            return False
        self._fails = False
        return True

    def _say(self, text: str) -> None:
        tqdm.write(f"MLflow at {self._name} {text}", file=sys.stderr)

    def _reason(self, error: Exception) -> str:
        """The first line of an error, without the password of the URI."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0].replace(self._uri.rstrip("/"), self._name)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            with _settings(REFUSE_S):
                yield
        except Exception as error:
            raise TrackingError(f"MLflow at {self._name}: {self._reason(error)}") from error


def check(uri: str) -> str:
    """What messages call the place at a URI. Raises TrackingError where MLflow is not installed, or the URI is none."""
    if find_spec("mlflow") is None:
        raise TrackingError('tracking needs mlflow, which is not installed: pip install "jaxrec[mlflow]"')
    shown = _without_secrets(uri)
    if shown is None:
        raise TrackingError(EXPECTED)
    return shown


def connect(uri: str | None) -> Tracker | None:
    """The tracker of the first process; None in the others, and where there is no URI.

    Raises, in every process, TrainingError where there can be none; in the first one it is a TrackingError.
    """
    found: list[Tracker] = []
    if uri is not None:
        in_first(lambda asked: found.append(Tracker(uri)))
    return found[0] if found else None


def begin(uri: str | None, tracker: Tracker | None, run: Run, tags: Mapping[str, str]) -> None:
    """`Tracker.begin` in the first process, while the others wait for its end; nothing where there is no URI.

    Raises as `connect`.
    """

    def in_mlflow(asked: StopRequested) -> None:
        if tracker is not None:
            tracker.begin(run, tags=tags)

    if uri is not None:
        in_first(in_mlflow)


@contextmanager
def tracked(tracker: Tracker | None) -> Iterator[Track | None]:
    """What takes the metrics of a training under way (None: nothing does); then MLflow learns how it ended."""
    if tracker is None:
        yield None
        return
    tracker.status("RUNNING")
    try:
        yield tracker.metric
    except BaseException as error:
        tracker.status("KILLED" if isinstance(error, TrainingStopped | KeyboardInterrupt) else "FAILED")
        raise
    tracker.status("FINISHED")


@contextmanager
def _settings(timeout: str) -> Iterator[None]:
    """MLflow would ask a server that is gone for minutes. What the environment says otherwise stays."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def with_limits(uri: str) -> str:
    """The URI of a database with LIMITS, unless it says itself how long connecting may take; other URIs as they are.

    Examples:
        >>> with_limits("mysql://localhost/db")
        'mysql://localhost/db?connect_timeout=5'
        >>> with_limits("postgresql://localhost/db?connect_timeout=60")
        'postgresql://localhost/db?connect_timeout=60'
    """
    limits = next((one for drivers, one in LIMITS.items() if uri.partition("://")[0] in drivers), "")
    return uri if not limits or "connect_timeout=" in uri else f"{uri}{'&' if '?' in uri else '?'}{limits}"


def _ask_database(uri: str) -> None:
    """Raises the error of a database that does not answer, which MLflow would ask ten times, for minutes."""
    if not uri.startswith(DATABASES):
        return
    from sqlalchemy import create_engine, inspect

    engine = create_engine(uri)
    if engine.dialect.name == "sqlite" and engine.url.database:
        Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
    try:
        inspect(engine).get_table_names()
    finally:
        engine.dispose()


def save_model(directory: Path, out: Path) -> None:
    """Writes a model of MLflow that answers as `serve` does (`serve.pyfunc`) around an exported model directory.

    The folder of `out` holds nothing else.
    """
    events = [("user_id", "string"), ("item_id", "string"), ("timestamp", "long")]
    answers = [("user_id", "string"), ("rank", "long"), ("item_id", "string"), ("title", "string"), ("score", "double")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of type hints of its own, and of a signature without an example
        import mlflow.pyfunc
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
        from mlflow.types.schema import AnyType

        # The checks of serve.pyfunc: MLflow would refuse ratings that are whole numbers.
        rating = ColSpec(AnyType(), "rating", required=False)
        data = out.with_name(DATA_NAME)
        data.symlink_to(directory.resolve())
        mlflow.pyfunc.save_model(
            path=str(out),
            loader_module="serve.pyfunc",
            data_path=str(data),
            pip_requirements=[
                f"mlflow-skinny=={version('mlflow-skinny')}",  # without its name MLflow adds the whole of itself
                f"jaxrec[mlflow,serve-cpu,index]=={version('jaxrec')}",
            ],
            signature=ModelSignature(
                Schema([*(ColSpec(kind, name) for name, kind in events), rating]),
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


def _without_secrets(uri: str) -> str | None:
    """A URI for messages; None for one that cannot be told apart from its password.

    Examples:
        >>> _without_secrets("postgresql://me:secret@example.org:5432/db?password=secret")
        'postgresql://example.org:5432'
        >>> _without_secrets("http://me:sec/ret@example.org")
    """
    try:
        parts = urlsplit(uri.strip())
        _ = parts.port
    except ValueError:
        return None
    if not parts.netloc + parts.path or (parts.netloc and "@" in parts.path + parts.query + parts.fragment):
        return None
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}" if host else re.split("[?#]", uri)[0]
