"""Which column of a log holds what: by the name that was given, or by the names that logs have.

Names are compared without regard to case and to anything but letters and digits, and without a type that follows a
colon (`user_id:token`, as RecBole writes it): `User-ID`, `user_id` and `userId` are one name.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.errors import DataError

SKIPPED = "-"  # in ColumnNames.order: no column that is read
NOT_READ = "none"  # as the name of the rating column: ratings are not read

# Groups of names, the more certain ones first: of two columns the one in the earlier group is meant.
USER_NAMES = (
    ("user", "userid", "uid"),
    ("customer", "reviewer", "visitor", "member", "account", "client", "person", "listener", "viewer", "reader"),
    ("session", "username"),
)
ITEM_NAMES = (
    ("item", "itemid", "iid"),
    (
        *("movie", "product", "article", "asin", "isbn", "track", "song", "artist", "book", "anime", "video", "game"),
        *("show", "business", "news", "recipe", "venue", "location", "sku", "content", "document", "doc", "goods"),
    ),
    ("parentasin", "productname", "trackname", "artistname"),
)
RATING_NAMES = (("rating", "ratings", "userrating"), ("stars", "score", "overall", "bookrating", "reviewscore"))
TIME_NAMES = (
    ("timestamp", "ts", "unixtimestamp", "unixtime", "unixreviewtime"),
    ("time", "datetime", "eventtime", "timestampms", "timems", "tstamp"),
    (
        *("date", "eventdate", "reviewtime", "reviewdate", "createdat", "created", "watchedat", "playedat", "ratedat"),
        *("purchasedate", "tdat", "dateadded", "visittime", "reviewtimestamp"),
    ),
)
NAMES = {USER: USER_NAMES, ITEM: ITEM_NAMES, RATING: RATING_NAMES, TIME: TIME_NAMES}
MOVIE_NAMES = {
    ITEM: ITEM_NAMES,
    TITLE: (("title", "itemtitle", "movietitle", "booktitle"), ("name", "productname", "trackname", "originaltitle")),
    GENRES: (("genres", "genre"), ("categories", "category", "tags", "tag", "maincategory")),
}
OPTIONS = {USER: "--user-col", ITEM: "--item-col", RATING: "--rating-col", TIME: "--time-col"}
EXPECTED = {
    USER: "userId or user_id",
    ITEM: "movieId or item_id",
    RATING: "rating",
    TIME: "timestamp",
    TITLE: "title",
    GENRES: "genres",
}


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """The columns of a log; None: recognized by their names.

    Attributes:
        user, item, rating, time: The name of each in the header. `rating` "none": ratings are not read.
        order: What the columns of a file without a header hold, each `user`, `item`, `rating` or `time` (or a synonym
            of these), or `-` for a column that is not read.
    """

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    order: tuple[str, ...] | None = None

    def named(self, role: str) -> str | None:
        """The given name of schema column `role`."""
        return {USER: self.user, ITEM: self.item, RATING: self.rating, TIME: self.time}.get(role)


def choose_columns(
    header: Sequence[str], names: ColumnNames, where: str, has_options: bool = True, roles: Sequence[str] = tuple(NAMES)
) -> dict[str, str]:
    """The column of each schema name that a log's header has.

    Args:
        header: The names of the columns.
        names: Those that were given.
        where: What messages call the header.
        has_options: The command has options for other names, which the message then says.
        roles: The schema names that are wanted.

    Returns:
        Column by schema name; without RATING the log has no ratings.

    Raises:
        DataError: Where a column is missing, occurs twice or has two purposes, or where two could be meant.

    Examples:
        >>> choose_columns(["Date", "User-ID", "isbn", "note"], ColumnNames(), "log.csv:1")
        {'user_id': 'User-ID', 'item_id': 'isbn', 'timestamp': 'Date'}
    """
    chosen: dict[str, str] = {}
    missing = []
    for role in roles:
        groups, given = NAMES[role], names.named(role)
        if role == RATING and given == NOT_READ:
            continue
        found = _recognized(header, groups) if given is None else [name for name in header if name == given][:1]
        if len(found) > 1:
            hint = f"; name the one that is meant: {OPTIONS[role]} {found[0]}" if has_options else ""
            raise DataError(f"{where}: the columns {' and '.join(found)} could both be the {EXPECTED[role]}{hint}")
        if found:
            chosen[role] = found[0]
        elif given is not None or role != RATING:
            hint = f" (or another, given as {OPTIONS[role]})" if given is None and has_options else ""
            missing.append(f"{EXPECTED[role] if given is None else given}{hint}")
    came = ",".join(header)
    if missing:
        raise DataError(f"{where}: column {', '.join(missing)} is missing; the header is {came!r}")
    return checked_columns(header, chosen, where)


def movie_columns(header: Sequence[str], where: str) -> dict[str, str]:
    """The columns ITEM, TITLE and GENRES of a movies file's header; one of the last two may be missing.

    Raises DataError where the ids, or both of the others, are missing, and where two columns could be meant.
    """
    chosen: dict[str, str] = {}
    for role, groups in MOVIE_NAMES.items():
        found = _recognized(header, groups)
        if len(found) > 1:
            raise DataError(
                f"{where}: the columns {' and '.join(found)} could both be the {EXPECTED[role]}; rename the other one"
            )
        if found:
            chosen[role] = found[0]
    missing = [] if ITEM in chosen else [EXPECTED[ITEM]]
    if TITLE not in chosen and GENRES not in chosen:
        missing.append("title or genres")
    if missing:
        raise DataError(f"{where}: column {', '.join(missing)} is missing; the header is {','.join(header)!r}")
    return checked_columns(header, chosen, where)


def feature_columns(header: Sequence[str], where: str) -> list[str]:
    """The column of the ids, and then all others, of the header of a table of items' features.

    Of several that could be the ids, such as movieId and artist, one whose name ends with id goes before the others.
    Raises DataError where there is none, or nothing else, and where a column occurs twice or has no name.
    """
    found = _recognized(header, ITEM_NAMES)
    came = ",".join(header)
    if not found:
        raise DataError(f"{where}: column {EXPECTED[ITEM]} is missing; the header is {came!r}")
    ids = next((name for name in found if plain(name).endswith("id")), found[0])
    odd = [name for name in header if header.count(name) > 1 or not name.strip() or name == ITEM != ids]
    if odd:
        raise DataError(f"{where}: column {odd[0]!r} occurs twice or has no name of its own; the header is {came!r}")
    if len(header) < 2:
        raise DataError(f"{where}: no column beside {ids}; expected features of the items")
    return [ids, *(name for name in header if name != ids)]


def checked_columns(header: Sequence[str], chosen: dict[str, str], where: str) -> dict[str, str]:
    """`chosen`; raises DataError where one of its columns occurs twice in the header, or is chosen twice."""
    repeated = [name for name in chosen.values() if list(header).count(name) > 1]
    if repeated:
        raise DataError(f"{where}: column {repeated[0]} occurs twice; the header is {','.join(header)!r}")
    if len(set(chosen.values())) < len(chosen):
        raise DataError(f"{where}: one column is given for two purposes: {', '.join(chosen.values())}")
    return chosen


def ordered_columns(order: Sequence[str], where: str) -> dict[str, int]:
    """The position of each schema name in a file without a header. Raises DataError where one is missing or twice."""
    positions: dict[str, int] = {}
    for at, name in enumerate(order):
        role = role_of(name)
        if role is None:
            if name in (SKIPPED, ""):
                continue
            raise DataError(f"{where}: --columns names {name!r}; expected user, item, rating, time, or {SKIPPED}")
        if role in positions:
            raise DataError(f"{where}: --columns {','.join(order)} names the {role} twice")
        positions[role] = at
    missing = [short for short, role in (("user", USER), ("item", ITEM), ("time", TIME)) if role not in positions]
    if missing:
        raise DataError(
            f"{where}: --columns {','.join(order)} does not name {' and '.join(missing)}; expected names such as"
            f" user,item,rating,time in the order of the file's columns, and {SKIPPED} for one that is not read"
        )
    return positions


def role_of(name: str) -> str | None:
    """The schema name that a column's name stands for, by synonyms; None for another name."""
    return next((role for role, groups in NAMES.items() if _recognized([name], groups)), None)


def plain(name: str) -> str:
    """A name as names are compared.

    Examples:
        >>> plain("User-ID"), plain("user_id:token"), plain("movieId")
        ('userid', 'userid', 'movieid')
    """
    return re.sub(r"[\W_]", "", re.sub(r":\w+$", "", name.strip()).lower())


def described(columns: Mapping[str, str]) -> str:
    """The chosen columns in one line: `user=userId, item=movieId, ...`."""
    short = {USER: "user", ITEM: "item", RATING: "rating", TIME: "time"}
    return ", ".join(f"{short.get(role, role)}={name}" for role, name in columns.items())


def _recognized(header: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """The columns that the first matching group names; a name may be followed by `id`."""
    for group in groups:
        known = {*group, *(f"{name}id" for name in group)}
        if found := list(dict.fromkeys(name for name in header if plain(name) in known)):
            return found
    return []
