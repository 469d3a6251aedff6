"""Reads a log into the engine's table `events`, and checks every row of it.

`events` has user and item (BIGINT or VARCHAR), rating (FLOAT or NULL), time (BIGINT seconds) and within (milliseconds
within the second), in the order of the source; and file, line and text where the source was read exactly.
"""

import dataclasses
import time
from pathlib import Path

import duckdb
import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.reading.bad_rows import BadRow, BadRows
from jaxrec.data.reading.connection import first_line, quoted
from jaxrec.data.reading.formats import SHORT, Relation
from jaxrec.data.reading.rules import TEXT_TYPE, Field, IdKind, TimeUnit, id_field, rating_field, time_fields, whole
from jaxrec.data.reading.sources import ColumnNames
from jaxrec.data.schema import ITEM, RATING, TIME, USER, WIDEST_SCALE, infer_rating_scale
from jaxrec.errors import DataError


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How a log is read. `users` and `items`: the kind of their ids."""

    columns: ColumnNames = dataclasses.field(default_factory=ColumnNames)
    time_unit: TimeUnit = TimeUnit.AUTO
    users: IdKind = IdKind.AUTO
    items: IdKind = IdKind.AUTO


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is in `events`. `exact`: with file, line and text; `scale` None: there are no ratings."""

    rows: int
    scale: RatingScale | None
    exact: bool
    time_unit: TimeUnit


def load(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    options: ReadOptions,
    scale: RatingScale | None,
    bad: BadRows,
    scratch: Path,
    exact: bool = False,
) -> Loaded:
    """Fills `events`. A source in which something is wrong is read again, exactly, to say what and where.

    `scale` None: recognized.
    Raises DataError for bad rows, unless `bad` puts them into quarantine, and where no row is left.
    """
    unit = relation.time_unit() if options.time_unit is TimeUnit.AUTO else options.time_unit
    now = int(time.time())
    given = {USER: options.users, ITEM: options.items}
    if relation.typed:
        as_typed = {role: IdKind.TEXT for role in given if relation.types[role] == TEXT_TYPE}
        given = {role: as_typed.get(role, kind) if kind is IdKind.AUTO else kind for role, kind in given.items()}
    if not exact:
        loaded = _load_fast(connection, relation, given, scale, unit, now)
        if loaded is not None:
            return loaded
    return _load_exactly(connection, relation, given, scale, unit, now, bad, scratch)


def _load_fast(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    given: dict[str, IdKind],
    scale: RatingScale | None,
    unit: TimeUnit,
    now: int,
) -> Loaded | None:
    """None where any row breaks a rule."""
    source = relation.fast()
    try:
        kinds = {role: _kind_of_first(connection, source, relation, role, option) for role, option in given.items()}
        fields, within = _fields(relation, kinds, unit, now)
        values = ", ".join(f"{fields[role].value} AS {short}" for role, short in SHORT.items())
        valid = [field.valid for field in fields.values()]
        for role, option in given.items():
            if relation.types[role] == TEXT_TYPE and kinds[role] is IdKind.TEXT and option is IdKind.AUTO:
                valid.append(f"NOT {whole(SHORT[role])}")
        connection.execute(
            f"CREATE OR REPLACE TABLE events AS "
            f"SELECT {values}, ({within})::SMALLINT AS within, {' AND '.join(valid)} AS ok FROM ({source})"
        )
    except (duckdb.InvalidInputException, duckdb.ConversionException):
        return None  # the exact way says which row it was
    rows, wrong = connection.execute("SELECT count(*), count(*) FILTER (NOT ok) FROM events").fetchall()[0]
    if wrong or not rows:
        return None
    scale = scale or infer_rating_scale(deciding_ratings(connection, "events"))
    if scale is not None and _count(connection, f"events WHERE NOT {_in_scale('rating', scale)}"):
        return None
    return Loaded(rows, scale, exact=False, time_unit=unit)


def _load_exactly(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    given: dict[str, IdKind],
    given_scale: RatingScale | None,
    unit: TimeUnit,
    now: int,
    bad: BadRows,
    scratch: Path,
) -> Loaded:
    before = bad.count
    try:
        source = relation.exact(scratch, bad)
        connection.execute(f"CREATE OR REPLACE TABLE stage AS {source}")
    except duckdb.Error as error:
        raise DataError(f"{relation.name}: cannot be read: {first_line(error)}") from error
    staged = _count(connection, "stage")
    if not staged and bad.count == before:
        raise DataError(f"{relation.name}: no rows after the header")
    kinds = {role: _kind_of_all(connection, relation, role, option) for role, option in given.items()}
    fields, within = _fields(relation, kinds, unit, now)
    for role, option in given.items():
        if relation.types[role] == TEXT_TYPE and option is IdKind.AUTO and kinds[role] is IdKind.TEXT:
            fields[role] = _text_only(fields[role], SHORT[role], _looks_whole(connection, SHORT[role]))
    faults = " ".join(
        f"WHEN NOT {field.valid} THEN {{'field': {quoted(relation.labels.get(role, role))}, "
        f"'value': coalesce({SHORT[role]}::VARCHAR, ''), 'reason': {field.reason}}}"
        for role, field in fields.items()
    )
    values = ", ".join(f"{field.value} AS new_{SHORT[role]}" for role, field in fields.items())
    connection.execute(
        f"CREATE OR REPLACE TABLE checked AS SELECT file, line, text, {values}, ({within})::SMALLINT AS within, "
        f"rating::VARCHAR AS rating_text, CASE {faults} END AS fault FROM stage"
    )
    connection.execute("DROP TABLE stage")
    good = "(SELECT new_rating AS rating FROM checked WHERE fault IS NULL)"
    scale = given_scale or infer_rating_scale(deciding_ratings(connection, good))
    fits = "true" if scale is None else _in_scale("new_rating", scale)
    source = "" if given_scale else " (the scale that the log seems to have; another can be given: --rating-scale)"
    outside = (
        f"{{'field': {quoted(relation.labels.get(RATING, RATING))}, 'value': rating_text, "
        f"'reason': 'is outside {scale}{source}'}}"
    )
    _report(
        connection,
        f"SELECT file, line, text, coalesce(fault, {outside}) AS fault FROM checked "
        f"WHERE fault IS NOT NULL OR NOT {fits} ORDER BY rowid",
        bad,
    )
    bad.fail_if_any()
    chosen = ", ".join(f"new_{short} AS {short}" for short in SHORT.values())
    connection.execute(
        f"CREATE OR REPLACE TABLE events AS SELECT {chosen}, within, file, line, text FROM checked "
        f"WHERE fault IS NULL AND {fits} ORDER BY rowid"
    )
    connection.execute("DROP TABLE checked")
    rows = _count(connection, "events")
    if not rows:
        raise DataError(f"{relation.name}: every row is bad; {bad.count} of them are in quarantine")
    return Loaded(rows, scale, exact=True, time_unit=unit)


def _fields(relation: Relation, kinds: dict[str, IdKind], unit: TimeUnit, now: int) -> tuple[dict[str, Field], str]:
    def where(role: str) -> str:
        return f"{relation.name}: column {relation.labels[role]}"

    rating = Field("NULL::FLOAT", "true", "''")
    if RATING in relation.types:
        rating = rating_field("rating", relation.types[RATING], where(RATING))
    moment, within = time_fields("time", relation.types[TIME], unit, now, where(TIME))
    return {
        USER: id_field("user", relation.types[USER], kinds[USER], where(USER)),
        ITEM: id_field("item", relation.types[ITEM], kinds[ITEM], where(ITEM)),
        RATING: rating,
        TIME: moment,
    }, within


def _kind_of_first(
    connection: duckdb.DuckDBPyConnection, source: str, relation: Relation, role: str, option: IdKind
) -> IdKind:
    if option is not IdKind.AUTO or relation.types[role] != TEXT_TYPE:
        return option
    query = f"SELECT {whole(SHORT[role])} FROM ({source}) LIMIT 1"
    first = connection.execute(query).fetchall()
    return IdKind.INTEGER if first and first[0][0] else IdKind.TEXT


def _kind_of_all(connection: duckdb.DuckDBPyConnection, relation: Relation, role: str, option: IdKind) -> IdKind:
    """Whole numbers with leading zeros make a column of digits text; else the majority decides."""
    if option is not IdKind.AUTO or relation.types[role] != TEXT_TYPE:
        return option
    column = SHORT[role]
    counts = (
        f"count(*) FILTER ({whole(column)}), count(*) FILTER (NOT {_digits(column)} AND {column} <> ''), "
        f"count(*) FILTER ({_digits(column)} AND NOT {whole(column)})"
    )
    numbers, names, padded = connection.execute(f"SELECT {counts} FROM stage").fetchall()[0]
    if padded and not names:
        return IdKind.TEXT
    return IdKind.INTEGER if numbers >= names + padded else IdKind.TEXT


def _digits(column: str) -> str:
    return f"regexp_full_match(coalesce({column}, ''), '-?[0-9]+')"


def _looks_whole(connection: duckdb.DuckDBPyConnection, column: str) -> bool:
    """Whether every id consists of digits: then they are text for their leading zeros, and none is out of place."""
    return not _count(connection, f"stage WHERE NOT {_digits(column)} AND {column} <> ''")


def _text_only(field: Field, column: str, all_digits: bool) -> Field:
    if all_digits:
        return field
    reason = "is a whole number, and most ids of its column are text; if all are text, give --ids text"
    fault = f"CASE WHEN {field.valid} THEN '{reason}' ELSE {field.reason} END"
    return Field(field.value, f"({field.valid} AND NOT {whole(column)})", fault)


def deciding_ratings(connection: duckdb.DuckDBPyConnection, table: str) -> np.ndarray:
    """[0 to 3] float32: the ratings of `table` by which `jaxrec.data.schema.infer_rating_scale` decides."""
    possible = _in_scale("rating", WIDEST_SCALE)
    query = (
        f"SELECT any_value(rating), min(rating) FILTER ({possible}), "
        f"any_value(rating) FILTER ({possible} AND rating <> round(rating)) FROM {table}"
    )
    found = connection.execute(query).fetchall()[0]
    return np.array([rating for rating in found if rating is not None], np.float32)


def _in_scale(column: str, scale: RatingScale) -> str:
    return f"coalesce({column} BETWEEN {scale.minimum!r}::FLOAT AND {scale.maximum!r}::FLOAT, true)"


def _report(connection: duckdb.DuckDBPyConnection, query: str, bad: BadRows) -> None:
    result = connection.execute(query)
    while found := result.fetchmany(10_000):
        for file, line, text, fault in found:
            bad.add(BadRow(file, line, fault["field"], fault["value"] or "", fault["reason"], text))


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
