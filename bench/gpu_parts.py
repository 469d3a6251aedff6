"""What bench/gpu.py measures, a function for each part. All run on the CPU, too, at the sizes of TINY.

Each part gets `until`, by `time.monotonic`: no figure is begun after it, which raises TimeoutError, and a stage in a
process of its own is ended then, which raises subprocess.TimeoutExpired.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from flax import nnx

from bench.recurrences import Weights, ways
from bench.train_steps import Shape, Step, our_loss, our_step, plain_jax_step, random_batch, random_weights, torch_step
from jaxrec.config import ModelConfig, TrainConfig
from jaxrec.data.batches import MAX_EARLIER, TrainBatch
from jaxrec.data.events import Events
from jaxrec.models.lstm import LSTM
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.training.sharding import data_mesh
from jaxrec.training.step import initial_state, make_optimizer, make_train_step, softmax_sample

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TOP_K = 10
SEARCH_WIDTH = 128  # of the query: two models of 64
# By precision, how far a loss and a gradient may be from those in float64, relative to their norm.
LIMITS = {"float32, highest": 1e-4, "float32, default": 1e-2, "bfloat16": 2e-2}
Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How much is measured; `seconds`: of each figure, about."""

    seconds: float
    product: int
    parity: Shape
    step: Shape
    batches: tuple[int, ...]
    epoch_items: int
    epoch_events: int
    epoch_rows: tuple[int, ...]
    epoch_length: int
    search_items: int
    search_batches: tuple[int, ...]
    max_epochs: int


FULL = Sizes(
    seconds=1.0,
    product=8192,
    parity=Shape(batch=64),
    step=Shape(),
    batches=(128, 1024, 4096),
    epoch_items=60_000,
    epoch_events=25_000_000,
    epoch_rows=(8, 64, 256),
    epoch_length=200,
    search_items=1_000_000,
    search_batches=(1, 8, 64, 256, 1024),
    max_epochs=10,
)
TINY = Sizes(
    seconds=0.01,
    product=64,
    parity=Shape(items=30, width=8, batch=4, length=6),
    step=Shape(items=30, width=8, batch=4, length=6),
    batches=(2, 4),
    epoch_items=50,
    epoch_events=1000,
    epoch_rows=(2,),
    epoch_length=10,
    search_items=500,
    search_batches=(1, 4),
    max_epochs=1,
)


def device(sizes: Sizes, until: float) -> Figures:
    """Which device it is, and the peak of a square matrix product, in TFLOP/s by precision."""
    first, size = jax.devices()[0], sizes.product
    factor = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    peaks = {}
    for name, dtype, precision in (
        ("float32, highest", jnp.float32, "highest"),
        ("float32, default", jnp.float32, "default"),
        ("bfloat16", jnp.bfloat16, "default"),
    ):
        on_device = jnp.asarray(factor, dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        peaks[name] = 2 * size**3 / 1e12 / min(_times(lambda: product(on_device, on_device), sizes.seconds, until))  # noqa: B023
    return {"platform": first.platform, "device": first.device_kind, "driver": _driver(), "peak": peaks}


def parity(sizes: Sizes, until: float) -> Figures:
    """Loss and gradients of the network of bench/train_steps.py on each device, beside float64 on the CPU."""
    weights, batch = random_weights(sizes.parity), random_batch(sizes.parity)
    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(cpu):
        expected = _loss_and_gradients({name: np.float64(w) for name, w in weights.items()}, batch, jnp.float64)
    rows = []
    for one in dict.fromkeys((cpu, jax.devices()[0])):
        for name, limit in LIMITS.items():
            _check(until)
            dtype = jnp.bfloat16 if name == "bfloat16" else jnp.float32
            with jax.default_device(one), jax.default_matmul_precision("highest" if "highest" in name else "default"):
                found = _loss_and_gradients(weights, batch, dtype)
            deviations = [_deviation(found[:1], expected[:1]), _deviation(found[1:], expected[1:])]
            rows.append([one.platform, name, *deviations, limit, all(one <= limit for one in deviations)])
    return {"rows": rows}


def recurrence(sizes: Sizes, until: float) -> Figures:
    """One layer forwards and backwards, each way of bench/recurrences.py, without resets within a row."""
    width, length = sizes.step.width, sizes.step.length
    lstm = LSTM(width, width, rngs=nnx.Rngs(0))
    weights = Weights(lstm.kernel[...], lstm.recurrent_kernel[...], lstm.bias[...])
    rows = []
    for batch in sizes.batches:
        rng, scan = np.random.default_rng(0), None
        x = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
        where = np.ones((batch, length), bool)
        for name, way in ways(jax.default_backend()).items():

            @jax.jit
            def both(weights: Weights, x: jax.Array, way: Any = way, where: Any = where) -> Any:
                return jax.value_and_grad(lambda w: jnp.sum(way(w, x, where) ** 2))(weights)

            took = statistics.median(_times(lambda: both(weights, x), sizes.seconds, until))  # noqa: B023
            found = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(both(weights, x))]
            scan = found if scan is None else scan
            rows.append([batch, name, 1e3 * took, _deviation(found, scan)])
    return {"rows": rows}


def step(sizes: Sizes, until: float) -> Figures:
    """A training step beside plain JAX and PyTorch, as a share of the peak of a float32 product."""
    torch = _torch_device()
    peak = device(sizes, until)["peak"]
    rows = []
    for batch_size in sizes.batches:
        shape = sizes.step._replace(batch=batch_size)
        weights, batch = random_weights(shape), random_batch(shape)
        ways: dict[str, tuple[Callable[[], Step], str]] = {
            "jaxrec": (lambda: our_step(weights, *batch), "float32, default"),  # noqa: B023
            "jaxrec, bfloat16": (lambda: our_step(weights, *batch, dtype=jnp.bfloat16), "bfloat16"),  # noqa: B023
            "plain JAX": (lambda: plain_jax_step(weights, *batch), "float32, default"),  # noqa: B023
        }
        if torch is not None:
            ways["PyTorch nn.LSTM"] = (lambda: torch_step(weights, *batch, _cores(), torch), "float32, default")  # noqa: B023
        for name, (make, precision) in ways.items():
            took = statistics.median(_times(make(), sizes.seconds, until))
            rate = shape.flop / 1e12 / took
            rows.append([batch_size, name, 1e3 * took, shape.positions / took, rate, rate / peak[precision]])
    return {"rows": rows, "torch": torch}


def epoch(sizes: Sizes, until: float) -> Figures:
    """The product's step on generated batches of the shape of a log of 25 million events; an epoch of such steps."""
    rows = []
    for batch_rows in sizes.epoch_rows:
        batch = random_train_batch(sizes.epoch_items, batch_rows, sizes.epoch_length)
        config = TrainConfig()
        optimizer = make_optimizer(config, 100)
        model = TimeRatingAwareLSTM(sizes.epoch_items, ModelConfig(max_length=sizes.epoch_length), rngs=nnx.Rngs(0))
        graphdef, state = initial_state(model, optimizer)
        run = make_train_step(graphdef, optimizer, data_mesh(), config.request_gap_dropout, config.sampled_items)
        held, key = [state], jax.random.key(0)

        def one(run: Any = run, held: list[Any] = held, batch: TrainBatch = batch, key: Any = key) -> float:
            held[0], metrics = run(held[0], batch, key)
            return float(metrics["loss"])

        took = statistics.median(_times(one, sizes.seconds, until))
        tokens = batch_rows * sizes.epoch_length
        rows.append([tokens, 1e3 * took, tokens / took, sizes.epoch_events / tokens * took])
    return {"rows": rows, "sampled": softmax_sample(sizes.epoch_items, None)}


def search(sizes: Sizes, until: float) -> Figures:
    """The best items of each query by ONNX Runtime, all products computed, on each provider, with and without bound
    inputs and outputs."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(SEARCH_WIDTH, sizes.search_items)).astype(np.float32)
    content = _search_graph(vectors)
    rows, expected = [], {}
    for provider in _providers():
        options = onnxruntime.SessionOptions()
        session = onnxruntime.InferenceSession(content, options, providers=[provider, CPU][: 1 + (provider != CPU)])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"expected {provider}, came {session.get_providers()[0]}")
        for batch in sizes.search_batches:
            query = np.random.default_rng(batch).normal(size=(batch, SEARCH_WIDTH)).astype(np.float32)
            bound = _bound(session, query, "cuda" if provider == CUDA else "cpu")
            _, items = session.run(None, {"query": query})
            best = expected.setdefault(batch, items)
            plain, with_binding = (
                statistics.median(_times(run, sizes.seconds, until))
                for run in (functools.partial(session.run, None, {"query": query}), bound)
            )
            same = float(np.mean([len({*a} & {*b}) / len(a) for a, b in zip(items, best, strict=True)]))
            rows.append([provider.removesuffix("ExecutionProvider"), batch, 1e3 * plain, 1e3 * with_binding, same])
    return {"rows": rows, "items": sizes.search_items}


def end_to_end(ratings: Path, work: Path, sizes: Sizes, until: float) -> Figures:
    """prepare, train, evaluate and export as a user runs them; seconds of each, and the figures of the evaluation."""
    shutil.rmtree(work, ignore_errors=True)
    data, run = work / "data", work / "run"
    stages = {
        "prepare": ["prepare", ratings, "--min-user-ratings", 5, "--min-movie-ratings", 5, "--out", data],
        "train": ["train", data, "--out", run, "--max-epochs", sizes.max_epochs],
        "evaluate": ["evaluate", run, "--json", work / "evaluation.json"],
        "export": ["export", run, "--out", work / "model"],
    }
    rows = []
    for name, arguments in stages.items():
        start = time.perf_counter()
        command = [sys.executable, "-m", "jaxrec.cli.main", *map(str, arguments)]
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=max(0.0, until - time.monotonic()))
        rows.append([name, time.perf_counter() - start])
    return {"rows": rows, "evaluation": json.loads((work / "evaluation.json").read_text("utf-8"))}


def random_train_batch(items: int, rows: int, length: int) -> TrainBatch:
    """Random events, of which one in a hundred begins another history."""
    rng, shape = np.random.default_rng(0), (rows, length)
    events = Events(
        rng.integers(1, items + 1, shape).astype(np.int32),
        rng.random(shape).astype(np.float32),
        rng.integers(0, 10**6, shape).astype(np.float32),
        np.full(rows, length, np.int32),
    )
    earlier = rng.integers(1, items + 1, (rows, MAX_EARLIER)).astype(np.int32)
    starts = rng.random(shape) < 0.01
    return TrainBatch(events, starts, np.roll(events.item, -1, axis=1), np.roll(events.gap, -1, axis=1), earlier)


def _loss_and_gradients(weights: Any, batch: Any, dtype: Any) -> list[np.ndarray]:
    loss, gradients = jax.jit(jax.value_and_grad(our_loss(weights, *batch, dtype=dtype)))(
        {name: jnp.asarray(value) for name, value in weights.items()}
    )
    return [np.asarray(loss, np.float64), *(np.asarray(gradients[name], np.float64) for name in sorted(gradients))]


def _deviation(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The norm of the difference of all arrays, relative to that of the expected ones."""
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in zip(found, expected, strict=True))
    return float(np.sqrt(difference / sum(float(np.sum(b**2)) for b in expected)))


def _check(until: float) -> None:
    if time.monotonic() > until:
        raise TimeoutError("no time is left")


def _times(run: Callable[[], Any], seconds: float, until: float) -> list[float]:
    """Of repeated calls for about so long, at least three, after one that compiles. Raises TimeoutError."""
    _check(until)
    jax.block_until_ready(run())
    return list(_timed(run, time.perf_counter() + seconds, until))


def _timed(run: Callable[[], Any], stop: float, until: float) -> Iterator[float]:
    count = 0
    while count < 3 or time.perf_counter() < stop:
        _check(until)
        start = time.perf_counter()
        jax.block_until_ready(run())
        yield time.perf_counter() - start
        count += 1


def _search_graph(vectors: np.ndarray) -> bytes:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["query", "vectors"], ["scores"]),
        helper.make_node("TopK", ["scores", "k"], ["best", "items"]),
    ]
    inputs = [helper.make_tensor_value_info("query", kind, ["batch", len(vectors)])]
    outputs = [
        helper.make_tensor_value_info("best", kind, ["batch", TOP_K]),
        helper.make_tensor_value_info("items", onnx.TensorProto.INT64, ["batch", TOP_K]),
    ]
    weights = [onnx.numpy_helper.from_array(vectors, "vectors"), onnx.numpy_helper.from_array(np.array([TOP_K]), "k")]
    graph = helper.make_graph(nodes, "search", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def _bound(session: onnxruntime.InferenceSession, query: np.ndarray, place: str) -> Callable[[], object]:
    """A run with the query on the device already, whose answers stay there."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("query", onnxruntime.OrtValue.ortvalue_from_numpy(query, place, 0))
    for name in ("best", "items"):
        binding.bind_output(name, place, 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _providers() -> list[str]:
    """CPU, and CUDA where there is a GPU: ONNX Runtime lists it elsewhere, too."""
    if jax.default_backend() != "gpu" or CUDA not in onnxruntime.get_available_providers():
        return [CPU]
    onnxruntime.preload_dlls()
    return [CPU, CUDA]


def _torch_device() -> str | None:
    """Where PyTorch runs; None: it is not installed, or does not reach the accelerator that JAX has."""
    if find_spec("torch") is None:
        return None
    import torch

    if jax.default_backend() == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def _driver() -> str:
    """As nvidia-smi names it; "none" without one."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
