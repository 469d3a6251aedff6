"""A flame graph of the server while it answers stored users.

    pip install py-spy
    python -m bench.flame runs/bench-model --concurrency 32 --out bench/flame.svg

py-spy samples the Python stacks of the running server, every thread that does not wait, while h2load asks it as in
bench/latency.py; what C does counts for the line that called it. Besides the picture, prints how the samples are shared
among the parts, by the innermost frame that tells.
"""

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import click

from bench.latency import HISTORIES, RECOMMEND, recommend_check, record, rpc_target, workload
from bench.load import drive, require_h2load
from serve.pb.recommender_pb2 import RecommendRequest
from tests.serve.process import running_server

RATE = 100
# File or function of a frame; looked for from the inside out.
PARTS = (
    ("ONNX Runtime", ("onnxruntime_inference_collection.py",)),
    ("log of slates, in its own thread", ("deferred.py", "_write_deferred", "_insert_slates")),
    ("revision of the history, from SQLite", ("sqlite/store.py",)),
    (
        "arrays around the run, states, batching",
        ("states.py", "batching.py", "engine.py", "numpy", "model/recommender.py"),
    ),
    ("metrics", ("metrics.py", "prometheus_client")),
    ("decoding and encoding", ("codec.py", "rules.py", "RecommendResponse", "recommender_pb2")),
    (
        "around the call: request id, gate, servicer",
        ("calls.py", "gate.py", "recommends.py", "waiting.py", "api/recommender.py", "service.py", "loaded.py"),
    ),
    ("gRPC, and the event loop", ("loop.py", "asyncio/", "grpc/")),
)


# py-spy takes some threads that wait for busy ones.
WAITING = ("_worker (concurrent", "wait (threading.py")


def part_of(stack: str) -> str:
    for frame in reversed(stack.split(";")):
        for part, marks in PARTS:
            if any(mark in frame for mark in marks):
                return part
    return "other"


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--concurrency", type=click.IntRange(1), default=32)
@click.option("--seconds", type=click.IntRange(1), default=8)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="SVG file.")
def main(model: Path, concurrency: int, seconds: int, out: Path) -> None:
    """Draw what the server on MODEL spends its time on."""
    require_h2load()
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{Path('/usr/local/bin')}")
    if spy is None:
        raise click.ClickException("expected py-spy beside Python: pip install py-spy")
    work = workload(model, 50, 10)
    requests = [
        RecommendRequest(user_id=str(user), k=10, request_time=work.request_time).SerializeToString()
        for user in range(HISTORIES)
    ]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running_server(model, folder / "events.sqlite"))
        record(server.address, work.histories)
        port = int(server.address.rpartition(":")[2])
        target, channel = rpc_target("ours", [server.process.pid], port, RECOMMEND, requests, recommend_check(work))
        stack.enter_context(channel)
        drive(target, concurrency, 1.0, 0, folder)
        raw = folder / "stacks.txt"
        command = [spy, "record", "--rate", str(RATE), "--pid", str(server.process.pid)]
        runs = [("raw", raw), ("flamegraph", out)]
        for kind, file in runs:
            spying = subprocess.Popen([*command, "--duration", str(seconds), "--format", kind, "--output", str(file)])
            sample = drive(target, concurrency, seconds + 1.0, 0, folder)
            if spying.wait(60):
                raise click.ClickException("py-spy failed")
        # The title is the command, and py-spy's place is this machine's own.
        out.write_text(out.read_text(encoding="utf-8").replace(spy, "py-spy"), encoding="utf-8")
        shares: Counter[str] = Counter()
        for line in raw.read_text().splitlines():
            frames, _, count = line.rpartition(" ")
            if any(mark in frames.rpartition(";")[2] for mark in WAITING):
                continue
            shares[part_of(frames)] += int(count)
    click.echo(f"{sample.rate:.0f} requests/s while sampled\n\n| part | share of samples |\n|---|---|")
    for part, count in shares.most_common():
        click.echo(f"| {part} | {count / shares.total():.0%} |")


if __name__ == "__main__":
    main()
