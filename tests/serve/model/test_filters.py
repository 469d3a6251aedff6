"""Masks of a small catalogue, and the places of new items, by hand."""

import gc
import weakref

import numpy as np
import pytest

from serve.model.catalog import Catalog, parse_catalog
from serve.model.filters import Filters, ItemFilter
from serve.model.ranking.engine import Ranking
from serve.model.recommender import with_new_items


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return parse_catalog(
        "item_id,title,genres,popularity,recent_popularity,new\n"
        "a,A,Drama,1,1,0\n"
        "b,B,War|Drama,1,1,0\n"
        "c,C,Comedy,1,1,0\n"
        "d,D,,1,1,1\n"
        "e,E,Comedy|Drama|War,1,1,1\n"
    )


def indices(*items: int) -> np.ndarray:
    return np.array(items, np.int32)


@pytest.mark.parametrize(
    ("item_filter", "allowed"),
    [
        (ItemFilter(any_tags=("War", "Comedy")), "bce"),
        (ItemFilter(all_tags=("War", "Drama")), "be"),
        (ItemFilter(none_tags=("War", "Comedy")), "ad"),
        (ItemFilter(any_tags=("Drama",), none_tags=("Comedy",)), "ab"),
        (ItemFilter(any_tags=("Comedy",), all_tags=("War",), none_tags=()), "e"),
        (ItemFilter(all_tags=("Drama",), none_tags=("Drama",)), ""),
        (ItemFilter(items=indices(4, 1, 1)), "ad"),
        (ItemFilter(items=indices(4, 1, 2), all_tags=("Drama",)), "ab"),
        (ItemFilter(items=indices()), ""),
    ],
)
def test_masks(catalog: Catalog, item_filter: ItemFilter, allowed: str) -> None:
    blocked = Filters(catalog).blocked(item_filter)
    assert blocked is not None
    assert "".join(catalog.item_ids[item] for item in np.flatnonzero(~blocked)) == allowed
    assert blocked.dtype == np.bool_
    assert blocked[0]


def test_a_filter_without_ids_and_tags_makes_no_mask(catalog: Catalog) -> None:
    filters = Filters(catalog)
    assert filters.blocked(None) is None
    assert filters.blocked(ItemFilter(minimum_score=1.0)) is None


def test_a_mask_of_tags_is_made_once_and_cannot_be_changed(catalog: Catalog) -> None:
    filters = Filters(catalog)
    blocked = filters.blocked(ItemFilter(any_tags=("War",)))
    assert filters.blocked(ItemFilter(any_tags=("War",))) is blocked
    with pytest.raises(ValueError, match="read-only"):
        blocked[1] = False


def test_the_tags_are_those_of_the_items(catalog: Catalog) -> None:
    filters = Filters(catalog)
    assert [tag for tag in ("War", "Western", "war", "", "War|Drama", "Comedy") if tag in filters.of_tag] == [
        "War",
        "Comedy",
    ]
    assert filters.tags == sorted(filters.of_tag)
    assert filters.tags is filters.tags


def test_kept_masks_do_not_keep_their_owner(catalog: Catalog) -> None:
    filters = Filters(catalog)
    filters.blocked(ItemFilter(any_tags=("War",)))
    gc.disable()
    try:
        kept = weakref.ref(filters)
        del filters
        assert kept() is None
    finally:
        gc.enable()


def ranking(*items: tuple[int, float]) -> Ranking:
    return Ranking(np.array([item for item, _ in items], np.int32), np.array([x for _, x in items], np.float32))


@pytest.mark.parametrize(
    ("k", "slots", "places"),
    [
        (4, 1, [1, 8, 2, 3]),  # 8 by its score, above 2
        (4, 2, [1, 8, 2, 9]),  # 9 at the end, where by its score it would not be
        (3, 3, [8, 9, 7]),
        (5, 3, [1, 8, 2, 9, 7]),
        (6, 4, [1, 8, 2, 3, 9, 7]),  # there are three new items
        (7, 1, [1, 8, 2, 3, 9, 7]),  # and three that are known
        (1, 1, [8]),
    ],
)
def test_new_items_have_their_places_and_the_order_is_that_of_the_scores(k: int, slots: int, places: list[int]) -> None:
    known, new = ranking((1, 5.0), (2, 3.0), (3, 2.0)), ranking((8, 4.0), (9, 1.0), (7, 0.5))
    found = with_new_items(known, new, k, slots)
    assert found.items.tolist() == places
    assert (np.diff(found.scores) < 0).all()
