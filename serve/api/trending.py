"""Trending: what a request asks for, and the message for the answer."""

import time
from collections.abc import Mapping

from serve.api.codec import check_view
from serve.api.errors import Violations
from serve.api.filters import decode_filter
from serve.api.rules import DEFAULT_K, checked_count
from serve.model.popular import trending
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
    # One of them: it is replaced as a whole.
    live, found = model.live, Violations()
    k = found.check(checked_count, "k", request.k) or DEFAULT_K
    half_life = WINDOWS.get(request.window, 0)
    if request.window not in WINDOWS:
        found.add("window", f"one of {', '.join(pb.TrendWindow.keys())}", request.window)
    item_filter = found.check(decode_filter, request, model, live)
    found.check(check_view, request.view)
    found.raise_any()
    texts, metadata = request.view != pb.VIEW_IDS, request.view == pb.VIEW_FULL
    popular, catalog = model.popular_in(live), live.catalog
    best = trending(popular, half_life, k, item_filter, request.exclude_item_ids, int(time.time()))
    return pb.TrendingResponse(
        items=[
            pb.TrendingItem(
                item_id=catalog.item_ids[one.item],
                title=catalog.titles[one.item] if texts else "",
                genres=catalog.genres[one.item] if texts else (),
                count=one.events,
                known=live.added is None or one.item < live.added.first,
                metadata=live.metadata.get(one.item) if metadata else None,
            )
            for one in best
        ],
        counted_time=popular.now.counted.time,
        model_version=model.info.model_version,
    )
