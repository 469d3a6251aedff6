"""The commands of `python -m serve`."""

import gc
import logging
import os
import signal
import threading
from pathlib import Path

import click

from serve.model.artifact import ArtifactError, read_artifact
from serve.model.engine import Provider, ProviderError, SearchBy
from serve.model.recommender import Recommender

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

search_option = click.option(
    "--search",
    "search_by",
    type=click.Choice(["auto", "exact", "index"]),
    default="auto",
    show_default=True,
    help="How the best items are found. `auto`: with the model's index if it has one, which large catalogues do;"
    " `exact`: all items are looked at; `index`: nothing else will do.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Serve an exported model directory with ONNX Runtime."""


existing_file = click.Path(dir_okay=False, path_type=Path)


@main.command(short_help="Answer gRPC calls with a model.")
@model_argument
@click.option(
    "--address",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen. Port 0: a free one. An address that other machines reach needs TLS and authentication.",
)
@click.option(
    "--store",
    default="events.sqlite",
    show_default=True,
    help="SQLite file with the events of all users, created when missing; or postgresql://... or redis://...",
)
@provider_option
@threads_option
@search_option
@click.option("--tls-cert", type=existing_file, help="Certificate chain in PEM; read again when it changes.")
@click.option("--tls-key", type=existing_file, help="Its private key in PEM.")
@click.option("--tls-client-ca", type=existing_file, help="Let in only clients with a certificate of these.")
@click.option(
    "--tokens",
    type=existing_file,
    help="File with a line `RIGHTS TOKEN` for each token that is accepted, RIGHTS being some of read,write,admin."
    " Without: the same lines in the environment variable JAXREC_TOKENS, or no tokens.",
)
@click.option("--allow-insecure", is_flag=True, help="Listen for other machines without TLS or authentication.")
@click.option("--metrics", "metrics_address", metavar="HOST:PORT", help="Where Prometheus fetches metrics, over HTTP.")
@click.option(
    "--explore",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    metavar="TEMPERATURE",
    help="Draw the items of an answer in proportion to exp(score / TEMPERATURE), with their probabilities in the answer"
    " and in the store: a log to learn from. 0: always the best.",
)
@click.option(
    "--front",
    type=click.Choice(["auto", "polling", "threads"]),
    default="auto",
    show_default=True,
    help="Which thread answers Recommend: the one that polls for calls, or one of a pool. `auto`: the polling one when"
    " the store is a local file.",
)
@click.option(
    "--shared-port",
    is_flag=True,
    help="Let other servers that are started with this listen on the same port, one for each core: the kernel spreads"
    " connections over them. They may share a store.",
)
@click.option(
    "--watch",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often MODEL is looked at for a newer version. 0: never.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long calls under way may take once the server is to end.",
)
@click.option(
    "--log-format",
    type=click.Choice(["json", "text"]),
    default="json",
    show_default=True,
    help="Lines of the log on standard error: JSON objects, or for human readers.",
)
@click.option("--log-calls", is_flag=True, help="A log line for every call, not only for failures of the server.")
def run(  # noqa: PLR0915
    model: Path,
    address: str,
    store: str,
    provider: Provider,
    threads: int,
    search_by: SearchBy,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    tokens: Path | None,
    allow_insecure: bool,
    metrics_address: str | None,
    explore: float,
    front: str,
    shared_port: bool,
    watch: float,
    drain: float,
    log_format: str,
    log_calls: bool,
) -> None:
    """Answer gRPC calls with the model directory MODEL, or the newest of the model directories in it, until SIGTERM
    or SIGINT.

    Prints `serving MODEL_VERSION on HOST:PORT (provider NAME, search WAY)` when it is healthy. On SIGTERM or SIGINT it
    answers the calls under way, takes no new ones, and exits with 0; with 1 when it cannot go on.
    """
    # gRPC is not needed for the other command.
    from serve.front.addresses import SecurityError
    from serve.front.auth import Tls, parse_tokens, read_tokens
    from serve.front.server import AddressError, create_server, leave_process
    from serve.model.exploration import Exploration
    from serve.observability.logs import log_as_json
    from serve.observability.metrics import Metrics
    from serve.serving.loading import open_models
    from serve.stores import open_store
    from serve.stores.base import StoreError

    if log_format == "json":
        log_as_json()
    else:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise click.UsageError("expected --tls-cert and --tls-key together, and --tls-client-ca only with them")
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        stopped.set()

    try:
        accepted = None
        if tokens is not None:
            accepted = read_tokens(tokens)
        elif "JAXREC_TOKENS" in os.environ:
            accepted = parse_tokens(os.environ["JAXREC_TOKENS"], "JAXREC_TOKENS")
        metrics = Metrics()
        exploration = Exploration(explore) if explore else None
        with (
            open_store(store) as events,
            open_models(
                *(model, events, metrics),
                provider=provider,
                threads=threads,
                search_by=search_by,
                exploration=exploration,
                watch_s=watch,
                load_now=False,
            ) as models,
        ):
            # Catalogue and libraries stay: without them a full collection takes microseconds, not tens of milliseconds.
            gc.collect()
            gc.freeze()
            server = create_server(
                models,
                events,
                address,
                metrics=metrics,
                tls=None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key, tls_client_ca),
                tokens=accepted,
                allow_insecure=allow_insecure,
                log_calls=log_calls,
                polling=None if front == "auto" else front == "polling",
                shared_port=shared_port,
                on_failure=fail,
            )
            stop_metrics = None if metrics_address is None else metrics.serve(metrics_address, allow_insecure)
            # Open from here on, so that health checks see a server that is not ready, and not none.
            server.listen()
            models.open()
            # A server that is to end already must not attract calls.
            if not stopped.is_set():
                server.start()
                host = address.rpartition(":")[0]
                main = models.version("").model
                how = f"provider {main.provider}, search {main.engine.search_by}"
                click.echo(f"serving {main.info.model_version} on {host}:{server.port} ({how})")
                stopped.wait()
            if not server.finish_calls(drain):
                logging.getLogger(__name__).warning("calls were still under way after %g s, and are cut off", drain)
            if stop_metrics is not None:
                stop_metrics()
    except (AddressError, ArtifactError, ProviderError, SecurityError, StoreError) as error:
        raise click.ClickException(str(error)) from error
    leave_process(int(failed.is_set()))


@main.command(short_help="Ask a running server, for an answer to read.")
@click.option("--address", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT", help="The server.")
@click.option("--user", metavar="ID", help="Recommend for a stored user.")
@click.option(
    "--watched",
    multiple=True,
    metavar="ITEM[=RATING]",
    help="Recommend after this item. Repeat it for several, oldest first, as if one a day up to now.",
)
@click.option("--similar", "similar_to", metavar="ITEM", help="Items like this one.")
@click.option("--profile", "profile_of", metavar="ID", help="What is stored of a user.")
@click.option("--k", type=click.IntRange(1, 1000), default=10, show_default=True, help="Lines to answer.")
@click.option("--why", is_flag=True, help="Say why each item is recommended.")
@click.option("--tls", is_flag=True, help="Encrypt, trusting the authorities of the system. Implied by the next three.")
@click.option("--ca", type=existing_file, help="Trust these authorities instead, in PEM.")
@click.option("--cert", type=existing_file, help="The client's certificate in PEM, for servers that ask for one.")
@click.option("--key", type=existing_file, help="Its private key in PEM.")
@click.option("--token-file", type=existing_file, help="File with the token. Without: JAXREC_TOKEN, or none.")
@click.option("--timeout", type=click.FloatRange(0.001), default=5.0, show_default=True, help="Seconds.")
def ask(
    address: str,
    user: str | None,
    watched: tuple[str, ...],
    similar_to: str | None,
    profile_of: str | None,
    k: int,
    why: bool,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    token_file: Path | None,
    timeout: float,
) -> None:
    """Ask a running server and print its answer as a table: recommendations, similar items, a user's profile, or,
    without a question, which model answers."""
    import grpc

    from serve.cli import ask as tables
    from serve.client.sync import Connection, RecommenderClient

    if sum((user is not None, bool(watched), similar_to is not None, profile_of is not None)) > 1:
        raise click.UsageError("expected one of --user, --watched, --similar and --profile")
    try:
        token = os.environ.get("JAXREC_TOKEN") if token_file is None else token_file.read_text("utf-8").strip()
        connection = Connection(address, timeout, tls=tls, ca=ca, certificate=cert, key=key, token=token)
        with RecommenderClient(connection) as client:
            if user is not None or watched:
                click.echo(tables.recommendations(client, user, watched, k, why))
            elif similar_to is not None:
                click.echo(tables.similar(client, similar_to, k))
            elif profile_of is not None:
                click.echo(tables.profile(client, profile_of, k))
            else:
                click.echo(tables.model(client))
    except grpc.RpcError as error:
        raise click.ClickException(f"{error.code().name}: {error.details()}") from error
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@main.command(short_help="Copy events and shown recommendations into a file.")
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT.sqlite")
def log(store: str, out: Path) -> None:
    """Copy the log of STORE, a SQLite file, postgresql://... or redis://... that servers may be using, into the SQLite
    file OUT: all events, and all recommendations that were shown. It is the next policy's training data."""
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
    click.echo(f"{out}: {copied.events} events, {copied.shown} recommendations shown")


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
@search_option
def recommend(
    model: Path,
    history: Path,
    requests: Path | None,
    k: int,
    out: Path,
    provider: Provider,
    threads: int,
    search_by: SearchBy,
) -> None:
    """Recommend for many users at once with the model directory MODEL, without a server.

    Items of the user's history are not recommended. A user without history gets the most popular items, with
    their number of training events as the score.
    """
    from serve.cli.recommend import recommend_file
    from serve.cli.tables import TableError

    recommender = _load(model, provider, threads, search_by)
    try:
        recommend_file(recommender, history, requests, k, out)
    except TableError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def _load(model: Path, provider: Provider, threads: int, search_by: SearchBy) -> Recommender:
    try:
        return Recommender(read_artifact(model), provider, threads, search_by)
    except (ArtifactError, ProviderError) as error:
        raise click.ClickException(str(error)) from error
