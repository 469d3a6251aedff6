"""An empty RPC on the kinds of server that Python's gRPC has: what gRPC alone costs.

    python bench/echo_server.py polling|threaded

`polling` is the kind that `serve` is. Prints its port on one line and answers until it is killed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from serve.front.limits import WORKERS
from serve.front.polling import Front, polling_server

SERVICE, METHOD = "bench.Echo", "Echo"


def main() -> None:
    """Answers every message with itself."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    pool = ThreadPoolExecutor(WORKERS)
    server: grpc.Server
    if sys.argv[1] == "polling":
        server = polling_server(pool, ThreadPoolExecutor(1), Front([f"/{SERVICE}/{METHOD}"]))
    else:
        server = grpc.server(pool)
    server.add_registered_method_handlers(SERVICE, {METHOD: handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
