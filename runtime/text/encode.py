"""One `/encode` body, SGLang's fields, to a `Call`; and vectors out of the engine's answer.

Comes in: a parsed JSON object. Goes out: the checked call, prompts not yet tokenized, and the
length its vectors are cut to. Used by the native and OpenAI routes and by the offline Engine.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from runtime.errors import InvalidRequest
from runtime.manifest import EmbeddingInfo
from runtime.request import SamplingParams
from runtime.text.call import Call, Logprobs, Prompt, salt
from runtime.text.generate import (
    check_count,
    each,
    read_priority,
    read_rids,
    split_prompts,
    supported,
)
from runtime.text.model import TextModel
from runtime.text.sampling import Sampling
from runtime.text.schema import convert, show
from runtime.text.sequence import Sequence

NOT_EMBEDDING = (
    "This model does not appear to be an embedding model: it generates text. Use /generate or "
    "/v1/completions, or compile it with model.pooling."
)
NOTHING = Sampling(  # no token is sampled
    params=SamplingParams(max_new_tokens=0),
    max_new_tokens=0,
    n=1,
    stop=(),
    no_stop_trim=False,
    skip_special_tokens=True,
    stream_interval=None,
)


class EncodeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    dimensions: int | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    extra_key: str | list[str] | None = None
    cache_salt: str | list[str] | None = None


def read_encode(body: Any, model: TextModel, tenant: bytes = b"") -> tuple[Call, int | None]:
    """The call, and the dimensions asked for (None: all)."""
    embedding_of(model)
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    parsed = convert(supported(body), EncodeBody)
    if (parsed.text is None) == (parsed.input_ids is None):
        raise InvalidRequest("Either text or input_ids should be provided.")
    param = "input_ids" if parsed.text is None else "text"
    sources, single = split_prompts(getattr(parsed, param), param)
    count = len(sources)
    check_count(count, model, param)
    extra = each(parsed.extra_key, count, "extra_key", "")
    salts = each(parsed.cache_salt, count, "cache_salt", "")
    call = encode_call(
        sources,
        rids=read_rids(parsed.rid, count, single=single),
        priority=read_priority(parsed.priority),
        salts=[salt(tenant, extra[i], salts[i]) for i in range(count)],
        single=single,
    )
    return call, read_dimensions(parsed.dimensions, model)


def encode_call(
    sources: list[str | list[int]],
    *,
    rids: list[str],
    priority: int,
    salts: list[bytes],
    single: bool,
) -> Call:
    prompts = [
        Prompt(
            source=source,
            rid=rid,
            sampling=NOTHING,
            logprobs=Logprobs(),
            priority=priority,
            salt=own,
        )
        for source, rid, own in zip(sources, rids, salts, strict=True)
    ]
    return Call(prompts=prompts, single=single, stream=False)


def read_dimensions(wanted: int | None, model: TextModel) -> int | None:
    """Only lengths the model is trained for; all of them is always one."""
    info = embedding_of(model)
    if wanted is None or wanted == info.dim:
        return None
    if wanted not in info.dimensions:
        choices = ", ".join(map(str, (*info.dimensions, info.dim)))
        raise InvalidRequest(
            f"dimensions must be one of {choices} for this model, got {show(wanted)}.",
            param="dimensions",
        )
    return wanted


def embedding_of(model: TextModel) -> EmbeddingInfo:
    if model.embedding is None:
        raise InvalidRequest(NOT_EMBEDDING)
    return model.embedding


def vector(seq: Sequence, info: EmbeddingInfo, dimensions: int | None) -> npt.NDArray[np.float32]:
    """The sequence's vector; a shorter one is cut, then normalised again."""
    full = np.frombuffer(seq.embedding, "<f4")
    if dimensions is None:
        return full
    cut = full[:dimensions]
    if info.normalise:
        cut = cut / max(float(np.linalg.norm(cut)), 1e-12)
    return cut.astype(np.float32)


def encoded(seq: Sequence, info: EmbeddingInfo, dimensions: int | None) -> dict[str, Any]:
    """SGLang's object."""
    meta = seq.meta_info()
    for name in ("completion_tokens", "reasoning_tokens"):
        del meta[name]
    return {"embedding": vector(seq, info, dimensions).tolist(), "meta_info": meta}
