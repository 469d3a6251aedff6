"""`python -m serve ask`: answers of a running server as tables, for a human at a terminal."""

import time
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from serve.cli.connecting import Connecting, connected, connection_options, table
from serve.client import AppliedRule, Boost, Event, ItemFilter, Part, Pin, RecommenderClient, Rules, TrendWindow
from serve.pb.recommender_pb2 import RecommendResponse, ScorePart

DAY_S = 86_400
WINDOWS = {
    "hour": TrendWindow.TREND_WINDOW_HOUR,
    "six-hours": TrendWindow.TREND_WINDOW_SIX_HOURS,
    "day": TrendWindow.TREND_WINDOW_DAY,
    "week": TrendWindow.TREND_WINDOW_WEEK,
    "month": TrendWindow.TREND_WINDOW_MONTH,
}
FILTERS = ("exclude", "allow", "any_tag", "all_tag", "no_tag", "minimum_score")
"""Options of recommendations, of similar items and of what is popular now."""
RULES = ("diversity", "max_per_tag", "boost", "boost_tag", "pin", "pin_tag")
"""Options that are rules after the model."""
OF_RECOMMENDATIONS = ("seen", "new_items", "not_shown_within", "why", "request_id", *RULES)


@click.command("ask")
@connection_options
@click.option("--user", metavar="ID", help="Recommend for a stored user.")
@click.option(
    "--watched",
    multiple=True,
    metavar="ITEM[=RATING]",
    help="Recommend after this item. Repeat it for several items, oldest first; they count as one a day up to now."
    " With --user they are added to the stored events, for this answer only.",
)
@click.option("--similar", "similar_to", metavar="ITEM", help="Show items similar to this one.")
@click.option(
    "--trending",
    type=click.Choice(list(WINDOWS)),
    help="Show what is popular now. Events lose half of their weight in this time.",
)
@click.option("--profile", "profile_of", metavar="ID", help="Show what is stored of a user.")
@click.option("--events", "events_of", metavar="ID", help="Show the last events of a user, of all types.")
@click.option("--k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Number of lines.")
@click.option("--exclude", multiple=True, metavar="ITEM", help="Leave this item out. Repeatable, as the next four.")
@click.option("--allow", multiple=True, metavar="ITEM", help="Only the items that are named with this option.")
@click.option("--any-tag", multiple=True, metavar="TAG", help="Only items with at least one of these tags (genres).")
@click.option("--all-tag", multiple=True, metavar="TAG", help="Only items with each of these tags.")
@click.option("--no-tag", multiple=True, metavar="TAG", help="Only items with none of these tags.")
@click.option("--minimum-score", type=float, metavar="SCORE", help="Only items with at least this score or similarity.")
@click.option(
    "--seen",
    type=click.Choice(["exclude", "allow"]),
    help="Whether items of the history may be recommended. By default the model decides.",
)
@click.option("--new-items", type=click.IntRange(0, 1000), default=0, help="Number of places reserved for new items.")
@click.option(
    "--not-shown-within",
    type=click.IntRange(0),
    default=0,
    metavar="SECONDS",
    help="With --user: leave out what was recommended lately.",
)
@click.option("--diversity", type=float, default=0.0, help="Weight of being unlike the items above, 0 to 1.")
@click.option("--max-per-tag", type=int, default=0, help="Most items with the same tag.")
@click.option("--boost", multiple=True, metavar="ITEM=FACTOR", help="Multiply the item's weight, by .01 to 100.")
@click.option("--boost-tag", multiple=True, metavar="TAG=FACTOR", help="Multiply the weight of all items with the tag.")
@click.option("--pin", multiple=True, metavar="ITEM=PLACE", help="Put the item at this place; 1 is the first.")
@click.option("--pin-tag", multiple=True, metavar="TAG=PLACE", help="Put the best item with the tag at this place.")
@click.option("--why", is_flag=True, help="Say why each item is recommended.")
@click.option("--request-id", default="", metavar="ID", help="Repeated with the same id, the server logs one answer.")
@click.option(
    "--model-version",
    default="",
    metavar="VERSION",
    help="Ask for this version; by default the user's, or the main one.",
)
@click.option(
    "--bucket-key",
    default="",
    metavar="KEY",
    help="With --watched or --similar: be answered by the version of a user with this id.",
)
@click.pass_context
def command(
    context: click.Context,
    connection: Connecting,
    user: str | None,
    watched: tuple[str, ...],
    similar_to: str | None,
    trending: str | None,
    profile_of: str | None,
    events_of: str | None,
    k: int,
    exclude: tuple[str, ...],
    allow: tuple[str, ...],
    any_tag: tuple[str, ...],
    all_tag: tuple[str, ...],
    no_tag: tuple[str, ...],
    minimum_score: float | None,
    seen: str | None,
    new_items: int,
    not_shown_within: int,
    why: bool,
    request_id: str,
    model_version: str,
    bucket_key: str,
    **ruled: Any,
) -> None:
    """Ask a running server and print its answer as a table: recommendations, similar items, a user's profile or
    events, what is popular now, or, without a question, which model answers."""
    recommending, others = user is not None or bool(watched), (similar_to, trending, profile_of, events_of)
    if sum((recommending, *(one is not None for one in others))) > 1:
        raise click.UsageError("expected one of --user or --watched, --similar, --trending, --profile and --events")
    if any(one is not None for one in (trending, profile_of, events_of)):
        _refuse(context, ["model_version"], "--user, --watched, --similar or nothing")
    if user is not None or (not recommending and similar_to is None):
        _refuse(context, ["bucket_key"], "--watched or --similar, without --user,")
    if not recommending:
        _refuse(context, OF_RECOMMENDATIONS, "--user or --watched")
        if similar_to is None and trending is None:
            _refuse(context, FILTERS, "--user, --watched, --similar or --trending")
    allow_seen = None if seen is None else seen == "allow"
    with connected(connection) as client:
        allowed = ItemFilter(
            allow_item_ids=allow, any_tags=any_tag, all_tags=all_tag, none_tags=no_tag, minimum_score=minimum_score
        )
        asked: dict[str, Any] = {"exclude_item_ids": exclude, "filter": allowed, "k": k}
        if trending is None:
            asked |= {"model_version": model_version, "bucket_key": bucket_key}
        if recommending:
            asked |= {"allow_seen": allow_seen, "new_item_slots": new_items, "explain": why}
            asked |= {"not_shown_within": not_shown_within, "request_id": request_id, "rules": _rules(**ruled)}
            click.echo(recommendations(client, user, watched, **asked))
        elif similar_to is not None:
            click.echo(similar(client, similar_to, **asked))
        elif trending is not None:
            click.echo(popular(client, trending, **asked))
        elif profile_of is not None:
            click.echo(profile(client, profile_of, k))
        elif events_of is not None:
            click.echo(events(client, events_of, k))
        else:
            click.echo(model(client, model_version))


def _refuse(context: click.Context, names: Sequence[str], needed: str) -> None:
    """Raises UsageError for options that were given without the question that they belong to."""
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')}: expected {needed} with it")


def recommendations(client: RecommenderClient, user_id: str | None, watched: Sequence[str], **asked: Any) -> str:
    """The best items for a stored user, or after items that were watched, one a day up to now, or both; `asked`: what
    else `RecommenderClient.recommend` is given."""
    if not watched:
        return _answer(client.recommend(user_id=user_id, **asked), asked["explain"])
    now = int(time.time())
    history = [_event(text, now - DAY_S * (len(watched) - at)) for at, text in enumerate(watched)]
    answer = client.recommend(user_id=user_id, history=history, request_time=now, **asked)
    return _answer(answer, asked["explain"])


def _time(seconds: int) -> str:
    """A time in UTC; 0 is not known."""
    if not seconds:
        return "unknown"
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _rules(
    diversity: float,
    max_per_tag: int,
    boost: Sequence[str],
    boost_tag: Sequence[str],
    pin: Sequence[str],
    pin_tag: Sequence[str],
) -> Rules:
    """Raises ValueError."""
    return Rules(
        diversity=diversity,
        max_per_tag=max_per_tag,
        boosts=[
            *(Boost(item_id=name, factor=float(value)) for name, value in map(_named, boost)),
            *(Boost(tag=name, factor=float(value)) for name, value in map(_named, boost_tag)),
        ],
        pins=[
            *(Pin(item_id=name, position=int(value)) for name, value in map(_named, pin)),
            *(Pin(tag=name, position=int(value)) for name, value in map(_named, pin_tag)),
        ],
    )


def _named(text: str) -> tuple[str, str]:
    """NAME and VALUE of NAME=VALUE; raises ValueError."""
    name, separator, value = text.rpartition("=")
    if not separator:
        raise ValueError(f"expected NAME=VALUE, came {text}")
    return name, value


def _event(text: str, timestamp: int) -> Event:
    """ITEM or ITEM=RATING; raises ValueError."""
    item_id, separator, rating = text.rpartition("=")
    if not separator:
        return Event(item_id=text, timestamp=timestamp)
    return Event(item_id=item_id, rating=float(rating), timestamp=timestamp)


def _answer(answer: RecommendResponse, why: bool) -> str:
    ruled = any(one.applied for one in answer.recommendations)
    rows = [
        [str(rank), one.item_id, one.title, ", ".join(one.genres), f"{one.score:.3f}"]
        + ([", ".join(map(_rule, one.applied))] if ruled else [])
        + ([one.explanation.text, ", ".join(map(_part, one.explanation.parts))] if why else [])
        for rank, one in enumerate(answer.recommendations, start=1)
    ]
    more = [*(["rules"] if ruled else []), *(["why", "parts of the score"] if why else [])]
    lines = [table(["", "item", "title", "genres", "score", *more], rows)]
    lines.append(f"\npolicy {answer.policy}, model {answer.model_version}, recommendation {answer.recommendation_id}")
    if answer.ignored_event_count:
        lines.append(f"{answer.ignored_event_count} events on items that the model does not know were left out")
    return "\n".join(lines)


def _part(one: ScorePart) -> str:
    return f"{Part.Name(one.part).removeprefix('PART_').lower()} {one.value:+.3f}"


def _rule(applied: "AppliedRule.ValueType") -> str:
    return AppliedRule.Name(applied).removeprefix("APPLIED_RULE_").lower().replace("_", " ")


def similar(client: RecommenderClient, item_id: str, **asked: Any) -> str:
    """The items most like one; `asked`: what else `RecommenderClient.similar_items` is given."""
    rows = [
        [str(rank), one.item_id, one.title, ", ".join(one.genres), f"{one.similarity:.3f}"]
        for rank, one in enumerate(client.similar_items(item_id, **asked).items, start=1)
    ]
    return table(["", "item", "title", "genres", "similarity"], rows)


def popular(client: RecommenderClient, window: str, **asked: Any) -> str:
    """What is popular now; `asked`: what else `RecommenderClient.trending` is given."""
    rows = [
        [str(rank), one.item_id, one.title, ", ".join(one.genres), f"{one.count:.2f}"]
        for rank, one in enumerate(client.trending(window=WINDOWS[window], **asked).items, start=1)
    ]
    return table(["", "item", "title", "genres", "events"], rows)


def profile(client: RecommenderClient, user_id: str, k: int) -> str:
    """A user's last k events, and the user's genres."""
    found = client.get_user_profile(user_id, k)
    watched = [
        [
            _time(one.timestamp),
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


def events(client: RecommenderClient, user_id: str, k: int) -> str:
    """A user's last k events, of all types."""
    rows = [
        [
            _time(one.timestamp),
            one.type,
            one.item_id,
            f"{one.rating:g}" if one.HasField("rating") else "",
            f"{one.value:g}" if one.HasField("value") else "",
            one.event_id,
        ]
        for one in client.list_events(user_id, k).events
    ]
    return table(["time (UTC)", "type", "item", "rating", "value", "event"], rows)


def model(client: RecommenderClient, model_version: str = "") -> str:
    """What answers, and within which limits."""
    info = client.get_model_info(model_version)
    scale = info.rating_scale
    rows = [
        ["model", info.model_version],
        ["policy", info.policy],
        ["exported", _time(info.created_time)],
        ["items", f"{info.item_count}"],
        ["ratings", f"{scale.minimum:g} to {scale.maximum:g}" if info.HasField("rating_scale") else "none"],
        ["history", f"last {info.max_history} events"],
        ["new items", f"{info.new_item_count}"],
        ["items added", f"{info.added_item_count}"],
        ["runs on", info.execution_provider],
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)
