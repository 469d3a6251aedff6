"""`python -m serve log`: copies what a store has logged."""

from pathlib import Path

import click

from serve.cli.options import FILE


@click.command("log")
@click.argument("store")
@click.argument("out", type=FILE, metavar="OUT.sqlite")
def command(store: str, out: Path) -> None:
    """Copy the log of STORE into the SQLite file OUT: all events and all recommendations, the training data of the next
    policy. STORE is a SQLite file, postgresql://... or redis://..., and may be in use by servers."""
    from tqdm import tqdm

    from serve.stores import open_store
    from serve.stores.base import StoreError
    from serve.stores.copy import copy_log

    if "://" not in store and not Path(store).is_file():
        raise click.ClickException(f"{store}: expected a store, there is no such file")
    try:
        with open_store(store) as opened, tqdm(unit=" rows", delay=1) as bar:

            def progress(rows: int) -> None:
                bar.update(rows)

            copied = copy_log(opened, out, progress)
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {copied.events} events, {copied.slates} recommendations")
