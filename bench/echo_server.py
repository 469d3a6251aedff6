"""An empty RPC on the same kind of server as `serve`: what gRPC alone costs.

Prints its port on one line and answers until it is killed.
"""

from concurrent.futures import ThreadPoolExecutor

import grpc

from serve.server import WORKERS

SERVICE, METHOD = "bench.Echo", "Echo"


def main() -> None:
    """Answers every message with itself."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    server = grpc.server(ThreadPoolExecutor(WORKERS))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
