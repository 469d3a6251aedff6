"""Reading `--features` and movies: which ids are accepted, and what is refused, with its place."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.content import item_content
from jaxrec.data.prepare import prepare
from jaxrec.data.reading.features import features_like, read_features
from jaxrec.data.reading.movies import movies_like, read_movies
from jaxrec.data.schema import ITEM, MISSING, TIME, USER
from jaxrec.errors import DataError

ODD_IDS = [*(word for word in MISSING if word), "d | e", "[b", '["c"]', "x|", "a, b"]
"""Each is an id like any other."""
WHOLE, TEXT = np.array([10, 20]), np.array(["10", "20"], dtype=object)


def as_json(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_an_id_may_be_any_word(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"features.{form}"
    rows: list[dict[str, object]] = [{ITEM: f" {raw} ", "studio": "A"} for raw in ODD_IDS]
    if form == "json":
        path.write_text(as_json(rows))
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    assert read_features(path)[ITEM].tolist() == ODD_IDS


def test_odd_ids_match_those_of_the_log(tmp_path: Path) -> None:
    count = len(ODD_IDS)
    log = pd.DataFrame({USER: np.repeat([1, 2, 3], count), ITEM: ODD_IDS * 3, TIME: range(3 * count)})
    pd.DataFrame({ITEM: ODD_IDS, "studio": ["A"] * count}).to_csv(tmp_path / "features.csv", index=False)
    data = prepare(log, config=PrepareConfig(1, 0), features=tmp_path / "features.csv")
    assert set(data.catalog.ids.raw_ids.tolist()) == set(ODD_IDS)
    assert item_content(data).matrix.tolist() == [[0]] + [[1]] * count


@pytest.mark.parametrize(("raw", "message"), [([1], r"\[1\]"), ({"a": 1}, r'\{"a": 1\}')])
def test_an_id_in_json_is_no_list_or_object(raw: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "features.json").write_text(as_json([{ITEM: "a", "studio": "A"}, {ITEM: raw, "studio": "A"}]))
    with pytest.raises(DataError, match=rf"features\.json:2: the id is {message}; expected text or a whole number"):
        read_features(tmp_path / "features.json")


@pytest.mark.parametrize("like", [features_like, movies_like])
@pytest.mark.parametrize(
    ("ids", "log", "message"),
    [
        ([10, None], WHOLE, r"row 2: movieId is None; expected a whole number"),
        ([10.0, float("nan")], WHOLE, r"row 2: movieId is nan; expected a whole number"),
        (pd.array([10, None], "Int64"), WHOLE, r"row 2: movieId is <NA>; expected a whole number"),
        ([10.0, 20.0], WHOLE, r"row 1: movieId is 10\.0; expected a whole number"),
        ([10, "20"], WHOLE, r"row 2: movieId is '20'; expected a whole number of 64 bits, as in the interactions"),
        ([10, True], WHOLE, r"row 2: movieId is True; expected a whole number"),
        ([10, 2**63], WHOLE, r"row 2: movieId is 9223372036854775808; expected a whole number of 64 bits"),
        (["10", None], TEXT, r"row 2: movieId is None; expected text that is not empty, as in the interactions"),
        (["10", " "], TEXT, r"row 2: movieId is ' '; expected text"),
        (["10", 20], TEXT, r"row 2: movieId is 20; expected text"),
        (["10", "\ud800"], TEXT, r"row 2: movieId '\\ud800' holds half of a surrogate pair"),
        (["10", "20", "10"], TEXT, r"row 3: movieId 10 occurs twice"),
    ],
)
def test_ids_of_a_frame_are_refused_with_row_value_and_the_frames_own_column(
    like: Callable[[pd.DataFrame, np.ndarray], object], ids: list[object], log: np.ndarray, message: str
) -> None:
    texts = ["a"] * len(ids)
    frame = pd.DataFrame({"movieId": pd.Series(ids, dtype=None if hasattr(ids, "dtype") else object), "title": texts})
    name = "movies" if like is movies_like else "features"
    with pytest.raises(DataError, match=f"{name}: {message}"):
        like(frame, log)


@pytest.mark.parametrize(
    "ids", [np.array([10, 20], np.uint8), pd.array([10, 20], "Int64"), pd.Categorical([10, 20]), [10, np.int64(20)]]
)
def test_whole_ids_of_a_frame_may_be_of_any_type(ids: object) -> None:
    found = features_like(pd.DataFrame({ITEM: pd.Series(ids), "studio": ["A", "B"]}), WHOLE)
    assert found is not None
    assert found[ITEM].dtype == np.int64
    assert found[ITEM].tolist() == [10, 20]


HALF = "\ud800"
"""Half of a surrogate pair: JSON can hold it as an escape, UTF-8 cannot."""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({ITEM: HALF, "studio": "A"}, r":2: item_id '\\ud800' holds half of a surrogate pair; expected Unicode text"),
        ({ITEM: "b", "studio": HALF}, r":2: studio '\\ud800' holds half of a surrogate pair; expected Unicode text"),
        ({ITEM: "b", "studio": ["x", HALF]}, r":2: studio 'x\|\\ud800' holds half"),
    ],
)
def test_half_a_surrogate_pair_in_features_is_refused_with_its_line(
    row: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "features.json"
    path.write_text(as_json([{ITEM: "a", "studio": "\U0001f600"}, row]))
    with pytest.raises(DataError, match=r"features\.json" + message):
        read_features(path)


def test_half_a_surrogate_pair_in_a_list_of_csv_or_a_columns_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text('item_id,tags\na,x\nb,"[""\\ud800""]"\n')
    with pytest.raises(DataError, match=r"features\.csv:3: tags '\\ud800\|' holds half of a surrogate pair"):
        read_features(tmp_path / "features.csv")
    (tmp_path / "features.json").write_text(as_json([{ITEM: "a", HALF: "x"}]))
    with pytest.raises(DataError, match=r"features\.json: column '\\ud800' holds half of a surrogate pair"):
        read_features(tmp_path / "features.json")


def test_half_a_surrogate_pair_in_a_frame_is_refused_with_its_row() -> None:
    frame = pd.DataFrame({ITEM: WHOLE, "title": pd.Series(["a", HALF], dtype=object)})
    with pytest.raises(DataError, match=r"features: row 2: title '\\ud800' holds half of a surrogate pair"):
        features_like(frame, WHOLE)
    with pytest.raises(DataError, match=r"movies: row 2: title '\\ud800' holds half of a surrogate pair"):
        movies_like(frame, WHOLE)
    with pytest.raises(DataError, match=r"movies: row 1: genres 'A\|\\ud800' holds half of a surrogate pair"):
        movies_like(pd.DataFrame({ITEM: WHOLE, "genres": [["A", HALF], []]}), WHOLE)


def test_half_a_surrogate_pair_in_a_file_of_movies_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "movies.json"
    path.write_text(as_json([{ITEM: 10, "title": "\U0001f600"}, {ITEM: 20, "title": HALF}]))
    with pytest.raises(DataError, match=r"movies\.json:2: "):
        read_movies(path)
    (tmp_path / "movies.csv").write_text('item_id,title,genres\n10,a,War\n20,b,"[""\\ud800""]"\n')
    with pytest.raises(DataError, match=r"movies\.csv:3: genres '\\ud800' holds half of a surrogate pair"):
        read_movies(tmp_path / "movies.csv")
