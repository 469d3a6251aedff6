"""A model of MLflow keeps the rules of the server, and names the row that breaks one."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jaxrec.runs.tracking import save_model
from serve.api.errors import InvalidRequest
from serve.api.rules import MAX_HISTORY_EVENTS

pytestmark = [  # of MLflow's own code
    pytest.mark.filterwarnings("ignore:.*type hint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROW = {"user_id": "a", "item_id": "1007", "rating": 4.0, "timestamp": 10**9}


@pytest.fixture(scope="module")
def model(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pyfunc")
    save_model(model_directory, folder / "model")
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder / "model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rating": 5.5}, r"events\[1\].rating: expected a rating in 0.5..5, came 5.5"),
        ({"rating": float("inf")}, r"events\[1\].rating: .*inf"),
        ({"timestamp": 1_700_000_000_000}, r"events\[1\].timestamp: .*milliseconds"),
        ({"timestamp": 0}, r"events\[1\].timestamp: .*none"),
        ({"timestamp": -1}, r"events\[1\].timestamp: .*came -1"),
        ({"timestamp": int(time.time()) + 10**6}, r"events\[1\].timestamp: "),
        ({"user_id": None}, r"events\[1\].user_id: expected a string, came none"),
        ({"item_id": None}, r"events\[1\].item_id: expected a string, came none"),
        ({"item_id": 1007}, r"events\[1\].item_id: expected a string, came 1007"),
        ({"item_id": ""}, r"events\[1\].item_id: expected an id of 1 to 512"),
        ({"user_id": " a"}, r"events\[1\].user_id: expected an id without spaces"),
    ],
)
def test_a_wrong_row_is_refused_as_the_server_refuses_it(model: Any, change: Mapping[str, Any], message: str) -> None:
    frame = pd.DataFrame([ROW, {**ROW, **change}])
    with pytest.raises(InvalidRequest, match=message):
        model.predict(frame)


@pytest.mark.parametrize("k", [-1, 1001, 10**7])
def test_a_wrong_count_is_refused(model: Any, k: int) -> None:
    with pytest.raises(InvalidRequest, match="k: expected 1 to 1000"):
        model.predict(pd.DataFrame([ROW]), params={"k": k})


def test_a_history_is_as_long_as_one_that_the_server_takes(model: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"user 'a': expected at most {MAX_HISTORY_EVENTS} entries"):
        model.predict(pd.DataFrame([ROW] * (MAX_HISTORY_EVENTS + 1)))


def test_ratings_may_be_whole_numbers_or_missing(model: Any) -> None:
    floats = model.predict(pd.DataFrame([{**ROW, "rating": 4.0}]))
    assert model.predict(pd.DataFrame([{**ROW, "rating": 4}])).equals(floats)
    none = model.predict(pd.DataFrame([{**ROW, "rating": None}]))
    assert model.predict(pd.DataFrame([ROW]).drop(columns="rating")).equals(none)
    assert not none.equals(floats)
