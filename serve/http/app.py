"""The ASGI app of the HTTP door: its routes, what each answer says to browsers, and whom it belongs to."""

import base64
import hashlib
import importlib.metadata
import ipaddress
import logging
import re
import traceback
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.front.auth import Tokens
from serve.http.calls import Calls, Failed
from serve.http.connect import TIMEOUT, VERSION, Gateway, connect_routes
from serve.http.errors import error_response, json_response, plain_error_response, refused
from serve.http.inference import inference_routes
from serve.http.openapi import openapi
from serve.observability.metrics import Metrics
from serve.pb import model_admin_pb2, open_inference_pb2, recommender_pb2

logger = logging.getLogger(__name__)

SERVICES = tuple(
    service
    for file in (recommender_pb2, model_admin_pb2, open_inference_pb2, health_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
CHECK = "/grpc.health.v1.Health/Check"
PAGE = "page.html"
INTERNAL = "the server failed, see its log"
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def create_app(
    calls: Calls,
    metrics: Metrics,
    tokens: Tokens | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> Starlette:
    """The app.

    Args:
        calls: Of the gRPC server.
        metrics: Where requests are counted that never reach it.
        tokens: Those of the gRPC server: bodies are read of callers whom it will not refuse. None: of all.
        origins: Pages of these origins may call from a browser, such as `https://example.org`; `*` means all.
        hosts: Names under which the server may be asked, beside all IP addresses. Empty: all names.
    """
    gateway = Gateway(calls, tokens, metrics)
    document = json_response(openapi(SERVICES, importlib.metadata.version("jaxrec"), tokens is not None))
    page = _page()

    async def healthz(request: Request) -> Response:
        try:
            content, _ = await gateway.call(request, CHECK, b"")
        except Failed as failed:
            return error_response(failed)
        status = health_pb2.HealthCheckResponse.FromString(content).status
        serving = status == health_pb2.HealthCheckResponse.SERVING
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        return json_response({"status": name}, 200 if serving else 503)

    async def described(request: Request) -> Response:
        return document

    async def shown(request: Request) -> Response:
        return page

    middleware = [Middleware(Outermost, hosts=hosts)]
    if origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id", TIMEOUT, VERSION],
            expose_headers=["x-request-id", "trailer-x-request-id", "retry-after"],
        )
        middleware.append(cors)
    app = Starlette(
        routes=[
            Route("/", shown),
            Route("/healthz", healthz),
            Route("/openapi.json", described),
            *inference_routes(gateway),
            *connect_routes(SERVICES, gateway),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _refusal, ClientDisconnect: _nobody},
    )
    app.router.redirect_slashes = False
    return app


class Outermost:
    """Adds to each answer that its content is what it says, refuses other hosts' names, and answers for bugs.

    If all names were let in, a page of another site could let its name point to this machine, and call what has no
    password. It cannot do that with an IP address.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._hosts and host and not self._is_own(host):
            text = f"host: expected an IP address or one of {', '.join(sorted(self._hosts))}, came another one"
            refusal = error_response(refused(grpc.StatusCode.PERMISSION_DENIED, text, 421))
            await refusal(scope, receive, answer)
            return
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno}"
            logger.error("%s %.200r failed: %s at %s", scope["method"], scope["path"], type(error).__name__, where)
            if not begun:
                await error_response(refused(grpc.StatusCode.INTERNAL, INTERNAL))(scope, receive, answer)

    def _is_own(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host).lower()
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in self._hosts
        return True


async def _refusal(request: Request, error: Exception) -> Response:
    """An unknown path, or another verb than its own."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    failed = refused(grpc.StatusCode.UNIMPLEMENTED, text, error.status_code)
    response = (plain_error_response if request.url.path.startswith("/v2") else error_response)(failed)
    response.headers.update(error.headers or {})
    return response


async def _nobody(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return error_response(refused(grpc.StatusCode.CANCELLED, "cancelled by the client"))


def _page() -> Response:
    """The page, which a browser lets run and load nothing but itself."""
    content = files("serve.http").joinpath(PAGE).read_bytes()
    allowed: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(content):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode("ascii")
        allowed[kind.decode("ascii")].append(f"'sha256-{digest}'")
    policy: dict[str, Any] = {
        "default-src": "'none'",
        "script-src": " ".join(allowed["script"]),
        "style-src": " ".join(allowed["style"]),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(content, 200, headers, "text/html; charset=utf-8")
