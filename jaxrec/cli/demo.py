"""`jaxrec demo`."""

from pathlib import Path

import click

from jaxrec.cli.options import NEW_FOLDER, SEED, SEED_HELP


@click.command()
@click.option("--out", type=NEW_FOLDER, default=Path("runs/demo"), help="Folder for everything that the demo makes.")
@click.option("--seed", type=SEED, default=0, help=SEED_HELP)
def demo(out: Path, seed: int) -> None:
    """Runs every stage on 100,004 MovieLens ratings: from the log to recommendations over gRPC."""
    import jax

    from jaxrec.runs.demo import run_demo
    from jaxrec.training.host_memory import keep_freed_memory

    if jax.default_backend() == "cpu":
        keep_freed_memory()
    run_demo(out, seed)
