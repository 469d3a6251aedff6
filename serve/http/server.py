"""Puts the HTTP door in front of a gRPC server."""

from collections.abc import Callable, Sequence

from serve.addresses import host_and_port
from serve.front.server import Listener
from serve.http.app import create_app
from serve.http.calls import Calls, PrivateSocket
from serve.http.connections import Door, open_socket
from serve.http.tls import server_context
from serve.observability.metrics import Metrics

LOOPBACK = ("localhost",)


class HttpServer:
    """An HTTP door that was opened but not started; `port` is already bound.

    The gRPC server of this process has to listen on `grpc_address` for it (`create_server(also_listen=...)`).
    """

    def __init__(
        self,
        listener: Listener,
        metrics: Metrics | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Binds the port.

        Args:
            listener: Where to listen and for whom: with the gRPC server's own TLS and tokens.
            metrics: Those of the gRPC server; None: metrics that are not published.
            origins: Pages of these origins may call from a browser; `*` means all.
            hosts: Further names under which a server is asked that needs neither a token nor a client certificate,
                beside those of loopback, the listener's host and all IP addresses; `*` means all.
            on_failure: Called when the door ends without having been asked to.

        Raises:
            AddressError: The address cannot be used.
            SecurityError: The certificate cannot be used.
        """
        tls = None if listener.tls is None else server_context(listener.tls)
        is_open = listener.tokens is None and (listener.tls is None or listener.tls.client_ca is None)
        names = (*LOOPBACK, host_and_port(listener.address)[0], *hosts) if is_open and "*" not in hosts else ()
        opened = open_socket(listener.address, listener.shared_port)
        self._private = PrivateSocket()
        self.grpc_address = self._private.address
        self.calls = Calls(self.grpc_address)
        self._door = Door(
            create_app(self.calls, metrics or Metrics(), listener.tokens, origins, names), opened, tls, on_failure
        )
        self.port = self._door.port
        host = listener.address.rpartition(":")[0]
        self.url = f"{'http' if tls is None else 'https'}://{host}:{self.port}"

    def start(self) -> None:
        """Begins to answer; before the gRPC server does, calls are UNAVAILABLE."""
        self._door.start()

    def close(self) -> None:
        """Ends after the answers that are under way; first let the gRPC server finish its calls."""
        self._door.close()
        self.calls.close()
        self._private.close()
