"""`python -m serve run`: a server from its settings to its end."""

import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import click

from serve.cli.options import FILE, all_settings
from serve.settings import Settings, SettingsError, listed, read_settings

if TYPE_CHECKING:
    from serve.api.event_types import EventTypes
    from serve.front.lifecycle import RecommenderServer
    from serve.front.server import Listener
    from serve.front.supervised import Supervised
    from serve.http.server import HttpServer
    from serve.model.recommender import Recommender
    from serve.observability.metrics import Metrics
    from serve.serving.reranker import Reranker
    from serve.serving.versions import ModelLibrary
    from serve.stores.base import EventStore

logger = logging.getLogger(__name__)

# A signal that comes just before a wait does not end it, since Python runs its handler between two waits only.
LOOK_S = 0.5


class Stop:
    """Whether to stop; may be set by any thread and by a signal's handler.

    A `threading.Event` may not: the handler runs in the thread that waits, which can hold the event's lock just then,
    and would wait for itself. `SimpleQueue.put` may interrupt a `get` of its own thread.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._wake: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Ends the wait, and all later ones at once."""
        self._is_set = True
        self._wake.put(None)

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._is_set

    def wait(self, seconds: float) -> bool:
        """Waits until it is set, but not longer. Returns whether it is."""
        if not self._is_set:
            with suppress(Empty):
                self._wake.get(timeout=seconds)
        return self._is_set


@click.command("run")
@click.argument("model", required=False)
@click.option(
    "--settings",
    "file",
    type=FILE,
    metavar="FILE",
    help="TOML file with settings, named as these options with _ instead of -. An option beats an environment variable"
    " such as JAXREC_TLS_CERT, which beats the file, which beats the default.  [default: what JAXREC_SETTINGS names]",
)
@all_settings
def command(file: Path | None, **options: Any) -> None:
    """Answer gRPC calls with the model directory MODEL, or the newest of the model directories in it, until SIGTERM
    or SIGINT.

    Prints `serving MODEL_VERSION on HOST:PORT (provider NAME, search WAY)` when it is ready, with `--fast` also
    ` and fast ADDRESS` after the first address, with `--http` then also ` and http://HOST:PORT`, and with `--processes`
    also `, N processes` in the brackets. After SIGTERM or SIGINT it finishes the calls under way, accepts no new ones,
    and exits with 0; after a failure of its own, with 1.
    """
    try:
        settings = read_settings(options, os.environ, file)
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    if settings.processes > 1:
        supervise(settings)
    else:
        serve(settings)


def supervise(settings: Settings) -> None:
    """Has several processes serve until a signal, then ends this one; raises click.ClickException if none can."""
    from serve.addresses import AddressError, SecurityError
    from serve.front.supervisor import StartError, Supervisor

    _start_logging(settings)
    try:
        status = Supervisor(settings, click.echo).run()
    except (AddressError, SecurityError, StartError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(status)


def serve(settings: Settings, supervised: "Supervised | None" = None) -> None:
    """Serves until a signal or a failure, then ends the process, with 1 and a message if it cannot serve.

    Args:
        settings: Of this server.
        supervised: Of one process of several; then `settings` are what it says.
    """
    from serve.addresses import AddressError, SecurityError
    from serve.api.event_types import EventTypesError
    from serve.front.lifecycle import leave_process
    from serve.model.graphs import ProviderError
    from serve.model.manifest import ArtifactError
    from serve.serving.reranker import RerankerError
    from serve.stores.base import StoreError

    _start_logging(settings)
    stopped, failed, fail = _reasons_to_stop()
    try:
        _serve(settings, supervised, stopped, fail)
    except (
        AddressError,
        ArtifactError,
        EventTypesError,
        ProviderError,
        RerankerError,
        SecurityError,
        StoreError,
    ) as error:
        if supervised is None:
            click.ClickException(str(error)).show()
        else:
            supervised.failed(str(error))
        # gRPC's threads may be there, and crash if Python takes itself apart.
        failed.set()
    leave_process(int(failed.is_set()))


def _serve(settings: Settings, supervised: "Supervised | None", stopped: Stop, fail: Callable[[], None]) -> None:
    from serve.api.event_types import BUILT_IN, read_event_types
    from serve.model.exploration import Exploration
    from serve.observability.metrics import Metrics
    from serve.serving.loading import ModelLoader, open_models
    from serve.serving.sweeper import SlatePruner
    from serve.stores import open_store

    listener, metrics = _listener(settings), Metrics()
    if supervised is not None:
        supervised.follow(metrics, stopped.set)
    event_types = BUILT_IN if settings.event_types is None else read_event_types(settings.event_types)
    exploration = Exploration(settings.explore) if settings.explore else None
    reranker = _reranker(settings, metrics)
    with open_store(settings.store) as events:
        loader = ModelLoader(
            events,
            metrics,
            settings.provider,
            settings.threads,
            settings.search,
            exploration,
            reranker,
            settings.states,
        )
        with (
            open_models(
                settings.model,
                loader,
                watch_s=settings.watch,
                trend_refresh_s=settings.trend_refresh_s,
                keep_previous=not settings.forget_previous,
                load_now=False,
            ) as models,
            ExitStack() as stack,
        ):
            if settings.slate_retention:
                stack.callback(SlatePruner(events, settings.slate_retention).close)
            # Libraries stay: without them a full collection takes microseconds, not tens of milliseconds.
            gc.collect()
            gc.freeze()
            # Nobody may connect to one of several processes that comes late before it can answer.
            is_late = supervised is not None and supervised.is_late
            if supervised is not None and is_late:
                models.open(supervised.division)
                supervised.opened(models)
            server, where = _opened(settings, listener, models, events, event_types, metrics, fail, stack)
            if not is_late:
                models.open()
                if supervised is not None:
                    supervised.opened(models)
            if supervised is not None:
                supervised.wait_for_others()
            # A server that was stopped meanwhile must not attract calls.
            if not stopped.is_set():
                server.start()
                say = click.echo if supervised is None else supervised.serves
                say(_said(models.version("").model, where, settings.processes))
                while not stopped.wait(LOOK_S):
                    pass
            if not server.finish_calls(settings.drain):
                logger.warning("calls were still under way after %g s, and are cut off", settings.drain)


def _opened(
    settings: Settings,
    listener: "Listener",
    models: "ModelLibrary",
    events: "EventStore",
    event_types: "EventTypes",
    metrics: "Metrics",
    fail: Callable[[], None],
    stack: ExitStack,
) -> tuple["RecommenderServer", str]:
    """Opens the ports until `stack` ends, so that health checks see a server that is not ready, and not none.

    Returns the server, and where it is to be reached. Raises AddressError and SecurityError.
    """
    from serve.front.server import create_server
    from serve.observability.merged import publish

    http = _http(settings, listener, metrics, fail)
    server = create_server(
        models,
        events,
        listener,
        metrics=metrics,
        event_types=event_types,
        slate_log=settings.slate_log,
        slate_retention=settings.slate_retention,
        log_calls=settings.log_calls,
        workers=settings.store_threads,
        also_listen=() if http is None else (http.grpc_address,),
        connection_age_s=settings.connection_age,
        fast=settings.fast,
        on_failure=fail,
    )
    if settings.metrics is not None:
        exposed = settings.allow_insecure or settings.allow_insecure_metrics
        stack.callback(publish(metrics.registry, settings.metrics, exposed))
    server.listen()
    if http is not None:
        http.start()
        stack.callback(http.close)
    where = listener.at(server.port)
    if server.fast_address is not None:
        where += f" and fast {server.fast_address}"
    return server, where if http is None else f"{where} and {http.url}"


def _reasons_to_stop() -> tuple[Stop, threading.Event, Callable[[], None]]:
    """What is set by a signal or a failure, what is set by a failure alone, and what a failure calls."""
    stopped, failed = Stop(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())

    def fail() -> None:
        failed.set()
        stopped.set()

    return stopped, failed, fail


def _said(model: "Recommender", where: str, processes: int) -> str:
    how = f"{model.provider}, search {model.engine.search_by}"
    if processes > 1:
        how += f", {processes} processes"
    return f"serving {model.info.model_version} on {where} (provider {how})"


def _start_logging(settings: Settings) -> None:
    from serve.observability.logs import JsonFormatter, start_logging

    of_several = settings.processes > 1
    process = " %(process)d" if of_several else ""
    text = logging.Formatter(f"%(asctime)s{process} %(levelname)s %(name)s: %(message)s")
    formatter = JsonFormatter(with_process=of_several) if settings.log_format == "json" else text
    start_logging(formatter, is_shared=of_several)


def _reranker(settings: Settings, metrics: "Metrics") -> "Reranker | None":
    """The server's own re-ranker, if it has one; raises RerankerError."""
    from serve.serving.reranker import Reranker, load_reranker

    if settings.reranker is None:
        return None
    return Reranker(load_reranker(settings.reranker), settings.reranker_timeout_s, metrics.reranked)


def _listener(settings: Settings) -> "Listener":
    """Where to listen and for whom; raises AddressError and SecurityError."""
    from serve.front.auth import parse_tokens, read_tokens
    from serve.front.server import Listener
    from serve.front.tls import Tls

    tokens = tls = None
    if settings.tokens_file is not None:
        tokens = read_tokens(settings.tokens_file)
    elif settings.tokens is not None:
        tokens = parse_tokens(settings.tokens, "tokens (JAXREC_TOKENS or the settings file)")
    if settings.tls_cert is not None and settings.tls_key is not None:
        tls = Tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return Listener(settings.address, tls, tokens, settings.allow_insecure, settings.shared_port)


def _http(
    settings: Settings, listener: "Listener", metrics: "Metrics", fail: Callable[[], None]
) -> "HttpServer | None":
    """The HTTP door, for the same callers; raises AddressError and SecurityError."""
    if settings.http is None:
        return None
    from serve.http.server import HttpServer

    where = dataclasses.replace(listener, address=settings.http)
    return HttpServer(where, metrics, listed(settings.http_origins), listed(settings.http_hosts), fail)
