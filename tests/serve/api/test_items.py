"""UpsertItems, DeleteItems, GetItem and ListItems: what is stored, where it comes from, and pages."""

import time

import grpc
import pytest

from serve.api import rules
from serve.client import Item, RecommenderClient
from serve.model.recommender import Recommender
from serve.pb.recommender_pb2 import CatalogItem

LONGEST = "\U00010348" * 512  # four bytes of UTF-8 each


def all_items(client: RecommenderClient, page_size: int, *, stored_only: bool = False) -> list[CatalogItem]:
    found, token = [], None
    while token != "":
        page = client.list_items(page_size, token or "", stored_only)
        assert len(page.items) <= page_size
        found += page.items
        token = page.next_page_token
    return found


def test_an_item_comes_back_as_it_was_stored(client: RecommenderClient, model: Recommender) -> None:
    known, now = model.catalog.item_ids[1], int(time.time())
    item = Item(
        item_id=known,
        title="Ü",
        tags=["b", "a", "b"],
        available_from=0,
        available_until=now + 1_000,
        metadata={"poster": "p.png", "year": "1995"},
    )
    stored = client.upsert_items([item, Item(item_id="new", hidden=True)])
    assert (stored.created_count, stored.replaced_count) == (2, 0)
    answer = client.get_item(known)
    expected = Item()
    expected.CopyFrom(item)
    expected.tags[:] = ["a", "b"]
    assert answer.item == CatalogItem(item=expected, stored=True, known=True, available=True)
    assert answer.model_version == model.info.model_version
    assert client.get_item("new").item == CatalogItem(item=Item(item_id="new", hidden=True), stored=True)
    # As a whole.
    replaced = client.upsert_items([Item(item_id=known, available_until=now - 1_000)])
    assert (replaced.created_count, replaced.replaced_count) == (0, 1)
    found = client.get_item(known).item
    assert found == CatalogItem(item=Item(item_id=known, available_until=now - 1_000), stored=True, known=True)
    assert client.upsert_items([]).created_count == 0


def test_what_is_deleted_is_as_the_model_directory_says(client: RecommenderClient, model: Recommender) -> None:
    known = model.catalog.item_ids[1]
    own = CatalogItem(
        item=Item(item_id=known, title=model.own_catalog.titles[1], tags=model.own_catalog.genres[1]),
        known=True,
        available=True,
    )
    assert client.get_item(known).item == own
    client.upsert_items([Item(item_id=known, hidden=True), Item(item_id="new")])
    assert client.delete_items([known, "new", "never stored", known]).deleted_count == 2
    assert client.delete_items([known]).deleted_count == 0
    assert client.get_item(known).item == own
    with pytest.raises(grpc.RpcError) as failure:
        client.get_item("new")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    version = model.info.model_version
    assert failure.value.details() == f"the item 'new' is not stored, and the model {version} does not know it"


@pytest.mark.parametrize("page_size", [1, 7, 62, 1000])
def test_pages_have_the_items_of_the_store_and_of_the_model_in_order(
    client: RecommenderClient, model: Recommender, page_size: int
) -> None:
    known = model.catalog.item_ids[5]
    assert known == "1035"
    stored = ["0", "1035", "2", "ä", LONGEST]
    client.upsert_items([Item(item_id=item_id, title="stored") for item_id in stored])
    found = all_items(client, page_size)
    assert [one.item.item_id for one in found] == sorted({*stored, *model.catalog.item_ids[1:]})
    assert {one.item.item_id for one in found if one.stored} == set(stored)
    assert {one.item.item_id for one in found if one.known} == set(model.catalog.item_ids[1:])
    assert all((one.item.title == "stored") == one.stored for one in found)
    alone = all_items(client, page_size, stored_only=True)
    assert [one.item.item_id for one in alone] == stored
    assert alone[1] == CatalogItem(item=Item(item_id="1035", title="stored"), stored=True, known=True, available=True)


def test_a_page_goes_on_where_the_one_before_ended_whatever_changed(client: RecommenderClient) -> None:
    client.upsert_items([Item(item_id=item_id) for item_id in "acegi"])
    page = client.list_items(2, stored_only=True)
    assert [one.item.item_id for one in page.items] == ["a", "c"]
    client.delete_items(["c", "e"])
    client.upsert_items([Item(item_id="b"), Item(item_id="d")])
    page = client.list_items(2, page.next_page_token, stored_only=True)
    assert [one.item.item_id for one in page.items] == ["d", "g"]


def test_a_page_of_long_items_is_shorter(client: RecommenderClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """All come in the end, and an item that is too long for a page by itself too."""
    monkeypatch.setattr("serve.api.pages.MAX_PAGE_BYTES", 200)
    client.upsert_items([Item(item_id=f"{at}", title="x" * (150 if at else 900)) for at in range(3)])
    sizes, token = [], None
    while token != "":
        page = client.list_items(1000, token or "", True)
        sizes.append([one.item.item_id for one in page.items])
        token = page.next_page_token
    assert sizes == [["0"], ["1"], ["2"]]


def test_limits_are_valid_and_told(client: RecommenderClient) -> None:
    limits = client.get_model_info().limits
    assert (limits.max_upserted_items, limits.max_title_length, limits.max_item_tags) == (1_000, 1_000, 100)
    assert (limits.max_tag_length, limits.max_metadata_bytes, limits.max_item_bytes) == (100, 2_048, 4_096)
    largest = [
        Item(item_id=LONGEST, title="\u20ac" * 600, metadata={"k": "v" * 100}),
        Item(item_id="title", title="x" * 1_000, metadata={"k" * 48: "v" * 2_000}),
        Item(item_id="tags", tags=[f"{at:038}" for at in range(98)] + ["a" * 100]),
        Item(item_id="count", tags=[f"{at:03}" for at in range(100)]),
        Item(item_id="times", available_from=253_402_300_798, available_until=253_402_300_799),
    ]
    longest = Item(item_id="longest", title="x" * 1_000, metadata={"k" * 48: "v" * 2_000})
    longest.tags.extend([f"{at:098}" for at in range(10)])
    longest.tags.append("x" * (4_096 - longest.ByteSize() - 2))
    assert longest.ByteSize() == 4_096
    client.upsert_items([*largest, longest, *(Item(item_id=f"{at}") for at in range(994))])
    for item in [*largest, longest]:
        assert client.get_item(item.item_id).item.item == item
    longest.title = "x" * 999 + "ü"
    with pytest.raises(grpc.RpcError) as failure:
        client.upsert_items([largest[0], longest])
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details() == "items[1]: expected an item of at most 4096 bytes, came 4097"
    everything = [*(item.item_id for item in [*largest, longest]), *(f"{at}" for at in range(994))]
    assert client.delete_items(everything).deleted_count == 1_000


def test_the_largest_page_and_the_largest_items_are_within_what_clients_take() -> None:
    """An item in an answer has a score, a propensity and two lengths beside its fields."""
    assert 1_000 * (rules.MAX_ITEM_BYTES + 24) < rules.MAX_ANSWER_BYTES
    assert rules.MAX_LISTED_TAGS * (4 * rules.MAX_TAG_LENGTH + 3) < rules.MAX_ANSWER_BYTES
