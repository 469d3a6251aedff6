"""Puts the HTTP door in front of a gRPC server."""

from collections.abc import Callable, Sequence

from serve.addresses import host_and_port, is_loopback
from serve.front.server import Listener
from serve.http.app import create_app
from serve.http.calls import Calls, PrivateSocket
from serve.http.connections import Door, open_socket
from serve.http.tls import server_context
from serve.observability.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class HttpServer:
    """An HTTP door that was opened but not started; `port` is already bound.

    The gRPC server of this process has to listen on `grpc_address` for it (`create_server(also_listen=...)`).
    """

    def __init__(
        self,
        listener: Listener,
        metrics: Metrics | None = None,
        origins: Sequence[str] = (),
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Binds the port.

        Args:
            listener: Where to listen and for whom: with the gRPC server's own TLS and tokens.
            metrics: Those of the gRPC server; None: metrics that are not published.
            origins: Pages of these origins may call from a browser; `*` means all.
            on_failure: Called when the door ends without having been asked to.

        Raises:
            AddressError: The address cannot be used.
            SecurityError: The certificate cannot be used.
        """
        tls = None if listener.tls is None else server_context(listener.tls)
        # Who needs neither a token nor a certificate is asked for under this machine's own names only.
        is_private = is_loopback(listener.address) and listener.tokens is None and not listener.allow_insecure
        is_private = is_private and (listener.tls is None or listener.tls.client_ca is None)
        hosts = (*LOOPBACK, host_and_port(listener.address)[0]) if is_private else ()
        opened = open_socket(listener.address, listener.shared_port)
        self._private = PrivateSocket()
        self.grpc_address = self._private.address
        self.calls = Calls(self.grpc_address)
        self._door = Door(
            create_app(self.calls, metrics or Metrics(), listener.tokens, origins, hosts), opened, tls, on_failure
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
