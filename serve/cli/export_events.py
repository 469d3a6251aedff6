"""`python -m serve export-events`: what a store has recorded, as a file to train on."""

from pathlib import Path

import click

from serve.cli.options import FILE


@click.command("export-events")
@click.argument("store")
@click.argument("out", type=FILE, metavar="OUT.csv|OUT.parquet")
@click.option(
    "--after",
    type=click.IntRange(0),
    default=0,
    metavar="REVISION",
    help="Only the events that arrived after this revision, which an earlier export printed.  [default: all]",
)
def command(store: str, out: Path, after: int) -> None:
    """Write the recorded events of STORE to OUT, as `jaxrec prepare` and `jaxrec append` read them: user_id, item_id,
    rating (empty: none) and timestamp in seconds. STORE is a SQLite file, postgresql://... or redis://..., and may be
    in use by servers. The last line printed is the revision to give to the next export."""
    from tqdm import tqdm

    from serve.event_log.export import export_events
    from serve.stores import open_store
    from serve.stores.base import StoreError

    if "://" not in store and not Path(store).is_file():
        raise click.ClickException(f"{store}: expected a store, there is no such file")
    try:
        with open_store(store) as opened, tqdm(unit=" events", delay=1) as bar:

            def progress(rows: int) -> None:
                bar.update(rows)

            exported = export_events(opened, out, after, progress)
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    left_out = f"; {exported.left_out} left out with a line break in an id (a .parquet file can hold them)"
    click.echo(f"{out}: {exported.events} events{left_out if exported.left_out else ''}")
    click.echo(exported.revision)
