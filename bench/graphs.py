"""What session options, saved optimized graphs and IO binding do for a model's graphs on the CPU, in one run.

    python bench/make_model.py --items 10000 --out runs/bench-model
    python bench/graphs.py runs/bench-model [--also RUNS/OTHER-MODEL]

Each way gets a session of its own on one thread; all are asked by turns, so that a busy moment hits all alike. Printed
are medians over the rounds: of the best run of each round (µs), and of the seconds to make the session. `--also` times
another directory's graphs of the same kind beside them, such as one that was exported with --int8.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from onnxruntime import GraphOptimizationLevel as Level

ROUNDS, RUNS = 15, 20
DAY = 86_400
Feed = dict[str, np.ndarray]
OUTPUTS = {"step": ["next_state", "items", "scores"], "sequence": ["state", "items", "scores"]}


def options(level: Any = Level.ORT_ENABLE_ALL, **changes: Any) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = made.inter_op_num_threads = 1
    made.graph_optimization_level = level
    made.log_severity_level = 3  # no advice that a saved graph is for this machine only
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def session(graph: Path, made: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(graph), made, providers=["CPUExecutionProvider"])


def saved(graph: Path, level: Any, folder: Path, name: str) -> Path:
    out = folder / f"{graph.stem}-{name}.onnx"
    session(graph, options(level, optimized_model_filepath=str(out)))
    return out


def feed(graph: str, rows: int, state_width: int, items: int) -> Feed:
    """Requests of 50 events, or of a state and one event; ten answers."""
    random = np.random.default_rng(rows)
    history = random.integers(1, items + 1, (rows, 50)).astype(np.int32)
    asked = {"request_gap": np.full(rows, DAY, np.float32), "exclude": history, "k": np.array([10])}
    asked |= {"trend": np.zeros(items + 1, np.float32), "blocked": np.zeros((1, items + 1), bool)}
    if graph == "sequence":
        rating, gap = np.full(history.shape, -1, np.float32), np.full(history.shape, DAY, np.float32)
        return {"item": history, "rating": rating, "gap": gap, "length": np.full(rows, 50, np.int32), **asked}
    state = random.uniform(-0.5, 0.5, (rows, state_width)).astype(np.float32)
    state[:, -10:] = history[:, :10]
    one = {"rating": np.full(rows, -1, np.float32), "gap": np.full(rows, DAY, np.float32)}
    return {"state": state, "item": history[:, 0].copy(), **one, **asked}


def plain(run: onnxruntime.InferenceSession, outputs: list[str], inputs: Feed) -> Callable[[], Any]:
    return lambda: run.run(outputs, inputs)


def bound(run: onnxruntime.InferenceSession, outputs: list[str], inputs: Feed) -> Callable[[], Any]:
    """Inputs and outputs in buffers that are bound once; the request is copied in, and the answer out."""
    binding = run.io_binding()
    buffers = {name: array.copy() for name, array in inputs.items()}
    answers = dict(zip(outputs, run.run(outputs, inputs), strict=True))
    for name, array in buffers.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in answers.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def call() -> list[np.ndarray]:
        for name, array in inputs.items():
            buffers[name][...] = array
        run.run_with_iobinding(binding)
        return [array.copy() for array in answers.values()]

    return call


def bound_uncopied(run: onnxruntime.InferenceSession, outputs: list[str], inputs: Feed) -> Callable[[], Any]:
    """The best case that no server has: nothing is copied in or out."""
    binding = run.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, array in zip(outputs, run.run(outputs, inputs), strict=True):
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return lambda: (run.run_with_iobinding(binding), values)


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--also", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another model directory.")
@click.option("--batch", type=click.IntRange(1), multiple=True, default=(1, 16), help="Rows of a run; repeatable.")
def main(model: Path, also: Path | None, batch: tuple[int, ...]) -> None:
    """Time the graphs of MODEL under several options."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("| graph | way | s to load |" + "".join(f" µs, {rows} row{'s' * (rows > 1)} |" for rows in batch))
        print("|---|---|---|" + "---|" * len(batch))
        for graph, outputs in OUTPUTS.items():
            table(graph, outputs, model / f"{graph}.onnx", also and also / f"{graph}.onnx", batch, folder)


def table(graph: str, outputs: list[str], file: Path, also: Path | None, batch: tuple[int, ...], folder: Path) -> None:
    levels = {"basic": Level.ORT_ENABLE_BASIC, "extended": Level.ORT_ENABLE_EXTENDED, "all": Level.ORT_ENABLE_ALL}
    ways: dict[str, Callable[[], onnxruntime.InferenceSession]] = {
        "as it is (optimized at load: all)": lambda: session(file, options()),
        "not optimized": lambda: session(file, options(Level.ORT_DISABLE_ALL)),
        "no arena": lambda: session(file, options(enable_cpu_mem_arena=False)),
        "no memory pattern": lambda: session(file, options(enable_mem_pattern=False)),
        "parallel execution": lambda: session(file, options(execution_mode=onnxruntime.ExecutionMode.ORT_PARALLEL)),
    }
    for level_name, level in levels.items():
        stored = saved(file, level, folder, level_name)
        ways[f"saved at {level_name}, loaded as it is"] = lambda stored=stored: session(
            stored, options(Level.ORT_DISABLE_ALL)
        )
    if also is not None:
        ways[f"{also.parent.name}"] = lambda: session(also, options())
    load: dict[str, list[float]] = {way: [] for way in ways}
    sessions: dict[str, onnxruntime.InferenceSession] = {}
    for _ in range(5):
        for way, make in ways.items():
            begin = time.perf_counter()
            sessions[way] = make()
            load[way].append(time.perf_counter() - begin)
    first = next(iter(sessions.values()))
    width = next((node.shape[-1] for node in first.get_inputs() if node.name == "state"), 0)
    items = len(np.load(file.parent / "item_vectors.npy", mmap_mode="r")) - 1
    best: dict[tuple[str, int], list[float]] = {}
    for rows in batch:
        inputs = feed(graph, rows, width, items)
        calls = {way: plain(run, outputs, inputs) for way, run in sessions.items()}
        calls["IO binding, copied in and out"] = bound(first, outputs, inputs)
        calls["IO binding, nothing copied"] = bound_uncopied(first, outputs, inputs)
        for _ in range(ROUNDS):
            for way, call in calls.items():
                times = []
                for _ in range(RUNS):
                    begin = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - begin)
                best.setdefault((way, rows), []).append(min(times))
    for way in calls:
        seconds = f"{statistics.median(load[way]):.3f}" if way in load else "-"
        figures = "".join(f" {statistics.median(best[way, rows]) * 1e6:.0f} |" for rows in batch)
        print(f"| {graph} | {way} | {seconds} |{figures}")


if __name__ == "__main__":
    main()
