"""Asks an HTTP door, one request a connection, as a plain client does."""

import http.client
import json
import ssl
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from serve.front.lifecycle import RecommenderServer
from serve.http.server import HttpServer
from serve.observability.metrics import Metrics

TIMEOUT_S = 30


class Said(NamedTuple):
    """One answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Doors(NamedTuple):
    """Both doors of a server."""

    server: RecommenderServer
    http: HttpServer
    metrics: Metrics

    @property
    def address(self) -> str:
        return f"localhost:{self.server.port}"

    @property
    def port(self) -> int:
        return self.http.port


Opening = Callable[..., AbstractContextManager[Doors]]


def ask(
    port: int,
    path: str,
    body: bytes | str | dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    verb: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> Said:
    """GET, or POST of a text, bytes, or of a value as JSON."""
    connection: http.client.HTTPConnection
    if tls is None:
        connection = http.client.HTTPConnection("localhost", port, timeout=TIMEOUT_S)
    else:
        connection = http.client.HTTPSConnection("localhost", port, timeout=TIMEOUT_S, context=tls)
    if isinstance(body, dict):
        body = json.dumps(body)
    content = {} if body is None else {"content-type": "application/json"}
    try:
        connection.request(verb or ("GET" if body is None else "POST"), path, body, content | dict(headers or {}))
        answer = connection.getresponse()
        return Said(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()
