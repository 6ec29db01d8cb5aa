"""The one typed validator at the engine's boundary: no request reaches the scheduler without
passing `check`.

Comes in: a decoded Request (msgspec has checked types). Every integer is held to a range tied to
vocabulary, context or pool, every float to being finite and in range. Goes out: nothing, or
InvalidRequest. Called by the engine loop for every request, whoever sent it.
"""

from __future__ import annotations

import math

from runtime.core.edits import most_edits
from runtime.device.base import Capacity
from runtime.errors import InvalidRequest
from runtime.request import MAX_TOP_LOGPROBS, Request, SamplingParams

MAX_BIAS = 1024
MAX_STOP_IDS = 128
MAX_SALT = 256
MAX_GRAMMAR = 1 << 20
CELLS = 4 << 20  # logprob cells of one request


def check(request: Request, capacity: Capacity, eos: int = 0) -> None:
    """`eos`: how many tokens end a sequence by themselves."""
    tokens, sampling, vocab = request.tokens, request.sampling, capacity.vocab
    if not 0 <= request.id < 2**63:
        raise _refuse("id", f"must be in [0, 2**63 - 1], got {request.id}")
    if not tokens:
        raise _refuse("input_ids", "cannot be empty.")
    if len(tokens) > capacity.context:
        raise InvalidRequest(
            f"The input ({len(tokens)} tokens) is longer than the model's context length "
            f"({capacity.context} tokens).",
            param="input_ids",
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab:
        raise _refuse("input_ids", f"must be in [0, {vocab - 1}], got {low if low < 0 else high}.")
    if capacity.embedding and (sampling.max_new_tokens or request.prompt_logprobs_from >= 0):
        raise InvalidRequest("This is an embedding model: it generates no text.")
    _check_lengths(len(tokens), sampling, capacity)
    _check_sampling(sampling, vocab)
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise _refuse(
            "top_logprobs_num", f"must be in [0, {MAX_TOP_LOGPROBS}], got {request.top_logprobs}."
        )
    start = request.prompt_logprobs_from
    if not -1 <= start < len(tokens):
        raise _refuse("logprob_start_len", f"must be in [-1, {len(tokens) - 1}], got {start}.")
    scored = len(tokens) - start if start >= 0 else 0
    cells = (sampling.max_new_tokens * request.logprobs + scored) * (1 + request.top_logprobs)
    if cells > CELLS:
        raise _refuse("top_logprobs_num", f"asks for {cells} log-probabilities, at most {CELLS}.")
    if not -(2**31) <= request.priority < 2**31:
        raise _refuse("priority", f"must be in [-2**31, 2**31 - 1], got {request.priority}.")
    if len(request.salt) > MAX_SALT:
        raise _refuse("cache_salt", f"is {len(request.salt)} bytes, at most {MAX_SALT}.")
    edits = most_edits(request, len(sampling.stop_token_ids) + eos)
    if edits > capacity.edits:
        raise _refuse(
            "logit_bias", f"and penalties need {edits} state edits, at most {capacity.edits}."
        )


def check_whole(request: Request, capacity: Capacity, step_tokens: int) -> None:
    """A sequence that must be computed in one step fits into one."""
    if capacity.whole and len(request.tokens) > step_tokens:
        raise InvalidRequest(
            f"The input ({len(request.tokens)} tokens) is longer than a step ({step_tokens} "
            "tokens), and this model computes a sequence in one step; send less or raise "
            "max_step_tokens.",
            param="input_ids",
        )


def _check_lengths(prompt: int, sampling: SamplingParams, capacity: Capacity) -> None:
    most = sampling.max_new_tokens
    if most < 0:
        raise _refuse("max_new_tokens", f"must be at least 0, got {most}.")
    total = prompt + most
    if total > capacity.context:
        raise InvalidRequest(
            "Requested token count exceeds the model's maximum context length of "
            f"{capacity.context} tokens. You requested a "
            f"total of {total} tokens: {prompt} tokens from the input messages and {most} tokens "
            "for the completion. Please "
            "reduce the number of tokens in the input text or the completion to fit within the "
            "limit.",
            param="max_new_tokens",
        )
    pool = capacity.pages * capacity.page_size
    if total > pool:
        raise _refuse(
            "max_new_tokens",
            f"and the input are {total} tokens, the KV pool holds {pool}; ask for fewer or raise "
            "kv_tokens.",
        )
    if not 0 <= sampling.min_new_tokens <= most:
        raise _refuse(
            "min_new_tokens",
            f"must be in [0, max_new_tokens({most})], got {sampling.min_new_tokens}.",
        )


def _check_sampling(s: SamplingParams, vocab: int) -> None:
    if not (math.isfinite(s.temperature) and s.temperature >= 0):
        raise _refuse("temperature", f"must be a non-negative finite number, got {s.temperature}.")
    if not 0 < s.top_p <= 1:
        raise _refuse("top_p", f"must be in (0, 1], got {s.top_p}.")
    if not 0 <= s.top_k < 2**31:
        raise _refuse("top_k", f"must be -1 (disable) or at least 1, got {s.top_k}.")
    if not 0 <= s.min_p <= 1:
        raise _refuse("min_p", f"must be in [0, 1], got {s.min_p}.")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(s, name) <= 2:
            raise _refuse(name, f"must be in [-2, 2], got {getattr(s, name)}.")
    if not 0 < s.repetition_penalty <= 2:
        raise _refuse(
            "repetition_penalty",
            f"must be in (0, 2] (1.0 = no penalty), got {s.repetition_penalty}.",
        )
    if len(s.logit_bias) > MAX_BIAS:
        raise _refuse("logit_bias", f"has {len(s.logit_bias)} entries, at most {MAX_BIAS}.")
    for token, value in s.logit_bias.items():
        if not 0 <= token < vocab:
            raise _refuse("logit_bias", f"must has keys in [0, {vocab - 1}], got {token}.")
        if not -100 <= value <= 100:
            raise _refuse("logit_bias", f"must have values in [-100, 100], got {value}.")
    if len(s.stop_token_ids) > MAX_STOP_IDS:
        raise _refuse(
            "stop_token_ids", f"has {len(s.stop_token_ids)} entries, at most {MAX_STOP_IDS}."
        )
    for token in s.stop_token_ids:
        if not 0 <= token < vocab:
            raise _refuse("stop_token_ids", f"must be in [0, {vocab - 1}], got {token}.")
    if s.grammar is not None and not 0 < len(s.grammar.text) <= MAX_GRAMMAR:
        raise InvalidRequest(
            f"{s.grammar.kind} must be 1 to {MAX_GRAMMAR} characters, got {len(s.grammar.text)}.",
            param="grammar",
        )
    if s.seed is not None and not -(2**63) <= s.seed < 2**63:
        raise _refuse("sampling_seed", f"must be in [-2**63, 2**63 - 1], got {s.seed}.")


def _refuse(param: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {what}", param=param)
