"""`jaxrec prepare-distributed`: files, a cluster and the terminal around `jaxrec.data.distributed.prepare`."""

from pathlib import Path

import click
from tqdm import tqdm

from jaxrec.cli.data import filter_and_split_options
from jaxrec.config import FilterOn, PrepareConfig, SplitKind, Ties
from jaxrec.errors import DataError

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("folder", type=EXISTING_FOLDER)
@click.option("--movies", type=EXISTING_FILE, help="movieId,title,genres; without it there are no titles and genres.")
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the shards; replaced if it exists.")
@click.option("--shards", type=click.IntRange(1), required=True, help="At least as many as there will be hosts.")
@click.option("--scheduler", help="Address of a Dask scheduler; without it, workers are started here.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Processes to start here.")
@filter_and_split_options
def prepare_distributed(
    folder: Path,
    movies: Path | None,
    out: Path,
    shards: int,
    scheduler: str | None,
    workers: int,
    min_user_ratings: int,
    min_movie_ratings: int,
    split: str,
    ties: str,
    filter_on: str,
    seed: int,
) -> None:
    """Prepares the Parquet files under FOLDER on several machines, into shards by user."""
    try:
        from jaxrec.data.distributed import prepare as driver
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is missing; install it with: pip install 'jaxrec[distributed]'") from error

    config = PrepareConfig(
        min_user_ratings, min_movie_ratings, SplitKind(split), Ties(ties), seed=seed, filter_on=FilterOn(filter_on)
    )
    with driver.cluster(scheduler, workers) as client, tqdm(unit="task") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        index = driver.prepare_distributed(client, folder, out, shards, movies, config, progress=show)
    click.echo(f"{out}: {index['events']} events of {index['users']} users in {shards} shards")
