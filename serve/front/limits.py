"""How many threads, calls, connections and bytes a server allows."""

from serve.api.rules import MAX_MESSAGE_BYTES
from serve.settings import DEFAULTS

# Threads for what neither the event loop answers nor runs the model for many rows: RecordEvents, which waits for the
# disk, and most else.
WORKERS: int = DEFAULTS["store_threads"]
# For what runs the model for many rows, reads long histories, or explains.
SLOW_WORKERS = 3
# A history of 300 events. To decode and check the longest that is allowed takes as long as a run of the model.
LONG_MESSAGE_BYTES = 16 * 2**10
# Calls that have one of `WORKERS` or wait for it, and the same of the slow ones, of the admin service, and of streams.
MAX_CALLS = 256
MAX_SLOW_CALLS = 64
MAX_ADMIN_CALLS = 8
MAX_WATCHES = 1_000
MAX_REFLECTIONS = 16
# Headers of a call; gRPC by itself refuses calls at random from half of it on.
METADATA_BYTES = 16 * 2**10
# Further calls wait at the client, where they cost the server nothing. HTTP/2 recommends no less.
MAX_CALLS_OF_A_CONNECTION = 100
# Further ones are closed at once. A connection costs some 20 KB.
MAX_CONNECTIONS = 10_000
# An answer that its client does not read, and a connection to a server that has become one of several, lasts so long.
CONNECTION_AGE_S = 600.0
CONNECTION_GRACE_S = 30.0
# So many calls may wait in gRPC to be looked at. It then resets some, which a client sees as CANCELLED and does not
# repeat; by default from 1,000 on, which ten full connections are.
MOST_AT_THE_DOOR = 10_000

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_A_CONNECTION),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A client that is gone without a word.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # It counts calls which the client has its answer to, until the server has seen them off, and so refuses good ones
    # of a client that stays below the limit. What is in the server is counted in `serve.front.waiting`.
    ("grpc.http.overload_protection", 0),
    # By it gRPC would let every call of a fast connection send up to 16 MiB before it is asked for, and not 64 KiB. All
    # of a message may come in any case once it is asked for.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.server.max_pending_requests", MOST_AT_THE_DOOR),
    ("grpc.server.max_pending_requests_hard_limit", 2 * MOST_AT_THE_DOOR),
)
"""Of gRPC's server; those of its public header channel_arg_names.h."""
