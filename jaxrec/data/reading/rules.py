"""The rules of each field as SQL: what its value is, when it is valid, and what a message says was expected."""

import dataclasses
import enum
import math
from collections.abc import Sequence

from jaxrec.data.schema import MAX_ID_LENGTH
from jaxrec.errors import DataError

_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
WHOLE_TYPES = (*_SIGNED, *(f"U{name}" for name in _SIGNED))
FLOAT_TYPES = ("FLOAT", "DOUBLE")
TEXT_TYPE = "VARCHAR"


class IdKind(enum.StrEnum):
    """How ids are read. AUTO: whole numbers where most of the first rows are, else text."""

    AUTO = "auto"
    INTEGER = "integer"
    TEXT = "text"


class TimeUnit(enum.StrEnum):
    """The form of times. AUTO: by the first rows. The compact forms are digits: 20240131, 202401312359, and so on."""

    AUTO = "auto"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"
    ISO = "iso"
    COMPACT_DAY = "yyyymmdd"
    COMPACT_MINUTE = "yyyymmddhhmm"
    COMPACT_SECOND = "yyyymmddhhmmss"


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
    if sql_type == "UUID":
        return Field(f"{column}::VARCHAR", f"{column} IS NOT NULL", "'is empty; expected an id'")
    if sql_type.startswith("DECIMAL") and sql_type.endswith(",0)"):
        sql_type = "HUGEINT"
    if sql_type == TEXT_TYPE and kind is IdKind.INTEGER:
        reason = "is not a whole number, as the other ids of its column are; if ids are text, give --ids text"
        return Field(f"TRY_CAST({column} AS BIGINT)", whole(column), f"{empty}'{reason}' END")
    if sql_type == TEXT_TYPE:
        valid = (
            f"coalesce({column} = trim({column}) AND length({column}) BETWEEN 1 AND {MAX_ID_LENGTH} "
            f"AND NOT contains({column}, chr(0)), false)"
        )
        long = f"WHEN length({column}) > {MAX_ID_LENGTH} THEN 'is longer than {MAX_ID_LENGTH} characters'"
        reason = f"CASE WHEN {column} IS NULL THEN 'is empty; expected an id' {long} ELSE "
        return Field(
            column, valid, f"{reason}'is empty, or has spaces around it or the character U+0000; expected an id' END"
        )
    if sql_type in WHOLE_TYPES and kind is IdKind.TEXT:
        return Field(f"{column}::VARCHAR", f"{column} IS NOT NULL", "'is empty; expected an id'")
    if sql_type in WHOLE_TYPES:
        value = f"TRY_CAST({column} AS BIGINT)"
        return Field(value, f"{value} IS NOT NULL", f"{empty}'is beyond 64 bits' END")
    if sql_type in FLOAT_TYPES:
        raise DataError(f"{where} is {sql_type}; {FLOAT_IDS}")
    raise DataError(f"{where} is {sql_type}; expected whole numbers or text as ids")


FLOAT_IDS = (
    "expected whole numbers or text as ids: pandas makes floats of whole numbers where one is missing, and "
    "astype('Int64') keeps them whole"
)


def rating_field(column: str, sql_type: str, missing: Sequence[float], where: str) -> Field:
    """A rating; the value is FLOAT, NULL where there is none, also for the values `missing`."""
    numeric = sql_type in (*WHOLE_TYPES, *FLOAT_TYPES) or sql_type.startswith("DECIMAL")
    if not numeric and sql_type != TEXT_TYPE:
        raise DataError(f"{where} is {sql_type}; expected numbers as ratings")
    number = f"TRY_CAST({column} AS FLOAT)"
    if sql_type == TEXT_TYPE:  # "3,5" is a number, too
        number = f"coalesce({number}, TRY_CAST(replace({column}, ',', '.') AS FLOAT))"
    if not all(math.isfinite(marker) for marker in missing):
        raise DataError(f"--missing-rating {', '.join(map(str, missing))}: expected finite numbers")
    value = number
    for marker in missing:
        value = f"nullif({value}, {marker!r}::FLOAT)"
    none = f"{column} IS NULL" if sql_type != TEXT_TYPE else f"coalesce({column}, '') = ''"
    return Field(value, f"({none} OR coalesce(isfinite({number}), false))", "'is not a number'")
