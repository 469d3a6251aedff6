"""Answers of a running server as tables, for a human at a terminal."""

import time
from collections.abc import Sequence

from serve.client.sync import Event, RecommenderClient
from serve.pb.recommender_pb2 import RecommendResponse

SECONDS_PER_DAY = 86_400


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, each column as wide as its longest text; numbers to the right."""
    printable = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[at]) for row in printable) for at in range(len(header))]
    lines = []
    for row in printable:
        cells = [
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).removeprefix("-").isdecimal()


def recommendations(client: RecommenderClient, user_id: str | None, watched: Sequence[str], k: int, why: bool) -> str:
    """The best k items for a stored user, or after items that were watched, one a day up to now."""
    if user_id is not None:
        return _answer(client.recommend(user_id=user_id, k=k, explain=why), why)
    now = int(time.time())
    history = [_event(text, now - SECONDS_PER_DAY * (len(watched) - at)) for at, text in enumerate(watched)]
    return _answer(client.recommend(history=history, k=k, request_time=now, explain=why), why)


def _event(text: str, timestamp: int) -> Event:
    """ITEM or ITEM=RATING; raises ValueError."""
    item_id, separator, rating = text.rpartition("=")
    if not separator:
        return Event(item_id=text, timestamp=timestamp)
    return Event(item_id=item_id, rating=float(rating), timestamp=timestamp)


def _answer(answer: RecommendResponse, why: bool) -> str:
    rows = [
        [str(rank), one.item_id, one.title, ", ".join(one.genres), f"{one.score:.3f}"]
        + ([one.explanation.text] if why else [])
        for rank, one in enumerate(answer.recommendations, start=1)
    ]
    lines = [table(["", "item", "title", "genres", "score", *(["why"] if why else [])], rows)]
    lines.append(f"\npolicy {answer.policy}, model {answer.model_version}, recommendation {answer.recommendation_id}")
    if answer.ignored_event_count:
        lines.append(f"{answer.ignored_event_count} events on items that the model does not know were left out")
    return "\n".join(lines)


def similar(client: RecommenderClient, item_id: str, k: int) -> str:
    """The k items most like one."""
    rows = [
        [str(rank), one.item_id, one.title, ", ".join(one.genres), f"{one.similarity:.3f}"]
        for rank, one in enumerate(client.similar_items(item_id, k).items, start=1)
    ]
    return table(["", "item", "title", "genres", "similarity"], rows)


def profile(client: RecommenderClient, user_id: str, k: int) -> str:
    """A user's last k events, and the user's genres."""
    found = client.get_user_profile(user_id, k)
    watched = [
        [
            time.strftime("%Y-%m-%d %H:%M", time.gmtime(one.timestamp)),
            one.item_id,
            one.title,
            f"{one.rating:g}" if one.HasField("rating") else "",
        ]
        for one in found.watch_list
    ]
    genres = [
        [
            one.genre,
            f"{one.share:.2f}",
            f"{one.recency_weighted_share:.2f}",
            f"{one.mean_rating:.2f}" if one.HasField("mean_rating") else "",
        ]
        for one in found.genre_preferences
    ]
    return "\n".join(
        [
            f"{found.event_count} events, the last {len(watched)}:",
            table(["time (UTC)", "item", "title", "rating"], watched),
            "",
            table(["genre", "share", "lately", "mean rating"], genres),
        ]
    )


def model(client: RecommenderClient) -> str:
    """What answers, and within which limits."""
    info = client.get_model_info()
    scale = info.rating_scale
    rows = [
        ["model", info.model_version],
        ["policy", info.policy],
        ["exported", info.created],
        ["items", f"{info.item_count}"],
        ["ratings", f"{scale.minimum:g} to {scale.maximum:g}" if info.HasField("rating_scale") else "none"],
        ["history", f"last {info.max_history} events"],
        ["runs on", info.execution_provider],
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)
