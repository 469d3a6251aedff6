"""A model directory with an index of 3,000 items, exported once."""

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
from tests.serve.model.rankings import LARGE


@pytest.fixture(scope="session")
def large_directory(
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """3,000 items, of which the index names some hundreds."""
    ids = np.arange(1, LARGE + 1)
    movies = pd.DataFrame({ITEM: ids, TITLE: [f"Movie {n}" for n in ids], GENRES: ["Drama", "Comedy"] * (LARGE // 2)})
    log = pd.DataFrame({USER: 1 + ids % 100, ITEM: ids, RATING: np.float32(4), TIME: 10**9 + ids})
    config = PrepareConfig(min_user_ratings=1, min_movie_ratings=1, rating_scale=RatingScale(0.5, 5.0))
    data = prepare(log, movies, config)
    out = tmp_path_factory.mktemp("large") / "model"
    export_model(
        random_hybrid(data, 5, True),
        data,
        out,
        training={},
        metrics={},
        licence="Synthetic.",
        index=True,
    )
    return out


@pytest.fixture(scope="session")
def large(large_directory: Path) -> Artifact:
    return read_artifact(large_directory)
