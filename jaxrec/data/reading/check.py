"""Reads a log into DuckDB, and checks every row of it.

The view `events` has the rows that keep the rules: number (from 0, in the order of the source; rows that break a rule
have numbers, too), user and item (BIGINT or VARCHAR), rating (FLOAT or NULL), time (BIGINT seconds) and within
(milliseconds within the second).
"""

import dataclasses
import datetime
import time
from collections.abc import Mapping

import duckdb
import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.reading.bad_rows import BadRow, BadRows
from jaxrec.data.reading.columns import ColumnNames
from jaxrec.data.reading.connection import first_line, quoted
from jaxrec.data.reading.formats import SAMPLE_ROWS, SHORT, Relation
from jaxrec.data.reading.rules import FLOAT_IDS, TEXT_TYPE, Field, IdKind, TimeUnit, id_field, rating_field, whole
from jaxrec.data.reading.scale import choose_scale, count_ratings, in_scale, rating_notes
from jaxrec.data.reading.sources import TextOptions
from jaxrec.data.reading.times import (
    FIRST_PLAUSIBLE,
    PER_SECOND,
    TimeForm,
    has_fractions,
    recognize_times,
    time_fields,
)
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError, NoUsableRow

KIND_SAMPLE = 100_000  # first rows that decide whether ids are whole numbers or text
FLOAT_ID = r"-?[0-9]+\.0|-?[0-9](\.[0-9]+)?[eE]\+?[0-9]+"
MANY_PADDED = 0.1  # share of ids with leading zeros from which ids are text


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How a log is read; what is None or AUTO is recognized.

    Attributes:
        columns: Names of the columns.
        text: Delimiter and encoding.
        time_unit: The form of the times.
        time_format: Their form in the letters of strptime, which goes before `time_unit`.
        missing_ratings: Values of the rating column that mean "no rating".
        users, items: The kind of their ids.
    """

    columns: ColumnNames = dataclasses.field(default_factory=ColumnNames)
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    time_unit: TimeUnit = TimeUnit.AUTO
    time_format: str | None = None
    missing_ratings: tuple[float, ...] = ()
    users: IdKind = IdKind.AUTO
    items: IdKind = IdKind.AUTO


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What is in `events`.

    Attributes:
        rows: How many rows `events` has.
        scale: The one that was given or recognized; None: there are no ratings, and none was given.
        rated: There are ratings.
        notes: What is odd about the log, each in one sentence.
    """

    rows: int
    scale: RatingScale | None
    rated: bool
    times: TimeForm
    notes: tuple[str, ...]


def load(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    options: ReadOptions,
    scale: RatingScale | None,
    bad: BadRows,
) -> Loaded:
    """Makes `events` of the rows that keep the rules.

    Args:
        connection: DuckDB.
        relation: The rows.
        options: How they are read.
        scale: The range of possible ratings; None: recognized.
        bad: Takes those that break a rule.

    Returns:
        What was read.

    Raises:
        DataError: For rows that break a rule, unless `bad` puts them into quarantine; where no row is left; where ids,
            times or ratings are in no form that is known.
    """
    now = int(time.time())
    try:
        fields, within, times = _fill(connection, relation, options, now, bad)
    except duckdb.Error as error:
        bad.fail_if_any()
        raise DataError(f"{relation.name}: cannot be read: {first_line(error)}") from error
    total, wrong = connection.execute("SELECT count(*), count(*) FILTER (NOT ok) FROM loaded").fetchall()[0]
    if not total and not bad.count:
        raise DataError(f"{relation.name}: no rows after the header")
    if wrong and not relation.trim and _has_spaces(connection, relation):
        relation.trim = True
        _create(connection, relation, fields, within)
    counts = count_ratings(connection, "(SELECT rating FROM loaded WHERE ok)")
    given = scale is not None
    scale = scale or choose_scale(counts, relation.name)
    fits = "true" if scale is None else in_scale("rating", scale)
    broken = _column(connection, f"SELECT rowid FROM loaded WHERE NOT (ok AND {fits}) ORDER BY rowid")
    if len(broken):
        outside = "" if given else " (the scale that the log seems to have; another can be given: --rating-scale)"
        _report(connection, relation, fields, scale, outside, broken, bad)
    bad.fail_if_any()
    connection.execute(
        "CREATE OR REPLACE VIEW events AS SELECT rowid AS number, user, item, rating, time, within FROM loaded"
        f"{f' WHERE ok AND {fits}' if len(broken) else ''}"
    )
    rows = total - len(broken)
    if not rows:
        raise NoUsableRow(f"{relation.name}: every row is bad: {bad}", bad.count)
    notes = rating_notes(counts, scale, bool(options.missing_ratings)) + _time_notes(connection, times)
    return Loaded(rows, scale, len(counts) > 0, times, tuple(notes))


def _fill(
    connection: duckdb.DuckDBPyConnection, relation: Relation, options: ReadOptions, now: int, bad: BadRows
) -> tuple[Mapping[str, Field], str, TimeForm]:
    """Reads all rows into `loaded`, with `ok`: whether a row keeps the rules. Rows that are not whole go to `bad`."""
    try:
        fields, within, times = _recognize(connection, relation, options, now)
        _create(connection, relation, fields, within)
        if relation.count() in (None, _count(connection, "loaded")):
            return fields, within, times
    except (duckdb.InvalidInputException, duckdb.ConversionException):
        pass
    if not relation.repair(bad.add):
        raise DataError(f"{relation.name}: cannot be read; its rows are not what its schema says")
    if not relation.count():
        bad.fail_if_any()
        if bad.count:
            raise DataError(f"{relation.name}: every row is bad: {bad}")
        raise DataError(f"{relation.name}: no rows after the header")
    fields, within, times = _recognize(connection, relation, options, now)
    _create(connection, relation, fields, within)
    if relation.count() != _count(connection, "loaded"):
        raise DataError(f"{relation.name}: {relation.count()} rows, and DuckDB reads {_count(connection, 'loaded')}")
    return fields, within, times


def _create(
    connection: duckdb.DuckDBPyConnection, relation: Relation, fields: Mapping[str, Field], within: str
) -> None:
    values = ", ".join(f"{fields[role].value} AS {short}" for role, short in SHORT.items())
    valid = " AND ".join(field.valid for field in fields.values())
    connection.execute(
        f"CREATE OR REPLACE TABLE loaded AS SELECT {values}, ({within})::SMALLINT AS within, ({valid}) AS ok "
        f"FROM ({relation.sql()})"
    )


def _recognize(
    connection: duckdb.DuckDBPyConnection, relation: Relation, options: ReadOptions, now: int
) -> tuple[Mapping[str, Field], str, TimeForm]:
    """The rules of each field of a relation, and SQL of the milliseconds within the second."""

    def where(role: str) -> str:
        return f"{relation.name}: column {relation.labels[role]}"

    kinds = {}
    for role, kind in ((USER, options.users), (ITEM, options.items)):
        kinds[role] = kind
        if kind is IdKind.AUTO and relation.types[role] == TEXT_TYPE:
            kinds[role] = IdKind.TEXT if relation.typed else _kind(connection, relation, role, where(role))
    if options.time_format is not None or options.time_unit is not TimeUnit.AUTO:
        fractions = options.time_unit in PER_SECOND and has_fractions(_sample_of_times(connection, relation))
        times = TimeForm(options.time_unit, options.time_format, fractions)
    elif relation.types[TIME].startswith(("TIMESTAMP", "DATE")):
        times = TimeForm(TimeUnit.ISO)
    else:
        times = recognize_times(_sample_of_times(connection, relation), now, where(TIME))
    rating = Field("NULL::FLOAT", "true", "''")
    if RATING in relation.types:
        rating = rating_field("rating", relation.types[RATING], options.missing_ratings, where(RATING))
    moment, within = time_fields("time", relation.types[TIME], times, now, where(TIME))
    fields = {
        USER: id_field("user", relation.types[USER], kinds[USER], where(USER)),
        ITEM: id_field("item", relation.types[ITEM], kinds[ITEM], where(ITEM)),
        RATING: rating,
        TIME: moment,
    }
    return fields, within, times


def _sample_of_times(connection: duckdb.DuckDBPyConnection, relation: Relation) -> list[object]:
    return [row[0] for row in connection.execute(f"SELECT time FROM ({relation.sql()}) LIMIT {SAMPLE_ROWS}").fetchall()]


def _kind(connection: duckdb.DuckDBPyConnection, relation: Relation, role: str, where: str) -> IdKind:
    """By the first rows: whole numbers, if most ids are and leading zeros are rare.

    Raises DataError where most ids are whole numbers that became floats.
    """
    column = SHORT[role]
    digits = f"regexp_full_match({column}, '-?[0-9]+')"
    counts = (
        f"count({column}), count(*) FILTER ({whole(column)}), count(*) FILTER ({digits} AND NOT {whole(column)}), "
        f"count(*) FILTER (regexp_full_match({column}, '{FLOAT_ID}'))"
    )
    sample = f"(SELECT trim({column}) AS {column} FROM ({relation.sql()}) LIMIT {KIND_SAMPLE})"
    total, numbers, padded, floats = connection.execute(f"SELECT {counts} FROM {sample}").fetchall()[0]
    if floats * 2 > total:
        raise DataError(
            f"{where}: ids such as 123.0 or 1.23E+10 are floats; {FLOAT_IDS}. To take them as they are: --ids text"
        )
    if padded > MANY_PADDED * total or (padded and padded + numbers == total):
        return IdKind.TEXT
    return IdKind.INTEGER if numbers * 2 >= total else IdKind.TEXT


def _has_spaces(connection: duckdb.DuckDBPyConnection, relation: Relation) -> bool:
    """Whether the first of the rows that break a rule have white space around a field."""
    numbers = _column(connection, f"SELECT rowid FROM loaded WHERE NOT ok ORDER BY rowid LIMIT {SAMPLE_ROWS}")
    spaces = " OR ".join(
        f"coalesce({short} <> trim({short}, ' \t'), false)"
        for role, short in SHORT.items()
        if relation.types.get(role) == TEXT_TYPE
    )
    if not spaces or relation.typed:
        return False
    return any(_count(connection, f"({query}) WHERE {spaces}") for _, query in relation.raw(numbers))


def _report(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    fields: Mapping[str, Field],
    scale: RatingScale | None,
    source: str,
    broken: np.ndarray,
    bad: BadRows,
) -> None:
    """Says of each of the rows `broken` (numbers of the relation's rows) which field is at fault, and why."""
    rating = fields[RATING]
    rules = [(role, field.valid, field.reason) for role, field in fields.items()]
    if scale is not None:
        rules.append((RATING, in_scale(rating.value, scale), quoted(f"is outside {scale}{source}")))
    faults = " ".join(
        f"WHEN NOT {valid} THEN {{'field': {quoted(relation.labels.get(role, role))}, "
        f"'value': coalesce({SHORT[role]}::VARCHAR, ''), 'reason': {reason}}}"
        for role, valid, reason in rules
    )
    listed = broken if bad.limit is None else broken[: bad.limit]
    places, texts = relation.places(listed), relation.texts(listed)
    left = len(listed)
    for _, query in relation.raw(broken):
        found = connection.execute(f"SELECT CASE {faults} END FROM ({query}) ORDER BY number").fetchall()
        bad.add_all(
            BadRow(file, line, fault["field"], fault["value"], fault["reason"], text)
            for (fault,), (file, line), text in zip(found[:left], places, texts, strict=False)
        )
        bad.add_unlisted(fault["field"] for (fault,) in found[left:])
        left = max(0, left - len(found))


def _time_notes(connection: duckdb.DuckDBPyConnection, times: TimeForm) -> list[str]:
    first, last = connection.execute("SELECT min(time), max(time) FROM events").fetchall()[0]
    if last >= FIRST_PLAUSIBLE:
        return []
    days = [datetime.datetime.fromtimestamp(each, datetime.UTC).date().isoformat() for each in (first, last)]
    return [
        f"all times are before 1990, from {days[0]} to {days[1]}, as they were read: {times}; if that is not the form "
        "they are in, give --time-unit or --time-format"
    ]


def _column(connection: duckdb.DuckDBPyConnection, query: str) -> np.ndarray:
    return np.ma.getdata(next(iter(connection.execute(query).fetchnumpy().values()))).astype(np.int64)


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
