"""What the HTTP door allows a caller, in bytes, seconds and counts."""

from serve.api.rules import MAX_MESSAGE_BYTES
from serve.front.limits import MAX_CALLS_OF_A_CONNECTION

# An encoded message may be as long as over gRPC.
MAX_BODY_BYTES = MAX_MESSAGE_BYTES
# Of JSON, which costs far more, most of all for its objects. It holds 10,000 usual events.
MAX_JSON_BYTES = 2 * 2**20
MAX_JSON_OBJECTS = 2**16
# Of a method that needs no right, so that a stranger's body costs nothing.
MAX_FREE_BYTES = 2**10
FREE_BODY_S = 2.0
# Request line and headers together.
MAX_HEAD_BYTES = 16 * 2**10
# Bodies that are being read, of all connections together: a few of the longest, or thousands of usual ones.
MAX_BODIES_BYTES = 64 * 2**20
MAX_CONNECTIONS = 512
# All calls share one connection to the gRPC server. Health checks have the rest of it to themselves.
MAX_CHECKS = 10
MAX_CALLS = MAX_CALLS_OF_A_CONNECTION - MAX_CHECKS
# From the first byte of a request to the end of its headers, and from there to the end of its body.
HEAD_S = 10.0
BODY_S = 30.0
# A connection without a request is kept for so long.
IDLE_S = 60
# An answer that the client does not read is dropped after so long.
UNREAD_S = 30.0
# Longer messages are converted in a thread, since the loop must not stand still for them.
LONG_BYTES = 16 * 2**10
# How long connections may take to end once all calls are answered.
CLOSE_S = 2
