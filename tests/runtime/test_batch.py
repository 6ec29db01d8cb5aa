"""Steps as arrays: decode rows, prompt chunks and scored rows land where StepInput says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from oracle import SMALL, make_loop

from runtime.core.batch import build
from runtime.device.base import StepInput, StepOutput
from runtime.device.null import NullSession
from runtime.request import Request, SamplingParams


class Recorder(NullSession):
    """Keeps copies of every step it is given."""

    def __init__(self) -> None:
        super().__init__(SMALL, strict=True)
        self.inputs: list[StepInput] = []
        self.outputs: list[StepOutput] = []

    def submit(self, step: StepInput) -> int:
        fields = {f: np.array(getattr(step, f)) for f in step.__slots__}
        self.inputs.append(StepInput(**fields))
        return super().submit(step)


def request(number: int, tokens: list[int], most: int = 4, **more: object) -> Request:
    sampling = SamplingParams(max_new_tokens=most, temperature=0, ignore_eos=True)
    return Request(**{"id": number, "tokens": tokens, "sampling": sampling, **more})  # type: ignore[arg-type]


def run(requests: list[Request], **options: object) -> list[StepInput]:
    session = Recorder()
    loop = make_loop(session=session, **options)
    for r in requests:
        loop.add(r)
    while loop.has_work:
        loop.step()
    return session.inputs


def test_prompt_then_decode() -> None:
    prompt, *decodes = run([request(0, [5, 6, 7, 8, 9])])
    assert prompt.tokens.tolist() == [5, 6, 7, 8, 9]
    assert prompt.positions.tolist() == [0, 1, 2, 3, 4]
    assert prompt.row_token.tolist() == [4] and prompt.row_target.tolist() == [-1]
    assert len(decodes) == 3  # no step more than the tokens asked for
    for i, step in enumerate(decodes):
        assert step.tokens.tolist() == [-1 - int(step.row_slot[0])]  # fed on the device
        assert step.positions.tolist() == [5 + i]
        assert step.seq_len.tolist() == [6 + i]
        page = step.pages[0][(5 + i) // 4]
        assert step.kv_slots.tolist() == [page * 4 + (5 + i) % 4]


def test_prompts_are_cut_to_the_token_budget_around_decode_rows() -> None:
    steps = run([request(0, [1] * 3, most=9), request(1, list(range(20)))], max_step_tokens=8)
    assert [len(s.tokens) for s in steps[:4]] == [8, 8, 8, 2]
    second = steps[1]
    assert second.seq_start.tolist() == [0, 1, 8]
    assert second.tokens[0] < 0 and second.tokens[1:].tolist() == list(range(5, 12))
    assert second.row_token.tolist() == [0]  # the unfinished prompt has no logit row
    third = steps[2]
    assert third.row_token.tolist() == [0]
    assert steps[3].row_token.tolist() == [0, 1]


def test_scored_prompts_get_one_row_per_position_within_the_row_budget() -> None:
    tokens = list(range(10))
    steps = run([request(0, tokens, most=1, prompt_logprobs_from=2, logprobs=True, top_logprobs=2)])
    scored = [
        (int(s.positions[row]), int(target))
        for s in steps
        for row, target in zip(s.row_token, s.row_target, strict=True)
        if target >= 0
    ]
    assert scored == [(i, i + 1) for i in range(1, 9)]
    assert all(len(s.row_token) <= SMALL.max_seqs for s in steps)
    rows = [r for s in steps for r in zip(s.row_target, s.row_flags, s.row_top, strict=True)]
    assert all(flags == 2 and top == 2 for target, flags, top in rows)


def test_penalties_bias_and_bans_are_told_before_the_first_sample() -> None:
    sampling = SamplingParams(
        max_new_tokens=4,
        min_new_tokens=2,
        temperature=0,
        repetition_penalty=1.5,
        logit_bias={9: 2.0},
        stop_token_ids=(9, 11),
        ignore_eos=True,
    )
    first, second, third, *_ = run([Request(id=0, tokens=[3, 4, 3], sampling=sampling)])
    slot = int(first.row_slot[0])
    told = [(s, t, k) for s, t, k, _ in first.edits.tolist()]
    assert told == [
        (slot, 0, 0),
        (slot, 3, 1),
        (slot, 4, 1),
        (slot, 9, 3),
        (slot, 9, 3),
        (slot, 11, 3),
    ]
    values = first.edits[3:, 3].copy().view(np.float32).tolist()
    assert values == [2.0, -np.inf, -np.inf]
    assert len(second.edits) == 0
    lifted = [(t, float(np.int32(v).view(np.float32))) for _, t, _, v in third.edits.tolist()]
    assert lifted == [(9, 2.0), (11, 0.0)]
    assert first.row_flags.tolist() == [1]


def test_decode_arrays_are_kept_while_the_same_sequences_decode() -> None:
    loop = make_loop(replace(SMALL, pages=64))
    for i in range(3):
        loop.add(request(i, [i + 1, 2, 3], most=30))
    loop.step()
    scheduler = loop.scheduler
    one = build(scheduler.schedule(0.0), scheduler.slots)
    positions = one.positions.copy()
    two = build(scheduler.schedule(0.0), scheduler.slots)
    assert two is one and two.kept is not None
    assert (two.positions == positions + 1).all()
