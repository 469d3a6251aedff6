"""The index of a large catalogue beside the whole product: latency, recall, memory, and what the memory could give.

    for n in 10000 60000 1000000; do
        python bench/make_model.py --items $n --clustered --index --out runs/catalogue-$n
    done
    python -m bench.large_catalogue runs/catalogue-10000 runs/catalogue-60000 runs/catalogue-1000000

Item vectors lie around centres, LSTMs are random (`bench/make_model.py --clustered`). A request is a stored user's: a
step on the state after 50 random events, ten answers, the 50 items excluded. Both ways answer the same requests by
turns on one thread, which is another than the one that loaded; CPU is that of all threads of the process. Recall@10 is
the share of the exact answer's items that the index gives. The floor of the exact way is the time to read the item
vectors once, at the speed at which an array of 512 MB is read here. Memory is that of a process of its own that loads
the model and answers, file pages included and without.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from bench.publish import here
from serve.model.directory import Artifact, read_artifact
from serve.model.features import Features
from serve.model.ranking.engine import Engine, Step
from serve.settings import SearchBy

DAY = 86_400.0
K = 10
EVENTS = 50


def requests(engine: Engine, count: int) -> list[Step]:
    """The last events of random histories on the states before them."""
    random = np.random.default_rng(0)
    item = random.integers(1, engine.item_count + 1, (count, EVENTS)).astype(np.int32)
    rating, gap = np.full(EVENTS, -1, np.float32), np.full(EVENTS, DAY, np.float32)
    steps = []
    for row in item:
        ((_, state),) = engine.replay([Features(row[:-1], rating[:-1], gap[:-1], -1.0, row)])
        steps.append(Step(state, row[-1:], rating[-1:], gap[-1:], DAY, row[None]))
    return steps


def bandwidth_gb_s() -> float:
    """The best of ten reads of an array that no cache holds."""
    array = np.ones(128_000_000, np.float32)
    best = np.inf
    for _ in range(10):
        begin = time.perf_counter()
        np.dot(array, array)
        best = min(best, time.perf_counter() - begin)
    return array.nbytes / best / 1e9


def memory_mb(model: Path, search_by: SearchBy) -> tuple[float, float, float]:
    """Resident MB, of them anonymous, and seconds to load."""
    command = [sys.executable, "-m", "bench.large_catalogue", str(model), "--memory-of", search_by]
    resident, anonymous, seconds = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return resident, anonymous, seconds


def print_memory(model: Path, search_by: SearchBy) -> None:
    begin = time.perf_counter()
    engine = Engine(read_artifact(model), "cpu", search_by=search_by)
    seconds = time.perf_counter() - begin
    for step in requests(engine, 20):
        engine.step([step], K)
    status = Path("/proc/self/status").read_text()
    sizes = [int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon")]
    print(json.dumps([*sizes, seconds]))


def measure(model: Path, rounds: int, count: int, bandwidth: float) -> None:
    """In another thread than the one that loads, as a server: what is set for one thread does not hold for others."""
    with ThreadPoolExecutor(1) as pool:
        artifact = read_artifact(model)
        ways: dict[str, Engine] = {way: Engine(artifact, "cpu", search_by=way) for way in ("exact", "index")}  # type: ignore[arg-type]
        pool.submit(measure_ways, model, artifact, ways, rounds, count, bandwidth).result()


def measure_ways(
    model: Path, artifact: Artifact, ways: dict[str, Engine], rounds: int, count: int, bandwidth: float
) -> None:
    steps = requests(ways["index"], count)
    kept = [len(np.intersect1d(*(ways[way].step([step], K)[0][0].items for way in ways))) / K for step in steps]
    alone: dict[str, list[float]] = {way: [] for way in ways}
    together: dict[str, list[float]] = {way: [] for way in ways}
    busy: dict[str, float] = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, engine in ways.items():
            for step in steps:
                begin = time.perf_counter()
                engine.step([step], K)
                alone[way].append(time.perf_counter() - begin)
            busy_before = time.process_time()
            for start in range(0, count - 15, 16):
                begin = time.perf_counter()
                engine.step(steps[start : start + 16], K)
                together[way].append((time.perf_counter() - begin) / 16)
            busy[way] += time.process_time() - busy_before
    megabytes = artifact.item_vectors.nbytes / 1e6
    manifest = json.loads((model / "manifest.json").read_text())["index"]
    looks = f"{manifest['candidates']} candidates"
    for way in ways:
        p10, p50, p99 = np.percentile(alone[way], [10, 50, 99]) * 1e3
        batch = np.percentile(together[way], [10, 50]) * 1e3
        cpu = busy[way] / (16 * len(together[way])) * 1e3
        resident, anonymous, seconds = memory_mb(model, way)  # type: ignore[arg-type]
        recall, how = (1.0, "") if way == "exact" else (float(np.mean(kept)), f" ({looks})")
        print(
            f"| {artifact.info.item_count:,} | {way}{how} | {p10:.2f} / {p50:.2f} / {p99:.2f} | {batch[0]:.2f} / "
            f"{batch[1]:.2f} | {cpu:.2f} | {megabytes / bandwidth:.2f} | {recall:.4f} | "
            f"{resident:.0f} / {anonymous:.0f} | {seconds:.1f} |",
            flush=True,
        )


@click.command(context_settings={"show_default": True})
@click.argument("models", type=click.Path(exists=True, file_okay=False, path_type=Path), nargs=-1, required=True)
@click.option("--rounds", type=click.IntRange(1), default=5)
@click.option("--requests", "count", type=click.IntRange(16), default=64)
@click.option("--memory-of", type=click.Choice(["exact", "index"]), hidden=True)
def main(models: tuple[Path, ...], rounds: int, count: int, memory_of: SearchBy | None) -> None:
    """Measure the model directories MODELS, each with an index."""
    if memory_of is not None:
        print_memory(models[0], memory_of)
        return
    bandwidth = bandwidth_gb_s()
    print(f"Measured at commit {here().commit}, {here().machine}.")
    print(f"Memory is read at {bandwidth:.1f} GB/s.\n")
    print(
        "| items | way | ms alone, p10 / p50 / p99 | ms each of 16, p10 / p50 | CPU ms each of 16 | floor, ms |"
        " recall@10 | MB resident / anonymous | s to load |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in models:
        measure(model, rounds, count, bandwidth)


if __name__ == "__main__":
    main()
