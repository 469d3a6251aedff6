"""Rows of items that a model was not exported with: equal to what the content heads give, and bad files are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrec.config import PrepareConfig
from jaxrec.data.content import YEAR as TRAINING_YEAR
from jaxrec.data.encoding import fit_column
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.added_items import added_items
from jaxrec.onnx.model_directory import export_model
from serve.model.directory import read_artifact
from serve.model.item_rows import NUMERIC, YEAR, Column, ItemRows
from serve.model.manifest import ArtifactError
from tests.conftest import heads
from tests.serve.model.test_directory import edit_manifest


@pytest.fixture
def copy(model_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "model"))


@pytest.fixture(scope="module")
def described() -> PreparedData:
    """40 items with genres, years in titles, a number, a category and several tags; some lack one of them."""
    ids = [f"i{at}" for at in range(40)]
    titles = [f"T{at} ({1950 + at})" if at % 5 else f"T{at}" for at in range(40)]
    movies = pd.DataFrame({ITEM: ids, TITLE: titles, GENRES: ["A|B", "B", "", "C"] * 10})
    features = pd.DataFrame(
        {
            ITEM: ids,
            "minutes": [str(60 + 7 * at) if at % 3 else "" for at in range(40)],
            "studio": ["S1", "S2", " S3", "S2|"] * 10,
            "cast": ["x|y", "y| z", "w", ""] * 10,
        }
    )
    rows = [(user, ids[(3 * user + 7 * at) % 40], 100 * at + user) for user in range(30) for at in range(8)]
    return prepare(pd.DataFrame(rows, columns=[USER, ITEM, TIME]), movies, PrepareConfig(0, 0), features=features)


def test_a_row_is_what_the_content_heads_give(
    described: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid], tmp_path: Path
) -> None:
    hybrid = random_hybrid(described, 3, False)
    given = heads(hybrid, described)
    export_model(hybrid, described, tmp_path / "m", training={}, metrics={}, licence="None.", heads=given)
    rows = read_artifact(tmp_path / "m").item_rows
    assert described.features is not None
    metadata = described.features.set_index(ITEM).to_dict("index")
    catalog, weights = described.catalog, hybrid.mix_weights()
    of_lstm, of_content = (np.asarray(head.rows(given.features.matrix)) for head in (given.lstm, given.content))
    for at, item_id in enumerate(catalog.ids.raw_ids, start=1):
        found = rows.row(catalog.titles[at - 1], catalog.item_genres[at - 1], metadata[item_id])
        bias = weights.lstm * of_lstm[at, -1] + weights.content * of_content[at, -1] + given.shift
        np.testing.assert_allclose(found, [*of_lstm[at, :-1], *of_content[at, :-1], bias], rtol=0, atol=2e-5)
    # What no feature stands for counts as missing, as a year that no title has does not: it is in the nearest bin.
    offset = rows.rows[-1]
    np.testing.assert_array_equal(rows.row("", ("Z",), {"studio": "S9", "minutes": "1_0", "other": "x"}), offset)
    first, last = (rows.row(f"T ({year})", (), {}) for year in (1851, 1951))
    np.testing.assert_array_equal(first, last)
    assert not np.array_equal(first, offset)


def test_without_heads_an_added_item_has_no_vector_and_the_least_bias(
    described: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]
) -> None:
    hybrid = random_hybrid(described, 3, False)
    rows = added_items(hybrid, described, None).rows
    assert rows.shape == (1, hybrid.item_vectors().shape[1] + 1)
    assert not rows[:, :-1].any()
    known = described.train_popularity() > 0
    assert rows[0, -1] == np.asarray(hybrid.supervised_bias())[known].min()


def test_bins_and_categories_by_hand() -> None:
    rows = ItemRows(
        np.arange(1, 7, dtype=np.float32)[:, None] ** 2,
        {"A": 0},
        [Column("n", NUMERIC, {}, (10.0, 20.0)), Column("c", "categorical", {"x": 0}, ())],
        (1990,),
    )
    # 1 is of A, 4 and 9 of the bins, 16 of x, 25 of years, 36 of every item.
    assert rows.row("", (), {}).tolist() == [36]
    assert rows.row("T (1980) ", ("A", "other"), {"n": "19.9|", "c": "x|"}).tolist() == [36 + 1 + 4 + 16 + 25]
    assert rows.row("(1980) T", (), {"n": "20", "c": " x"}).tolist() == [36 + 9 + 16]
    assert rows.row("", (), {"n": "nan", "c": "x|x"}).tolist() == [36]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("file", "other.npy", 'added_items.file is "other.npy", expected added_items.npy'),
        ("genres", "yes", 'added_items.genres is "yes", expected true or false'),
        ("genres", False, r"added_items.npy: is float32 \(.*\), expected finite float32 \("),
        ("columns", {}, r"added_items.columns is \{\}, expected a list"),
        ("columns", [3], r"added_items.columns\[0\]. is 3, expected an object"),
        ("columns", [{"kind": "colour"}], r'columns\[0\].kind is "colour", expected numeric or'),
        (
            "columns",
            [{"name": "n", "kind": "numeric", "categories": [], "starts": [2, 2]}],
            r"columns\[0\].starts is \[2, 2\], expected finite numbers that increase",
        ),
        (
            "columns",
            [{"name": "n", "kind": "categorical", "categories": ["a", "a"], "starts": []}],
            r"columns\[0\].categories is .*, expected a list of different texts",
        ),
        ("title_years", [1990, 1980], r"title_years is \[1990, 1980\], expected finite numbers that increase"),
    ],
)
def test_a_wrong_section_of_the_manifest(copy: Path, field: str, value: Any, expected: str) -> None:
    edit_manifest(copy, lambda manifest: manifest["added_items"].update({field: value}))
    with pytest.raises(ArtifactError, match=expected):
        read_artifact(copy)


def test_a_model_without_the_file_is_refused(copy: Path) -> None:
    (copy / "added_items.npy").unlink()
    with pytest.raises(ArtifactError, match=r"added_items\.npy: cannot be read"):
        read_artifact(copy)
    assert json.loads((copy / "manifest.json").read_text())["added_items"]["file"] == "added_items.npy"


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["90", "-1.5e3", " 7 ", "1_0", "inf", "nan", "7|", "|", "x|x", "x| y", "x|y|", "٣", "1e400", "60"]),
    st.floats(allow_nan=True).map(str),
)


@given(st.lists(TEXTS, max_size=6), TEXTS)
def test_a_text_has_the_features_that_the_training_gave_it(seen: list[str], text: str) -> None:
    """Whatever the column was fitted to."""
    fitted = fit_column("c", [*seen, *seen], np.ones(2 * len(seen), bool))
    if fitted is None:
        return
    places = {category: at for at, category in enumerate(fitted.categories)}
    column = Column("c", fitted.kind.value, places, fitted.starts)
    assert column.feature_count == len(fitted.features)
    _, features = fitted.cells([text])
    assert sorted(column.features(text)) == sorted(features.tolist())


@given(st.one_of(st.text(max_size=12), st.integers(1700, 2200).map(lambda year: f"T ({year}) "), st.just("T (1999)\n")))
def test_a_title_has_the_year_that_the_training_found(title: str) -> None:
    theirs, ours = TRAINING_YEAR.search(title), YEAR.search(title)
    assert (theirs and theirs[1]) == (ours and ours[1])
