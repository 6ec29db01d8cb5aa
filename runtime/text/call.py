"""A checked call: its prompts, and the engine requests made of them.

Comes in: prompts with their parameters (from generate.py or the OpenAI routes) and their token ids.
Goes out: one `Sequence` per output, each with its engine `Request`.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec

from runtime.errors import InvalidRequest
from runtime.request import Request
from runtime.text.model import TextModel
from runtime.text.sampling import Sampling
from runtime.text.schema import show
from runtime.text.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """What to report: `start` -1 outputs only, otherwise from this prompt position on."""

    wanted: bool = False
    start: int = -1
    top: int = 0
    with_text: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a call; `source` is text to be tokenized or ids."""

    source: str | list[int]
    rid: str
    sampling: Sampling
    logprobs: Logprobs
    priority: int = 0
    salt: bytes = b""
    show_prompt_ids: bool = False


_ids = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`single`: answer with one object instead of a list. `name`: the client's own for all of it;
    those of its prompts and outputs follow from it."""

    prompts: list[Prompt]
    single: bool
    stream: bool
    name: str = ""

    def build(self, model: TextModel, tokens: Seq[list[int]]) -> list[Sequence]:
        """`tokens[i]`: the ids of `prompts[i]`. Outputs are prompt-major: all `n` of the first
        prompt, then the next.
        """
        return [
            _sequence(model, prompt, ids, copy, index=i * prompt.sampling.n + copy)
            for i, (prompt, ids) in enumerate(zip(self.prompts, tokens, strict=True))
            for copy in range(prompt.sampling.n)
        ]


def salt(tenant: bytes, *keys: str | None) -> bytes:
    """Separates prefix caches: by the caller's API key, and by the keys a request brings."""
    named = [key.encode() for key in keys if key]
    if not named:
        return tenant
    return hashlib.sha256(
        b"\0".join((tenant, *(hashlib.sha256(k).digest() for k in named)))
    ).digest()


def new_rid() -> str:
    return secrets.token_hex(16)


def _sequence(
    model: TextModel, prompt: Prompt, ids: list[int], copy: int, *, index: int
) -> Sequence:
    sampling, logprobs = prompt.sampling, prompt.logprobs
    size = len(ids)
    if size == 0:
        raise InvalidRequest("input_ids cannot be empty.", param="input_ids")
    room = model.context - (model.embedding is None)  # a generator needs one for its output
    if size > room:
        raise InvalidRequest(
            f"The input ({size} tokens) is longer than the model's context length "
            f"({model.context} tokens).",
            param="text" if isinstance(prompt.source, str) else "input_ids",
        )
    if logprobs.start < -1 or logprobs.start >= size:
        raise InvalidRequest(
            f"logprob_start_len must be -1 or in [0, {size - 1}], got {show(logprobs.start)}.",
            param="logprob_start_len",
        )
    most = sampling.max_new_tokens
    if most is not None and size + most > model.context:
        raise InvalidRequest(
            f"Requested token count exceeds the model's maximum context length of {model.context} "
            f"tokens. You requested a total of {size + most} tokens: {size} tokens from the input "
            f"messages and {most} tokens for the completion. Please reduce the number of tokens in "
            "the input text or the completion to fit within the limit.",
            param="max_new_tokens",
        )
    most = max(model.room - size, 1) if most is None else most
    seed = sampling.params.seed
    if seed is not None and copy:  # the same seed would give n equal outputs
        seed = (seed + copy + 2**63) % 2**64 - 2**63
    request = Request(
        id=next(_ids),
        tokens=ids,
        sampling=msgspec.structs.replace(
            sampling.params,
            max_new_tokens=most,
            min_new_tokens=min(sampling.params.min_new_tokens, most),
            seed=seed,
        ),
        logprobs=logprobs.wanted,
        top_logprobs=logprobs.top,
        prompt_logprobs_from=logprobs.start,
        priority=prompt.priority,
        salt=prompt.salt,
    )
    n = sampling.n
    return Sequence(
        request=request,
        rid=prompt.rid if n == 1 else f"{prompt.rid}_{copy}",
        index=index,
        tokenizer=model.tokenizer,
        detokenizer=model.detokenizers.new(skip_special_tokens=sampling.skip_special_tokens)
        if model.detokenizers
        else None,
        stop=sampling.stop,
        no_stop_trim=sampling.no_stop_trim,
        interval=sampling.stream_interval or model.stream_interval,
        text_in_logprobs=logprobs.with_text,
        show_prompt_ids=prompt.show_prompt_ids,
    )
