"""Times: the forms that logs write them in, which of them a log uses, and the SQL that reads it."""

import dataclasses
import datetime
import re
from collections.abc import Sequence

from jaxrec.data.reading.connection import quoted
from jaxrec.data.reading.rules import FLOAT_TYPES, TEXT_TYPE, WHOLE_TYPES, Field, TimeUnit, whole
from jaxrec.data.schema import SECONDS_PER_DAY, is_missing
from jaxrec.errors import DataError

FIRST_PLAUSIBLE = 631_152_000  # 1990-01-01, in seconds: logs of user events are younger
FIRST_FINE = 100_000_000  # seconds (1973): as milliseconds or finer, a time of seconds would lie before it
ISO_DATE = re.compile(r"\s*\d{4}[-/]\d\d?[-/]\d\d?")
NUMBER = re.compile(r"-?\d{1,19}([.,]\d*)?([eE][+-]?\d+)?")


PER_SECOND = {
    TimeUnit.SECONDS: 1,
    TimeUnit.MILLISECONDS: 1_000,
    TimeUnit.MICROSECONDS: 1_000_000,
    TimeUnit.NANOSECONDS: 1_000_000_000,
}
COMPACT = {
    TimeUnit.COMPACT_DAY: "%Y%m%d",
    TimeUnit.COMPACT_MINUTE: "%Y%m%d%H%M",
    TimeUnit.COMPACT_SECOND: "%Y%m%d%H%M%S",
}


@dataclasses.dataclass(frozen=True)
class TimeForm:
    """How times are written. `format`: one of strptime, which goes before the unit; `fractions`: of the unit, too."""

    unit: TimeUnit
    format: str | None = None
    fractions: bool = False

    def __str__(self) -> str:
        return self.format or self.unit.value


def recognize_times(values: Sequence[object], now: float, where: str) -> TimeForm:
    """The form that most of some values have; of numbers the one that puts most of them between 1990 and now.

    Args:
        values: Numbers or texts; None and words for it are left out.
        now: Seconds since 1970.
        where: What messages call the column.

    Returns:
        The form. Numbers that no unit puts between 1990 and now are seconds, such as those of a made-up log.

    Raises:
        DataError: For texts in no form that is known.

    Examples:
        >>> now = 1_700_000_000.0
        >>> str(recognize_times(["1112486027"], now, "time")), str(recognize_times([1112486027123], now, "time"))
        ('seconds', 'milliseconds')
        >>> str(recognize_times(["20220421"], now, "time")), str(recognize_times(["2022-04-21 07:30"], now, "time"))
        ('yyyymmdd', 'iso')
    """
    texts = [text for value in values if not is_missing(text := str(value).strip())]
    numbers = [text for text in texts if NUMBER.fullmatch(text)]
    iso = sum(ISO_DATE.match(text) is not None for text in texts)
    if iso > len(numbers):
        return TimeForm(TimeUnit.ISO)
    if len(numbers) * 2 < len(texts):
        example = next(text for text in texts if not NUMBER.fullmatch(text))
        raise DataError(
            f"{where}: times such as {example!r} are in no form that is known; give it in the letters of strptime, such"
            " as --time-format '%d.%m.%Y %H:%M' for 31.12.2024 23:59"
        )
    found = [float(text.replace(",", ".")) for text in numbers]
    fitting = {
        unit: sum(FIRST_PLAUSIBLE <= number / per <= now + SECONDS_PER_DAY for number in found)
        for unit, per in PER_SECOND.items()
    }
    for unit, form in COMPACT.items():
        fitting[unit] = sum(_is_compact(text, form, now) for text in numbers)
    best = max(fitting, key=lambda unit: fitting[unit])
    return TimeForm(best if fitting[best] else TimeUnit.SECONDS, fractions=has_fractions(numbers))


def has_fractions(values: Sequence[object]) -> bool:
    """Whether some of the values that are numbers are written with a point, a comma or an exponent."""
    texts = [str(value).strip() for value in values]
    return any(NUMBER.fullmatch(text) and not text.removeprefix("-").isdecimal() for text in texts)


def _is_compact(text: str, form: str, now: float) -> bool:
    if len(text) != {"%Y%m%d": 8, "%Y%m%d%H%M": 12, "%Y%m%d%H%M%S": 14}[form]:
        return False
    try:
        time = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC).timestamp()
    except ValueError:
        return False
    return FIRST_PLAUSIBLE <= time <= now + SECONDS_PER_DAY


def time_fields(column: str, sql_type: str, form: TimeForm, now: int, where: str) -> tuple[Field, str]:
    """A time, and SQL of its milliseconds within the second.

    Args:
        column: The raw column.
        sql_type: Its type.
        form: How its values are written; not AUTO.
        now: Seconds since 1970; a time more than a day later is no time.
        where: What messages call the column.

    Returns:
        The field, whose value is BIGINT seconds since 1970; times without a zone are UTC.

    Raises:
        DataError: For a type that holds no times.
    """
    latest = now + SECONDS_PER_DAY
    if sql_type == "FLOAT":
        raise DataError(
            f"{where} holds 32-bit floats, which are exact to minutes only; expected whole numbers or float64"
        )
    if sql_type.startswith(("TIMESTAMP", "DATE")):
        kind = "TIMESTAMPTZ" if sql_type == "TIMESTAMP WITH TIME ZONE" else "TIMESTAMP"
        return _instant(f"TRY_CAST({column} AS {kind})", "a time", latest)
    if sql_type not in (TEXT_TYPE, *WHOLE_TYPES, *FLOAT_TYPES) and not sql_type.startswith("DECIMAL"):
        raise DataError(f"{where} is {sql_type}; expected times")
    text = column if sql_type == TEXT_TYPE else f"{column}::VARCHAR"
    if form.format is not None:
        return _instant(f"try_strptime({text}, {quoted(form.format)})::TIMESTAMPTZ", f"one as {form.format}", latest)
    if form.unit in COMPACT:
        day = f"CASE WHEN length({text}) = {len(form.unit.value)} THEN try_strptime({text}, '{COMPACT[form.unit]}') END"
        return _instant(f"({day})::TIMESTAMPTZ", f"one as {form.unit.value}", latest)
    if form.unit is TimeUnit.ISO:
        if sql_type == TEXT_TYPE:
            return _instant(f"TRY_CAST({text} AS TIMESTAMPTZ)", "an ISO 8601 time", latest)
        form = TimeForm(TimeUnit.SECONDS)
    return _number(column, sql_type, form, latest)


def _instant(instant: str, expected: str, latest: int) -> tuple[Field, str]:
    milliseconds = f"epoch_ms(CASE WHEN isfinite({instant}) THEN {instant} END)"
    value = f"({milliseconds} // 1000)"
    end = datetime.datetime.fromtimestamp(latest, datetime.UTC).strftime("%Y-%m-%d %H:%M")
    reason = f"is not a time; expected {expected} from 1970 to {end} UTC (a day from now)".replace("'", "''")
    return Field(value, f"coalesce({value} BETWEEN 0 AND {latest}, false)", f"'{reason}'"), f"({milliseconds} % 1000)"


def _number(column: str, sql_type: str, form: TimeForm, latest: int) -> tuple[Field, str]:
    per = PER_SECOND[form.unit]
    number = f"TRY_CAST({column} AS BIGINT)"
    valid = whole(column) if sql_type == TEXT_TYPE else f"coalesce({number} = {column}, false)"
    value, within = (number, "0") if per == 1 else (f"({number} // {per})", f"({number} % {per} // {per // 1000})")
    if form.fractions:
        point = f"replace({column}, ',', '.')" if sql_type == TEXT_TYPE else column
        # A double has 15 digits: enough for milliseconds of this century.
        milliseconds = f"floor(TRY_CAST({point} AS DOUBLE) * 1000 / {per})"
        milliseconds = f"(CASE WHEN abs({milliseconds}) < 1e17 THEN {milliseconds}::BIGINT END)"
        valid, value, within = "true", f"({milliseconds} // 1000)", f"({milliseconds} % 1000)"
    earliest = FIRST_FINE if per > 1 else 0
    kind = "" if form.fractions else "whole "
    reason = (
        f"is not a time; expected {kind}{form.unit} since 1970 in {earliest * per}..{latest * per} (a day from now)"
    )
    inside = f"coalesce({value} BETWEEN {earliest} AND {latest}, false)"
    return Field(value, f"({valid} AND {inside})", f"'{reason}'"), within
