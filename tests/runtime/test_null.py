"""The null device notices a step that breaks the contract: the tests above it rest on that."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from oracle import SMALL

from runtime.device.base import StepInput, open_session
from runtime.device.null import NullSession
from runtime.errors import UsageError
from runtime.manifest import LengthRule


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def good() -> StepInput:
    """Two prompts, of three and two tokens, both sampled."""
    zeros = np.zeros(2, np.float32)
    return StepInput(
        tokens=i32(1, 2, 3, 4, 5),
        positions=i32(0, 1, 2, 0, 1),
        kv_slots=i32(20, 21, 22, 8, 9),
        seq_start=i32(0, 3, 5),
        seq_len=i32(3, 2),
        pages=[i32(5), i32(2)],
        row_token=i32(2, 4),
        row_slot=i32(0, 1),
        row_target=i32(-1, -1),
        row_flags=i32(0, 0),
        row_top=i32(0, 0),
        temperature=zeros,
        top_k=i32(0, 0),
        top_p=zeros + 1,
        min_p=zeros,
        frequency=zeros,
        presence=zeros,
        repetition=zeros + 1,
        seed=np.zeros(2, np.int64),
        edits=np.zeros((0, 4), np.int32),
    )


def test_a_good_step_passes_in_both_forms_of_page_tables() -> None:
    session = NullSession(SMALL, strict=True)
    tokens = session.collect(session.submit(good())).token.tolist()
    again = session.collect(
        session.submit(replace(good(), pages=np.array([[5, 9], [2, 9]], np.int32)))
    )
    assert tokens == again.token.tolist()
    assert all(0 <= token < SMALL.vocab for token in tokens)


def test_outputs_end_with_the_next_step() -> None:
    session = NullSession(SMALL, strict=True)
    out = session.collect(session.submit(good()))
    tokens, arrays = out.token.copy(), (out.token, out.logprob, out.status, out.top_ids)
    session.submit(good())
    assert (out.token != tokens).all() and all((a == -77).all() for a in arrays)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": i32(1, 2, 3, 4, 40)}, "token out of range"),
        ({"tokens": i32(1, 2, 3, 4, -5)}, "token out of range"),
        ({"positions": i32(0, 1, 3, 0, 1)}, "last position|gap"),
        ({"positions": i32(1, 0, 2, 0, 1)}, "gap"),
        ({"kv_slots": i32(20, 21, 23, 8, 9)}, "page table"),
        ({"kv_slots": i32(20, 21, 22, 8, 8)}, "page table"),
        ({"seq_len": i32(3, 3)}, "last position"),
        ({"seq_start": i32(0, 2, 5)}, "last position|gap"),
        ({"seq_start": i32(0, 5, 5)}, "without a token"),
        ({"pages": [i32(5), i32(24)], "kv_slots": i32(20, 21, 22, 96, 97)}, "page out of range"),
        ({"pages": [i32(5), i32(5)], "kv_slots": i32(20, 21, 22, 20, 21)}, "two tokens"),
        ({"row_token": i32(2, 5)}, "row of no token"),
        ({"row_slot": i32(0, 4)}, "slot out of range"),
        ({"row_slot": i32(0, 0)}, "two samples"),
        ({"row_target": i32(-1, 40)}, "target"),
        ({"row_top": i32(0, 21)}, "top logprobs"),
        ({"row_mask": i32(0, -1)}, "come together"),
        ({"row_mask": i32(0, -1), "masks": np.zeros((1, 3), np.int32)}, "3 words for 40 tokens"),
        ({"row_mask": i32(1, -1), "masks": np.zeros((1, 2), np.int32)}, "without their rows"),
        ({"row_mask": i32(0, -1), "masks": np.zeros((2, 2), np.int32)}, "without their rows"),
        ({"edits": np.array([[4, 0, 0, 0]], np.int32)}, "edit out of range"),
        ({"edits": np.zeros((81, 4), np.int32)}, "81 edits"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_broken_promises_are_named(change: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        NullSession(SMALL, strict=True).submit(replace(good(), **change))


@pytest.mark.parametrize(
    ("of", "rows", "what"),
    [
        ("prompt", None, "come where a rule is"),
        ("prompt", i32(0, 0, 0, 0), "unequal length"),
        ("prompt", i32(0, 0, 0, 3, 3), "row of rope out of range"),
        ("prompt", i32(0, 1, 1, 0, 0), "several ropes"),
        ("sequence", i32(0, 0, 0, 0, 0), "too short for its sequence"),
        ("token", i32(0, 0, 0, 0, 0), "another's rope"),
        ("token", i32(0, 0, 1, 0, 1), "another's rope"),
    ],
)
def test_broken_promises_about_ropes_are_named(of: str, rows: np.ndarray, what: str) -> None:
    """Of sequences of three tokens and of two."""
    rule = LengthRule(of=of, bounds=(2,) if of == "token" else (2, 9))
    right = {"prompt": i32(2, 2, 2, 0, 0), "sequence": i32(1, 1, 1, 0, 0)}
    session = NullSession(replace(SMALL, rope_rule=rule), strict=True)
    session.submit(replace(good(), rope_variant=right.get(of, i32(0, 0, 1, 0, 0))))
    with pytest.raises(ValueError, match=what):
        session.submit(replace(good(), rope_variant=rows))
    with pytest.raises(ValueError, match="come where a rule is"):
        NullSession(SMALL).submit(replace(good(), rope_variant=i32(0, 0, 0, 0, 0)))


def test_keys_of_another_rope_are_named() -> None:
    rule = LengthRule(of="prompt", bounds=(2,))
    session = NullSession(replace(SMALL, rope_rule=rule), strict=True)
    session.collect(session.submit(replace(good(), rope_variant=i32(0, 0, 0, 0, 0))))
    more = replace(
        good(),
        tokens=i32(5, 6),
        positions=i32(3, 2),
        seq_start=i32(0, 1, 2),
        seq_len=i32(4, 3),
        kv_slots=i32(23, 10),
        row_token=i32(0, 1),
    )
    with pytest.raises(ValueError, match="key of another rope"):
        session.submit(replace(more, rope_variant=i32(0, 1)))


def test_rows_with_a_mask_take_one_of_its_tokens() -> None:
    masks = np.array([[1 << 5 | 1 << 31, 1 << 7], [0, 0]], np.uint32).view(np.int32)
    step = replace(good(), row_mask=i32(0, 1), masks=masks)
    session = NullSession(SMALL, strict=True)
    out = session.collect(session.submit(step))
    assert out.token[0] in (5, 31, 39)
    assert out.status.tolist() == [0, 2]


def test_going_on_from_a_foreign_key_is_seen() -> None:
    session = NullSession(SMALL, strict=True)
    session.collect(session.submit(good()))
    step = replace(
        good(),
        tokens=i32(-1, -2),
        positions=i32(3, 2),
        kv_slots=i32(23, 10),
        seq_start=i32(0, 1, 2),
        seq_len=i32(4, 3),
        row_token=i32(0, 1),
    )
    session.collect(session.submit(step))
    wrong = replace(
        step,
        positions=i32(4, 3),
        seq_len=i32(5, 4),
        pages=[i32(7, 6), i32(2)],
        kv_slots=i32(24, 11),
    )
    with pytest.raises(ValueError, match="key"):
        session.submit(wrong)


def test_two_steps_may_fly_and_return_in_order() -> None:
    session = NullSession(SMALL)
    one, two = session.submit(good()), session.submit(good())
    with pytest.raises(ValueError, match="in flight"):
        session.submit(good())
    with pytest.raises(ValueError, match="oldest"):
        session.collect(two)
    session.collect(one)
    session.collect(two)


def test_fake_clock_makes_steps_follow_each_other() -> None:
    session = NullSession(SMALL, step_s=0.02)
    start = time.perf_counter()
    tickets = [session.submit(good()), session.submit(good())]
    for ticket in tickets:
        session.collect(ticket)
    assert time.perf_counter() - start >= 0.04


def test_opens_without_an_artifact() -> None:
    session = open_session(None, device="null", kv_tokens=320)
    assert (session.capacity.pages, session.capacity.context) == (20, 320)


@pytest.mark.parametrize("option", ["threads", "gpu"])
def test_options_of_real_devices_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}=1 has no effect: device=null"):
        open_session(None, device="null", **{option: 1})
