"""Untyped JSON objects to typed bodies, with error texts of our own.

Comes in: a parsed JSON object and the msgspec type it must have. Goes out: the typed body, or
`InvalidRequest` naming the parameter. No library text and no more of the request than a parameter
name reaches the client.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from runtime.errors import InvalidRequest

T = TypeVar("T")

_EXPECTED = re.compile(r"Expected `(?P<want>[^`]*)`(?:, got `(?P<got>[^`]*)`)?")
_PATH = re.compile(r" - at `(?:key` in `)?\$(?P<path>[^`]*)`\s*$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*?)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")


def convert(body: Any, kind: type[T], where: str = "") -> T:
    """`where` prefixes the parameter's name in the message."""
    try:
        return msgspec.convert(body, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise _refusal(str(error), where) from None


def check_unsupported(
    body: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """`body` without the fields in `neutral`, each of which may only be absent, null, false or
    one of its neutral values.
    """
    rest = dict(body)
    for name in neutral.keys() & rest.keys():
        value = rest.pop(name)
        if value is None or value is False or any(_same(value, v) for v in neutral[name]):
            continue
        raise InvalidRequest(
            f"{where}{name} is not supported by this server; leave it out.", param=f"{where}{name}"
        )
    return rest


# What callers of the OpenAI API write on the native route.
OTHER_API = {
    "sampling_params.max_tokens": "max_new_tokens",
    "sampling_params.seed": "sampling_seed",
}


def show(value: object) -> str:
    """A client's value in an error text: short, and no control characters."""
    text = ascii(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _same(value: object, neutral: object) -> bool:
    return type(value) is type(neutral) and value == neutral


def _refusal(text: str, where: str) -> InvalidRequest:
    path = _PATH.search(text)
    name = where + (path["path"] if path else "")
    name = re.sub(r"\[\.\.\.\]", "[]", name.lstrip("."))
    if unknown := _UNKNOWN.search(text):
        field = show(unknown["name"])
        param = f"{name}.{field}" if name else field
        meant = f"; did you mean {OTHER_API[param]}?" if param in OTHER_API else "."
        return InvalidRequest(f"Unknown parameter: {param}{meant}", param=param)
    if missing := _MISSING.search(text):
        param = f"{name}.{missing['name']}" if name else missing["name"]
        return InvalidRequest(f"Missing parameter: {param}.", param=param)
    if text.startswith("Invalid enum value"):
        return InvalidRequest(f"{name} is none of the values it may have.", param=name or None)
    if expected := _EXPECTED.search(text):
        got = f", got {expected['got']}" if expected["got"] else ""
        return InvalidRequest(
            f"{name or 'The body'} must be {expected['want']}{got}.", param=name or None
        )
    return InvalidRequest(f"{name or 'The body'} is out of range.", param=name or None)
