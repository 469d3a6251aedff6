"""An empty RPC on the kinds of server that Python's gRPC has: what gRPC alone costs.

    python bench/echo_server.py loop|threaded

`loop` is the kind that `serve` is: gRPC's asyncio server, with a method that reads its message itself. Prints its port
on one line and answers until it is killed.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from serve.front.limits import OPTIONS, WORKERS
from serve.front.loop import shared_loop

SERVICE, METHOD = "bench.Echo", "Echo"


async def echo(_: object, context: Any) -> Any:
    """Answers a message with itself."""
    return await context.read()


async def start() -> int:
    """Starts the server in the running loop; its port."""
    server = grpc.aio.server(options=OPTIONS)
    handlers = {METHOD: grpc.stream_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    running.append(server)
    return port


running: list[Any] = []


def main() -> None:
    """Answers every message with itself."""
    if sys.argv[1] == "loop":
        port = shared_loop().wait_for(start())
    else:
        server = grpc.server(ThreadPoolExecutor(WORKERS))
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
        server.add_registered_method_handlers(SERVICE, {METHOD: handler})
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        running.append(server)
    print(port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
