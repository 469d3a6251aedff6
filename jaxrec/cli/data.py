"""The commands that make prepared data: prepare, append, check, fetch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, EXISTING_PATH, NEW_FOLDER, SEED, with_options
from jaxrec.config import MEMORY_GB, FilterOn, PrepareConfig, RatingScale, Repeats, SplitKind, Ties
from jaxrec.data.movielens import BASE_URL, DATASETS
from jaxrec.data.reading.bad_rows import QUARANTINE_FILE, OnBadRows
from jaxrec.data.reading.rules import IdKind, TimeUnit

if TYPE_CHECKING:
    from jaxrec.data.prepared import PreparedData
    from jaxrec.data.reading.check import ReadOptions

read_options = with_options(
    click.option("--user-col", help="Column of the user ids.  [default: recognized, such as userId or customer_id]"),
    click.option("--item-col", help="Column of the item ids.  [default: recognized, such as movieId or asin]"),
    click.option(
        "--rating-col",
        help="Column of the ratings; none: read no ratings.  [default: recognized, such as rating or stars]",
    ),
    click.option("--time-col", help="Column of the times.  [default: recognized, such as timestamp or date]"),
    click.option(
        "--columns",
        metavar="NAMES",
        help="What the columns of a file without a header hold, such as user,item,rating,time; - for one that is not"
        " read.",
    ),
    click.option("--delimiter", help="What separates fields, such as ';' or tab.  [default: recognized]"),
    click.option("--encoding", help="Encoding of text, such as cp1252.  [default: recognized]"),
    click.option(
        "--time-unit",
        type=click.Choice([u.value for u in TimeUnit]),
        default=TimeUnit.AUTO.value,
        help="Form of the times; auto: recognized from the first rows.",
    ),
    click.option("--time-format", help="Form of the times in the letters of strptime, such as '%d.%m.%Y %H:%M'."),
    click.option(
        "--missing-rating",
        type=float,
        multiple=True,
        metavar="VALUE",
        help="A value of the rating column that means that there is no rating, such as 0 or -1. May be repeated.",
    ),
    click.option(
        "--on-bad-rows",
        type=click.Choice([b.value for b in OnBadRows]),
        default=OnBadRows.FAIL.value,
        help="fail: stop and name rows that break the rules; quarantine: set them aside in quarantine.csv.",
    ),
    click.option(
        "--memory", type=click.FloatRange(0.25, 1e6), default=MEMORY_GB, help="GB of memory for reading and sorting."
    ),
)
id_option = click.option(
    "--ids",
    type=click.Choice([k.value for k in IdKind]),
    default=IdKind.AUTO.value,
    help="Whether ids are whole numbers or text; auto: recognized.",
)

repeats_option = click.option(
    "--repeats",
    type=click.Choice([r.value for r in Repeats]),
    default=PrepareConfig.repeats.value,
    help="Rows with the user, item and time of an earlier one: keep them as events, leave all but the first out, or"
    " fail; auto: keep without ratings, first with them.",
)

filter_and_split_options = with_options(
    click.option(
        "--min-user-ratings",
        type=click.IntRange(0),
        default=PrepareConfig.min_user_ratings,
        help="Drop users with fewer ratings.",
    ),
    click.option(
        "--min-movie-ratings",
        type=click.IntRange(0),
        default=PrepareConfig.min_movie_ratings,
        help="Drop movies with fewer ratings; 0 also keeps those of --movies and --features without ratings.",
    ),
    click.option(
        "--split",
        type=click.Choice([k.value for k in SplitKind]),
        default=PrepareConfig.split.value,
        help="What is held out: each user's last events, the last tenth of the whole time, or a tenth of the users.",
    ),
    click.option(
        "--ties",
        type=click.Choice([t.value for t in Ties]),
        default=PrepareConfig.ties.value,
        help="Order of one user's events with equal timestamps: that of the file's rows, or random.",
    ),
    click.option(
        "--filter-on",
        type=click.Choice([f.value for f in FilterOn]),
        default=PrepareConfig.filter_on.value,
        help="Under leave-one-out, count ratings over the whole log, as the literature does, or in training only.",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=PrepareConfig.seed,
        help="Seed of --ties random and --split user-held-out.",
    ),
    repeats_option,
)


@click.command()
@click.argument("ratings", type=EXISTING_PATH, nargs=-1, required=True)
@click.option("--movies", type=EXISTING_FILE, help="Titles and genres; found beside the ratings in a folder or zip.")
@click.option(
    "--features",
    type=EXISTING_FILE,
    help="What else is known of the items, CSV or JSON lines: item ids and columns of categories, of lists (A|B), or of"
    " numbers.",
)
@filter_and_split_options
@click.option("--rating-scale", type=float, nargs=2, help="Lowest and highest possible rating; recognized by default.")
@id_option
@read_options
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the prepared data; replaced if it exists.")
def prepare(
    ratings: tuple[Path, ...],
    movies: Path | None,
    features: Path | None,
    rating_scale: tuple[float, float] | None,
    ids: str,
    memory: float,
    on_bad_rows: str,
    out: Path,
    **options: Any,
) -> None:
    """Reads RATINGS, checks every row, and writes prepared data.

    RATINGS is a file, a folder of files, or several files: CSV (any delimiter and encoding, with or without a header),
    JSON lines, Parquet, or MovieLens as it comes; also as .gz or .zip.
    """
    from jaxrec.data.prepare import prepare as prepare_data
    from jaxrec.data.report import write_report

    config = prepare_config(options, RatingScale(*rating_scale) if rating_scale else None)
    result = prepare_data(
        ratings,
        movies,
        config,
        features=features,
        out=out,
        options=reading(options, ids),
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
        add_files=write_report,
    )
    _print_prepared(result, out)


@click.command()
@click.argument("data", type=EXISTING_FOLDER)
@click.argument("ratings", type=EXISTING_PATH, nargs=-1, required=True)
@click.option("--movies", type=EXISTING_FILE, help="Titles and genres of new movies.")
@click.option("--features", type=EXISTING_FILE, help="What else is known of new items, or of known ones.")
@read_options
@click.option("--out", type=NEW_FOLDER, help="Folder for the result; by default it replaces DATA.")
def append(
    data: Path,
    ratings: tuple[Path, ...],
    movies: Path | None,
    features: Path | None,
    memory: float,
    on_bad_rows: str,
    out: Path | None,
    **options: Any,
) -> None:
    """Adds the events of RATINGS to prepared DATA; the original files are not needed. Known ids keep their index."""
    from jaxrec.data.append import append as append_events
    from jaxrec.data.report import write_report

    out = out or data
    result = append_events(
        data,
        ratings,
        movies,
        features=features,
        out=out,
        options=reading(options),
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
        add_files=write_report,
    )
    _print_prepared(result, out)


@click.command()
@click.argument("data", type=EXISTING_FOLDER)
def check(data: Path) -> None:
    """Compares every file of prepared DATA with its checksum."""
    from jaxrec.data.store import check_prepared

    click.echo(f"{data}: {check_prepared(data):,} bytes are as they were written")


@click.command()
@click.argument("name", type=click.Choice(DATASETS))
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for NAME.zip and its terms.")
@click.option("--base-url", default=BASE_URL, help="Folder on the web that holds NAME.zip: GroupLens, or a mirror.")
def fetch(name: str, out: Path, base_url: str) -> None:
    """Downloads the MovieLens data set NAME and verifies it."""
    from jaxrec.data.movielens import fetch as fetch_archive

    fetch_archive(name, out, base_url, say=click.echo)


def prepare_config(options: dict[str, Any], rating_scale: RatingScale | None = None) -> PrepareConfig:
    """The configuration that `filter_and_split_options` say."""
    return PrepareConfig(
        min_user_ratings=options["min_user_ratings"],
        min_movie_ratings=options["min_movie_ratings"],
        split=SplitKind(options["split"]),
        ties=Ties(options["ties"]),
        rating_scale=rating_scale,
        seed=options["seed"],
        filter_on=FilterOn(options["filter_on"]),
        repeats=Repeats(options["repeats"]),
    )


def reading(options: dict[str, Any], ids: str = IdKind.AUTO.value) -> ReadOptions:
    """How a log is to be read, as `read_options` and `id_option` say."""
    from jaxrec.data.reading.check import ReadOptions
    from jaxrec.data.reading.columns import ColumnNames
    from jaxrec.data.reading.sources import TextOptions

    order = options["columns"]
    delimiter = options["delimiter"]
    return ReadOptions(
        ColumnNames(
            options["user_col"],
            options["item_col"],
            options["rating_col"],
            options["time_col"],
            None if order is None else tuple(name.strip() for name in order.split(",")),
        ),
        TextOptions({"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter), options["encoding"]),
        TimeUnit(options["time_unit"]),
        options["time_format"],
        options["missing_rating"],
        IdKind(ids),
        IdKind(ids),
    )


def print_counts(counts: Mapping[str, Any]) -> None:
    """What was read, a line for each value."""
    for name, value in counts.items():
        if name not in ("bad_rows_by_field", "notes"):
            click.echo(f"{name}: {value}")


def print_oddities(counts: Mapping[str, Any], quarantine: Path) -> None:
    """What was set aside, and what is odd about a log."""
    if counts["bad_rows"]:
        by_field = ", ".join(f"{field} {count}" for field, count in counts["bad_rows_by_field"].items())
        click.echo(f"in quarantine: {counts['bad_rows']} rows ({by_field}), see {quarantine}")
    for note in counts["notes"]:
        click.echo(f"note: {note}")


def _print_prepared(data: PreparedData, out: Path) -> None:
    print_counts({**data.input, **data.summary()})
    click.echo(f"report: {out / 'report.json'}, {out / 'report.png'}")
    click.echo(f"rating scale: {data.config.rating_scale or 'no ratings'}")
    print_oddities(data.input, out / QUARANTINE_FILE)
