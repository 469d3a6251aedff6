"""Watch list and genre preferences, with numbers that a reader checks by hand."""

import grpc
import pytest

from serve.client import RecommenderClient, UserEvent
from serve.model.catalog import Catalog, parse_catalog
from serve.model.events import KnownEvent
from serve.model.profile import GenrePreference, genre_preferences
from serve.model.recommender import Recommender

DAY = 86_400
DRAMA, DRAMA_AND_WAR, COMEDY, NO_GENRE = 1, 2, 3, 4


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return parse_catalog(
        "item_id,title,genres,popularity,recent_popularity,new\n"
        "a,A,Drama,1,1,0\n"
        "b,B,War|Drama,1,1,0\n"
        "c,C,Comedy,1,1,0\n"
        "d,D,,1,1,0\n"
    )


def test_preferences(catalog: Catalog) -> None:
    # 60, 30 and 0 days before the newest: weights 1/4, 1/2, 1 and 1.
    events = [
        KnownEvent(DRAMA_AND_WAR, 5.0, 0),
        KnownEvent(DRAMA, 2.0, 30 * DAY),
        KnownEvent(COMEDY, None, 60 * DAY),
        KnownEvent(NO_GENRE, 1.0, 60 * DAY),
    ]
    total = 1 / 4 + 1 / 2 + 1 + 1
    assert genre_preferences(events, catalog) == [
        GenrePreference("Comedy", 1 / 4, None, 1 / total),
        GenrePreference("Drama", 2 / 4, (5.0 + 2.0) / 2, (1 / 4 + 1 / 2) / total),
        GenrePreference("War", 1 / 4, 5.0, (1 / 4) / total),
    ]


def test_equal_shares_are_sorted_by_name(catalog: Catalog) -> None:
    preferences = genre_preferences([KnownEvent(DRAMA_AND_WAR, None, 0)], catalog)
    assert [preference.genre for preference in preferences] == ["Drama", "War"]


def test_no_events_no_preferences(catalog: Catalog) -> None:
    assert genre_preferences([], catalog) == []


def test_profile_of_a_stored_user(client: RecommenderClient, model: Recommender) -> None:
    first, second = model.catalog.item_ids[1:3]
    client.record_events(
        [
            UserEvent(event_id="1", user_id="u", item_id=second, rating=4.5, timestamp=30 * DAY),
            UserEvent(event_id="2", user_id="u", item_id=first, timestamp=1),
            UserEvent(event_id="3", user_id="u", item_id="no such film", rating=1.0, timestamp=60 * DAY),
        ]
    )

    profile = client.get_user_profile("u", 2)

    newest, older = profile.watch_list
    assert (newest.item_id, newest.title, list(newest.genres)) == ("no such film", "", [])
    assert (newest.rating, newest.timestamp) == (1.0, 60 * DAY)
    assert (older.item_id, older.title, tuple(older.genres)) == (
        second,
        model.catalog.titles[2],
        model.catalog.genres[2],
    )
    assert (older.rating, older.timestamp) == (4.5, 30 * DAY)
    assert profile.event_count == 3
    assert profile.model_version == model.info.model_version
    # The unknown item has no genres and does not count: the newest event is the one of 30 days.
    shares = {preference.genre: preference for preference in profile.genre_preferences}
    assert set(shares) == {*model.catalog.genres[1], *model.catalog.genres[2]}
    for genre in set(model.catalog.genres[2]) - set(model.catalog.genres[1]):
        assert shares[genre].share == pytest.approx(1 / 2)
        assert shares[genre].recency_weighted_share == pytest.approx(1 / (1 + 1 / 2))
        assert shares[genre].mean_rating == 4.5
    for genre in set(model.catalog.genres[1]) - set(model.catalog.genres[2]):
        assert shares[genre].recency_weighted_share == pytest.approx((1 / 2) / (1 + 1 / 2))
        assert not shares[genre].HasField("mean_rating")


def test_an_event_without_rating_is_listed_without(client: RecommenderClient) -> None:
    client.record_events([UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)])
    (watched,) = client.get_user_profile("u").watch_list
    assert not watched.HasField("rating")


def test_limit(client: RecommenderClient) -> None:
    events = [UserEvent(event_id=f"{at}", user_id="u", item_id="1007", timestamp=at) for at in range(1, 13)]
    client.record_events(events)
    assert [one.timestamp for one in client.get_user_profile("u", 0).watch_list] == list(range(12, 0, -1))
    assert [one.timestamp for one in client.get_user_profile("u", 1).watch_list] == [12]
    assert client.get_user_profile("u", 1).event_count == 12


def test_unknown_user(client: RecommenderClient) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        client.get_user_profile("nobody")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert failure.value.details() == "no event of the user 'nobody' is stored"


def test_recording_says_what_it_did(client: RecommenderClient) -> None:
    known = UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)
    unknown = UserEvent(event_id="2", user_id="u", item_id="no such film", timestamp=1)
    first = client.record_events([known, unknown, known])
    assert (first.recorded_count, first.duplicate_count, first.unknown_item_count) == (2, 1, 1)
    again = client.record_events([known, unknown])
    assert (again.recorded_count, again.duplicate_count, again.unknown_item_count) == (0, 2, 0)
    assert client.get_user_profile("u").event_count == 2
