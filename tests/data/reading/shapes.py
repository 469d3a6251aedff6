"""Shapes of logs: each a small file as people have it, and what `jaxrec prepare` makes of it.

docs/log_shapes.md is made of this table: python -m tests.data.reading.shapes
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.columns import ColumnNames
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.rules import IdKind, TimeUnit
from jaxrec.data.reading.sources import TextOptions
from jaxrec.errors import DataError

# user, item, rating and time (seconds) that each shape holds.
EVENTS = [(1, 7, 4.0, 1_500_000_000), (1, 12, 3.0, 1_500_086_400), (2, 7, 5.0, 1_500_172_800)]
DAYS = ["2017-07-14", "2017-07-15", "2017-07-16"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One file. `options`: as on the command line, and `read`: the same in Python; `refused`: part of the message."""

    name: str
    content: str | bytes | Callable[[Path], object]
    options: str = ""
    read: ReadOptions = dataclasses.field(default_factory=ReadOptions)
    file: str = "log.csv"
    ratings: bool = True
    times: tuple[int, ...] = tuple(event[3] for event in EVENTS)
    refused: str = ""


def table(separator: str = ",", header: str = "userId,movieId,rating,timestamp", times: list[str] | None = None) -> str:
    """The events as text."""
    moments = times or [str(time) for *_, time in EVENTS]
    rows = [(str(u), str(i), f"{r:g}", t) for (u, i, r, _), t in zip(EVENTS, moments, strict=True)]
    return "".join(separator.join(row) + "\n" for row in [tuple(header.split(",")), *rows] if row != ("",))


def lines(keys: str) -> str:
    """The events as JSON lines."""
    return "".join(json.dumps(dict(zip(keys.split(","), event, strict=True))) + "\n" for event in EVENTS)


def parquet(**times: object) -> Callable[[Path], object]:
    """Writes Parquet with times of a type."""
    frame = pd.DataFrame(EVENTS, columns=["userId", "movieId", "rating", "timestamp"])
    return lambda path: frame.assign(**times).to_parquet(path, index=False)  # type: ignore[arg-type]


def columns(*order: str) -> ReadOptions:
    """Options of a file without a header."""
    return ReadOptions(columns=ColumnNames(order=order))


MOMENTS = pd.to_datetime([event[3] for event in EVENTS], unit="s")
MIDNIGHTS = tuple(event[3] // 86_400 * 86_400 for event in EVENTS)
MINUTES = tuple(event[3] // 60 * 60 for event in EVENTS)
PLAIN = table()

SHAPES = (
    Shape("comma, header", PLAIN),
    Shape("semicolon", table(";")),
    Shape("tab", table("\t")),
    Shape("vertical bar", table("|")),
    Shape("`::` with a header", table("::")),
    Shape("a delimiter of its own", table("~"), "--delimiter '~'", ReadOptions(text=TextOptions("~"))),
    Shape("spaces after the commas", table(", ")),
    Shape("everything in quotes", re.sub(r"[^,\n]+", r'"\g<0>"', PLAIN)),
    Shape("decimal commas", table(";", times=["1500000000,0", "1500086400,0", "1500172800,0"]).replace(
        ";4;", ";4,0;")),
    Shape("UTF-8 with a byte order mark", PLAIN.encode("utf-8-sig")),
    Shape("UTF-16, as Excel's Unicode text", table("\t").encode("utf-16")),
    Shape("UTF-16 without a mark", PLAIN.encode("utf-16-le")),
    Shape("Windows-1252, recognized by its words", table(header="userId,movieId,rating,timestamp,café").replace(
        "00\n", "00,Zoë\n").encode("cp1252")),
    Shape("Latin-1, as an option", PLAIN.encode("latin-1"), "--encoding latin-1",
          ReadOptions(text=TextOptions(None, "latin-1"))),
    Shape("CR LF, and CR alone", PLAIN.replace("\n", "\r\n", 2).replace("\n1,12", "\r1,12")),
    Shape("names of Amazon", table(header="reviewerID,asin,overall,unixReviewTime")),
    Shape("names of Book-Crossing", table(";", "User-ID,ISBN,Book-Rating,Date")),
    Shape("names of RecBole", table("\t", "user_id:token,item_id:token,rating:float,timestamp:float"),
          file="log.inter"),
    Shape("names of Retailrocket, no ratings", "timestamp,visitorid,event,itemid,transactionid\n" + "".join(
        f"{t}000,{u},view,{i},\n" for u, i, _, t in EVENTS), ratings=False),
    Shape("names in capitals", table(header="USER_ID,ITEM_ID,RATING,TIMESTAMP")),
    Shape("other names, as an option", table(header="who,what,grade,when"),
          "--user-col who --item-col what --rating-col grade --time-col when",
          ReadOptions(columns=ColumnNames("who", "what", "grade", "when"))),
    Shape("other names", table(header="who,what,grade,when"), refused="column userId or user_id"),
    Shape("two columns that could be the items", "user,artist,track,time\n" + "".join(
        f"{u},{i},{i},{t}\n" for u, i, _, t in EVENTS), ratings=False,
          refused="the columns artist and track could both be the movieId or item_id; name the one that is meant: "
          "--item-col artist"),
    Shape("ratings that are none, left out", table(), "--rating-col none",
          ReadOptions(columns=ColumnNames(rating="none")), ratings=False),
    Shape("no header, as an option", table(header=""), "--columns user,item,rating,time",
          columns("user", "item", "rating", "time")),
    Shape("no header, a column that is not read", "".join(f"{t},{u},x,{i}\n" for u, i, _, t in EVENTS),
          "--columns time,user,-,item", columns("time", "user", "-", "item"), ratings=False),
    Shape("no header", table(header=""), refused="looks like a row and not like a header; say what the 4 columns hold: "
          "--columns user,item,rating,time"),
    Shape("MovieLens 1M", table("::", ""), file="ratings.dat"),
    Shape("MovieLens 100K", table("\t", ""), file="u.data"),
    Shape("JSON lines", lines("user_id,item_id,stars,timestamp"), file="log.jsonl"),
    Shape("a JSON list", json.dumps([{"user": 1, "item": 2, "time": 3}]), file="log.json",
          refused="a JSON list; expected JSON lines: one object in each line"),
    Shape("milliseconds", table(times=[f"{t}000" for *_, t in EVENTS])),
    Shape("microseconds", table(times=[f"{t}000000" for *_, t in EVENTS])),
    Shape("nanoseconds", table(times=[f"{t}000000000" for *_, t in EVENTS])),
    Shape("seconds with fractions", table(times=[f"{t}.25" for *_, t in EVENTS])),
    Shape("seconds as a float", table(times=[f"{t}.0" for *_, t in EVENTS])),
    Shape("ISO 8601 with a zone", table(
        times=["2017-07-14T04:40:00+02:00", "2017-07-15 02:40Z", "2017-07-16T02:40:00Z"])),
    Shape("dates", table(times=DAYS), times=MIDNIGHTS),
    Shape("dates with slashes", table(times=[day.replace("-", "/") for day in DAYS]), times=MIDNIGHTS),
    Shape("days as numbers", table(times=[day.replace("-", "") for day in DAYS]), times=MIDNIGHTS),
    Shape("minutes as numbers", table(times=[f"{day.replace('-', '')}0240" for day in DAYS]), times=MINUTES),
    Shape("seconds as numbers", table(times=[f"{day.replace('-', '')}024000" for day in DAYS])),
    Shape("day.month.year, as an option", table(times=["14.07.2017 02:40", "15.07.2017 02:40", "16.07.2017 02:40"]),
          "--time-format '%d.%m.%Y %H:%M'", ReadOptions(time_format="%d.%m.%Y %H:%M")),
    Shape("day.month.year", table(times=["14.07.2017 02:40", "15.07.2017 02:40", "16.07.2017 02:40"]),
          refused="times such as '14.07.2017 02:40' are in no form that is known"),
    Shape("times that lie ahead", table(times=["4000000000", "4000000001", "4000000002"]),
          refused="is not a time; expected whole seconds since 1970"),
    Shape("Parquet, times without a zone", parquet(timestamp=MOMENTS), file="log.parquet"),
    Shape("Parquet, times in UTC", parquet(timestamp=MOMENTS.tz_localize("UTC")), file="log.parquet"),
    Shape("Parquet, times in another zone", parquet(timestamp=MOMENTS.tz_localize("UTC").tz_convert("Asia/Tokyo")),
          file="log.parquet"),
    Shape("Parquet, dates", parquet(timestamp=MOMENTS.date), file="log.parquet", times=MIDNIGHTS),
    Shape("Parquet, whole milliseconds", parquet(timestamp=[t * 1000 for *_, t in EVENTS]), file="log.parquet"),
    Shape("a marker for a missing rating, as an option", table().replace("1,12,3,", "1,12,-1,"), "--missing-rating -1",
          ReadOptions(missing_ratings=(-1.0,))),
    Shape("ratings of no known scale", table().replace(",4,", ",4000,").replace(",3,", ",-7,"),
          refused="the ratings fit none of the known scales"),
    Shape("ids that became floats", table().replace(",7,", ",7.0,").replace(",12,", ",12.0,"),
          refused="ids such as 123.0 or 1.23E+10 are floats"),
    Shape("ids that became floats, as text", table().replace(",7,", ",7.0,").replace(",12,", ",12.0,"), "--ids text",
          ReadOptions(users=IdKind.TEXT, items=IdKind.TEXT)),
    Shape("seconds, as an option", table(times=["1", "2", "3"]), "--time-unit seconds",
          ReadOptions(time_unit=TimeUnit.SECONDS),
          times=(1, 2, 3)),
)  # fmt: skip


def outcome(shape: Shape, folder: Path) -> tuple[str, pd.DataFrame | None]:
    """What a shape gives: a line for people, and its events; None where it is refused."""
    path = folder / shape.file
    if callable(shape.content):
        shape.content(path)
    else:
        path.write_bytes(shape.content.encode() if isinstance(shape.content, str) else shape.content)
    try:
        frame, scale = read_ratings(path, options=shape.read)
    except DataError as error:
        return f"refused: {str(error).replace(str(path), shape.file)}", None
    return f"read; {'no ratings' if scale is None else f'ratings {scale}'}", frame


def page(folder: Path) -> str:
    """docs/log_shapes.md."""
    rows = []
    for at, shape in enumerate(SHAPES):
        (folder / str(at)).mkdir()
        said, _ = outcome(shape, folder / str(at))
        said = re.sub(r"in 0\.\.\d+ \(a", "up to NOW (a", said)
        options = f"`{shape.options}`" if shape.options else ""
        rows.append(f"| {shape.name} | {options} | {said} |".replace("||", "\\|\\|"))
    return HEAD + "\n".join(row.replace("`|`", "`\\|`") for row in rows) + "\n"


HEAD = """# Shapes of logs

Each row is a small log that the tests write and read (`tests/data/reading/shapes.py`), and this page is made from their
outcomes. A test compares both. [Data](data.md#what-can-be-read) explains the options.

<!-- figures: none -->

| shape | options | outcome |
|---|---|---|
"""

if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        Path("docs/log_shapes.md").write_text(page(Path(scratch)), encoding="utf-8")
