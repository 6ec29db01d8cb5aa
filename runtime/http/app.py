"""The route table, who may call what, and the one place where errors become answers.

Comes in: a `Server`. Goes out: an aiohttp application. Every route names its scope here or the
application does not start; access is decided on the matched route, never on a URL from a header.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

from aiohttp import web

from runtime.errors import EngineDead, InvalidRequest, UsageError
from runtime.http import chat, embeddings, native, openai, tokens
from runtime.http.replies import error_reply
from runtime.http.server import RequestEnded, Server
from runtime.log import AccessLog
from runtime.metrics import prometheus_text

log = logging.getLogger("headstart.http")

HEADER_BYTES = 32 << 10


class Scope(Enum):
    OPEN = "open"  # anyone: probes
    API = "api"  # the API key, if one is set
    ADMIN = "admin"  # the admin key if one is set, else the API key, else anyone


Handler = Callable[[Server, web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """`works`: needs the engine, so refused while draining or starting."""

    methods: tuple[str, ...]
    path: str
    handler: Handler
    scope: Scope | None
    works: bool = False


async def metrics(server: Server, request: web.Request) -> web.StreamResponse:
    link = server.link
    name = server.model.name
    text = prometheus_text(server.metrics, name, link.stats, link.capacity, link.throughput)
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})


GET, POST = ("GET",), ("POST",)
PROBE = ("GET", "HEAD")  # monitors that want no body

ROUTES: tuple[Route, ...] = (
    Route(methods=PROBE, path="/health", handler=native.health, scope=Scope.OPEN),
    Route(methods=PROBE, path="/ready", handler=native.health, scope=Scope.OPEN),
    Route(
        methods=GET,
        path="/health_generate",
        handler=native.health_generate,
        scope=Scope.API,
        works=True,
    ),
    Route(methods=GET, path="/metrics", handler=metrics, scope=Scope.API),
    Route(methods=GET, path="/get_model_info", handler=native.model_info, scope=Scope.API),
    Route(methods=GET, path="/model_info", handler=native.model_info, scope=Scope.API),
    Route(methods=GET, path="/get_server_info", handler=native.server_info, scope=Scope.API),
    Route(methods=GET, path="/server_info", handler=native.server_info, scope=Scope.API),
    Route(
        methods=("POST", "PUT"),
        path="/generate",
        handler=native.generate,
        scope=Scope.API,
        works=True,
    ),
    Route(
        methods=("POST", "PUT"),
        path="/encode",
        handler=embeddings.encode_route,
        scope=Scope.API,
        works=True,
    ),
    Route(
        methods=("GET", "POST"),
        path="/flush_cache",
        handler=native.flush_cache,
        scope=Scope.ADMIN,
        works=True,
    ),
    Route(methods=POST, path="/abort_request", handler=native.abort_request, scope=Scope.ADMIN),
    Route(methods=GET, path="/v1/models", handler=openai.models, scope=Scope.API),
    Route(methods=GET, path="/v1/models/{id}", handler=openai.one_model, scope=Scope.API),
    Route(
        methods=POST,
        path="/v1/completions",
        handler=openai.completions,
        scope=Scope.API,
        works=True,
    ),
    Route(
        methods=POST,
        path="/v1/chat/completions",
        handler=chat.chat_completions,
        scope=Scope.API,
        works=True,
    ),
    Route(
        methods=POST,
        path="/v1/embeddings",
        handler=embeddings.embeddings,
        scope=Scope.API,
        works=True,
    ),
    Route(methods=POST, path="/v1/tokenize", handler=tokens.tokenize_text, scope=Scope.API),
    Route(methods=POST, path="/tokenize", handler=tokens.tokenize_text, scope=Scope.API),
    Route(methods=POST, path="/v1/detokenize", handler=tokens.detokenize, scope=Scope.API),
    Route(methods=POST, path="/detokenize", handler=tokens.detokenize, scope=Scope.API),
)


def build_app(server: Server, routes: tuple[Route, ...] = ROUTES) -> web.Application:
    gate = Gate(server, AccessLog())
    app = web.Application(middlewares=[gate.middleware], client_max_size=1 << 30)
    for route in routes:
        if not isinstance(route.scope, Scope):
            raise UsageError(f"route {route.path}: expected a scope, got {route.scope}; name one")
        for method in route.methods:
            app.router.add_route(method, route.path, gate.wrap(route))
    return app


class Gate:
    """Around every request: host, key, state of the server, error texts, counters, log line."""

    def __init__(self, server: Server, access: AccessLog) -> None:
        config = server.config
        self._server = server
        self._access = access
        self._api = _digest(config.api_key)
        self._admin = _digest(config.admin_api_key)
        self._hosts = _local_hosts(config.host)

    def wrap(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            request["route"] = route.path
            request["tenant"] = self._admit(request, route)
            server = self._server
            # Whoever waits for a server may ask for any of its routes: none answers too early.
            starting = server.link.capacity is None and route.scope is not Scope.OPEN
            if starting or (route.works and not server.accepting):
                raise EngineDead(
                    "The server is shutting down."
                    if server.draining
                    else "The engine is starting; try again."
                )
            return await route.handler(self._server, request)

        return handle

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        metrics = self._server.metrics
        start = time.perf_counter()
        metrics.http_active += 1
        status = 499  # the client left
        try:
            reply = await self._answer(request, handler)
            status = reply.status
            return reply
        finally:
            metrics.http_active -= 1
            route = request.get("route", "unknown")
            metrics.http_requests[route] += 1
            metrics.http_responses[route, status] += 1
            self._access.write(route, request.method, status, time.perf_counter() - start)

    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            self._check_head(request)
            return await handler(request)
        except InvalidRequest as error:
            reply = error_reply(str(error), error.status, error.param)
            if error.status in (408, 413):
                reply.force_close()  # the rest of the body is not worth reading
            return reply
        except RequestEnded as error:
            return error_reply(str(error), error.status)
        except EngineDead as error:
            return error_reply(str(error), 503)
        except web.HTTPException as error:
            return _routing_error(error)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("bug while answering route=%s", request.get("route", "unknown"))
            return error_reply("Internal error.", 500)

    def _check_head(self, request: web.Request) -> None:
        if sum(len(name) + len(value) for name, value in request.raw_headers) > HEADER_BYTES:
            raise InvalidRequest("The request headers are too long.", status=431)
        # A probe in HTTP/1.0 need not name a host; no browser leaves it out.
        host = request.headers.get("Host")
        if self._hosts and host is not None and _host_name(host) not in self._hosts:
            raise InvalidRequest("This server does not answer to that host name.", status=421)

    def _admit(self, request: web.Request, route: Route) -> bytes:
        """The caller's identity, which separates prefix caches."""
        if route.scope is Scope.OPEN:
            return b""
        wanted = self._api
        if route.scope is Scope.ADMIN and self._admin is not None:
            wanted = self._admin
        if wanted is None:
            return b""
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = [hmac.compare_digest(given, k) for k in (self._api, self._admin) if k is not None]
        if kind.lower() != "bearer" or not any(known):
            raise InvalidRequest("Unauthorized", status=401)
        if not hmac.compare_digest(given, wanted):  # a key of ours, but not for this route
            raise InvalidRequest("Forbidden", status=403)
        return given


def _digest(key: str | None) -> bytes | None:
    return None if key is None else hashlib.sha256(key.encode()).digest()


def _local_hosts(host: str) -> frozenset[str]:
    """Names a server on loopback answers to (against DNS rebinding); empty: any."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return frozenset({"localhost", "127.0.0.1", "::1", host}) if local else frozenset()


def _host_name(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header


def _routing_error(error: web.HTTPException) -> web.Response:
    if error.status == 404:
        return error_reply("There is no such route.", 404)
    if isinstance(error, web.HTTPMethodNotAllowed):
        reply = error_reply("This route does not take that method.", 405)
        reply.headers["Allow"] = ",".join(sorted(error.allowed_methods))
        return reply
    return error_reply("The request cannot be served.", error.status)
