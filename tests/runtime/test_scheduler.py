"""The scheduler under random load: every request ends with exactly its own tokens, and nothing
leaks.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import EOS, SMALL, Answer, Clock, drain, make_loop, predict, run_all

from runtime.core.commit import HEARD
from runtime.core.sequence import WAITING
from runtime.device.base import StepInput
from runtime.device.null import NullSession
from runtime.manifest import LengthRule
from runtime.request import Request, SamplingParams

BASES = [[(i * 7 + b * 13) % SMALL.vocab for i in range(40)] for b in range(3)]


def random_request(rng: random.Random, number: int) -> Request:
    base = rng.choice(BASES)
    tokens = base[: rng.randint(1, 36)] + rng.choices(range(SMALL.vocab), k=rng.randint(0, 6))
    most = rng.randint(0, 24) if len(tokens) <= 40 else rng.randint(0, 4)
    some = rng.random
    logprobs = some() < 0.4
    return Request(
        id=number,
        tokens=tokens,
        sampling=SamplingParams(
            max_new_tokens=most,
            min_new_tokens=rng.randint(0, most) if some() < 0.5 else 0,
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(-(2**63), 2**63),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            presence_penalty=rng.choice([0.0, 0.0, -1.0]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logit_bias={rng.randrange(40): rng.choice([-100.0, 1.0]) for _ in range(3)}
            if some() < 0.3
            else {},
            stop_token_ids=tuple(rng.choices(range(40), k=rng.randint(0, 3))),
            ignore_eos=some() < 0.3,
        ),
        logprobs=logprobs,
        top_logprobs=rng.randint(0, 3) if logprobs else 0,
        prompt_logprobs_from=rng.choice([-1, -1, 0, len(tokens) // 2, len(tokens) - 1]),
        priority=rng.choice([0, 0, 1]),
        salt=rng.choice([b"", b"", b"a"]),
    )


def random_history(rng: random.Random) -> list[tuple[int, str, Any]]:
    """(step, add | abort, what), in order of steps."""
    acts: list[tuple[int, str, Any]] = []
    for number in range(rng.randint(1, 14)):
        at = rng.choice([0, rng.randint(0, 25)])
        acts.append((at, "add", random_request(rng, number)))
        if rng.random() < 0.2:
            acts.append((at + rng.randint(0, 12), "abort", number))
    return sorted(acts, key=lambda act: act[0])


@settings(max_examples=200, deadline=None)
@given(
    # A seed and not hypothesis's own strategies: those prefer small values, and small requests
    # prove little.
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["lpm", "fcfs"]),
    overlap=st.booleans(),
    prefix_cache=st.booleans(),
    pages=st.sampled_from([16, 18, 24, 64]),
    step_tokens=st.sampled_from([4, 7, 16]),
)
def test_every_request_gets_its_own_tokens(
    seed: int, policy: str, overlap: bool, prefix_cache: bool, pages: int, step_tokens: int
) -> None:
    loop = make_loop(
        replace(SMALL, pages=pages),
        policy=policy,
        overlap=overlap,
        prefix_cache=prefix_cache,
        max_step_tokens=step_tokens,
        waiting_requests=100,
        waiting_tokens=100_000,
    )
    answers: dict[int, Answer] = {}
    aborted, added = set(), {}
    todo = random_history(random.Random(seed))
    step = 0
    while todo or loop.has_work:
        while todo and todo[0][0] <= step:
            _, act, what = todo.pop(0)
            if act == "add":
                added[what.id] = what
                loop.add(what)
            else:
                aborted.add(what)
                loop.abort(what)
        for event in loop.step():
            answers.setdefault(event.id, Answer()).feed(event)
        loop.scheduler.check()
        step += 1
        assert step < 3000
    loop.idle()
    pool = loop.scheduler.held.pool
    assert pool.used == 0
    assert prefix_cache or pool.cached == 0
    assert answers.keys() == added.keys()
    for number, answer in answers.items():
        compare(answer, predict(added[number]), may_abort=number in aborted)


def compare(answer: Answer, expected: Answer, *, may_abort: bool) -> None:
    assert answer.finish is not None
    assert answer.queue_s is not None or not answer.tokens
    if answer.finish.reason == "abort":
        assert may_abort
        assert answer.tokens == expected.tokens[: len(answer.tokens)]
        return
    assert (answer.tokens, answer.finish) == (expected.tokens, expected.finish)
    assert answer.logprobs == expected.logprobs
    assert answer.prompt_logprobs == expected.prompt_logprobs


def greedy(number: int, tokens: list[int], most: int = 8, **more: object) -> Request:
    return Request(
        id=number,
        tokens=tokens,
        sampling=SamplingParams(max_new_tokens=most, temperature=0, ignore_eos=True),
        **more,  # type: ignore[arg-type]
    )


def test_pool_too_small_for_all_is_shared_by_preemption() -> None:
    loop = make_loop(small := replace(SMALL, pages=16))
    asked = [greedy(i, BASES[i % 3][: 4 + i], most=40) for i in range(4)]
    answers = run_all(loop, asked)
    assert small.pages * small.page_size < sum(len(r.tokens) + 40 for r in asked)
    assert loop.scheduler.count.retractions > 0
    for request in asked:
        assert answers[request.id].tokens == predict(request).tokens


@pytest.mark.parametrize("steps", [HEARD - 1, HEARD, HEARD + 1, 2 * HEARD + 5])
def test_what_was_decoded_in_lockstep_is_known_to_who_comes_later(steps: int) -> None:
    """The books of a sequence that decoded alone for long are complete when it leaves: the pages
    of its outputs are found, by their tokens."""
    loop = make_loop(replace(SMALL, context=400, pages=200, edits=400))
    loop.add(greedy(0, BASES[0][:9], most=300))
    tokens = BASES[0][:9]
    for _ in range(steps):
        for event in loop.step():
            tokens += event.tokens
    loop.abort(0)
    drain(loop, {})
    again = greedy(1, tokens, most=5)
    answer = run_all(loop, [again])[1]
    assert answer.tokens == predict(again).tokens
    # All full pages but the last token's, whose logits are wanted.
    assert answer.cached == (len(tokens) - 1) // SMALL.page_size * SMALL.page_size > steps - 9


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("pages", [18, 64])
@pytest.mark.parametrize("of", ["prompt", "sequence", "token"])
def test_ropes_that_depend_on_lengths(of: str, pages: int, overlap: bool) -> None:
    """The null device checks each token's row of frequencies, and that all keys of a sequence have
    one where its rope is the whole sequence's: it is computed again when that changes."""
    rule = LengthRule(of=of, bounds=(14,) if of == "token" else (9, 17, 30))
    session = NullSession(replace(SMALL, pages=pages, rope_rule=rule), strict=True)
    loop = make_loop(session=session, overlap=overlap)
    requests = [greedy(i, BASES[i % 2][: 3 + 4 * i], most=25) for i in range(6)]
    computed = 0
    submit = session.submit

    def counted(step: StepInput) -> int:
        nonlocal computed
        computed += len(step.tokens)
        return submit(step)

    session.submit = counted  # type: ignore[method-assign]
    answers = run_all(loop, requests)
    for request in requests:
        compare(answers[request.id], predict(request), may_abort=False)
    alone = sum(len(r.tokens) + len(answers[r.id].tokens) for r in requests)
    assert (computed > 1.4 * alone) == (of == "sequence")


def test_prefix_is_reused_while_its_first_owner_still_runs() -> None:
    loop = make_loop()
    loop.add(greedy(0, BASES[0][:20], most=30))
    answers: dict[int, Answer] = {}
    for _ in range(4):
        for event in loop.step():
            answers.setdefault(event.id, Answer()).feed(event)
    loop.add(greedy(1, BASES[0][:20], most=4))
    drain(loop, answers)
    assert answers[1].cached == 16  # every full page but the one of the last token
    assert answers[1].tokens == predict(greedy(1, BASES[0][:20], most=4)).tokens


def test_equal_prompts_are_computed_once_even_when_they_come_together() -> None:
    loop = make_loop()
    asked = [greedy(i, BASES[0][:36], most=2) for i in range(4)]
    answers = run_all(loop, asked)
    assert [answers[i].cached for i in range(4)] == [0, 32, 32, 32]


def test_tenants_share_nothing() -> None:
    loop = make_loop()
    run_all(loop, [greedy(0, BASES[0][:20], salt=b"one")])
    assert run_all(loop, [greedy(1, BASES[0][:20], salt=b"two")])[1].cached == 0
    assert run_all(loop, [greedy(2, BASES[0][:20], salt=b"one")])[2].cached == 16


def test_outputs_are_reused_by_the_next_turn() -> None:
    loop = make_loop()
    first = run_all(loop, [greedy(0, BASES[0][:10], most=15)])[0]
    turn = BASES[0][:10] + first.tokens + [1, 2]
    assert run_all(loop, [greedy(1, turn, most=2)])[1].cached == 24


def test_flush_forgets_and_refuses_while_running() -> None:
    loop = make_loop()
    run_all(loop, [greedy(0, BASES[0][:20])])
    assert loop.scheduler.flush()
    assert run_all(loop, [greedy(1, BASES[0][:20])])[1].cached == 0
    loop.add(greedy(2, BASES[0][:20]))
    loop.step()
    assert not loop.scheduler.flush()


def _first_tokens(loop, count: int) -> list[int]:
    order: list[int] = []
    while len(order) < count:
        order += [e.id for e in loop.step() if e.tokens and e.id not in order]
    return order


def test_lpm_prefers_what_is_cached_and_fcfs_does_not() -> None:
    for policy, expected in (("lpm", [2, 1]), ("fcfs", [1, 2])):
        loop = make_loop(policy=policy, max_running=1)
        run_all(loop, [greedy(0, BASES[0][:20], most=1)])
        loop.add(greedy(1, BASES[1][:20], most=1))
        loop.add(greedy(2, BASES[0][:20], most=1))
        assert _first_tokens(loop, 2) == expected


def test_priority_goes_first_and_is_preempted_last() -> None:
    loop = make_loop(replace(SMALL, pages=16), max_running=3)
    asked = [greedy(i, BASES[i][:8], most=40, priority=int(i == 2)) for i in range(3)]
    answers = run_all(loop, asked)
    assert all(answers[i].tokens == predict(asked[i]).tokens for i in range(3))
    loop = make_loop(max_running=1)
    for request in asked:
        loop.add(request)
    assert _first_tokens(loop, 1) == [2]


def test_nobody_waits_for_ever_under_lpm() -> None:
    loop = make_loop(max_running=1, policy="lpm", waiting_requests=1000, waiting_tokens=10**6)
    run_all(loop, [greedy(0, BASES[0][:20], most=1)])
    loop.add(greedy(1, BASES[1][:20], most=1))
    number, finished = 2, []
    for _ in range(400):
        loop.add(greedy(number, BASES[0][:20], most=1))
        number += 1
        finished += [e.id for e in loop.step() if e.finish]
        if 1 in finished:
            break
    assert 1 in finished


def test_deadlines_and_full_queue() -> None:
    clock = Clock()
    loop = make_loop(
        clock=clock, max_running=1, waiting_requests=1, queue_wait_s=5.0, request_s=20.0
    )
    answers: dict[int, Answer] = {}

    def steps(count: int) -> None:
        for _ in range(count):
            for event in loop.step():
                answers.setdefault(event.id, Answer()).feed(event)

    loop.add(greedy(0, BASES[0][:8], most=56))
    steps(1)
    loop.add(greedy(1, BASES[0][:8]))
    loop.add(greedy(2, BASES[0][:8]))  # one waits already
    steps(2)
    assert (answers[2].finish.status, answers[2].finish.message) == (
        429,
        "The request queue is full.",
    )
    clock.now = 6.0
    steps(1)
    assert (answers[1].finish.status, answers[1].finish.message) == (
        504,
        "Request waiting timeout reached.",
    )
    clock.now = 21.0
    steps(1)
    assert (answers[0].finish.status, answers[0].finish.message) == (
        504,
        "Request running timeout reached.",
    )
    drain(loop, answers)
    assert loop.scheduler.held.pool.used == 0


def test_queue_time_is_told_once_from_arrival_to_first_admission() -> None:
    clock = Clock()
    loop = make_loop(replace(SMALL, pages=16), clock=clock, max_running=2)
    answers: dict[int, Answer] = {}
    for number in range(3):
        clock.now = number / 4
        loop.add(greedy(number, [number] * 20, most=30))  # two of them outgrow the pool
    loop.add(greedy(3, [3], most=30))
    while loop.has_work:
        clock.now += 1
        for event in loop.step():
            answers.setdefault(event.id, Answer()).feed(event)
        if clock.now > 5:
            loop.abort(3)
    assert loop.stats().retractions > 0
    assert (answers[0].queue_s, answers[1].queue_s) == (1.5, 1.25)
    waited = answers[2].queue_s
    assert waited is not None and waited >= 20, "until the first two ended"
    assert answers[3].queue_s is None, "it was never admitted"


def test_numbers_that_are_not_finite_end_their_request_and_are_not_cached() -> None:
    session = NullSession(SMALL, strict=True, poison=39)
    loop = make_loop(session=session)
    bad, good = greedy(0, [*BASES[0][:17], 39, 1, 2, 3, 4, 5]), greedy(1, BASES[1][:20])
    answers = run_all(loop, [bad, good])
    assert answers[0].finish.reason == "abort" and answers[0].finish.status == 500
    assert answers[0].tokens == []
    # The good one may itself sample the poisonous token; its tokens up to there are its own.
    expected = predict(good).tokens
    assert answers[1].tokens == expected[: len(answers[1].tokens)]
    assert loop.scheduler.held.matched(_waiting(loop, 2, bad.tokens)) == 0


def _waiting(loop, number: int, tokens: list[int]):
    loop.scheduler.add(greedy(number, tokens), 0.0)
    seq = loop.scheduler.live[number]
    assert seq.state == WAITING
    return seq


def test_abort_works_in_every_state() -> None:
    for steps in range(6):
        loop = make_loop(max_running=2, max_step_tokens=8)
        answers: dict[int, Answer] = {}
        for i in range(4):
            loop.add(greedy(i, BASES[i % 3][:20], most=4))
        for _ in range(steps):
            for event in loop.step():
                answers.setdefault(event.id, Answer()).feed(event)
        for i in range(4):
            loop.abort(i)
        loop.abort(99)
        drain(loop, answers)
        assert sorted(answers) == [0, 1, 2, 3]
        assert loop.scheduler.held.pool.used == 0


def test_id_in_use_is_refused_without_touching_its_owner() -> None:
    loop = make_loop()
    loop.add(greedy(0, BASES[0][:8]))
    loop.add(greedy(0, BASES[1][:8]))
    events = loop.step()
    assert [e.finish.status for e in events if e.finish] == [400]
    answers: dict[int, Answer] = {}
    drain(loop, answers)
    assert answers[0].tokens == predict(greedy(0, BASES[0][:8])).tokens


@pytest.mark.parametrize("overlap", [True, False])
def test_stop_at_eos_drops_the_speculative_token(overlap: bool) -> None:
    found = 0
    for start in range(30):
        request = Request(
            id=0,
            tokens=[start, 1, 2],
            sampling=SamplingParams(max_new_tokens=50, temperature=0),
        )
        answer = run_all(make_loop(overlap=overlap), [request])[0]
        expected = predict(request)
        assert answer.tokens == expected.tokens
        assert answer.finish == expected.finish
        found += expected.finish.matched == EOS[0]
    assert found  # the case occurs
