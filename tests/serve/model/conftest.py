"""Model directories with an index, of 3,000 items and of 60, exported once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.model_directory import export_model
from serve.model.directory import Artifact, read_artifact
from tests.once import made_once
from tests.serve.model.rankings import LARGE


@pytest.fixture(scope="session")
def large_directory(
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """3,000 items, of which the index names some hundreds."""

    def export(out: Path) -> None:
        ids = np.arange(1, LARGE + 1)
        names, genres = [f"Movie {n}" for n in ids], ["Drama", "Comedy"] * (LARGE // 2)
        movies = pd.DataFrame({ITEM: ids, TITLE: names, GENRES: genres})
        log = pd.DataFrame({USER: 1 + ids % 100, ITEM: ids, RATING: np.float32(4), TIME: 10**9 + ids})
        config = PrepareConfig(min_user_ratings=1, min_movie_ratings=1, rating_scale=RatingScale(0.5, 5.0))
        data = prepare(log, movies, config)
        hybrid = random_hybrid(data, 5, True)
        export_model(hybrid, data, out, training={}, metrics={}, licence="Synthetic.", index=True)

    return made_once(tmp_path_factory, "large_directory", export)


@pytest.fixture(scope="session")
def indexed_directory(small_data: PreparedData, small_hybrid: Hybrid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `model_directory`, with an index. Shared: copy it before changing it."""

    def export(out: Path) -> None:
        export_model(small_hybrid, small_data, out, training={}, metrics={}, licence="Synthetic.", index=True)

    return made_once(tmp_path_factory, "indexed_directory", export)


@pytest.fixture(scope="session")
def indexed(indexed_directory: Path) -> Artifact:
    return read_artifact(indexed_directory)


@pytest.fixture(scope="session")
def large(large_directory: Path) -> Artifact:
    return read_artifact(large_directory)
