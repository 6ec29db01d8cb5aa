"""One `/generate` body to engine requests, and their events back to response objects.

Comes in: a parsed body (SGLang's fields). `read_generate` checks it, `Call.build` makes one `Sequence` per output once the
prompts are tokenized. Each `Sequence` eats its `Event`s and renders SGLang's response object. Used by the native and OpenAI
routes and by the offline Engine: no asyncio, no HTTP here.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from typing import Any

import msgspec

from conf.schema import LimitsConfig
from runtime.errors import InvalidRequest
from runtime.request import MAX_TOP_LOGPROBS, Request
from runtime.text.detokenizer import Detokenizers
from runtime.text.sampling import Sampling, read_sampling
from runtime.text.schema import check_unsupported, convert, show
from runtime.text.sequence import Sequence
from runtime.text.tokenizer import Tokenizer

# Known to SGLang, not to us: refused unless at a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "input_embeds image_data video_data audio_data modalities mm_hashes mm_content_hashes use_audio_in_video video_config "
        "images_config mm_processor_kwargs max_dynamic_patch min_dynamic_patch image_max_dynamic_patch "
        "video_max_dynamic_patch token_ids_logprob return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs "
        "return_flat_raw_top_logprobs_b64 return_sampling_mask sampling_logprobs_mode return_hidden_states "
        "return_routed_experts return_indexer_topk return_entropy return_bytes session_params session_id lora_path "
        "custom_logit_processor max_thinking_tokens require_reasoning routed_dp_rank data_parallel_rank bootstrap_host "
        "bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size disagg_prefill_dp_rank kv_hints background "
        "custom_labels watermark"
    ).split(),
    ([], {}, ""),
) | {"routed_experts_start_len": (0,)}

# Hints for routers and logs that cannot change an answer: accepted from anyone.
IGNORED = ("routing_key", "conversation_id", "log_metrics", "no_logs")


class GenerateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    return_prompt_token_ids: bool | None = None
    stream: bool | None = None
    priority: int | None = None
    extra_key: str | list[str] | None = None
    cache_salt: str | list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """What the text layer knows of the served model. `tokenizer` None: token ids in, token ids out."""

    name: str
    tokenizer: Tokenizer | None
    detokenizers: Detokenizers | None
    context: int
    vocab: int
    limits: LimitsConfig
    stream_interval: int = 1

    @staticmethod
    def make(
        name: str,
        tokenizer: Tokenizer | None,
        *,
        context: int,
        vocab: int,
        limits: LimitsConfig,
        stream_interval: int = 1,
    ) -> TextModel:
        return TextModel(
            name=name,
            tokenizer=tokenizer,
            detokenizers=Detokenizers(tokenizer) if tokenizer else None,
            context=context,
            vocab=vocab,
            limits=limits,
            stream_interval=stream_interval,
        )


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
    """`single`: answer with one object instead of a list."""

    prompts: list[Prompt]
    single: bool
    stream: bool

    def build(self, model: TextModel, tokens: Seq[list[int]]) -> list[Sequence]:
        """`tokens[i]`: the ids of `prompts[i]`. Outputs are prompt-major: all `n` of the first prompt, then the next."""
        return [
            _sequence(model, prompt, ids, copy, index=i * prompt.sampling.n + copy)
            for i, (prompt, ids) in enumerate(zip(self.prompts, tokens, strict=True))
            for copy in range(prompt.sampling.n)
        ]


def read_generate(body: Any, model: TextModel, tenant: bytes = b"") -> Call:
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    known = {k: v for k, v in body.items() if k not in IGNORED}
    parsed = convert(check_unsupported(known, UNSUPPORTED), GenerateBody)
    sources, single = _sources(parsed)
    count = len(sources)
    if count > model.limits.prompts_per_request:
        raise InvalidRequest(
            f"at most {model.limits.prompts_per_request} prompts are allowed, got {count}",
            param="text",
        )
    samplings = _samplings(parsed, count, model)
    n = samplings[0].n
    _check_n(parsed, samplings)
    rids = read_rids(parsed.rid, count, single=single)
    wanted = _each(parsed.return_logprob, count, "return_logprob", False)
    starts = _each(parsed.logprob_start_len, count, "logprob_start_len", -1)
    tops = _each(parsed.top_logprobs_num, count, "top_logprobs_num", 0)
    extra = _each(parsed.extra_key, count, "extra_key", "")
    salts = _each(parsed.cache_salt, count, "cache_salt", "")
    prompts = [
        Prompt(
            source=source,
            rid=rids[i],
            sampling=samplings[i],
            logprobs=Logprobs(
                wanted=wanted[i],
                start=starts[i] if wanted[i] else -1,
                top=_top(tops[i]) if wanted[i] else 0,
                with_text=bool(parsed.return_text_in_logprobs),
            ),
            priority=_priority(parsed.priority),
            salt=salt(tenant, extra[i], salts[i]),
            show_prompt_ids=bool(parsed.return_prompt_token_ids),
        )
        for i, source in enumerate(sources)
    ]
    return Call(prompts=prompts, single=single and n == 1, stream=bool(parsed.stream))


def prompt_too_long(text: str, model: TextModel) -> bool:
    """Known without tokenizing: more bytes than the context's worth of the longest token. Cheap, so it comes first."""
    size = len(text)
    if model.tokenizer is None or size <= 16 * model.context:
        return False
    longest = model.tokenizer.longest_token()
    return longest > 0 and size > longest * model.context


def salt(tenant: bytes, *keys: str | None) -> bytes:
    """Separates prefix caches: by the caller's API key, and by the keys a request brings."""
    named = [key.encode() for key in keys if key]
    if not named:
        return tenant
    return hashlib.sha256(b"\0".join((tenant, *(hashlib.sha256(k).digest() for k in named)))).digest()


def new_rid() -> str:
    return secrets.token_hex(16)


def _sequence(
    model: TextModel, prompt: Prompt, ids: list[int], copy: int, *, index: int
) -> Sequence:
    sampling, logprobs = prompt.sampling, prompt.logprobs
    size = len(ids)
    if size == 0:
        raise InvalidRequest("input_ids cannot be empty.", param="input_ids")
    if size >= model.context:
        raise InvalidRequest(
            f"The input ({size} tokens) is longer than the model's context length ({model.context} tokens).",
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
            f"Requested token count exceeds the model's maximum context length of {model.context} tokens. You requested a "
            f"total of {size + most} tokens: {size} tokens from the input messages and {most} tokens for the completion. "
            "Please reduce the number of tokens in the input text or the completion to fit within the limit.",
            param="max_new_tokens",
        )
    most = model.context - size if most is None else most
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


def _sources(body: GenerateBody) -> tuple[list[str | list[int]], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise InvalidRequest("Either text, input_ids or input_embeds should be provided.")
    if body.text is not None:
        return split_prompts(body.text, "text")
    assert body.input_ids is not None
    return split_prompts(body.input_ids, "input_ids")


def split_prompts(
    given: str | Seq[str | int | list[int]], param: str
) -> tuple[list[str | list[int]], bool]:
    """The prompts of a call, and whether they were given as one: text, ids, or a list of either."""
    if isinstance(given, str):
        return [given], True
    kinds = set(map(type, given))
    if kinds == {int}:
        return [list(given)], True  # type: ignore[arg-type]
    if not given or any(part == [] for part in given):
        raise InvalidRequest(f"{param} cannot be empty.", param=param)
    if len(kinds) > 1:
        raise InvalidRequest(f"{param} mixes texts, ids and lists of ids.", param=param)
    return list(given), False  # type: ignore[arg-type]


def check_ids(ids: list[int], vocab: int) -> None:
    if min(ids) < 0 or max(ids) >= vocab:
        bad = next(i for i in ids if not 0 <= i < vocab)
        raise InvalidRequest(
            f"input_ids must be in [0, {vocab - 1}], got {show(bad)}.", param="input_ids"
        )


def _samplings(body: GenerateBody, count: int, model: TextModel) -> list[Sampling]:
    given = body.sampling_params
    if isinstance(given, list):
        if len(given) != count:
            raise _length_error("sampling_params", len(given), count)
        return [read_sampling(params, model.vocab, model.limits) for params in given]
    return [read_sampling(given or {}, model.vocab, model.limits)] * count


def _check_n(body: GenerateBody, samplings: list[Sampling]) -> None:
    n = samplings[0].n
    if any(s.n != n for s in samplings):
        raise InvalidRequest("n must be the same for all prompts of a batch.", param="n")
    if n > 1:
        for name in ("return_logprob", "logprob_start_len", "top_logprobs_num"):
            if isinstance(getattr(body, name), list):
                raise InvalidRequest(f"{name} cannot be a list when n > 1.", param=name)


def read_rids(rid: str | list[str] | None, count: int, *, single: bool) -> list[str]:
    if rid is None or rid == []:
        return [new_rid() for _ in range(count)]
    names = rid if isinstance(rid, list) else [rid]
    for name in names:
        if not 0 < len(name) <= 256 or not name.isprintable():
            raise InvalidRequest("rid must be 1 to 256 printable characters.", param="rid")
    if isinstance(rid, str):
        return [rid] if single or count == 1 else [f"{rid}_{i}" for i in range(count)]
    if len(rid) != count:
        raise _length_error("rid", len(rid), count)
    if len(set(rid)) != count:
        twice = sorted({name for name in rid if rid.count(name) > 1})
        raise InvalidRequest(
            f"Duplicate request IDs detected within the request: {', '.join(map(show, twice[:8]))}",
            param="rid",
        )
    return rid


def _each(value: Any, count: int, name: str, default: Any) -> list[Any]:
    if value is None:
        return [default] * count
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise _length_error(name, len(value), count)
    return value


def _length_error(name: str, got: int, want: int) -> InvalidRequest:
    return InvalidRequest(
        f"{name} has {got} entries for {want} prompts; give one per prompt or a single value.",
        param=name,
    )


def _top(top: int) -> int:
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs_num must be in [0, {MAX_TOP_LOGPROBS}], got {show(top)}.",
            param="top_logprobs_num",
        )
    return top


def _priority(priority: int | None) -> int:
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise InvalidRequest(
            f"priority must be in [-2**31, 2**31 - 1], got {show(priority)}.", param="priority"
        )
    return priority or 0


Encode = Callable[[str], list[int]]


def tokenize(model: TextModel, source: str | list[int]) -> list[int]:
    """A prompt's ids, checked. Slow for long text: callers with an event loop run it in a thread."""
    if isinstance(source, list):
        check_ids(source, model.vocab)
        return source
    if model.tokenizer is None:
        raise InvalidRequest("This model has no tokenizer; send input_ids.", param="text")
    if prompt_too_long(source, model):
        raise InvalidRequest(
            f"The input ({len(source)} characters) is longer than the model's context length ({model.context} tokens).",
            param="text",
        )
    return model.tokenizer.encode(source)
