"""One `/generate` body, SGLang's fields, to a `Call`.

Comes in: a parsed JSON object. Goes out: the checked call, prompts not yet tokenized. Used by the
native route and by the offline Engine: no asyncio, no HTTP here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import msgspec

from runtime.errors import InvalidRequest
from runtime.request import MAX_TOP_LOGPROBS
from runtime.text.call import Call, Logprobs, Prompt, new_rid, salt
from runtime.text.model import TextModel
from runtime.text.sampling import Sampling, read_sampling
from runtime.text.schema import check_unsupported, convert, show

# Known to SGLang, not to us: refused unless at a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = dict.fromkeys(
    """
    input_embeds image_data video_data audio_data modalities mm_hashes mm_content_hashes
    use_audio_in_video video_config images_config mm_processor_kwargs max_dynamic_patch
    min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch token_ids_logprob
    return_flat_raw_top_logprobs return_flat_raw_output_top_logprobs
    return_flat_raw_top_logprobs_b64 return_sampling_mask sampling_logprobs_mode
    return_hidden_states return_routed_experts return_indexer_topk return_entropy return_bytes
    session_params session_id lora_path custom_logit_processor max_thinking_tokens
    require_reasoning routed_dp_rank data_parallel_rank bootstrap_host bootstrap_port
    bootstrap_room bootstrap_pair_key decode_tp_size disagg_prefill_dp_rank kv_hints background
    custom_labels watermark
    """.split(),  # noqa: SIM905 - a list of quoted names is three times as long
    ([], {}, ""),
) | {"routed_experts_start_len": (0,)}

# Hints for routers that cannot change an answer, and a wish that always holds: no request is ever
# logged.
IGNORED = ("routing_key", "conversation_id", "no_logs")


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


def supported(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a native request that ask for something; refuses those we cannot give."""
    known = {k: v for k, v in body.items() if k not in IGNORED}
    if known.pop("log_metrics", None) not in (None, True):
        raise InvalidRequest(
            "log_metrics must be true: every request is counted; leave it out.", param="log_metrics"
        )
    return check_unsupported(known, UNSUPPORTED)


def read_generate(body: Any, model: TextModel, tenant: bytes = b"") -> Call:
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    refuse_embedding(model)
    parsed = convert(supported(body), GenerateBody)
    sources, single = _sources(parsed)
    count = len(sources)
    check_count(count, model, "text")
    samplings = _samplings(parsed, count, model)
    n = samplings[0].n
    _check_n(parsed, samplings)
    rids = read_rids(parsed.rid, count, single=single)
    wanted = each(parsed.return_logprob, count, "return_logprob", False)
    starts = each(parsed.logprob_start_len, count, "logprob_start_len", -1)
    tops = each(parsed.top_logprobs_num, count, "top_logprobs_num", 0)
    extra = each(parsed.extra_key, count, "extra_key", "")
    salts = each(parsed.cache_salt, count, "cache_salt", "")
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
            priority=read_priority(parsed.priority),
            salt=salt(tenant, extra[i], salts[i]),
            show_prompt_ids=bool(parsed.return_prompt_token_ids),
        )
        for i, source in enumerate(sources)
    ]
    return Call(
        prompts=prompts,
        single=single and n == 1,
        stream=bool(parsed.stream),
        name=call_name(parsed.rid),
    )


def check_count(count: int, model: TextModel, param: str) -> None:
    most = model.limits.prompts_per_request
    if count > most:
        raise InvalidRequest(f"at most {most} prompts are allowed, got {count}", param=param)


def refuse_embedding(model: TextModel) -> None:
    if model.embedding is not None:
        raise InvalidRequest(
            "This is an embedding model: it generates no text. Use /encode or /v1/embeddings."
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


def call_name(rid: str | list[str] | None) -> str:
    return rid if isinstance(rid, str) else ""


def each(value: Any, count: int, name: str, default: Any) -> list[Any]:
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


def read_priority(priority: int | None) -> int:
    if priority is not None and not -(2**31) <= priority < 2**31:
        raise InvalidRequest(
            f"priority must be in [-2**31, 2**31 - 1], got {show(priority)}.", param="priority"
        )
    return priority or 0
