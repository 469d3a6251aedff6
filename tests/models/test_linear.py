"""The linear autoencoder against EASE's dense solution."""

import numpy as np
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.models import linear
from jaxrec.models.linear import fit_linear
from tests.synthetic import random_log


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(random_log(users=60, items=20, max_events=12, seed=1), None, PrepareConfig(1, 1))


def dense_ease(data: PreparedData, penalty: float) -> np.ndarray:
    """[items, items] float64: equation 8, diagonal zero."""
    users = data.histories.users()
    rows = data.split.train_rows(data.histories)
    has = np.zeros((data.histories.user_count, len(data.catalog)))
    has[users[rows], data.histories.items[rows] - 1] = 1
    inverse = np.linalg.inv(has.T @ has + penalty * np.eye(has.shape[1]))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def test_full_rank_is_ease_off_the_diagonal(data: PreparedData) -> None:
    encoder, decoder = fit_linear(data, len(data.catalog), penalty=5.0)
    found = (encoder @ decoder.T)[1:, 1:]
    np.fill_diagonal(found, 0)
    np.testing.assert_allclose(found, dense_ease(data, 5.0), atol=1e-5)


def test_a_large_catalogue_has_the_same_solution(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    small = fit_linear(data, 6)
    monkeypatch.setattr(linear, "DENSE_ITEMS", 0)
    large = fit_linear(data, 6)
    np.testing.assert_allclose(large.encoder @ large.decoder.T, small.encoder @ small.decoder.T, atol=1e-4)


def test_shapes_padding_and_a_rank_beyond_the_data(data: PreparedData) -> None:
    encoder, decoder = fit_linear(data, 64)
    assert encoder.shape == decoder.shape == (len(data.catalog) + 1, 64)
    assert encoder.dtype == decoder.dtype == np.float32
    assert not encoder[0].any()
    assert not decoder[0].any()
    assert not encoder[:, len(data.catalog) :].any()
