"""Who may call what: bearer tokens with rights.

The rights are `read` (recommend, look things up), `write` (record events and impressions), `users` (forget users and
events, merge users), `catalogue` (store and delete items) and `admin` (models). Health checks need none. A method that
is in no table needs `admin`. Without tokens, every caller may do everything.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc

from serve.addresses import SecurityError
from serve.api.errors import NoRight, NoToken, Status, status_of
from serve.observability.metrics import Metrics

RIGHTS = ("read", "write", "users", "catalogue", "admin")
SHORTEST_TOKEN = 16
# Methods by the service, and by the right that they need.
METHODS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "jaxrec.v1.Recommender": {
        "read": (
            *("Recommend", "BatchRecommend", "SimilarItems", "GetUserProfile", "ListEvents"),
            *("GetItem", "ListItems", "GetModelInfo"),
        ),
        "write": ("RecordEvents", "RecordImpressions"),
        "users": ("DeleteUser", "DeleteEvents", "MergeUsers"),
        "catalogue": ("UpsertItems", "DeleteItems"),
    },
    "inference.GRPCInferenceService": {
        "read": ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"),
    },
    "grpc.reflection.v1alpha.ServerReflection": {"read": ("ServerReflectionInfo",)},
    # Not there: clients ask it first, and v1alpha only if it is UNIMPLEMENTED.
    "grpc.reflection.v1.ServerReflection": {"read": ("ServerReflectionInfo",)},
}
NEEDED: Mapping[str, str] = {
    f"/{service}/{name}": right
    for service, rights in METHODS.items()
    for right, names in rights.items()
    for name in names
}
HEALTH = "/grpc.health.v1.Health/"
"""Of its methods no right is asked."""


class Tokens:
    """The tokens that are accepted, with their rights. Keeps digests, so that no secret is in memory."""

    def __init__(self, rights_by_token: Mapping[str, Sequence[str]]) -> None:
        """Raises SecurityError."""
        if not rights_by_token:
            raise SecurityError("expected at least one token, came none")
        for token in rights_by_token:
            if len(token) < SHORTEST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
                raise SecurityError(f"expected tokens of at least {SHORTEST_TOKEN} ASCII characters without spaces")
        self._rights = [(_digest(token), frozenset(rights)) for token, rights in rights_by_token.items()]

    def rights(self, authorization: str) -> frozenset[str] | None:
        """The rights of `Bearer TOKEN`; None: no such token. Takes the same time whatever came."""
        scheme, _, token = authorization.partition(" ")
        digest, found = _digest(token.strip()), None
        for known, rights in self._rights:
            if hmac.compare_digest(known, digest):
                found = rights
        return found if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def parse_tokens(text: str, where: str) -> Tokens:
    """Reads lines of `RIGHTS TOKEN`, such as `read,write 3fa9...`; empty lines and `#` lines are skipped.

    Raises SecurityError with `where` and the line.
    """
    rights_by_token: dict[str, Sequence[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2 or not set(fields[0].split(",")) <= set(RIGHTS):
            raise SecurityError(
                f"{where}:{number}: expected RIGHTS TOKEN, with rights of {', '.join(RIGHTS)} joined by commas"
            )
        if fields[1] in rights_by_token:
            raise SecurityError(f"{where}:{number}: expected different tokens")
        rights_by_token[fields[1]] = fields[0].split(",")
    try:
        return Tokens(rights_by_token)
    except SecurityError as error:
        raise SecurityError(f"{where}: {error}") from error


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file; raises SecurityError."""
    try:
        return parse_tokens(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"{path}: expected lines of text: {type(error).__name__}") from error


@lru_cache(maxsize=256)
def needed_right(method: str) -> str | None:
    """What a call of `/package.Service/Method` needs."""
    return None if method.startswith(HEALTH) else NEEDED.get(method, "admin")


class TokenInterceptor(grpc.ServerInterceptor):
    """Turns away calls without a token that has the right; the outermost interceptor."""

    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._unauthenticated = _abort(status_of(NoToken()))
        self._forbidden = {right: _abort(status_of(NoRight(right))) for right in RIGHTS}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        right = needed_right(handler_call_details.method)
        if right is None:
            return continuation(handler_call_details)
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        # Of several headers, it would not be clear which one counts.
        rights = self._tokens.rights(str(given[0])) if len(given) == 1 else None
        if rights is None:
            self._metrics.rejected("unauthenticated", handler_call_details.method)
            return self._unauthenticated
        if right not in rights:
            self._metrics.rejected("permission", handler_call_details.method)
            return self._forbidden[right]
        return continuation(handler_call_details)


def _abort(status: Status) -> grpc.RpcMethodHandler:
    def abort(_: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata(status.metadata)
        context.abort(status.code, status.message)

    # For `serve.front.polling`: a call that is refused in any case need not wait for its message.
    abort.refuses = True  # type: ignore[attr-defined]
    # gRPC asks a handler for what the client began; a stream that is never read ends all the same.
    return grpc.unary_unary_rpc_method_handler(abort)
