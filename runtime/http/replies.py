"""What every answer looks like: JSON bodies, and one error shape for all routes.

An error carries SGLang's flat OpenAI fields and OpenAI's own nested `error` object, so clients of
either read it. Texts are ours; nothing of the request or of a library goes into them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

encode = msgspec.json.Encoder().encode

STATUS_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_object(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": status}


def error_body(message: str, status: int, param: str | None = None) -> bytes:
    error = error_object(message, status, param)
    return encode({"object": "error", **error, "error": error})


def stream_error(message: str, status: int) -> bytes:
    """The one event that ends a broken stream."""
    error = error_object(message, status) | {"retryable": status in (429, 503)}
    return b"data: " + encode({"error": error}) + b"\n\n"


def json_reply(body: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(body), status=status, content_type="application/json")


def error_reply(message: str, status: int, param: str | None = None) -> web.Response:
    return web.Response(
        body=error_body(message, status, param),
        status=status,
        content_type="application/json",
        headers=STATUS_HEADERS.get(status),
    )
