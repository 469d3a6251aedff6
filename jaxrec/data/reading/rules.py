"""The rules of each field as SQL: what its value is, when it is valid, and what a message says was expected."""

import dataclasses
import enum
import re
from collections.abc import Sequence

from jaxrec.data.schema import SECONDS_PER_DAY
from jaxrec.errors import DataError

FIRST_MILLISECONDS = 100_000_000_000  # as seconds the year 5138, as milliseconds 1973
ISO_DATE = re.compile(r"\s*\d{4}-\d\d-\d\d")
_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
WHOLE_TYPES = (*_SIGNED, *(f"U{name}" for name in _SIGNED))
FLOAT_TYPES = ("FLOAT", "DOUBLE")
TEXT_TYPE = "VARCHAR"


class IdKind(enum.StrEnum):
    """How ids are read. AUTO: whole numbers where all are, text where none is; a mixture is an error."""

    AUTO = "auto"
    INTEGER = "integer"
    TEXT = "text"


class TimeUnit(enum.StrEnum):
    """The unit of times. AUTO: by what the first rows hold."""

    AUTO = "auto"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    ISO = "iso"


@dataclasses.dataclass(frozen=True)
class Field:
    """SQL expressions over a raw column: `value`, `valid` (never NULL), and the reason to give where it is not."""

    value: str
    valid: str
    reason: str


def whole(column: str) -> str:
    """SQL: the text is a whole number as one writes it (no sign but -, no leading zero, no spaces)."""
    return f"coalesce(TRY_CAST({column} AS BIGINT)::VARCHAR = {column}, false)"


def id_field(column: str, sql_type: str, kind: IdKind, where: str) -> Field:
    """An id; the value is BIGINT or VARCHAR. Raises DataError for a column type that holds no ids."""
    empty = f"CASE WHEN {column} IS NULL THEN 'is empty; expected an id' ELSE "
    if sql_type == TEXT_TYPE and kind is IdKind.INTEGER:
        reason = "is not a whole number, as the other ids of its column are; if ids are text, give --ids text"
        return Field(f"TRY_CAST({column} AS BIGINT)", whole(column), f"{empty}'{reason}' END")
    if sql_type == TEXT_TYPE:
        valid = f"coalesce({column} = trim({column}) AND {column} <> '' AND NOT contains({column}, chr(0)), false)"
        return Field(column, valid, f"{empty}'is empty or has spaces around it; expected an id' END")
    if sql_type in WHOLE_TYPES and kind is IdKind.TEXT:
        return Field(f"{column}::VARCHAR", f"{column} IS NOT NULL", "'is empty; expected an id'")
    if sql_type in WHOLE_TYPES:
        value = f"TRY_CAST({column} AS BIGINT)"
        return Field(value, f"{value} IS NOT NULL", f"{empty}'is beyond 64 bits' END")
    raise DataError(f"{where} is {sql_type}; expected whole numbers or text as ids")


def rating_field(column: str, sql_type: str, where: str) -> Field:
    """A rating; the value is FLOAT, NULL where there is none."""
    numeric = sql_type in (*WHOLE_TYPES, *FLOAT_TYPES) or sql_type.startswith("DECIMAL")
    if not numeric and sql_type != TEXT_TYPE:
        raise DataError(f"{where} is {sql_type}; expected numbers as ratings")
    value = f"TRY_CAST({column} AS FLOAT)"
    return Field(value, f"({column} IS NULL OR coalesce(isfinite({value}), false))", "'is not a number'")


def time_fields(column: str, sql_type: str, unit: TimeUnit, now: int, where: str) -> tuple[Field, str]:
    """A time, and SQL of its milliseconds within the second; the value is BIGINT seconds since 1970, at most a day
    after `now`. Times without a zone are UTC."""
    latest = now + SECONDS_PER_DAY
    if unit is TimeUnit.AUTO:
        raise ValueError("the unit must be recognized first (recognize_time_unit)")
    if sql_type.startswith(("TIMESTAMP", "DATE")) or (sql_type == TEXT_TYPE and unit is TimeUnit.ISO):
        kind = "TIMESTAMPTZ" if sql_type in (TEXT_TYPE, "TIMESTAMP WITH TIME ZONE") else "TIMESTAMP"
        cast = f"TRY_CAST({column} AS {kind})"
        instant = f"CASE WHEN isfinite({cast}) THEN {cast} END"
        milliseconds, valid = f"epoch_ms({instant})", "true"
        expected = "an ISO 8601 time"
    elif sql_type in (TEXT_TYPE, *WHOLE_TYPES, *FLOAT_TYPES):
        number = f"TRY_CAST({column} AS BIGINT)"
        milliseconds = number if unit is TimeUnit.MILLISECONDS else ""
        valid = whole(column) if sql_type == TEXT_TYPE else f"coalesce({number} = {column}, false)"
        expected = f"whole {TimeUnit.SECONDS if unit is TimeUnit.ISO else unit} since 1970"
        if not milliseconds:
            value, within = number, "0"
    else:
        raise DataError(f"{where} is {sql_type}; expected times")
    if milliseconds:
        value, within = f"({milliseconds} // 1000)", f"({milliseconds} % 1000)"
    scale = 1000 if unit is TimeUnit.MILLISECONDS else 1
    # In milliseconds a time of seconds would be a day in 1970.
    earliest = FIRST_MILLISECONDS // 1000 if unit is TimeUnit.MILLISECONDS else 0
    reason = f"is not a time; expected {expected} in {earliest * scale}..{latest * scale} (a day from now)"
    return Field(
        value, f"({valid} AND coalesce({value} BETWEEN {earliest} AND {latest}, false))", f"'{reason}'"
    ), within


def recognize_time_unit(values: Sequence[object]) -> TimeUnit:
    """Seconds, milliseconds or ISO 8601, by the majority of some values as text."""
    texts = [str(value) for value in values if value is not None]
    iso = sum(ISO_DATE.match(text) is not None for text in texts)
    numbers = [float(text) for text in texts if re.fullmatch(r"\d{1,18}(\.0*)?", text)]
    if iso > len(numbers):
        return TimeUnit.ISO
    long = sum(number >= FIRST_MILLISECONDS for number in numbers)
    return TimeUnit.MILLISECONDS if long > len(numbers) / 2 else TimeUnit.SECONDS
