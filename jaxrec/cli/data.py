"""The commands that make prepared data: prepare, append, check."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jaxrec.config import FilterOn, PrepareConfig, SplitKind, Ties
from jaxrec.data.append import append as append_events
from jaxrec.data.prepare import prepare as prepare_data
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.bad_rows import QUARANTINE_FILE, OnBadRows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.connection import MEMORY_GB
from jaxrec.data.reading.rules import IdKind, TimeUnit
from jaxrec.data.reading.sources import ColumnNames
from jaxrec.data.schema import RatingScale
from jaxrec.data.store import check_prepared

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_PATH = click.Path(exists=True, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)

_READ_OPTIONS = (
    click.option("--user-col", help="Column of the users; recognized where it is userId or user_id."),
    click.option("--item-col", help="Column of the items; recognized where it is movieId or item_id."),
    click.option("--rating-col", help="Column of the ratings; without one the log is implicit."),
    click.option("--time-col", help="Column of the times; recognized where it is timestamp."),
    click.option(
        "--time-unit",
        type=click.Choice([u.value for u in TimeUnit]),
        default=TimeUnit.AUTO.value,
        help="Of the times; recognized by the first rows where not given.",
    ),
    click.option(
        "--on-bad-rows",
        type=click.Choice([b.value for b in OnBadRows]),
        default=OnBadRows.FAIL.value,
        help="Stop and name them, or set them aside in OUT/quarantine.csv and go on.",
    ),
    click.option("--memory", type=click.FloatRange(0.25, 1e6), default=MEMORY_GB, help="GB for the engine that sorts."),
)


_FILTER_AND_SPLIT_OPTIONS = (
    click.option(
        "--min-user-ratings",
        type=click.IntRange(0),
        default=PrepareConfig.min_user_ratings,
        help="Users with fewer are dropped.",
    ),
    click.option(
        "--min-movie-ratings",
        type=click.IntRange(0),
        default=PrepareConfig.min_movie_ratings,
        help="Movies with fewer are dropped; 0 keeps those that nobody rated.",
    ),
    click.option(
        "--split",
        type=click.Choice([k.value for k in SplitKind]),
        default=PrepareConfig.split.value,
        help="What is held out: each user's last events, the last tenth of all time, or a tenth of the users.",
    ),
    click.option(
        "--ties",
        type=click.Choice([t.value for t in Ties]),
        default=PrepareConfig.ties.value,
        help="What orders one user's equal timestamps: the rows of the file, or chance.",
    ),
    click.option(
        "--filter-on",
        type=click.Choice([f.value for f in FilterOn]),
        default=PrepareConfig.filter_on.value,
        help="Leave-one-out: count ratings over the whole log, as the literature does, or in training alone.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=PrepareConfig.seed,
        help="For --ties random and --split user-held-out.",
    ),
)


def filter_and_split_options(command: Callable[..., None]) -> Callable[..., None]:
    """What every preparation is told: thresholds, split, ties and seed."""
    return _with_options(command, _FILTER_AND_SPLIT_OPTIONS)


def _read_options(command: Callable[..., None]) -> Callable[..., None]:
    return _with_options(command, _READ_OPTIONS)


def _with_options(command: Callable[..., None], options: tuple[Callable[..., Any], ...]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("ratings", type=EXISTING_PATH)
@click.option("--movies", type=EXISTING_FILE, help="Titles and genres; found beside the ratings in a folder or zip.")
@filter_and_split_options
@click.option("--rating-scale", type=float, nargs=2, help="Minimum and maximum; recognized where not given.")
@click.option(
    "--ids",
    type=click.Choice([k.value for k in IdKind]),
    default=IdKind.AUTO.value,
    help="Whether ids are whole numbers or text; recognized where not given.",
)
@_read_options
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the prepared data; replaced if it exists.")
def prepare(
    ratings: Path,
    movies: Path | None,
    min_user_ratings: int,
    min_movie_ratings: int,
    split: str,
    ties: str,
    filter_on: str,
    rating_scale: tuple[float, float] | None,
    ids: str,
    seed: int,
    user_col: str | None,
    item_col: str | None,
    rating_col: str | None,
    time_col: str | None,
    time_unit: str,
    on_bad_rows: str,
    memory: float,
    out: Path,
) -> None:
    """Reads RATINGS, checks every row, and writes prepared data.

    RATINGS is a MovieLens folder, zip or file (CSV, .dat, u.data), any CSV with a header, also as .gz, or Parquet (a
    file or a folder).
    """
    scale = RatingScale(*rating_scale) if rating_scale else None
    config = PrepareConfig(
        min_user_ratings, min_movie_ratings, SplitKind(split), Ties(ties), scale, seed, FilterOn(filter_on)
    )
    columns = ColumnNames(user_col, item_col, rating_col, time_col)
    options = ReadOptions(columns, TimeUnit(time_unit), IdKind(ids), IdKind(ids))
    from jaxrec.data.report import write_report  # brings matplotlib, which takes a second to load

    result = prepare_data(
        ratings,
        movies,
        config,
        out=out,
        options=options,
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
        add_files=write_report,
    )
    _print_prepared(result, out)


@click.command()
@click.argument("data", type=EXISTING_FOLDER)
@click.argument("ratings", type=EXISTING_PATH)
@click.option("--movies", type=EXISTING_FILE, help="Titles and genres of new movies.")
@_read_options
@click.option("--out", type=NEW_FOLDER, help="Folder for the result; DATA itself is replaced where not given.")
def append(
    data: Path,
    ratings: Path,
    movies: Path | None,
    user_col: str | None,
    item_col: str | None,
    rating_col: str | None,
    time_col: str | None,
    time_unit: str,
    on_bad_rows: str,
    memory: float,
    out: Path | None,
) -> None:
    """Adds the events of RATINGS to prepared DATA, without its old files; known users and movies keep their index."""
    columns = ColumnNames(user_col, item_col, rating_col, time_col)
    options = ReadOptions(columns, TimeUnit(time_unit))
    out = out or data
    from jaxrec.data.report import write_report

    result = append_events(
        data,
        ratings,
        movies,
        out=out,
        options=options,
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
        add_files=write_report,
    )
    _print_prepared(result, out)


@click.command()
@click.argument("data", type=EXISTING_FOLDER)
def check(data: Path) -> None:
    """Compares every file of prepared DATA with its checksum."""
    click.echo(f"{data}: {check_prepared(data):,} bytes are as they were written")


def _print_prepared(data: PreparedData, out: Path) -> None:
    for name, value in {**data.input, **data.summary()}.items():
        if name == "bad_rows_by_field":
            continue
        click.echo(f"{name}: {value}")
    click.echo(f"report: {out / 'report.json'}, {out / 'report.png'}")
    click.echo(f"rating scale: {data.config.rating_scale or 'no ratings'}")
    if data.input["bad_rows"]:
        by_field = ", ".join(f"{field} {count}" for field, count in data.input["bad_rows_by_field"].items())
        click.echo(f"in quarantine: {data.input['bad_rows']} rows ({by_field}), see {out / QUARANTINE_FILE}")
