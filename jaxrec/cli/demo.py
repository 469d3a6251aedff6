"""`jaxrec demo`."""

import contextlib
import threading
from pathlib import Path

import click

from jaxrec.cli.options import NEW_FOLDER, SEED, SEED_HELP


@click.command()
@click.option("--out", type=NEW_FOLDER, default=Path("runs/demo"), help="Folder for everything that the demo makes.")
@click.option("--seed", type=SEED, default=0, help=SEED_HELP)
@click.option(
    "--page", is_flag=True, help="Then serve a page for a browser until Ctrl-C. A demo in OUT is not made again."
)
def demo(out: Path, seed: int, page: bool) -> None:
    """Runs every stage on 100,004 MovieLens ratings: from the log to recommendations over gRPC."""
    import jax

    from jaxrec.runs.demo import is_demo, run_demo, served_page
    from jaxrec.training.host_memory import keep_freed_memory

    if jax.default_backend() == "cpu":
        keep_freed_memory()
    if not (page and is_demo(out)):
        run_demo(out, seed)
    if page:
        with served_page(out) as address:
            click.echo(f"\nOpen {address} in a browser. Ctrl-C ends the server.")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
