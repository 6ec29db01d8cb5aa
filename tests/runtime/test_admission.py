"""The validator at the engine's boundary: every field's limits, and that nothing wrong passes."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SMALL, make_loop

from runtime.core.admission import check
from runtime.errors import InvalidRequest
from runtime.request import Grammar, Request, SamplingParams


def request(tokens: list[int] | None = None, **fields: object) -> Request:
    sampling = {k: v for k, v in fields.items() if k in SamplingParams.__struct_fields__}
    outer = {k: v for k, v in fields.items() if k not in sampling}
    params = SamplingParams(**{"max_new_tokens": 4, **sampling})  # type: ignore[arg-type]
    return Request(**{"id": 1, "tokens": tokens or [1, 2, 3], "sampling": params, **outer})  # type: ignore[arg-type]


def test_an_ordinary_request_passes() -> None:
    check(request(), SMALL)
    check(request(max_new_tokens=61), SMALL)  # exactly the context


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"id": -1}, "id"),
        ({"id": 2**63}, "id"),
        ({"tokens": [SMALL.vocab]}, "input_ids"),
        ({"tokens": [1, -1]}, "input_ids"),
        ({"tokens": [1] * 65}, "input_ids"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 62}, "max_new_tokens"),
        ({"max_new_tokens": 2**70}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "repetition_penalty"),
        ({"logit_bias": {SMALL.vocab: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"logit_bias": {i: 1.0 for i in range(2000)}}, "logit_bias"),
        ({"stop_token_ids": (SMALL.vocab,)}, "stop_token_ids"),
        ({"stop_token_ids": (-5,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 129}, "stop_token_ids"),
        ({"grammar": Grammar(kind="regex", text="")}, "grammar"),
        ({"grammar": Grammar(kind="regex", text="a" * (2**20 + 1))}, "grammar"),
        ({"seed": 2**63}, "sampling_seed"),
        ({"seed": -(2**63) - 1}, "sampling_seed"),
        ({"top_logprobs": 21}, "top_logprobs_num"),
        ({"top_logprobs": -1}, "top_logprobs_num"),
        ({"prompt_logprobs_from": 3}, "logprob_start_len"),
        ({"prompt_logprobs_from": -2}, "logprob_start_len"),
        ({"priority": 2**31}, "priority"),
        ({"salt": b"x" * 257}, "cache_salt"),
    ],
    ids=str,
)
def test_out_of_range_is_refused(bad: dict, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(request(**bad), SMALL)
    assert refused.value.param == param
    assert refused.value.status == 400


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        check(msgspec.structs.replace(request(), tokens=[]), SMALL)


def test_what_can_never_fit_the_pool_is_refused_with_both_numbers() -> None:
    from dataclasses import replace

    with pytest.raises(InvalidRequest, match=r"44 tokens, the KV pool holds 40"):
        check(request(max_new_tokens=41), replace(SMALL, pages=10))


def test_every_field_of_a_request_is_checked_or_free() -> None:
    """A new field must be given limits here: add it to the table above, or to `free`."""
    free = {"ignore_eos", "logprobs", "sampling", "tokens", "id"}
    table = test_out_of_range_is_refused.pytestmark[0].args[1]
    named = {name for bad, _ in table for name in bad}
    fields = {*SamplingParams.__struct_fields__, *Request.__struct_fields__}
    assert fields <= named | free


wild_int = st.one_of(st.integers(-5, 70), st.integers())
wild_float = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 0.5, 1e-45, 2.0]))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_request_ends_the_engine(data: st.DataObject) -> None:
    """Whatever passes runs to its end, whatever does not is refused, and the next one is served."""
    draw = data.draw
    sampling = SamplingParams(
        max_new_tokens=draw(wild_int),
        min_new_tokens=draw(st.one_of(st.just(0), wild_int)),
        temperature=draw(wild_float),
        top_k=draw(wild_int),
        top_p=draw(wild_float),
        min_p=draw(wild_float),
        frequency_penalty=draw(wild_float),
        presence_penalty=draw(wild_float),
        repetition_penalty=draw(wild_float),
        logit_bias=draw(st.dictionaries(wild_int, wild_float, max_size=2)),
        seed=draw(st.one_of(st.none(), wild_int)),
        stop_token_ids=tuple(draw(st.lists(wild_int, max_size=2))),
        ignore_eos=draw(st.booleans()),
    )
    wild = Request(
        id=draw(wild_int),
        tokens=draw(st.lists(wild_int, max_size=20)),
        sampling=sampling,
        logprobs=draw(st.booleans()),
        top_logprobs=draw(wild_int),
        prompt_logprobs_from=draw(wild_int),
        priority=draw(wild_int),
        salt=draw(st.binary(max_size=300)),
    )
    loop = make_loop()
    loop.add(wild)
    ends = []
    for _ in range(300):
        if not loop.has_work:
            break
        ends += [event for event in loop.step() if event.finish]
    assert len(ends) == 1
    loop.idle()
    loop.add(request(id=7))
    assert any(e.tokens for _ in range(10) if loop.has_work for e in loop.step())
