"""Logs in the shapes that people have: read to the same events, or refused with what to do."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.reading.shapes import EVENTS, SHAPES, Shape, outcome, page

PAGE = Path(__file__).parents[3] / "docs" / "log_shapes.md"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_is_read_or_refused_with_what_to_do(shape: Shape, tmp_path: Path) -> None:
    said, frame = outcome(shape, tmp_path)
    if shape.refused:
        assert said.startswith("refused: ")
        assert shape.refused in said
        return
    assert frame is not None, said
    assert frame["user_id"].astype(str).tolist() == ["1", "1", "2"]
    assert [float(item) for item in frame["item_id"]] == [7, 12, 7]
    assert frame["timestamp"].tolist() == list(shape.times)
    expected = [event[2] for event in EVENTS] if shape.ratings else [np.nan] * 3
    if shape.read.missing_ratings:
        expected[1] = np.nan
    np.testing.assert_array_equal(frame["rating"].to_numpy(), np.array(expected, np.float32))


def test_the_page_of_shapes_is_that_of_their_outcomes(tmp_path: Path) -> None:
    assert PAGE.read_text("utf-8") == page(tmp_path), (
        "docs/log_shapes.md: write it anew: python -m tests.data.reading.shapes"
    )
