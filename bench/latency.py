"""Latency, throughput and CPU cost of the server, beside its floor and beside its peers.

    python -m bench.make_model --items 10000 --out runs/bench-model
    python -m bench.make_model --items 10000 --reranker --out runs/bench-reranker
    python3.11 -m venv runs/peers && runs/peers/bin/pip install -r bench/peers/requirements.txt
    python -m bench.latency runs/bench-model --reranker runs/bench-reranker --peers runs/peers --plot runs/latency.svg

Starts `python -m serve run MODEL`, an empty echo server of the same kind and one with grpc's thread pool, and with
`--peers` Triton, FastAPI and MLServer on the same `sequence.onnx`, each in a process of its own. Where nginx and the
extra `fast` are installed, the server has the fast front too, which is asked directly and behind nginx. They are driven
one after the other by h2load at several concurrencies, in interleaved rounds, so that a busy moment of the machine hits
all alike. `session.run` is the graph alone on one thread, in this process. `reranker`: of the same model with a
reranker of the best 100 items, on a server of its own.

The peers get features ready for the graph and answer indices and scores. Ours gets raw ids, keeps (stored user) or
takes (inline history) the history, and answers ids, titles and genres; so the comparison is to the peers' advantage.

Every measurement begins with an answer that another client checks: its status, and its items against `session.run`.
h2load's answers must have the same size. At the end all requests are checked once more.

Prints tables with medians over the rounds and, in brackets, the lowest and highest round.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import onnxruntime
from google.protobuf.json_format import MessageToJson

from bench import peer_servers
from bench.fronts import fast_address
from bench.load import Sample, Target, drive, framed, memory_mb, require_h2load
from bench.publish import here, spread
from bench.workload import HISTORIES, Feed, Workload, step_feed, workload
from serve.client import Event, RecommenderClient, UserEvent
from serve.pb import open_inference_pb2 as v2
from serve.pb.recommender_pb2 import Boost, History, Pin, RecommendRequest, RecommendResponse, Rules
from tests.ports import reserved_port
from tests.serve.front.proxy import MISSING, Sockets, running_proxy
from tests.serve.process import ServerProcess, running_server

DEADLINE_S = 30.0
RECOMMEND = "/jaxrec.v1.Recommender/Recommend"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def run_graph(session: onnxruntime.InferenceSession, feeds: Sequence[Feed], seconds: float) -> Sample:
    """Runs a graph on one request after the other."""
    latencies: list[float] = []
    outputs = ["items", "scores"]
    for feed in feeds[:20]:
        session.run(outputs, feed)
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        begin = time.perf_counter()
        session.run(outputs, feeds[len(latencies) % len(feeds)])
        latencies.append(time.perf_counter() - begin)
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) * 1e3
    return Sample(float(p50), float(p95), float(p99), len(latencies) / elapsed, cpu * 1e3 / len(latencies))


def must(name: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Scores that are almost equal may change places."""
    if len(set(found) ^ set(expected)) > 2:
        raise click.ClickException(f"{name}: expected the items {list(expected)}, came {list(found)}")


def rpc_target(
    name: str,
    pids: Sequence[int],
    port: int,
    method: str,
    requests: Sequence[bytes],
    check: Callable[[int, bytes], None],
) -> tuple[Target, grpc.Channel]:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    call = channel.unary_unary(method)

    def answer(number: int) -> bytes:
        response: bytes = call(requests[number], timeout=DEADLINE_S)
        check(number, response)
        return framed(response)

    return Target(name, pids, f"http://127.0.0.1:{port}{method}", [framed(one) for one in requests], answer), channel


def infer_request(feed: Feed) -> bytes:
    request = v2.ModelInferRequest(model_name=peer_servers.MODEL_NAME)
    types = {"item": "INT32", "rating": "FP32", "gap": "FP32", "request_gap": "FP32", "exclude": "INT32", "k": "INT64"}
    for name, kind in types.items():
        shape = (1, 1) if name in ("request_gap", "k") else feed[name].shape
        request.inputs.add(name=name, datatype=kind, shape=shape)
        request.raw_input_contents.append(feed[name].tobytes())
    return request.SerializeToString()


def recommend_check(expected: Sequence[Sequence[str]]) -> Callable[[int, bytes], None]:
    def check(number: int, response: bytes) -> None:
        answer = RecommendResponse.FromString(response)
        must("Recommend", [one.item_id for one in answer.recommendations], expected[number])

    return check


def ruled(work: Workload) -> dict[str, Rules]:
    """Rules that need one ranking of the model, and some that need three."""
    tag = next(asked.any_tags[0] for asked, _ in work.filters.values() if asked.any_tags)
    pins = [Pin(tag=tag, position=1), Pin(item_id=work.ids[-1], position=2)]
    return {"diversity": Rules(diversity=0.2), "pins": Rules(pins=pins, boosts=[Boost(tag=tag, factor=2)])}


def ruled_check(name: str, k: int) -> Callable[[int, bytes], None]:
    """Each item once, as many as are asked for, and not all of them by score alone."""

    def check(number: int, response: bytes) -> None:
        found = RecommendResponse.FromString(response).recommendations
        if len({one.item_id for one in found}) != k or not any(one.applied for one in found):
            raise click.ClickException(f"{name}: expected {k} items by rules, came {[one.item_id for one in found]}")

    return check


def infer_check(name: str, work: Workload) -> Callable[[int, bytes], None]:
    def check(number: int, response: bytes) -> None:
        answer = v2.ModelInferResponse.FromString(response)
        at = [output.name for output in answer.outputs].index("items")
        found = (
            np.frombuffer(answer.raw_output_contents[at], np.int32)
            if answer.raw_output_contents
            else answer.outputs[at].contents.int_contents
        )
        must(name, [work.ids[item] for item in found], work.expected[number])

    return check


def fastapi_target(server: peer_servers.Started, work: Workload) -> Target:
    requests = [
        json.dumps(
            {
                **{name: feed[name][0].tolist() for name in ("item", "rating", "gap", "exclude")},
                "request_gap": float(feed["request_gap"][0]),
                "k": int(feed["k"][0]),
            }
        ).encode()
        for feed in work.feeds
    ]
    url = f"http://127.0.0.1:{server.port}/recommend"
    found: Found = lambda answer: [work.ids[item] for item in answer["items"]]  # noqa: E731
    return json_target("FastAPI, JSON", server.process.pid, url, requests, found, work)


Found = Callable[[Any], list[str]]


def json_target(name: str, pid: int, url: str, requests: Sequence[bytes], found: Found, work: Workload) -> Target:
    """A server that is asked over HTTP/1.1 with JSON; `found`: the items of an answer."""

    def answer(number: int) -> bytes:
        request = urllib.request.Request(url, requests[number], {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            body: bytes = response.read()
        must(name, found(json.loads(body)), work.expected[number])
        return body

    return Target(name, [pid], url, requests, answer, is_http1=True)


def record(address: str, histories: Sequence[Sequence[Event]]) -> None:
    """Stores each history as a user's, named by its place."""
    with RecommenderClient(address, timeout_s=DEADLINE_S) as client:
        for user, events in enumerate(histories):
            client.record_events(
                UserEvent(event_id=f"{user}-{at}", user_id=str(user), item_id=event.item_id, timestamp=event.timestamp)
                for at, event in enumerate(events)
            )


def start_seconds(model: Path, folder: Path) -> float:
    """From the start of the process until it says that it is serving, which it does when health does."""
    begin = time.monotonic()
    with running_server(model, folder / f"start-{begin}.sqlite"):
        return time.monotonic() - begin


def facts(model: Path) -> dict[str, str]:
    manifest = json.loads((model / "manifest.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    return {
        "machine": f"{here().machine}, grpc {grpc.__version__}, load {os.getloadavg()[0]:.1f} at the start",
        "commit": here().commit,
        "model": f"{manifest['item_count']} items, {size:.0f} MB",
    }


Measured = dict[tuple[str, int], list[Sample]]


def table(measured: Measured) -> str:
    """One line per measurement: the median of the rounds (lowest to highest)."""
    lines = ["| concurrency | what | p50 ms | p99 ms | requests/s | CPU ms per request |", "|---|---|---|---|---|---|"]
    for (name, callers), samples in sorted(measured.items(), key=lambda one: one[0][1]):
        columns = []
        for field, digits in (("p50", 2), ("p99", 2), ("rate", 0), ("cpu", 3)):
            columns.append(spread([getattr(one, field) for one in samples], digits))
        lines.append(f"| {callers or '-'} | {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def plot(measured: Measured, file: Path) -> None:
    """Requests per second and CPU time of each server at each concurrency."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, callers in measured if callers))
    concurrencies = sorted({callers for _, callers in measured if callers})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, field, title in zip(axes, ("rate", "cpu"), ("requests/s", "CPU ms per request"), strict=True):
        for name in names:
            values = [[getattr(one, field) for one in measured[name, callers]] for callers in concurrencies]
            middle = np.array([statistics.median(one) for one in values])
            spread = [middle - [min(one) for one in values], [max(one) for one in values] - middle]
            axis.errorbar(range(len(values)), middle, spread, marker="o", capsize=3, label=name)
        axis.set(title=title, xlabel="concurrency", xticks=range(len(concurrencies)), xticklabels=concurrencies, ylim=0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(file)


def add_fast(
    stack: ExitStack, ours: ServerProcess, folder: Path, add: Callable[[str, Sequence[int], int, str], None]
) -> None:
    """Has `add` take the fast front of our server, and nginx before it, by name, processes, port and way of asking."""
    fast, port = fast_address(ours), stack.enter_context(reserved_port())
    sockets = Sockets(folder, ours.address, fast, f"127.0.0.1:{port}", "reuseport")
    proxy = stack.enter_context(running_proxy(sockets))
    for way in ("stored user", "inline history"):
        add(f"ours, fast front, {way}", [ours.process.pid], int(fast.rpartition(":")[2]), way)
    add("ours, fast front, stored user, nginx", [ours.process.pid, proxy.pid], port, "stored user")


def add_reranker(
    stack: ExitStack, work: Workload, stored_user: Sequence[bytes], folder: Path, add: Callable[..., None]
) -> None:
    """Has `add` take a server of the model with a reranker."""
    server = stack.enter_context(running_server(work.model, folder / "reranker.sqlite"))
    record(server.address, work.histories)
    port, check = int(server.address.rpartition(":")[2]), recommend_check(work.expected)
    add("ours, stored user, reranker", [server.process.pid], port, RECOMMEND, stored_user, check)


def steps_of(work: Workload) -> list[Feed]:
    return [step_feed(work.step, feed) for feed in work.feeds]


def encoded(requests: Sequence[RecommendRequest]) -> list[bytes]:
    return [request.SerializeToString() for request in requests]


def start_all(
    stack: ExitStack, work: Workload, reranker: Workload | None, peers: Path | None, folder: Path
) -> tuple[list[Target], dict[str, float]]:
    """Starts every server until `stack` ends; with the seconds that each took until it answered."""
    seconds = {"ours": statistics.median(start_seconds(work.model, folder) for _ in range(5))}
    targets = []

    def add(*arguments: Any) -> None:
        target, channel = rpc_target(*arguments)
        stack.enter_context(channel)
        targets.append(target)

    for kind in ("loop", "threaded"):
        server = stack.enter_context(peer_servers.echo(kind, folder))
        add(f"echo, {kind}", [server.process.pid], server.port, "/bench.Echo/Echo", [b""], lambda *_: None)
    http = f"127.0.0.1:{stack.enter_context(reserved_port())}"
    options = ["--http", http, *([] if MISSING else ["--fast", "127.0.0.1:0"])]
    ours = stack.enter_context(running_server(work.model, folder / "events.sqlite", options=options))
    record(ours.address, work.histories)
    asked: dict[str, Any] = {"k": work.k, "request_time": work.request_time}
    ways = {
        "stored user": [RecommendRequest(user_id=str(user), **asked) for user in range(HISTORIES)],
        "inline history": [RecommendRequest(history=History(events=one), **asked) for one in work.histories],
    }
    check = recommend_check(work.expected)
    checks = {name: check for name in ways}
    for name, (asked_filter, expected) in work.filters.items():
        way = f"stored user, {name}"
        ways[way] = [RecommendRequest(user_id=str(user), filter=asked_filter, **asked) for user in range(HISTORIES)]
        checks[way] = recommend_check(expected)
    for name, rules in ruled(work).items():
        way = f"stored user, {name}"
        ways[way] = [RecommendRequest(user_id=str(user), rules=rules, **asked) for user in range(HISTORIES)]
        checks[way] = ruled_check(name, work.k)
    for name, requests in ways.items():
        messages = encoded(requests)
        port = int(ours.address.rpartition(":")[2])
        add(f"ours, {name}", [ours.process.pid], port, RECOMMEND, messages, checks[name])
    if not MISSING:

        def add_way(name: str, pids: Sequence[int], port: int, way: str) -> None:
            add(name, pids, port, RECOMMEND, encoded(ways[way]), check)

        add_fast(stack, ours, folder, add_way)
    texts = [MessageToJson(request, indent=None).encode() for request in ways["stored user"]]
    items: Found = lambda answer: [one["itemId"] for one in answer["recommendations"]]  # noqa: E731
    url = f"http://{http}{RECOMMEND}"
    targets.append(json_target("ours, stored user, HTTP and JSON", ours.process.pid, url, texts, items, work))
    # One process for each core: on one port, which the kernel divides, and on one store.
    both = stack.enter_context(running_server(work.model, folder / "events.sqlite", options=["--processes", "2"]))
    messages = encoded(ways["stored user"])
    port = int(both.address.rpartition(":")[2])
    add("ours, stored user, 2 processes", [both.process.pid], port, RECOMMEND, messages, check)
    if reranker is not None:
        add_reranker(stack, reranker, messages, folder, add)
    if peers is not None:
        graph = (work.model / "sequence.onnx").resolve()
        for name, start in (("Triton", peer_servers.triton), ("MLServer", peer_servers.mlserver)):
            server = stack.enter_context(start(peers, graph, folder, len(work.ids)))
            seconds[name] = server.seconds
            messages = [infer_request(feed) for feed in work.feeds]
            add(name, [server.process.pid], server.port, INFER, messages, infer_check(name, work))
        server = stack.enter_context(peer_servers.fastapi(peers, graph, folder, len(work.ids)))
        targets.append(fastapi_target(server, work))
        seconds["FastAPI, JSON"] = server.seconds
    return targets, seconds


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--seconds", type=click.FloatRange(0.1), default=1.0, help="For each measurement.")
@click.option("--history", "length", type=click.IntRange(1), default=50, help="Events per history.")
@click.option("--k", type=click.IntRange(1, 1000), default=10, help="Items per answer.")
@click.option("--concurrency", type=click.IntRange(1), multiple=True, default=(1, 8, 32, 128), help="Repeatable.")
@click.option(
    "--reranker", type=click.Path(exists=True, file_okay=False, path_type=Path), help="MODEL with a reranker."
)
@click.option(
    "--peers", type=click.Path(exists=True, path_type=Path), help="Environment with bench/peers/requirements.txt."
)
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the figures here (SVG).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all rounds here.")
def main(
    model: Path,
    rounds: int,
    seconds: float,
    length: int,
    k: int,
    concurrency: tuple[int, ...],
    reranker: Path | None,
    peers: Path | None,
    plot_file: Path | None,
    json_file: Path | None,
) -> None:
    """Measure the server on the model directory MODEL beside the graphs alone, gRPC alone, and peers."""
    require_h2load()
    described = facts(model)
    work = workload(model, length, k)
    reranked = None if reranker is None else workload(reranker, length, k)
    measured: Measured = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets, seconds_to_serve = start_all(stack, work, reranked, peers, folder)
        graphs = [("sequence", work.sequence, work.feeds), ("step", work.step, steps_of(work))]
        if reranked is not None:
            graphs.append(("step, reranker", reranked.step, steps_of(reranked)))
        for number in range(rounds):
            click.echo(f"round {number + 1} of {rounds}", err=True)
            for name, session, feeds in graphs:
                sample = run_graph(session, feeds, seconds)
                measured.setdefault((f"session.run, {name}", 0), []).append(sample)
            for callers, at in itertools.product(concurrency, range(len(targets))):
                target = targets[(at + number) % len(targets)]
                sample = drive(target, callers, seconds, number, folder)
                measured.setdefault((target.name, callers), []).append(sample)
        for target in targets:
            for number in range(len(target.requests)):
                target.answer(number)
        memory = {target.name: memory_mb(target.pids) for target in targets}
    for name, value in described.items():
        click.echo(f"- {name}: {value}")
    click.echo(f"- {length} events, top {k}, {rounds} interleaved rounds of {seconds:g} s\n\n{table(measured)}\n")
    click.echo("| what | seconds to serve | resident MB |\n|---|---|---|")
    for name, megabytes in memory.items():
        begun = seconds_to_serve.get("ours" if name.startswith("ours") else name)
        click.echo(f"| {name} | {'-' if begun is None else f'{begun:.2f}'} | {megabytes:.0f} |")
    if plot_file is not None:
        plot(measured, plot_file)
    if json_file is not None:
        samples = {f"{name} @ {callers}": [asdict(one) for one in each] for (name, callers), each in measured.items()}
        json_file.write_text(json.dumps({**described, "rounds": samples}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
