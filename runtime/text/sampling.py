"""Sampling parameters as clients write them (SGLang's names), checked and turned into the engine's.

Comes in: one `sampling_params` object. Goes out: `Sampling`, the engine's parameters plus what
stays in the text layer. The error texts are SGLang's, which clients match. Used by generate.py and,
for OpenAI bodies, runtime/http/openai.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from conf.schema import LimitsConfig
from runtime.errors import InvalidRequest
from runtime.request import SamplingParams
from runtime.text.grammar import KINDS, read_grammar
from runtime.text.schema import check_unsupported, convert, show

T = TypeVar("T")

GREEDY_BELOW = 1e-6

# Known to SGLang, not to us: refused unless at a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "beam_width": (1,),
    "stop_regex": ("", []),
    "custom_params": ({},),
    "watermark": ({},),
}


class SamplingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`null` means the default, except for max_new_tokens, where it means all the context
    allows.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    # Only slow tokenizers ever put spaces between control tokens; either value gives our text.
    spaces_between_special_tokens: bool | None = None
    stream_interval: int | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`max_new_tokens` None: as many as the context allows (known once the prompt is tokenized)."""

    params: SamplingParams
    max_new_tokens: int | None
    n: int
    stop: tuple[str, ...]
    no_stop_trim: bool
    skip_special_tokens: bool
    stream_interval: int | None


def read_sampling(body: Any, vocab: int, limits: LimitsConfig) -> Sampling:
    if not isinstance(body, dict):
        raise InvalidRequest("sampling_params must be an object.", param="sampling_params")
    body = check_unsupported(body, UNSUPPORTED, "sampling_params.")
    return sampling_from(convert(body, SamplingBody, "sampling_params"), vocab, limits)


def sampling_from(body: SamplingBody, vocab: int, limits: LimitsConfig) -> Sampling:
    temperature = _or(body.temperature, 1.0)
    top_k = _or(body.top_k, -1)
    min_new_tokens = _or(body.min_new_tokens, 0)
    _check_ranges(body, temperature, top_k, min_new_tokens)
    n = _or(body.n, 1)
    _require(1 <= n <= limits.n, "n", f"n must be in [1, {limits.n}], got {show(n)}.")
    interval = body.stream_interval
    _require(
        interval is None or interval >= 1,
        "stream_interval",
        f"stream_interval must be at least 1, got {show(interval)}.",
    )
    params = SamplingParams(
        max_new_tokens=0,  # set when the prompt length is known
        min_new_tokens=min_new_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=0 if top_k == -1 else min(top_k, vocab),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab, limits),
        seed=_seed(body.sampling_seed),
        stop_token_ids=_stop_token_ids(body.stop_token_ids or [], vocab, limits),
        ignore_eos=bool(body.ignore_eos),
        grammar=read_grammar({kind: getattr(body, kind) for kind in KINDS}, limits),
    )
    return Sampling(
        params=params,
        max_new_tokens=body.max_new_tokens,
        n=n,
        stop=stop_strings(body.stop, limits),
        no_stop_trim=bool(body.no_stop_trim),
        skip_special_tokens=body.skip_special_tokens is not False,
        stream_interval=interval,
    )


def stop_strings(stop: str | list[str] | None, limits: LimitsConfig) -> tuple[str, ...]:
    stops = tuple(s for s in ([stop] if isinstance(stop, str) else stop or []) if s)
    most = limits.stop_strings
    _require(
        len(stops) <= most, "stop", f"at most {most} stop strings are allowed, got {len(stops)}"
    )
    for text in stops:
        size = len(text.encode())
        _require(
            size <= limits.stop_bytes,
            "stop",
            f"a stop string is {size} bytes, over the {limits.stop_bytes}-byte limit",
        )
    return stops


def _check_ranges(body: SamplingBody, temperature: float, top_k: int, low: int) -> None:
    most = body.max_new_tokens
    _require(
        most is None or most >= 0,
        "max_new_tokens",
        f"max_new_tokens must be at least 0, got {show(most)}.",
    )
    _require(
        low >= 0,
        "min_new_tokens",
        f"min_new_tokens must be in [0, max_new_tokens], got {show(low)}.",
    )
    _require(
        most is None or low <= most,
        "min_new_tokens",
        f"min_new_tokens must be in [0, max_new_tokens({show(most)})], got {show(low)}.",
    )
    _require(
        math.isfinite(temperature) and temperature >= 0,
        "temperature",
        f"temperature must be a non-negative finite number, got {show(temperature)}.",
    )
    _require(
        top_k == -1 or top_k >= 1,
        "top_k",
        f"top_k must be -1 (disable) or at least 1, got {show(top_k)}.",
    )
    for name, low_end, high, shown in (
        ("top_p", 0.0, 1.0, "(0, 1]"),
        ("min_p", -math.inf, 1.0, "[0, 1]"),
        ("frequency_penalty", -math.inf, 2.0, "[-2, 2]"),
        ("presence_penalty", -math.inf, 2.0, "[-2, 2]"),
        ("repetition_penalty", 0.0, 2.0, "(0, 2] (1.0 = no penalty)"),
    ):
        value = getattr(body, name)
        if value is None:
            continue
        closed_low = {"min_p": 0.0, "frequency_penalty": -2.0, "presence_penalty": -2.0}.get(name)
        inside = low_end < value <= high and (closed_low is None or value >= closed_low)
        _require(inside, name, f"{name} must be in {shown}, got {show(value)}.")


def _logit_bias(bias: dict[str, float], vocab: int, limits: LimitsConfig) -> dict[int, float]:
    _require(
        len(bias) <= limits.logit_bias,
        "logit_bias",
        f"at most {limits.logit_bias} logit_bias entries are allowed, got {len(bias)}",
    )
    out: dict[int, float] = {}
    for key, value in bias.items():
        # isascii: int() would also take full-width digits and underscores.
        known = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab
        _require(
            known, "logit_bias", f"logit_bias must has keys in [0, {vocab - 1}], got {show(key)}."
        )
        _require(
            -100.0 <= value <= 100.0,
            "logit_bias",
            f"logit_bias values must be in [-100, 100], got {show(value)}.",
        )
        out[int(key)] = value
    return out


def _stop_token_ids(ids: list[int], vocab: int, limits: LimitsConfig) -> tuple[int, ...]:
    most = limits.stop_token_ids
    _require(
        len(ids) <= most,
        "stop_token_ids",
        f"at most {most} stop_token_ids are allowed, got {len(ids)}",
    )
    for token in ids:
        _require(
            0 <= token < vocab,
            "stop_token_ids",
            f"stop_token_ids must be in [0, {vocab - 1}], got {show(token)}.",
        )
    return tuple(ids)


def _seed(seed: int | None) -> int | None:
    _require(
        seed is None or -(2**63) <= seed < 2**63,
        "sampling_seed",
        f"sampling_seed must be in [-2**63, 2**63 - 1], got {show(seed)}.",
    )
    return seed


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _require(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise InvalidRequest(message, param=param)
