"""The commands of `python -m serve`."""

import logging
import signal
import threading
from pathlib import Path

import click

from serve.artifact import ArtifactError, read_artifact
from serve.engine import Provider, ProviderError
from serve.recommender import Recommender

model_argument = click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
provider_option = click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What runs the model. `auto`: CUDA where it works, else the CPU; `cuda`: nothing else will do.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Threads within one run of the model. Requests run beside each other anyway.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Serve an exported model directory with ONNX Runtime."""


@main.command(short_help="Answer gRPC calls with a model.")
@model_argument
@click.option(
    "--address",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen, without encryption. Port 0: a free one.",
)
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    default="events.sqlite",
    show_default=True,
    help="SQLite file with the events of all users; created when missing.",
)
@provider_option
@threads_option
def run(model: Path, address: str, store: Path, provider: Provider, threads: int) -> None:
    """Answer gRPC calls with the model directory MODEL until SIGTERM or SIGINT.

    Prints `serving MODEL_VERSION on HOST:PORT (provider NAME)` when it is healthy. On SIGTERM or SIGINT it
    answers the calls under way, takes no new ones, and exits with 0.
    """
    # gRPC is not needed for the other command.
    from serve.loading import open_models
    from serve.metrics import Metrics
    from serve.server import AddressError, create_server, leave_process
    from serve.store import StoreError, open_store

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        metrics = Metrics()
        with (
            open_store(store) as events,
            open_models(model, events, metrics, provider=provider, threads=threads) as models,
        ):
            server = create_server(models, events, address, metrics=metrics)
            server.start()
            host = address.rpartition(":")[0]
            main = models.version("").model
            click.echo(f"serving {main.info.model_version} on {host}:{server.port} (provider {main.provider})")
            stopped.wait()
            server.finish_calls()
    except (AddressError, ArtifactError, ProviderError, StoreError) as error:
        raise click.ClickException(str(error)) from error
    leave_process()


@main.command(short_help="Recommend for many users at once, from CSV to CSV.")
@model_argument
@click.option(
    "--history",
    type=click.Path(path_type=Path),
    required=True,
    metavar="CSV",
    help="Past events with the columns userId,movieId,rating,timestamp, as in MovieLens ratings.csv. An empty"
    " rating is no rating.",
)
@click.option(
    "--requests",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="Whom to recommend for and when, with the columns userId,timestamp; only events up to the timestamp"
    " are used. Without it: every user of the history, at no known time.",
)
@click.option("--k", type=click.IntRange(1), default=10, show_default=True, help="Items for each request.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="CSV",
    help="Where to write userId,rank,movieId,score, in the order of the requests. Replaced as a whole or not at all.",
)
@provider_option
@threads_option
def recommend(
    model: Path, history: Path, requests: Path | None, k: int, out: Path, provider: Provider, threads: int
) -> None:
    """Recommend for many users at once with the model directory MODEL, without a server.

    Items of the user's history are not recommended. A user without history gets the most popular items, with
    their number of training events as the score.
    """
    from serve.offline import recommend_file
    from serve.tables import TableError

    recommender = _load(model, provider, threads)
    try:
        recommend_file(recommender, history, requests, k, out)
    except TableError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def _load(model: Path, provider: Provider, threads: int) -> Recommender:
    try:
        return Recommender(read_artifact(model), provider, threads)
    except (ArtifactError, ProviderError) as error:
        raise click.ClickException(str(error)) from error
