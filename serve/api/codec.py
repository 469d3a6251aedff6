"""Between messages and the recommender's types. Decoding checks every field and raises InvalidRequest."""

import math
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from serve.api.answer_rules import APPLIED, Answerable, decode_rules, row_count
from serve.api.errors import InvalidRequest, Violations
from serve.api.event_types import EventTypes
from serve.api.filters import decode_filter, decode_seen, own_seen
from serve.api.pages import fitting_count, page_token
from serve.api.rules import (
    DEFAULT_K,
    LIMITS,
    MAX_ANSWER_BYTES,
    MAX_BATCH,
    MAX_BATCH_EVENTS,
    MAX_BATCH_ITEMS,
    MAX_BATCH_METADATA,
    MAX_BATCH_RULED,
    MAX_GENRE_PREFERENCES,
    MAX_HISTORY_EVENTS,
    MAX_IMPRESSIONS,
    MAX_K,
    MAX_LISTED_TAGS,
    MAX_NOT_SHOWN_S,
    MAX_POSITION,
    MAX_RECOMMENDATION_ID_LENGTH,
    MAX_RECORDED_EVENTS,
    check_event_time,
    check_id,
    check_ids,
    check_length,
    check_rating,
    check_time,
    checked_count,
    checked_weight,
    latest_time,
)
from serve.api.service import EventPage, Profile, Recommendation, WatchPage, repeatable_id
from serve.model.catalog import Catalog
from serve.model.events import INTERACTION, Event, RatingScale
from serve.model.explain import Explanation
from serve.model.live_catalog import LiveCatalog
from serve.model.parts import Part
from serve.model.ranking.engine import Ranking
from serve.model.recommender import Query, Recommender
from serve.pb import recommender_pb2 as pb
from serve.stores.base import ShownItem, UserEvent

_ID_TAG = pb.RecommendResponse(recommendation_id="x").SerializeToString()[:-2]  # less the length and the x
PARTS: Mapping[Part, "pb.Part.ValueType"] = {part: pb.Part.Value(f"PART_{part.name}") for part in Part}
VIEWS = frozenset(pb.View.values())


def decode_query(request: pb.RecommendRequest, model: Recommender, event_types: EventTypes) -> Query:
    """The question that a request asks the model that answers it, from now on."""
    # Most requests have few fields. What is absent is not checked, since a check costs more than a look.
    started, found, live = time.monotonic(), Violations(), model.live
    k = found.check(checked_count, "k", request.k)
    item_filter, is_known, exclude = None, True, tuple[str, ...]()
    if request.exclude_item_ids or request.HasField("filter"):
        before = len(found)
        item_filter = found.check(decode_filter, request, model, live)
        is_known, exclude = len(found) == before, tuple(request.exclude_item_ids)
    allow_seen = found.check(decode_seen, request.seen, model) if request.seen else None
    slots = request.new_item_slots
    if slots and not 0 <= slots <= (MAX_K if k is None else k):
        found.add("new_item_slots", "0 to k" if k is None else f"0 to k, which is {k}", slots)
    request_time = request.request_time if request.HasField("request_time") else None
    if request_time is not None and not found.passes(check_time, "request_time", request_time, latest_time()):
        request_time, is_known = None, False
    user_id, events, event_ids = request.user_id or None, list[Event](), list[str]()
    has_history = request.HasField("history")
    if user_id is not None:
        found.check(check_id, "user_id", user_id)
    elif not has_history:
        found.add("user_id", "a user, or a history", "neither")
    if has_history:
        history = found.check(_decode_history, request.history, request_time, model.info.rating_scale, event_types)
        events, event_ids = history or (events, event_ids)
    if request.bucket_key:
        found.check(check_version, request, user_id)
    if request.view:
        found.check(check_view, request.view)
    request_id = request.request_id
    if request_id:
        found.check(check_id, "request_id", request_id)
    not_shown_within = request.not_shown_within
    if not 0 <= not_shown_within <= MAX_NOT_SHOWN_S:
        found.add("not_shown_within", f"0 to {MAX_NOT_SHOWN_S} seconds", not_shown_within)
    elif not_shown_within and user_id is None and has_history:
        found.add("not_shown_within", "user_id with it", "a history")
    withheld, rules = live.withheld(request_time), None
    if request.HasField("rules"):
        answerable = Answerable(request, live, item_filter, withheld) if is_known else None
        rules = found.check(decode_rules, request, k, model, live, answerable)
    found.raise_any()
    slots = model.new_item_slots(slots, live)
    recommendation_id = repeatable_id(user_id, request_id) if request_id else ""
    options = (item_filter, allow_seen, slots, not_shown_within, withheld, live, event_ids, recommendation_id, rules)
    return Query(
        events,
        k or DEFAULT_K,
        exclude,
        request_time,
        request.explain,
        user_id,
        started,
        *options,
        model_version=request.model_version,
    )


def check_version(request: pb.RecommendRequest | pb.SimilarItemsRequest, user_id: str | None = None) -> None:
    """Raises InvalidRequest unless at most one thing says which model version answers."""
    if not request.bucket_key:
        return
    found = Violations()
    found.check(check_id, "bucket_key", request.bucket_key)
    if user_id is not None:
        found.add("bucket_key", "none with user_id, which divides users already", "both")
    if request.model_version:
        found.add("bucket_key", "none with model_version", "both")
    found.raise_any()


def check_view(view: int) -> None:
    """Raises InvalidRequest for a number that no view has."""
    if view not in VIEWS:
        raise InvalidRequest("view", f"one of {', '.join(pb.View.keys())}", view)


def check_batch(request: pb.BatchRecommendRequest, *, is_reranked: bool = False) -> None:
    """Raises InvalidRequest for a batch that is too large as a whole. What breaks a rule by itself fails alone, and is
    not counted.

    Args:
        request: The batch.
        is_reranked: Whether the server's own re-ranker orders the answers.
    """
    check_length("requests", request.requests, MAX_BATCH)
    found = Violations()
    valid = [(single.k or DEFAULT_K, single) for single in request.requests if 0 <= single.k <= MAX_K]
    items = sum(k for k, _ in valid)
    if items > MAX_BATCH_ITEMS:
        found.add("requests", f"at most {MAX_BATCH_ITEMS} items (k) in all", items)
    detailed = sum(k for k, single in valid if single.view == pb.VIEW_FULL)
    if detailed > MAX_BATCH_METADATA:
        found.add("requests", f"at most {MAX_BATCH_METADATA} items (k) with VIEW_FULL in all", detailed)
    ruled = sum(max(k, row_count(single.rules)) for k, single in valid if is_reranked or single.HasField("rules"))
    if ruled > MAX_BATCH_RULED:
        found.add("requests", f"at most {MAX_BATCH_RULED} items (k), or rankings, with rules in all", ruled)
    counts = [len(single.history.events) for single in request.requests]
    events = sum(count for count in counts if count <= MAX_HISTORY_EVENTS)
    if events > MAX_BATCH_EVENTS:
        found.add("requests", f"at most {MAX_BATCH_EVENTS} events in all", events)
    found.raise_any()


def _decode_history(
    history: pb.History, request_time: int | None, scale: RatingScale | None, event_types: EventTypes
) -> tuple[list[Event], list[str]]:
    """The events and their ids. Of equal ids the first is decoded; without any id, there are none."""
    check_length("history.events", history.events, MAX_HISTORY_EVENTS)
    latest, events, event_ids, ids = latest_time(), _valid_events(history, scale, event_types), list[str](), set[str]()
    found = Violations()
    for at, event in enumerate(() if events else history.events):
        event_id, first = event.event_id, len(found)
        decoded = _decode_event(event, scale, latest, event_types, found)
        if event_id:
            found.check(check_id, "event_id", event_id)
        if len(found) > first:
            found.put_within(f"history.events[{at}]", first)
            if found.is_full:
                break
        if event_id in ids or decoded is None:
            continue
        events.append(decoded)
        event_ids.append(event_id)
        if event_id:
            ids.add(event_id)
    found.raise_any()
    if events and request_time is not None:
        last = max(event.timestamp for event in events)
        if request_time < last:
            raise InvalidRequest("request_time", f"not before the last event at {last}", request_time)
    return events, event_ids if ids else []


def _valid_events(history: pb.History, scale: RatingScale | None, event_types: EventTypes) -> list[Event]:
    """The events, if none has an id and all are valid; else none. In passes over all of them, which take half the time
    of a look at one after the other."""
    events, scale_contains = history.events, math.isfinite if scale is None else scale.contains
    if any([event.event_id for event in events]):
        return []
    times = [event.timestamp for event in events]
    item_ids = [event.item_id for event in events]
    ratings = [event.rating if event.HasField("rating") else None for event in events]
    try:
        check_ids("", item_ids)
        weights = [event_types[event.type or INTERACTION] for event in events]
    except (InvalidRequest, KeyError):
        return []
    if not times or not 0 < min(times) <= max(times) <= latest_time():
        return []
    if not all(rating is None or scale_contains(rating) for rating in ratings):
        return []
    return list(map(Event, item_ids, ratings, times, weights))


def _decode_event(
    event: pb.Event | pb.UserEvent, scale: RatingScale | None, latest: int, event_types: EventTypes, found: Violations
) -> Event | None:
    """The event; None: it has violations, which `found` has then."""
    item_id, timestamp = event.item_id, event.timestamp
    rating = event.rating if event.HasField("rating") else None
    try:
        check_id("item_id", item_id)
        if rating is not None:
            check_rating("rating", rating, scale)
        check_event_time("timestamp", timestamp, latest)
        return Event(item_id, rating, timestamp, checked_weight("type", event.type, event_types))
    except InvalidRequest:
        # Once more and one by one: that takes longer, and most events have none.
        found.check(check_id, "item_id", item_id)
        if rating is not None:
            found.check(check_rating, "rating", rating, scale)
        found.check(check_event_time, "timestamp", timestamp, latest)
        found.check(checked_weight, "type", event.type, event_types)
        return None


def decode_user_events(
    request: pb.RecordEventsRequest, scale: RatingScale | None, event_types: EventTypes
) -> list[UserEvent]:
    """The events to store."""
    check_length("events", request.events, MAX_RECORDED_EVENTS)
    latest, events, found = latest_time(), list[UserEvent](), Violations()
    for at, event in enumerate(request.events):
        first = len(found)
        found.check(check_id, "event_id", event.event_id)
        found.check(check_id, "user_id", event.user_id)
        if event.recommendation_id:
            found.check(check_id, "recommendation_id", event.recommendation_id)
        decoded = _decode_event(event, scale, latest, event_types, found)
        value = event.value if event.HasField("value") else None
        if value is not None and not 0 <= value < math.inf:
            found.add("value", "a finite number from 0 on", f"{value:g}")
        found.put_within(f"events[{at}]", first)
        if found.is_full:
            break
        if decoded is not None:
            named = (event.recommendation_id or None, event.type or INTERACTION)
            events.append(UserEvent(event.event_id, event.user_id, decoded, *named, value))
    found.raise_any()
    return events


def decode_impressions(request: pb.RecordImpressionsRequest) -> list[ShownItem]:
    """The items that were shown."""
    check_length("impressions", request.impressions, MAX_IMPRESSIONS)
    latest, now, items, found = latest_time(), int(time.time()), list[ShownItem](), Violations()
    for at, one in enumerate(request.impressions):
        first = len(found)
        found.check(check_id, "recommendation_id", one.recommendation_id, MAX_RECOMMENDATION_ID_LENGTH)
        found.check(check_id, "item_id", one.item_id)
        if not 0 <= one.position <= MAX_POSITION:
            found.add("position", f"1 to {MAX_POSITION}, or 0 for not known", one.position)
        found.check(check_event_time, "timestamp", one.timestamp, latest)
        found.put_within(f"impressions[{at}]", first)
        if found.is_full:
            break
        items.append(ShownItem(one.recommendation_id, one.item_id, one.position, one.timestamp, now))
    found.raise_any()
    return items


def encode_events(user_id: str, page: EventPage) -> pb.ListEventsResponse:
    """The message for a page of a user's events, with as many as fit."""
    messages = [
        pb.UserEvent(
            event_id=one.event_id,
            user_id=one.user_id,
            item_id=one.event.item_id,
            rating=one.event.rating,
            timestamp=one.event.timestamp,
            recommendation_id=one.recommendation_id or "",
            type=one.type,
            value=one.value,
        )
        for _, one in page.events
    ]
    fitting = fitting_count(messages)
    return pb.ListEventsResponse(events=messages[:fitting], next_page_token=_next_page(user_id, page, fitting))


def _next_page(user_id: str, page: EventPage, fitting: int) -> str:
    """The token of the page after so many of a page's events; "": there is none."""
    if not page.more and fitting == len(page.events):
        return ""
    arrival, last = page.events[fitting - 1]
    return page_token(user_id, last.event.timestamp, arrival)


def answer_bytes(recommendation: Recommendation, view: int = pb.VIEW_BASIC) -> bytes:
    """The message for one answer, serialized; raises InvalidRequest if it is too long."""
    answer = recommendation.answer
    if view == pb.VIEW_FULL or answer.log_propensities or answer.explanations or answer.applied:
        response = encode_answer(recommendation, view)
        check_answer("k", response)
        return response.SerializeToString()
    encoded = _encoded_answer(recommendation, view)
    _check_size("k", len(encoded))
    return encoded


def _encoded_answer(recommendation: Recommendation, view: int) -> bytes:
    """Of an answer what every answer has."""
    answer, live = recommendation.answer, recommendation.live
    ids_alone = view == pb.VIEW_IDS
    messages = live.id_messages if ids_alone else live.messages
    parts = [_shared_fields(recommendation.model.info.model_version, answer.policy, answer.ignored_event_count)]
    scores, at = answer.scores.astype("<f4").tobytes(), 0
    for index in answer.items.tolist():
        parts += (messages.get(index) or _item_message(index, live, ids_alone=ids_alone), scores[at : at + 4])
        at += 4
    recommendation_id = recommendation.recommendation_id.encode()
    parts += (_ID_TAG, _varint(len(recommendation_id)), recommendation_id)
    # Parts of a message one after the other are the message: a third of the time of one field after the other.
    return b"".join(parts)


@lru_cache
def _shared_fields(model_version: str, policy: str, ignored_event_count: int) -> bytes:
    """What many answers have in common."""
    return pb.RecommendResponse(
        model_version=model_version, policy=policy, ignored_event_count=ignored_event_count
    ).SerializeToString()


def _varint(number: int) -> bytes:
    """As protobuf writes it: 7 bits a byte, the lowest first."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def encode_answer(recommendation: Recommendation, view: int = pb.VIEW_BASIC) -> pb.RecommendResponse:
    """The message for one answer."""
    answer, live = recommendation.answer, recommendation.live
    response = pb.RecommendResponse.FromString(_encoded_answer(recommendation, view))
    if answer.log_propensities:
        response.log_propensity = sum(answer.log_propensities)
        for item, log_propensity in zip(response.recommendations, answer.log_propensities, strict=True):
            item.log_propensity = log_propensity
    for item, explanation in zip(response.recommendations, answer.explanations, strict=False):
        item.explanation.CopyFrom(_encode_explanation(explanation, live.catalog))
    if answer.applied:
        for item, index in zip(response.recommendations, answer.items.tolist(), strict=True):
            item.applied.extend([APPLIED[rule] for rule in answer.applied.get(index, ())])
    if view == pb.VIEW_FULL:
        for item, index in zip(response.recommendations, answer.items.tolist(), strict=True):
            item.metadata.update(live.metadata.get(index, {}))
    return response


def check_answer(
    field: str,
    answer: pb.RecommendResponse | pb.BatchRecommendResponse | pb.SimilarItemsResponse | pb.TrendingResponse,
) -> None:
    """Raises InvalidRequest for an answer that clients do not take: titles, tags and explanations may be long."""
    _check_size(field, answer.ByteSize())


def _check_size(field: str, size: int) -> None:
    if size > MAX_ANSWER_BYTES:
        raise InvalidRequest(field, f"few enough items for an answer of {MAX_ANSWER_BYTES} bytes", f"{size} bytes")


def _item_message(item: int, live: LiveCatalog, *, ids_alone: bool) -> bytes:
    """All of an item's `recommendations` in a response but the four bytes of the score, which is its last field."""
    catalog = live.catalog
    message = pb.RecommendResponse()
    texts: Any = {} if ids_alone else {"title": catalog.titles[item], "genres": catalog.genres[item]}
    message.recommendations.add(item_id=catalog.item_ids[item], **texts)
    unscored = message.recommendations[0].SerializeToString()
    # Length-delimited field 1 of the response; field 4 with four bytes within it. protobuf's encoding guide.
    encoded = b"\x0a" + _varint(len(unscored) + 1 + 4) + unscored + b"\x25"
    (live.id_messages if ids_alone else live.messages)[item] = encoded
    return encoded


def _encode_explanation(explanation: Explanation, catalog: Catalog) -> pb.Explanation:
    return pb.Explanation(
        events=[
            pb.ExplainingEvent(
                item_id=catalog.item_ids[reason.event.item],
                title=catalog.titles[reason.event.item],
                rating=reason.event.rating,
                similarity=reason.similarity,
                influence=reason.influence,
                shared_genres=reason.shared_genres,
            )
            for reason in explanation.events
        ],
        shared_genres=explanation.shared_genres,
        text=explanation.text,
        parts=[pb.ScorePart(part=PARTS[part], value=value) for part, value in explanation.parts.items()],
    )


def encode_profile(user_id: str, profile: Profile) -> pb.GetUserProfileResponse:
    """The message for a user's profile, with as many of its page of the watch list as fit."""
    watched = [_encode_watched(event, profile.model.catalog) for _, event in profile.watched.events]
    fitting = fitting_count(watched)
    return pb.GetUserProfileResponse(
        watch_list=watched[:fitting],
        genre_preferences=[
            pb.GenrePreference(
                genre=preference.genre,
                share=preference.share,
                mean_rating=preference.mean_rating,
                recency_weighted_share=preference.recency_weighted_share,
            )
            for preference in profile.preferences[:MAX_GENRE_PREFERENCES]
        ],
        event_count=profile.event_count,
        model_version=profile.model.info.model_version,
        next_page_token=_next_watched(user_id, profile.watched, fitting),
    )


def _next_watched(user_id: str, page: WatchPage, fitting: int) -> str:
    """As `_next_page`, of the watch list."""
    if not page.more and fitting == len(page.events):
        return ""
    place, last = page.events[fitting - 1]
    return page_token(user_id, last.timestamp, place)


def _encode_watched(event: Event, catalog: Catalog) -> pb.WatchedItem:
    # Padding has no title and no genres: what an unknown item is answered with.
    item = catalog.index.get(event.item_id, 0)
    return pb.WatchedItem(
        item_id=event.item_id,
        title=catalog.titles[item],
        genres=catalog.genres[item],
        rating=event.rating,
        timestamp=event.timestamp,
    )


def encode_similar(
    ranking: Ranking, model: Recommender, live: LiveCatalog, view: int = pb.VIEW_BASIC
) -> pb.SimilarItemsResponse:
    """The message for an item's neighbours among the items of a catalogue."""
    catalog, metadata = live.catalog, live.metadata if view == pb.VIEW_FULL else {}
    texts = view != pb.VIEW_IDS
    return pb.SimilarItemsResponse(
        items=[
            pb.SimilarItem(
                item_id=catalog.item_ids[item],
                title=catalog.titles[item] if texts else "",
                genres=catalog.genres[item] if texts else (),
                similarity=similarity,
                metadata=metadata.get(item),
            )
            for item, similarity in zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True)
        ],
        model_version=model.info.model_version,
    )


def encode_model_info(
    model: Recommender, exploration_temperature: float, event_types: EventTypes
) -> pb.GetModelInfoResponse:
    """The message about one model."""
    info = model.info
    scale = info.rating_scale
    return pb.GetModelInfoResponse(
        model_version=info.model_version,
        policy=info.policy,
        created_time=info.created_time,
        item_count=info.item_count,
        rating_scale=None if scale is None else pb.RatingScale(minimum=scale.minimum, maximum=scale.maximum),
        genres=model.filters.tags[:MAX_LISTED_TAGS],
        execution_provider=model.provider,
        max_history=info.max_history,
        exploration_temperature=exploration_temperature,
        seen=own_seen(model),
        new_item_count=model.new_item_count,
        event_types=[pb.EventType(name=name, weight=weight) for name, weight in sorted(event_types.items())],
        limits=pb.Limits(**LIMITS),
        added_item_count=len(model.live.added_ids),
    )
