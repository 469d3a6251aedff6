"""Trending: what a request asks for, and the message for the answer."""

import time
from collections.abc import Mapping

from serve.api.errors import InvalidRequest
from serve.api.filters import decode_filter
from serve.api.rules import checked_count
from serve.model.popular import Allowed, trending
from serve.model.recommender import Recommender
from serve.model.trend import COUNTED_S
from serve.pb import recommender_pb2 as pb

HOUR_S, DAY_S = 3_600, 86_400
WINDOWS: Mapping[int, int] = {
    pb.TREND_WINDOW_UNSPECIFIED: COUNTED_S.index(DAY_S),
    pb.TREND_WINDOW_HOUR: COUNTED_S.index(HOUR_S),
    pb.TREND_WINDOW_SIX_HOURS: COUNTED_S.index(6 * HOUR_S),
    pb.TREND_WINDOW_DAY: COUNTED_S.index(DAY_S),
    pb.TREND_WINDOW_WEEK: COUNTED_S.index(7 * DAY_S),
    pb.TREND_WINDOW_MONTH: COUNTED_S.index(30 * DAY_S),
}
"""The place of the half-life of each window."""


def answer_trending(request: pb.TrendingRequest, model: Recommender) -> pb.TrendingResponse:
    """Checks and answers a request with a model's catalogue and counts.

    Raises:
        InvalidRequest: A field of the request breaks a rule.
    """
    k = checked_count("k", request.k)
    half_life = WINDOWS.get(request.window)
    if half_life is None:
        raise InvalidRequest("window", f"one of {', '.join(pb.TrendWindow.keys())}", request.window)
    item_filter = decode_filter(request, model)
    allowed = Allowed(item_filter, frozenset(request.filter.allow_item_ids), frozenset(request.exclude_item_ids))
    # One of each: they are replaced as a whole.
    now, live = model.popular_now, model.live
    found = trending(now, live, model.stored_items, half_life, k, allowed, int(time.time()))
    return pb.TrendingResponse(
        items=[
            pb.TrendingItem(
                item_id=one.item.item_id,
                title=one.item.title,
                genres=one.item.tags,
                count=one.events,
                known=one.known,
                metadata=one.item.metadata if request.with_metadata else None,
            )
            for one in found
        ],
        counted_at=now.counted.time,
        model_version=model.info.model_version,
    )
