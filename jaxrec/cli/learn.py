"""`jaxrec learn`: the options, and what is printed. The command imports what computes."""

import contextlib
from pathlib import Path

import click

from jaxrec.cli.export import INDEX
from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, NEW_FILE, NEW_FOLDER, mlflow_option
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.errors import DataError, TrainingStopped
from jaxrec.runs.learn.config import LearnConfig, Places
from jaxrec.training.stopping import stop_on_signals

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the command is to be given again


@click.command()
@click.option(
    "--store",
    required=True,
    envvar="JAXREC_STORE",
    help="The server's event store: a SQLite file, postgresql://... or redis://...  [env: JAXREC_STORE]",
)
@click.option("--data", type=EXISTING_FOLDER, required=True, help="The prepared data that RUN was trained on.")
@click.option("--run", type=EXISTING_FOLDER, required=True, help="The run to begin with, from `jaxrec train`.")
@click.option(
    "--models", type=NEW_FOLDER, required=True, help="The folder of versions that the server watches; gets new ones."
)
@click.option("--work", type=NEW_FOLDER, help="The folder of the loop.  [default: RUN.learn]")
@click.option("--metrics-file", type=NEW_FILE, help="File (*.prom) for the node exporter's textfile collector.")
@click.option(
    "--after",
    type=click.IntRange(0),
    default=LearnConfig.after,
    metavar="REVISION",
    help="Begin the loop after this revision of the store: earlier events are in DATA already.",
)
@click.option(
    "--least-events",
    type=click.IntRange(1),
    default=LearnConfig.least_events,
    help="Do nothing for fewer new events; they count for the next time.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 1),
    default=LearnConfig.margin,
    help="Share of the serving model's NDCG@10 that a retrained model may lose. It is published if the lower end of "
    "the 95 % interval of the difference is not below that loss, and the upper end is not below 0.",
)
@click.option(
    "--least-users",
    type=click.IntRange(1),
    default=LearnConfig.least_users,
    help="Refuse a retrained model if fewer users have a new held-out event to compare on.",
)
@click.option(
    "--keep",
    type=click.IntRange(2),
    default=LearnConfig.keep,
    help="Versions of the loop that stay, so that a server can roll back to them.",
)
@click.option(
    "--served/--no-served",
    default=LearnConfig.served,
    help="Whether to learn policies from the slates that were shown.",
)
@click.option(
    "--attribution-window",
    type=click.IntRange(0),
    help="As of `jaxrec rl served`, in seconds.  [default: the 99th percentile of the log]",
)
@click.option("--max-epochs", type=click.IntRange(1), help="As of `jaxrec train`.  [default: as RUN was trained]")
@click.option("--patience", type=click.IntRange(1), help="As of `jaxrec train`.  [default: as RUN was trained]")
@click.option(
    "--on-bad-rows",
    type=click.Choice([one.value for one in OnBadRows]),
    default=LearnConfig.on_bad_rows.value,
    help="Whether events that cannot be used end the command, or are set aside and counted.",
)
@click.option("--movies", type=EXISTING_FILE, help="Titles and genres of new items, as of `jaxrec append`.")
@click.option("--features", type=EXISTING_FILE, help="Features of items, as of `jaxrec append`.")
@click.option("--licence", type=EXISTING_FILE, help="Text about the data's licence, kept with each model.")
@click.option("--int8", is_flag=True, help="As of `jaxrec export`.")
@click.option("--index", type=click.Choice(list(INDEX)), default="auto", help="As of `jaxrec export`.")
@mlflow_option("Track each training, and keep the models that are published,")
def learn(
    store: str,
    data: Path,
    run: Path,
    models: Path,
    work: Path | None,
    metrics_file: Path | None,
    after: int,
    least_events: int,
    margin: float,
    least_users: int,
    keep: int,
    served: bool,
    attribution_window: int | None,
    max_epochs: int | None,
    patience: int | None,
    on_bad_rows: str,
    movies: Path | None,
    features: Path | None,
    licence: Path | None,
    int8: bool,
    index: str,
    mlflow: str | None,
) -> None:
    """Runs one round of the loop: what the server recorded becomes the next model version, or a reason why not.

    New events are appended to a copy of DATA, a copy of RUN is trained on them, and the result is exported to MODELS if
    it is not worse than what serves. RUN and DATA stay as they are; WORK/state.json says what happened. A command that
    was stopped or killed is resumed where it was when it is given again; stopped by SIGTERM or Ctrl-C, it ends with
    exit status 75. With no new events it does nothing.
    """
    import jax

    from jaxrec.runs.learn.loop import learn as run_round
    from jaxrec.runs.learn.metrics import write_metrics
    from jaxrec.runs.learn.state import read_state
    from jaxrec.training.host_memory import keep_freed_memory

    if "://" not in store and not Path(store).is_file():
        raise click.ClickException(f"{store}: expected a store, there is no such file")
    places = Places(store, run, data, models, work or run.with_name(f"{run.resolve().name}.learn"))
    config = LearnConfig(
        after=after,
        least_events=least_events,
        margin=margin,
        least_users=least_users,
        keep=keep,
        served=served,
        attribution_window=attribution_window,
        max_epochs=max_epochs,
        patience=patience,
        on_bad_rows=OnBadRows(on_bad_rows),
        movies=movies,
        features=features,
        licence=licence.read_text(encoding="utf-8") if licence else None,
        int8=int8,
        index=INDEX[index],
        mlflow=mlflow,
    )
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    with stop_on_signals() as stop:
        try:
            click.echo(run_round(places, config, stop).said)
        except TrainingStopped as stopped:
            click.echo(f"{stopped}; the same command resumes there")
            raise click.exceptions.Exit(STOPPED) from stopped
        finally:
            if metrics_file is not None:
                state = None
                with contextlib.suppress(DataError):
                    state = read_state(places.work)
                write_metrics(state, metrics_file)
