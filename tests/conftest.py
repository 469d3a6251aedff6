"""Fixtures that several parts of the tests share: one small catalogue, one random model, one exported directory."""

import gc
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig, RatingScale, TrainConfig, to_json
from jaxrec.data.content import item_content
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.data.store import write_prepared
from jaxrec.files import sha256
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid, MixWeights, PolicyHead
from jaxrec.models.neighbours import neighbours
from jaxrec.models.repeat import TABLE_SIZE, Repeat
from jaxrec.models.reranker import CONTEXT, FEATURES, Reranker, RerankerWeights, Scales
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.trend import Trend
from jaxrec.onnx.added_items import ContentHeads
from jaxrec.onnx.model_directory import export_model
from jaxrec.rl.logged.tables import with_reranker
from jaxrec.runs.directory import SCHEMA_VERSION
from jaxrec.training.content_head import ridge_head
from tests.once import made_once

# A program for the CPU runs only where its instructions are known.
_CPU = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
_KIND = {platform.machine(), *(line for line in _CPU if line.startswith(("model name", "flags", "Features")))}
_COMPILED = Path(__file__).parents[1] / "build/compiled" / hashlib.sha256(repr(sorted(_KIND)).encode()).hexdigest()[:12]
# Tests build the same small models again and again. Each program is compiled once, for this run and later ones, for all
# processes of the tests and those that they start; and to compile takes longer than a small model gains by it.
_COMPILING = {
    "jax_compilation_cache_dir": str(_COMPILED),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_disable_most_optimizations": True,
}
# Without fused loops a small training step is compiled in less than half of the time. What the environment says stays.
_FUSION = "--xla_cpu_use_fusion_emitters"
if _FUSION not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FUSION}=false"
for _name, _value in _COMPILING.items():
    if _name.upper() not in os.environ:
        os.environ[_name.upper()] = str(_value)
        jax.config.update(_name, _value)

# Writing to a disk waits for the disk after each file, since files are whole or absent after a power failure.
_IN_MEMORY, _ROOM = Path("/dev/shm"), 4 * 10**9
if "TMPDIR" not in os.environ and _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > _ROOM:
    os.environ["TMPDIR"] = tempfile.tempdir = str(_IN_MEMORY)

_MOST_RESIDENT = 10**9

# What takes longest begins first, so that no process waits long for the other at the end.
_LONGEST_FIRST = ("training", "runs", "rl", "cli", "onnx", "examples", "bench", "models")

MOVIES, USERS, EVENTS_PER_USER = 60, 40, 30
SMALL = ModelConfig(embedding=16, hidden=16, rating_width=4, time_width=4, max_length=50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folders = [folder for folder in _LONGEST_FIRST if Path(__file__).parent / folder in item.path.parents]
        return _LONGEST_FIRST.index(folders[0]) if folders else len(_LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _freed_memory_is_given_back() -> Iterator[None]:
    """`jaxrec train` keeps its memory until its process ends, which for the tests is the end of them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrec.training.host_memory.keep_freed_memory", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_files_are_dropped() -> Iterator[None]:
    """Once they take much memory. They are on the disk."""
    yield
    status = Path("/proc/self/statm")
    if status.is_file() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def small_data() -> PreparedData:
    """60 movies with raw ids 1007, 1014, ... and one to three genres, 40 users with 30 seeded ratings on 0.5..5."""
    rng = np.random.default_rng(0)
    raw_ids = 1000 + 7 * np.arange(1, MOVIES + 1)
    names = np.array(["Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi"])
    movies = pd.DataFrame(
        {
            ITEM: raw_ids,
            TITLE: [f"Movie {n}, The ({1950 + n})" for n in range(1, MOVIES + 1)],
            GENRES: ["|".join(rng.choice(names, rng.integers(1, 4), replace=False)) for _ in raw_ids],
        }
    )
    start = 1_000_000_000
    interactions = pd.DataFrame(
        {
            USER: np.repeat(np.arange(1, USERS + 1), EVENTS_PER_USER),
            ITEM: np.concatenate([rng.choice(raw_ids, EVENTS_PER_USER, replace=False) for _ in range(USERS)]),
            RATING: rng.integers(1, 11, USERS * EVENTS_PER_USER).astype(np.float32) / 2,
            TIME: start + rng.integers(0, 10**7, USERS * EVENTS_PER_USER),
        }
    )
    return prepare(interactions, movies, PrepareConfig(rating_scale=RatingScale(0.5, 5.0)))


TREND = np.array([[2.0, 1.0, 0.5, 0.25, 0.25, 0.25], [0.01, 0.01, 0.0, 0.0, 0.02, -0.01]])


def _random_hybrid(data: PreparedData, seed: int, with_policy: bool) -> Hybrid:
    items = len(data.catalog)
    rngs = nnx.Rngs(seed)
    hybrid = Hybrid(
        TimeRatingAwareLSTM(items, SMALL, rngs=rngs),
        TimeRatingAwareContentModel(items, data.catalog.genre_matrix(), SMALL, rngs=rngs),
        CoOccurrence(neighbours(data, width=8)),
        MixWeights(0.4, 0.6, 0.3),
        Trend(TREND, np.full(6, 1e6)),
        policy=PolicyHead(2 * SMALL.embedding, 8, items, rngs=rngs) if with_policy else None,
    )
    rng = np.random.default_rng(seed)
    weights = nnx.state(hybrid, nnx.Param)
    nnx.update(hybrid, jax.tree.map(lambda x: x + 0.4 * rng.normal(size=x.shape).astype(np.float32), weights))
    return hybrid


@pytest.fixture(scope="session")
def random_hybrid() -> Callable[[PreparedData, int, bool], Hybrid]:
    """Builds a hybrid whose every weight is random, and large enough that the logits of the items differ clearly.

    Takes the data, a seed, and whether there is a policy head.
    """
    return _random_hybrid


@pytest.fixture(scope="session")
def small_hybrid(small_data: PreparedData) -> Hybrid:
    """A random model of `small_data` with a policy head."""
    return _random_hybrid(small_data, seed=1, with_policy=True)


@pytest.fixture(scope="session")
def with_random_reranker() -> Callable[[Hybrid, PreparedData], Hybrid]:
    """Puts a reranker with random weights and scales, all different, on a hybrid of the data; its tables are fitted. A
    policy shifts its weights."""

    def build(hybrid: Hybrid, data: PreparedData) -> Hybrid:
        start, rng = with_reranker(hybrid, data), np.random.default_rng(0)
        assert start.reranker is not None
        features, context = len(FEATURES), len(CONTEXT)
        scales = Scales(
            rng.uniform(0.5, 2.0, features), rng.normal(scale=3.0, size=context), rng.uniform(5.0, 15.0, context)
        )
        weights = RerankerWeights(rng.normal(size=features), rng.normal(size=(context, features)))
        reranked = hybrid.with_reranker(Reranker(start.reranker.tables, scales, weights))
        if hybrid.policy is None:
            return reranked
        policy, items = hybrid.policy, len(data.catalog)
        width, hidden = policy.inner.kernel.shape
        shifting = PolicyHead(width, hidden, items, reranks=True, rngs=nnx.Rngs(0))
        shift = {
            "direct": 0.1 * rng.normal(size=features).astype(np.float32),
            "by_context": 0.1 * rng.normal(size=(context, features)).astype(np.float32),
        }
        nnx.update(shifting, nnx.to_pure_dict(nnx.state(policy)) | shift)
        return reranked.with_policy(shifting)

    return build


@pytest.fixture(scope="session")
def repeating_hybrid(small_hybrid: Hybrid) -> Hybrid:
    """`small_hybrid` without its policy, with a random table for items of the history, which it may recommend again."""
    table = np.append(0, np.random.default_rng(2).normal(size=TABLE_SIZE - 1))
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    return Hybrid(*models, small_hybrid.mix_weights(), small_hybrid.trend, repeat=Repeat(table))


def heads(hybrid: Hybrid, data: PreparedData) -> ContentHeads:
    """Those of the ridge regression, with a shift of half a logit."""
    features, popularity = item_content(data), data.train_popularity()
    fitted = (ridge_head(model, features.matrix, popularity) for model in (hybrid.lstm, hybrid.content))
    return ContentHeads(*fitted, features, 0.5)


@pytest.fixture(scope="session")
def model_directory(small_data: PreparedData, small_hybrid: Hybrid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported `small_hybrid`. Shared: copy it before changing it."""

    def export(out: Path) -> None:
        export_model(
            small_hybrid,
            small_data,
            out,
            training={"note": "random weights"},
            metrics={},
            licence="Synthetic data, free for any use.",
            heads=heads(small_hybrid, small_data),
        )

    return made_once(tmp_path_factory, "model_directory", export)


@pytest.fixture(scope="session")
def new_run(small_data: PreparedData) -> Callable[[Path, Hybrid], Path]:
    """Writes FOLDER/data and FOLDER/run, which says that `hybrid` was trained there, and returns the latter."""

    def write(folder: Path, hybrid: Hybrid) -> Path:
        write_prepared(small_data, folder / "data")
        description = {
            "schema_version": SCHEMA_VERSION,
            "data": str(folder / "data"),
            "data_sha256": sha256(folder / "data/prepared.json"),
            "data_version": 0,
            "items": len(small_data.catalog),
            "items_sha256": "",
            "model": to_json(hybrid.lstm.config),
            "train": to_json(TrainConfig()),
        }
        (folder / "run").mkdir()
        (folder / "run/run.json").write_text(json.dumps(description))
        return folder / "run"

    return write
