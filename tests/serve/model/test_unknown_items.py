"""Items of a history that the model does not know: which are kept, and that dislikes are kept before all others."""

import numpy as np
import pytest

from serve.model import events
from serve.model.catalog import parse_catalog
from serve.model.events import NO_UNKNOWN, Event, unknown_items

CATALOG = parse_catalog("item_id,title,genres,popularity,recent_popularity,new\na,A,,3,3,0\n")


def event(item_id: str, weight: float = 1.0) -> Event:
    return Event(item_id, None, 5, weight)


def test_the_last_event_that_is_not_neutral_counts() -> None:
    assert unknown_items([event("a"), event("x", 0.0)], CATALOG) is NO_UNKNOWN
    before = unknown_items([event("x"), event("y", -1.0), event("z", -1.0), event("x", 0.0)], CATALOG)
    assert before == {"x": False, "y": True, "z": True}
    assert unknown_items([event("y"), event("x", -2.0)], CATALOG, before) == {"z": True, "y": False, "x": True}
    assert before == {"x": False, "y": True, "z": True}


@pytest.mark.parametrize("seed", range(5))
def test_of_too_many_the_dislikes_are_kept_first_and_then_the_last(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_UNKNOWN", 4)
    order = np.random.default_rng(seed).permutation(8)
    found = unknown_items([event(f"i{at}", -1.0 if at < 2 else 1.0) for at in order], CATALOG)
    liked = [f"i{at}" for at in order if at >= 2][-2:]
    assert found == {f"i{at}": at < 2 for at in order if at < 2 or f"i{at}" in liked}
    assert list(found) == [f"i{at}" for at in order if f"i{at}" in found]
