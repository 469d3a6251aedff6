"""Between messages and the recommender's types. Decoding checks every field and raises InvalidRequest."""

import math
import struct
import time
from collections.abc import Sequence

from serve.api.answer_rules import APPLIED, MAX_BOOSTS, MAX_PINS, MAX_RULE_TAGS, decode_rules
from serve.api.errors import InvalidRequest
from serve.api.event_types import EventTypes
from serve.api.filters import decode_filter, decode_seen, own_seen
from serve.api.rules import (
    DEFAULT_K,
    MAX_ALLOWED_ITEMS,
    MAX_ANSWER_BYTES,
    MAX_BATCH,
    MAX_BATCH_EVENTS,
    MAX_BATCH_ITEMS,
    MAX_BATCH_METADATA,
    MAX_BATCH_RULED,
    MAX_HISTORY_EVENTS,
    MAX_IMPRESSIONS,
    MAX_ITEM_BYTES,
    MAX_ITEM_TAGS,
    MAX_K,
    MAX_LISTED_TAGS,
    MAX_METADATA_BYTES,
    MAX_NOT_SHOWN_S,
    MAX_POSITION,
    MAX_RECOMMENDATION_ID_LENGTH,
    MAX_RECORDED_EVENTS,
    MAX_TAG_LENGTH,
    MAX_TAGS,
    MAX_TITLE_LENGTH,
    MAX_UPSERTED_ITEMS,
    check_event_time,
    check_id,
    check_length,
    check_rating,
    check_time,
    checked_count,
    checked_weight,
    latest_time,
)
from serve.api.service import Profile, Recommendation
from serve.model.catalog import Catalog
from serve.model.events import INTERACTION, Event, RatingScale
from serve.model.explain import Explanation
from serve.model.live_catalog import LiveCatalog
from serve.model.ranking.engine import Ranking
from serve.model.recommender import NoNewItems, Query, Recommender
from serve.pb import recommender_pb2 as pb
from serve.stores.base import ShownItem, UserEvent

_SCORE = struct.Struct("<f")


def decode_query(request: pb.RecommendRequest, model: Recommender, event_types: EventTypes) -> Query:
    """The question that a request asks the model that answers it, from now on."""
    started = time.monotonic()
    k = checked_count("k", request.k)
    item_filter = decode_filter(request, model)
    allow_seen = decode_seen(request.seen, model)
    if not 0 <= request.new_item_slots <= k:
        raise InvalidRequest("new_item_slots", f"0 to k, which is {k}", request.new_item_slots)
    request_time = request.request_time if request.HasField("request_time") else None
    if request_time is not None:
        check_time("request_time", request_time, latest_time())
    subject = request.WhichOneof("subject")
    if subject is None:
        raise InvalidRequest("subject", "user_id or history", "neither")
    events: Sequence[Event] = ()
    user_id = None
    if subject == "history":
        events = _decode_history(request.history, request_time, model.info.rating_scale, event_types)
    else:
        user_id = request.user_id
        check_id("user_id", user_id)
    not_shown_within = request.not_shown_within
    if not 0 <= not_shown_within <= MAX_NOT_SHOWN_S:
        raise InvalidRequest("not_shown_within", f"0 to {MAX_NOT_SHOWN_S} seconds", not_shown_within)
    if not_shown_within and user_id is None:
        raise InvalidRequest("not_shown_within", "user_id with it", "a history")
    exclude, slots = tuple(request.exclude_item_ids), model.new_item_slots(request.new_item_slots)
    withheld = model.live.withheld(request_time)
    rules = decode_rules(request, k, model, item_filter, withheld)
    options = (item_filter, allow_seen, slots, not_shown_within, withheld, rules)
    return Query(events, k, exclude, request_time, request.explain, user_id, started, *options)


def decode_batch(
    request: pb.BatchRecommendRequest, models: Sequence[Recommender], event_types: EventTypes
) -> list[Query]:
    """The questions of a batch, each for the model that answers it."""
    check_length("requests", request.requests, MAX_BATCH)
    items = sum(single.k or DEFAULT_K for single in request.requests)
    if items > MAX_BATCH_ITEMS:
        raise InvalidRequest("requests", f"at most {MAX_BATCH_ITEMS} items (k) in all", items)
    detailed = sum(single.k or DEFAULT_K for single in request.requests if single.with_metadata)
    if detailed > MAX_BATCH_METADATA:
        raise InvalidRequest("requests", f"at most {MAX_BATCH_METADATA} items (k) with metadata in all", detailed)
    ruled = sum(single.k or DEFAULT_K for single in request.requests if single.HasField("rules"))
    if ruled > MAX_BATCH_RULED:
        raise InvalidRequest("requests", f"at most {MAX_BATCH_RULED} items (k) with rules in all", ruled)
    events = sum(len(single.history.events) for single in request.requests)
    if events > MAX_BATCH_EVENTS:
        raise InvalidRequest("requests", f"at most {MAX_BATCH_EVENTS} events in all", events)
    queries = []
    for at, (single, model) in enumerate(zip(request.requests, models, strict=True)):
        try:
            queries.append(decode_query(single, model, event_types))
        except InvalidRequest as error:
            raise error.within(f"requests[{at}]") from error
        except NoNewItems as error:
            raise NoNewItems(f"requests[{at}].{error}") from error
    return queries


def _decode_history(
    history: pb.History, request_time: int | None, scale: RatingScale | None, event_types: EventTypes
) -> Sequence[Event]:
    check_length("history.events", history.events, MAX_HISTORY_EVENTS)
    latest, events = latest_time(), []
    for at, event in enumerate(history.events):
        try:
            events.append(_decode_event(event, scale, latest, event_types))
        except InvalidRequest as error:
            raise error.within(f"history.events[{at}]") from error
    if events and request_time is not None:
        last = max(event.timestamp for event in events)
        if request_time < last:
            raise InvalidRequest("request_time", f"not before the last event at {last}", request_time)
    return events


def _decode_event(
    event: pb.Event | pb.UserEvent, scale: RatingScale | None, latest: int, event_types: EventTypes
) -> Event:
    item_id, timestamp, rating = event.item_id, event.timestamp, None
    check_id("item_id", item_id)
    if event.HasField("rating"):
        rating = event.rating
        check_rating("rating", rating, scale)
    check_event_time("timestamp", timestamp, latest)
    return Event(item_id, rating, timestamp, checked_weight("type", event.type, event_types))


def decode_user_events(
    request: pb.RecordEventsRequest, scale: RatingScale | None, event_types: EventTypes
) -> list[UserEvent]:
    """The events to store."""
    check_length("events", request.events, MAX_RECORDED_EVENTS)
    latest, events = latest_time(), []
    for at, event in enumerate(request.events):
        try:
            check_id("event_id", event.event_id)
            check_id("user_id", event.user_id)
            if event.recommendation_id:
                check_id("recommendation_id", event.recommendation_id)
            decoded = _decode_event(event, scale, latest, event_types)
            value = event.value if event.HasField("value") else None
            if value is not None and not 0 <= value < math.inf:
                raise InvalidRequest("value", "a finite number from 0 on", f"{value:g}")
            named = (event.recommendation_id or None, event.type or INTERACTION)
            events.append(UserEvent(event.event_id, event.user_id, decoded, *named, value))
        except InvalidRequest as error:
            raise error.within(f"events[{at}]") from error
    return events


def decode_impressions(request: pb.RecordImpressionsRequest) -> list[ShownItem]:
    """The items that were shown."""
    check_length("impressions", request.impressions, MAX_IMPRESSIONS)
    latest, now, items = latest_time(), int(time.time()), []
    for at, one in enumerate(request.impressions):
        try:
            check_id("recommendation_id", one.recommendation_id)
            if len(one.recommendation_id) > MAX_RECOMMENDATION_ID_LENGTH:
                expected = f"an id of 1 to {MAX_RECOMMENDATION_ID_LENGTH} characters"
                raise InvalidRequest("recommendation_id", expected, f"{len(one.recommendation_id)} characters")
            check_id("item_id", one.item_id)
            if not 0 <= one.position <= MAX_POSITION:
                raise InvalidRequest("position", f"1 to {MAX_POSITION}, or 0 for not known", one.position)
            check_event_time("timestamp", one.timestamp, latest)
        except InvalidRequest as error:
            raise error.within(f"impressions[{at}]") from error
        items.append(ShownItem(one.recommendation_id, one.item_id, one.position, one.timestamp, now))
    return items


def encode_events(events: Sequence[UserEvent], next_page_token: str) -> pb.ListEventsResponse:
    """The message for a page of a user's events."""
    return pb.ListEventsResponse(
        events=[
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
            for one in events
        ],
        next_page_token=next_page_token,
    )


def encode_answer(recommendation: Recommendation, *, with_metadata: bool = False) -> pb.RecommendResponse:
    """The message for one answer."""
    answer, model = recommendation.answer, recommendation.model
    live = model.live
    messages = live.messages
    parts: list[bytes] = []
    for index, score in zip(answer.items.tolist(), answer.scores.tolist(), strict=True):
        parts += (messages.get(index) or _item_message(index, live), _SCORE.pack(score))
    # Joined and parsed at once: a third of the time of one message after the other.
    response = pb.RecommendResponse.FromString(b"".join(parts))
    response.model_version = model.info.model_version
    response.policy = answer.policy
    response.ignored_event_count = answer.ignored_event_count
    response.recommendation_id = recommendation.recommendation_id
    if answer.log_propensities:
        response.log_propensity = sum(answer.log_propensities)
        for item, log_propensity in zip(response.recommendations, answer.log_propensities, strict=True):
            item.log_propensity = log_propensity
    for item, explanation in zip(response.recommendations, answer.explanations, strict=False):
        item.explanation.CopyFrom(_encode_explanation(explanation, live.catalog))
    if answer.applied:
        for item, index in zip(response.recommendations, answer.items.tolist(), strict=True):
            item.applied.extend([APPLIED[rule] for rule in answer.applied.get(index, ())])
    if with_metadata:
        for item, index in zip(response.recommendations, answer.items.tolist(), strict=True):
            item.metadata.update(live.metadata.get(index, {}))
    return response


def check_answer(field: str, answer: pb.RecommendResponse | pb.BatchRecommendResponse | pb.TrendingResponse) -> None:
    """Raises InvalidRequest for an answer that clients do not take: titles, tags and explanations may be long."""
    size = answer.ByteSize()
    if size > MAX_ANSWER_BYTES:
        raise InvalidRequest(field, f"few enough items for an answer of {MAX_ANSWER_BYTES} bytes", f"{size} bytes")


def _item_message(item: int, live: LiveCatalog) -> bytes:
    """All of an item's `recommendations` in a response but the four bytes of the score, which is its last field."""
    catalog = live.catalog
    message = pb.RecommendResponse()
    message.recommendations.add(item_id=catalog.item_ids[item], title=catalog.titles[item], genres=catalog.genres[item])
    unscored = message.recommendations[0].SerializeToString()
    # Length-delimited field 1 of the response; field 4 with four bytes within it. protobuf's encoding guide.
    length, head = len(unscored) + 1 + _SCORE.size, bytearray(b"\x0a")
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    encoded = live.messages[item] = bytes(head) + unscored + b"\x25"
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
    )


def encode_profile(profile: Profile, limit: int) -> pb.GetUserProfileResponse:
    """The message for a user's profile; the last `limit` events are the watch list."""
    return pb.GetUserProfileResponse(
        watch_list=[_encode_watched(event, profile.model.catalog) for event in reversed(profile.events[-limit:])],
        genre_preferences=[
            pb.GenrePreference(
                genre=preference.genre,
                share=preference.share,
                mean_rating=preference.mean_rating,
                recency_weighted_share=preference.recency_weighted_share,
            )
            for preference in profile.preferences
        ],
        event_count=len(profile.events),
        model_version=profile.model.info.model_version,
    )


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


def encode_similar(ranking: Ranking, model: Recommender, *, with_metadata: bool = False) -> pb.SimilarItemsResponse:
    """The message for an item's neighbours."""
    live = model.live
    catalog, metadata = live.catalog, live.metadata if with_metadata else {}
    return pb.SimilarItemsResponse(
        items=[
            pb.SimilarItem(
                item_id=catalog.item_ids[item],
                title=catalog.titles[item],
                genres=catalog.genres[item],
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
        created=info.created,
        item_count=info.item_count,
        rating_scale=None if scale is None else pb.RatingScale(minimum=scale.minimum, maximum=scale.maximum),
        genres=model.filters.tags[:MAX_LISTED_TAGS],
        execution_provider=model.provider,
        max_history=info.max_history,
        max_k=MAX_K,
        exploration_temperature=exploration_temperature,
        max_allow_item_ids=MAX_ALLOWED_ITEMS,
        max_tags=MAX_TAGS,
        seen=own_seen(model),
        new_item_count=model.new_item_count,
        event_types=[pb.EventType(name=name, weight=weight) for name, weight in sorted(event_types.items())],
        max_boosts=MAX_BOOSTS,
        max_pins=MAX_PINS,
        max_rule_tags=MAX_RULE_TAGS,
        max_upserted_items=MAX_UPSERTED_ITEMS,
        max_title_length=MAX_TITLE_LENGTH,
        max_item_tags=MAX_ITEM_TAGS,
        max_tag_length=MAX_TAG_LENGTH,
        max_metadata_bytes=MAX_METADATA_BYTES,
        max_item_bytes=MAX_ITEM_BYTES,
    )
