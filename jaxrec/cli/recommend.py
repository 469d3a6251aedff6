"""`jaxrec recommend`: answers for many users at once, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxrec.cli.data import id_option, print_counts, print_oddities, read_options, reading, repeats_option
from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, EXISTING_PATH, NEW_FILE
from jaxrec.config import Repeats
from jaxrec.data.reading.bad_rows import OnBadRows
from serve.cli.options import setting_option

if TYPE_CHECKING:
    from serve.settings import Provider, SearchBy


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
    type=NEW_FILE,
    required=True,
    help="CSV file for userId,rank,movieId,score, in the order of the requests or of the user ids; replaced as a whole"
    " or not at all.",
)
@id_option
@repeats_option
@read_options
@setting_option("provider")
@setting_option("threads")
@setting_option("search")
def recommend(
    model: Path,
    history: tuple[Path, ...],
    requests: Path | None,
    k: int,
    out: Path,
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

    Items of a user's history are not recommended. A user without history gets the most popular items, with their number
    of training events as the score. Rows in quarantine lie beside OUT: in top.quarantine.csv if OUT is top.csv.
    """
    from jaxrec.runs.batch_scoring import open_model, quarantine_file, recommend_log

    counts = recommend_log(
        open_model(model, provider or "auto", threads or 1, search or "auto"),
        history,
        out,
        requests=requests,
        k=k,
        options=reading(options, ids),
        repeats=Repeats(repeats),
        on_bad_rows=OnBadRows(on_bad_rows),
        memory_gb=memory,
    )
    print_counts(counts)
    print_oddities(counts, quarantine_file(out))
