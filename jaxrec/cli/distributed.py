"""`jaxrec prepare-distributed`: files, a cluster and the terminal around `jaxrec.data.distributed.prepare`."""

from pathlib import Path
from typing import Any

import click

from jaxrec.cli.data import filter_and_split_options, prepare_config
from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, NEW_FOLDER


@click.command()
@click.argument("folder", type=EXISTING_FOLDER)
@click.option("--movies", type=EXISTING_FILE, help="movieId,title,genres; without it there are no titles and genres.")
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the shards; replaced if it exists.")
@click.option(
    "--shards",
    type=click.IntRange(1),
    required=True,
    help="Number of shards. Each training process reads whole shards: a multiple of their number gives all of them as "
    "many events.",
)
@click.option("--scheduler", help="Address of a Dask scheduler; without it, workers are started on this machine.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Number of worker processes on this machine.")
@filter_and_split_options
def prepare_distributed(
    folder: Path,
    movies: Path | None,
    out: Path,
    shards: int,
    scheduler: str | None,
    workers: int,
    **options: Any,
) -> None:
    """Prepares the Parquet files under FOLDER on several machines, into shards by user."""
    from tqdm import tqdm

    from jaxrec.data.distributed import prepare as driver

    config = prepare_config(options)
    with driver.cluster(scheduler, workers) as client, tqdm(unit="task") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        index = driver.prepare_distributed(client, folder, out, shards, movies, config, progress=show)
    click.echo(f"{out}: {index['events']} events of {index['users']} users in {shards} shards")
