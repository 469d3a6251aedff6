"""`jaxrec recommend`: answers for many users at once, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxrec.cli.data import id_option, print_counts, print_oddities, read_options, reading, repeats_option
from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, EXISTING_PATH, given_options, option_name
from jaxrec.config import Repeats
from jaxrec.data.reading.bad_rows import OnBadRows
from serve.cli.extras import check_extras
from serve.cli.options import setting_option

if TYPE_CHECKING:
    from jaxrec.runs.batch.scoring import ModelSource
    from serve.settings import Provider, SearchBy

OPTIONS_OF_CLUSTER = ("model", "history", "out", "scheduler", "k", "repeats", "provider", "threads", "search")


@click.command()
@click.argument("model", type=EXISTING_FOLDER)
@click.option(
    "--history",
    type=EXISTING_PATH,
    required=True,
    multiple=True,
    help="The log of past events, in any form that `prepare` reads. May be repeated for several files.",
)
@click.option(
    "--requests",
    type=EXISTING_FILE,
    help="CSV with the columns userId,timestamp: for whom to recommend and when; only events up to then are used."
    "  [default: every user of the log, at no known time]",
)
@click.option("--k", type=click.IntRange(1), default=10, help="Items for each request.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="CSV file for userId,rank,movieId,score, in the order of the requests or of the user ids; with --scheduler a"
    " folder of Parquet files. Replaced as a whole or not at all.",
)
@click.option("--workers", type=click.IntRange(1), default=1, help="Processes of this machine that answer.")
@click.option(
    "--scheduler",
    help="Address of a Dask scheduler, whose workers read --history, a folder of Parquet files, and answer. They reach"
    " all paths under the same names.",
)
@id_option
@repeats_option
@read_options
@setting_option("provider")
@setting_option("threads")
@setting_option("search")
@click.pass_context
def recommend(
    context: click.Context,
    model: Path,
    history: tuple[Path, ...],
    requests: Path | None,
    k: int,
    out: Path,
    workers: int,
    scheduler: str | None,
    ids: str,
    repeats: str,
    memory: float,
    on_bad_rows: str,
    provider: Provider | None,
    threads: int | None,
    search: SearchBy | None,
    **options: Any,
) -> None:
    """Recommends for many users at once with the model directory MODEL, as the server would.

    Items of a user's history are not recommended. A user without history gets the most popular items, by training
    events and recent counts. Rows in quarantine lie beside OUT: in top.quarantine.csv if OUT is top.csv. The same
    command continues after an interruption.
    """
    from jaxrec.runs.batch.local import quarantine_file, recommend_log
    from jaxrec.runs.batch.scoring import ModelSource

    source = ModelSource(model.absolute(), provider or "auto", threads or 1, search or "auto")
    if scheduler is not None:
        _on_cluster(context, source, history, out, scheduler, k, Repeats(repeats))
        return
    counts = recommend_log(
        source,
        history,
        out,
        requests=requests,
        k=k,
        options=reading(options, ids),
        repeats=Repeats(repeats),
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
        workers=workers,
    )
    print_counts(counts)
    print_oddities(counts, quarantine_file(out))


def _on_cluster(
    context: click.Context,
    source: ModelSource,
    history: tuple[Path, ...],
    out: Path,
    scheduler: str,
    k: int,
    repeats: Repeats,
) -> None:
    """`recommend --scheduler`. Raises click.UsageError for options of one machine."""
    if unused := [name for name in given_options(context) if name not in OPTIONS_OF_CLUSTER]:
        raise click.UsageError(f"{option_name(unused[0])} is not possible with --scheduler")
    if len(history) > 1 or not history[0].is_dir():
        raise click.UsageError("with --scheduler, --history is one folder of Parquet files")
    check_extras("jaxrec recommend --scheduler", ("distributed",))

    from tqdm import tqdm

    from jaxrec.data.distributed.prepare import cluster
    from jaxrec.runs.batch.cluster import recommend_folder

    with cluster(scheduler, 1) as client, tqdm(unit="task") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        counts = recommend_folder(client, source, history[0], out, k=k, repeats=repeats, progress=show)
    print_counts(counts)
    for note in counts["notes"]:
        click.echo(f"note: {note}")
