"""Items of a store over a model's catalogue: titles, tags, metadata, and what is withheld when."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.model import live_catalog
from serve.model.catalog import Catalog, parse_catalog
from serve.model.filters import ItemFilter
from serve.model.item_rows import ItemRows
from serve.model.live_catalog import Item, LiveCatalog, Overlay

CATALOG = parse_catalog(
    "item_id,title,genres,popularity,recent_popularity,new\n"
    "a,A,Comedy|Drama,3,3,0\nb,B,Drama,2,2,0\nc,C,,1,1,0\nd,D,Comedy,0,0,1\n"
)
ROWS = ItemRows(np.array([[1, 10], [2, 20], [0, 5]], np.float32), {"Comedy": 0, "Drama": 1}, (), ())
LATEST = 253_402_300_799


def overlaid(*items: Item) -> LiveCatalog:
    overlay = Overlay(LiveCatalog.of(CATALOG), ROWS)
    overlay.apply((item.item_id, item) for item in items)
    return overlay.live()


def withheld(live: LiveCatalog, time: int) -> set[str]:
    found = live.withheld(time)
    if found is None:
        return set()
    assert found.mask[0]
    assert found.items == tuple(np.flatnonzero(found.mask[1:5]) + 1)
    assert found.total == len(found.items)
    return {live.catalog.item_ids[item] for item in np.flatnonzero(found.mask) if item}


def allowed(live: LiveCatalog, asked: ItemFilter) -> set[str]:
    blocked = live.filters.blocked(asked)
    assert blocked is not None
    return {live.catalog.item_ids[item] for item in np.flatnonzero(~blocked)}


def test_the_items_of_a_store_replace_titles_and_tags_and_bring_metadata() -> None:
    live = overlaid(Item("b", "New B", ("Comedy", "Jazz"), metadata={"year": "1995"}), Item("d"))
    assert live.catalog.titles == ("", "A", "New B", "C", "")
    assert live.catalog.genres == ((), ("Comedy", "Drama"), ("Comedy", "Jazz"), (), ())
    assert live.metadata == {2: {"year": "1995"}}
    assert live.catalog.item_ids == CATALOG.item_ids
    assert live.catalog.index is CATALOG.index
    assert sorted(live.filters.of_tag) == ["Comedy", "Drama", "Jazz"]
    assert allowed(live, ItemFilter(any_tags=("Comedy",))) == {"a", "b"}
    assert allowed(live, ItemFilter(all_tags=("Comedy", "Jazz"))) == {"b"}
    assert allowed(live, ItemFilter(none_tags=("Drama",))) == {"b", "c", "d"}
    assert live.withheld(0) is None


def test_a_tag_that_no_item_has_any_more_is_one_that_no_item_has() -> None:
    """A request may have been checked against the catalogue of before."""
    live = overlaid(Item("a"), Item("b"))
    assert "Drama" not in live.filters.of_tag
    assert allowed(live, ItemFilter(any_tags=("Drama",))) == set()
    assert allowed(live, ItemFilter(all_tags=("Drama",))) == set()
    assert allowed(live, ItemFilter(none_tags=("Drama",))) == {"a", "b", "c", "d"}


def test_an_item_is_available_from_its_first_second_until_before_its_last() -> None:
    live = overlaid(
        Item("a", available_from=100, available_until=200),
        Item("b", available_from=200),
        Item("c", available_until=100),
        Item("d", hidden=True, available_from=0),
    )
    expected = {
        0: {"a", "b", "d"},
        99: {"a", "b", "d"},
        100: {"b", "c", "d"},
        199: {"b", "c", "d"},
        200: {"a", "c", "d"},
    }
    for time, items in {**expected, LATEST: {"a", "c", "d"}}.items():
        assert withheld(live, time) == items
    assert Item("d", hidden=True).is_available(5) is False


def test_the_mask_of_a_stretch_of_time_is_made_once() -> None:
    live = overlaid(Item("a", available_from=100), Item("b", available_until=200))
    assert live.withheld(100) is live.withheld(150)
    assert withheld(live, 99) == {"a"}
    assert withheld(live, 150) == set()


def test_the_mask_of_now_stays_whatever_times_requests_name() -> None:
    live = overlaid(*(Item(item_id, hidden=True, available_from=at) for at, item_id in enumerate("abcd", start=1)))
    now = live.withheld()
    for time in range(live_catalog.KEPT + 1):
        live.withheld(time)
    assert live.withheld() is now
    assert now is not None
    assert now.total == 4


def test_items_that_the_model_does_not_know_come_after_its_own() -> None:
    live = overlaid(Item("x", "X", ("Comedy", "Jazz"), metadata={"k": "v"}), Item("a", "A"), Item("y", "", ("Drama",)))
    assert live.catalog.item_ids == ("", "a", "b", "c", "d", "x", "y")
    assert live.catalog.titles[5:] == ("X", "")
    assert [live.catalog.index[one] for one in ("d", "x", "y")] == [4, 5, 6]
    assert live.catalog.new.tolist() == [False] * 4 + [True] * 3
    assert live.catalog.by_popularity.tolist() == [1, 2, 3, 4, 5, 6]
    assert (live.catalog.popularity[5:].tolist(), live.metadata) == ([0, 0], {5: {"k": "v"}})
    assert allowed(live, ItemFilter(any_tags=("Comedy",))) == {"x", "d"}
    assert live.added is not None
    # What each tag adds, and every item has: [0, 5] + [1, 10], and [0, 5] + [2, 20].
    assert (live.added.first, live.added.vectors.tolist(), live.added.bias.tolist()) == (5, [[1], [2]], [15, 25])
    assert live.added_ids == ("x", "y")
    index = live.catalog.index
    assert dict(index) == {item_id: at for at, item_id in enumerate(live.catalog.item_ids) if at}
    assert (len(index), "x" in index, "w" in index, index.get("w"), index.get("w", 0)) == (6, True, False, None, 0)
    with pytest.raises(KeyError):
        index["w"]


def test_a_deleted_item_leaves_no_trace_and_changes_no_catalogue_of_before() -> None:
    overlay = Overlay(LiveCatalog.of(CATALOG), ROWS)
    overlay.apply(
        [("x", Item("x", "X", ("Comedy",))), ("y", Item("y", hidden=True)), ("z", Item("z", "Z", ("Drama",)))]
    )
    before = overlay.live()
    assert overlay.apply([("x", None)])
    after = overlay.live()
    assert sorted(after.added_ids) == ["y", "z"]
    assert withheld(after, 0) == {"y"}
    assert "x" not in after.catalog.index
    assert after.catalog.titles[after.catalog.index["z"]] == "Z"
    assert allowed(after, ItemFilter(any_tags=("Comedy",))) == {"a", "d"}
    assert allowed(after, ItemFilter(any_tags=("Drama",))) == {"a", "b", "z"}
    assert (before.added_ids, before.catalog.titles[5:]) == (("x", "y", "z"), ("X", "", "Z"))
    assert before.added is not None
    assert before.added.bias.tolist() == [15, 5, 25]
    overlay.apply([("z", None), ("y", None)])
    empty = overlay.live()
    assert (empty.added, empty.catalog.item_ids, empty.withheld(0)) == (None, CATALOG.item_ids, None)


def test_more_than_so_many_items_wait_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live_catalog, "MOST_ADDED", 2)
    overlay = Overlay(LiveCatalog.of(CATALOG), ROWS)
    overlay.apply((one, Item(one)) for one in "xyz")
    assert not overlay.apply([("w", Item("w")), ("z", Item("z", "Z"))])
    assert overlay.live().added_ids == ("x", "y")
    assert caplog.text.count("more than 2 items") == 1
    overlay.apply([("x", None)])
    live = overlay.live()
    assert set(live.added_ids) == {"y", "z"}
    assert live.catalog.titles[live.catalog.index["z"]] == "Z"
    assert not overlay.apply([("w", None)])
    overlay.apply([("y", None)])
    assert overlay.live().added_ids == ("z",)


def test_what_nobody_knows_changes_nothing() -> None:
    overlay = Overlay(LiveCatalog.of(CATALOG), ROWS)
    assert overlay.apply([("gone", None)]) is False
    assert overlay.apply([("unknown", None), ("a", Item("a"))]) is True


def test_many_withheld_items_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_catalog, "MOST_NOTED", 2)
    found = overlaid(*(Item(item_id, hidden=True) for item_id in "abc")).withheld(0)
    assert found is not None
    assert (found.items, found.total) == (None, 3)


TAGS = st.lists(st.sampled_from(["Comedy", "Drama", "Jazz", "x"]), unique=True).map(lambda tags: tuple(sorted(tags)))
TIMES = st.none() | st.integers(0, 4)
CHANGES = st.tuples(
    st.sampled_from("abcduvwx"),
    st.none()
    | st.tuples(st.sampled_from(["", "T"]), TAGS, TIMES, TIMES, st.booleans(), st.just({"k": "v"}) | st.just({})),
)


@settings(deadline=None)
@given(st.lists(st.lists(CHANGES, unique_by=lambda change: change[0], max_size=4), max_size=6))
def test_changes_in_parts_come_to_the_same_as_a_plain_model(parts: list[list[tuple[str, tuple | None]]]) -> None:  # type: ignore[type-arg]
    overlay, stored = Overlay(LiveCatalog.of(CATALOG), ROWS), dict[str, Item]()
    for part in parts:
        changes = [(item_id, None if fields is None else Item(item_id, *fields)) for item_id, fields in part]
        overlay.apply(changes)
        for item_id, item in changes:
            if item is None:
                stored.pop(item_id, None)
            else:
                stored[item_id] = item
        assert_equals(overlay.live(), CATALOG, stored)


def assert_equals(live: LiveCatalog, base: Catalog, stored: Mapping[str, Item]) -> None:
    """Item by item."""
    tags: dict[str, set[int]] = {}
    assert set(live.catalog.index) == {*base.index, *stored}
    for at, item_id in enumerate(live.catalog.item_ids[1:], start=1):
        if item_id in base.index:
            item = stored.get(item_id, Item(item_id, base.titles[at], base.genres[at]))
        else:
            item = stored[item_id]
            assert live.added is not None
            row = ROWS.row(item.title, item.tags, item.metadata).tolist()
            place = at - live.added.first
            assert [*live.added.vectors[place].tolist(), live.added.bias[place]] == row
        assert live.catalog.index[item_id] == at
        assert (live.catalog.titles[at], live.catalog.genres[at]) == (item.title, item.tags)
        assert live.metadata.get(at, {}) == item.metadata
        for time in range(6):
            assert (item_id in withheld(live, time)) == (not item.is_available(time))
        for tag in item.tags:
            tags.setdefault(tag, set()).add(at)
    assert {tag: set(items.tolist()) for tag, items in live.filters.of_tag.items()} == tags
