"""The engine loop: overlap, controls, drain, stats, and what happens when the books are wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracle import SMALL, Answer, drain, make_loop, run_all

from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.core.pages import PageLeak
from runtime.core.policy import resolve_policy
from runtime.device.base import StepInput
from runtime.device.null import NullSession
from runtime.errors import UsageError
from runtime.request import Control, Request, SamplingParams


def request(number: int, most: int = 5) -> Request:
    sampling = SamplingParams(max_new_tokens=most, temperature=0, ignore_eos=True)
    return Request(id=number, tokens=[1, 2, number], sampling=sampling)


class Watched(NullSession):
    """Notes the order of submits and collects."""

    def __init__(self) -> None:
        super().__init__(SMALL, strict=True)
        self.order: list[str] = []

    def submit(self, step: StepInput) -> int:
        ticket = super().submit(step)
        self.order.append(f"+{ticket}")
        return ticket

    def collect(self, ticket: int):
        self.order.append(f"-{ticket}")
        return super().collect(ticket)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (True, "+1 +2 -1 +3 -2 -3"),
        (False, "+1 -1 +2 -2 +3 -3"),
    ],
)
def test_step_n_is_submitted_before_step_n_minus_1_is_read(overlap: bool, expected: str) -> None:
    session = Watched()
    run_all(make_loop(session=session, overlap=overlap), [request(0, most=3)])
    assert " ".join(session.order) == expected


def test_phases_of_a_step_are_heard_in_order() -> None:
    loop, heard = make_loop(overlap=True), []
    loop.mark = heard.append
    loop.add(request(0, most=3))
    loop.step()
    loop.step()
    first = ["between", "schedule", "build", "submit"]
    assert heard == [*first, *first, "collect", "commit"]


def test_engine_chosen_seeds_differ_and_repeat_with_the_engine_seed() -> None:
    def tokens(seed: int) -> list[list[int]]:
        options = EngineOptions(artifact="", device="null", seed=seed)
        loop = EngineLoop(NullSession(SMALL), options, eos=())
        sampling = SamplingParams(max_new_tokens=8)
        answers = run_all(loop, [Request(id=i, tokens=[1], sampling=sampling) for i in range(2)])
        return [answers[i].tokens for i in range(2)]

    assert tokens(1)[0] != tokens(1)[1]
    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_controls_are_answered_once() -> None:
    loop = make_loop()
    for number, verb in enumerate(["stats", "flush_cache", "nonsense"]):
        loop.control(Control(id=number, verb=verb))
    assert [(r.id, r.ok) for r in loop.replies] == [(0, True), (1, True), (2, False)]
    assert loop.replies[0].stats.pages_total == SMALL.pages


def test_a_flush_waits_for_steps_of_what_has_ended_and_for_nothing_else() -> None:
    loop = make_loop()
    for busy in (0, 1):
        loop.add(request(busy))
        loop.step()
        loop.control(Control(id=busy, verb="flush_cache"))
        assert [(r.id, r.ok) for r in loop.replies] == [(busy, False)], "it runs"
        loop.replies.clear()
        loop.abort(busy)
        loop.control(Control(id=10 + busy, verb="flush_cache"))
        assert loop.replies == [], "its last step is on the device"
        if busy:
            loop.add(request(9))
        while loop.has_work and not loop.replies:
            loop.step()
        assert [(r.id, r.ok) for r in loop.replies] == [(10 + busy, not busy)]
        loop.replies.clear()


def test_drain_refuses_new_work_and_reports_when_empty() -> None:
    loop = make_loop()
    loop.add(request(0))
    loop.step()
    loop.control(Control(id=9, verb="drain"))
    loop.add(request(1))
    answers: dict[int, Answer] = {}
    while not loop.replies:
        for event in loop.step():
            answers.setdefault(event.id, Answer()).feed(event)
    assert answers[0].finish.reason == "length"
    assert answers[1].finish.status == 503
    assert [r.id for r in loop.replies] == [9]
    loop.add(request(2))
    drain(loop, answers)
    assert answers[2].finish.status == 503
    assert len(loop.replies) == 1


def test_stats_count() -> None:
    loop = make_loop()
    run_all(loop, [request(0), request(1)])
    stats = loop.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.running) == (6, 10, 0)
    assert stats.steps == loop.session.steps


def test_wrong_books_are_found_in_the_next_pause() -> None:
    loop = make_loop()
    run_all(loop, [request(0)])
    loop.add(request(1))
    drain_events(loop)
    loop.scheduler.held.pool.allocate(1)  # a page that nobody holds
    with pytest.raises(PageLeak):
        loop.idle()


def drain_events(loop: EngineLoop) -> None:
    while loop.has_work:
        loop.step()


def test_a_fault_in_admission_concerns_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop()
    monkeypatch.setattr(loop.scheduler, "add", lambda *_: 1 / 0)
    loop.add(request(0))
    monkeypatch.undo()
    loop.add(request(1))
    answers: dict[int, Answer] = {}
    drain(loop, answers)
    assert answers[0].finish.status == 500
    assert answers[1].finish.reason == "length"


def test_contradicting_options_are_refused_with_both_numbers() -> None:
    def options(**more: object) -> EngineOptions:
        return EngineOptions(**{"artifact": "", "device": "null"} | more)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match=r"5.*4 sequences"):
        resolve_policy(options(max_running=5), SMALL)
    with pytest.raises(UsageError, match=r"17.*16 tokens"):
        resolve_policy(options(max_step_tokens=17), SMALL)
    with pytest.raises(UsageError, match="max_running 4 is more than max_step_tokens 2"):
        resolve_policy(options(max_running=4, max_step_tokens=2), SMALL)
    assert resolve_policy(options(max_step_tokens=2), SMALL).max_running == 2
    assert resolve_policy(options(), replace(SMALL, slots=3)).max_running == 3
    for bad in ({"policy": "best"}, {"threads": 0}, {"queue_wait_s": -1.0}, {"device": "gpu"}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            options(**bad)
