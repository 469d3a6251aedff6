"""Starts the servers that bench/latency.py measures, each as a process of its own on a free port of the loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from tests.ports import reserved_port

HERE = Path(__file__).parent
PATIENCE_S = 60.0
MODEL_NAME = "jaxrec"

TRITON_CONFIG = """
name: "jaxrec"
backend: "python"
max_batch_size: 32
dynamic_batching {}
instance_group [{ count: 1, kind: KIND_CPU }]
input [
  { name: "item", data_type: TYPE_INT32, dims: [-1] },
  { name: "rating", data_type: TYPE_FP32, dims: [-1] },
  { name: "gap", data_type: TYPE_FP32, dims: [-1] },
  { name: "request_gap", data_type: TYPE_FP32, dims: [1] },
  { name: "exclude", data_type: TYPE_INT32, dims: [-1] },
  { name: "k", data_type: TYPE_INT64, dims: [1] }
]
output [
  { name: "items", data_type: TYPE_INT32, dims: [-1] },
  { name: "scores", data_type: TYPE_FP32, dims: [-1] }
]
"""


class Started:
    """A server's process, port, and the seconds from its start until it answered."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, seconds: float) -> None:
        self.process = process
        self.port = port
        self.seconds = seconds


@contextmanager
def started(
    command: Sequence[str], port: int | None, log: Path, env: dict[str, str] | None = None
) -> Iterator[Started]:
    """Runs a command until the block ends; without a port the command prints it on its first line."""
    begin = time.monotonic()
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE if port is None else errors, stderr=errors, text=True, env=env
        ) as process,
    ):
        try:
            if port is None:
                assert process.stdout is not None
                port = int(process.stdout.readline())
            wait_for_port(process, port, log)
            yield Started(process, port, time.monotonic() - begin)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_port(process: "subprocess.Popen[str]", port: int, log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{process.args!r} does not answer: {log.read_text()[-2000:]}") from None
            time.sleep(0.01)


def wait_until_ready(channel: grpc.Channel) -> None:
    """Until the Open Inference Protocol says that the model is ready."""
    from serve.pb import open_inference_pb2 as pb

    ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady", None, pb.ModelReadyResponse.FromString)
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if ready(pb.ModelReadyRequest(name=MODEL_NAME).SerializeToString(), timeout=5).ready:
                return
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
        time.sleep(0.02)


@contextmanager
def echo(kind: str, folder: Path) -> Iterator[Started]:
    with started([sys.executable, str(HERE / "echo_server.py"), kind], None, folder / f"echo-{kind}.log") as server:
        yield server


@contextmanager
def triton(venv: Path, graph: Path, folder: Path, rows: int) -> Iterator[Started]:
    """Triton from the wheel of nvidia-pytriton, started directly, with its Python backend and dynamic batching; `rows`:
    the items and the padding, for the inputs that are the same in all requests."""
    (site,) = (venv / "lib").glob("python3.*/site-packages")
    wheel = site / "pytriton" / "tritonserver"
    backends = folder / "backends" / "python"
    shutil.copytree(wheel / "backends" / "python", backends)
    version = site.parent.name.removeprefix("python")
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends)
    model = folder / "triton" / MODEL_NAME
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(TRITON_CONFIG)
    shutil.copy(HERE / "peers" / "triton_model.py", model / "1" / "model.py")
    shutil.copy(graph, model / "1" / "sequence.onnx")
    command = [str(wheel / "bin" / "tritonserver"), f"--model-repository={model.parent}"]
    command += [f"--backend-directory={backends.parent}", "--grpc-address=127.0.0.1"]
    command += ["--allow-http=false", "--allow-metrics=false", "--log-verbose=0"]
    env = {
        **os.environ,
        "CATALOG_ROWS": str(rows),
        "PYTHONPATH": str(site),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    libraries = subprocess.run(
        [str(venv / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    env["LD_LIBRARY_PATH"] = f"{libraries}:{site / 'nvidia_pytriton.libs'}"
    begin = time.monotonic()
    with (
        reserved_port() as port,
        started([*command, f"--grpc-port={port}"], port, folder / "triton.log", env) as server,
    ):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            wait_until_ready(channel)
        server.seconds = time.monotonic() - begin
        yield server


@contextmanager
def fastapi(venv: Path, graph: Path, folder: Path, rows: int) -> Iterator[Started]:
    command = [str(venv / "bin" / "python"), str(HERE / "peers" / "fastapi_app.py"), str(graph)]
    env = {**os.environ, "CATALOG_ROWS": str(rows)}
    with reserved_port() as port, started([*command, str(port)], port, folder / "fastapi.log", env) as server:
        yield server


@contextmanager
def mlserver(venv: Path, graph: Path, folder: Path, rows: int) -> Iterator[Started]:
    """MLServer without its worker processes, which do not pay on two cores."""
    home = folder / "mlserver"
    home.mkdir()
    shutil.copy(HERE / "peers" / "mlserver_runtime.py", home)
    (home / "model-settings.json").write_text(
        f'{{"name": "{MODEL_NAME}", "implementation": "mlserver_runtime.Graph", "parameters": {{"uri": "{graph}"}}}}'
    )
    env = {**os.environ, "CATALOG_ROWS": str(rows), "PYTHONPATH": str(home)}
    begin = time.monotonic()
    command = [str(venv / "bin" / "mlserver"), "start", str(home)]
    with reserved_port() as port, reserved_port() as http_port:
        (home / "settings.json").write_text(
            f'{{"parallel_workers": 0, "host": "127.0.0.1", "grpc_port": {port}, "http_port": {http_port},'
            f' "metrics_endpoint": null, "debug": false}}'
        )
        with started(command, port, folder / "mlserver.log", env) as server:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                wait_until_ready(channel)
            server.seconds = time.monotonic() - begin
            yield server
