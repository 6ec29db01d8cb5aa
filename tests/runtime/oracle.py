"""What the null device must answer, computed one sequence at a time without pages, batches or
slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import Capacity
from runtime.device.null import NullSession, TokenState, choose, digests, logprobs, mix
from runtime.request import Event, Finish, Request

SMALL = Capacity(
    context=64,
    vocab=40,
    page_size=4,
    pages=24,
    max_seqs=4,
    max_tokens=16,
    slots=4,
    edits=80,  # little more than one sequence can need
)
EOS = (7,)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0
    retractions: int = 0
    queue_s: float | None = None

    def feed(self, event: Event) -> None:
        assert self.finish is None, "an event after the last one"
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        self.cached = max(self.cached, event.cached_tokens)
        if event.queue_s is not None:
            assert self.queue_s is None, "told twice"
            self.queue_s = event.queue_s
        self.finish = event.finish


def _states(tokens: list[int]) -> np.ndarray:
    ids = np.array(tokens)
    return np.cumsum(digests(ids, np.arange(len(ids))), dtype=np.uint64)


def predict(request: Request, vocab: int = SMALL.vocab, eos: tuple[int, ...] = EOS) -> Answer:
    s = request.sampling
    stops = set(s.stop_token_ids) | (set() if s.ignore_eos else set(eos))
    text = list(request.tokens)
    answer = Answer()
    start = request.prompt_logprobs_from
    if start >= 0:
        states = _states(text)
        answer.prompt_logprobs = [
            None if i == 0 else float(logprobs(states[i - 1 : i], np.array([text[i]], np.int32))[0])
            for i in range(start, len(text))
        ]
    counts = TokenState()
    if s.repetition_penalty != 1.0:
        counts.marks = set(text)
    state = _states(text)[-1]
    seed = np.uint64(0)
    if s.temperature > 0:
        assert s.seed is not None, "give every sampled request of a test its seed"
        seed = mix(np.array([s.seed]))[0]
    else:
        seed = mix(np.array([0]))[0]
    for number in range(s.max_new_tokens):
        bias = dict(s.logit_bias)
        if number < s.min_new_tokens:
            bias |= dict.fromkeys(stops, float("-inf"))
        with np.errstate(over="ignore"):
            value = int(mix(np.array([state + seed], np.uint64))[0])
        if s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1.0:
            value += counts.hash(
                abs(s.frequency_penalty) + abs(s.presence_penalty), s.repetition_penalty
            )
        token = choose(value, vocab, bias)
        answer.tokens.append(token)
        if request.logprobs:
            answer.logprobs.append(
                float(logprobs(np.array([state]), np.array([token], np.int32))[0])
            )
        counts.counts[token] = counts.counts.get(token, 0) + 1
        if token in stops:
            answer.finish = Finish(reason="stop", matched=token)
            return answer
        with np.errstate(over="ignore"):
            state = state + digests(np.array([token]), np.array([len(text)]))[0]
        text.append(token)
    answer.finish = Finish(reason="length")
    return answer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_loop(
    capacity: Capacity = SMALL,
    *,
    clock: Clock | None = None,
    session: NullSession | None = None,
    eos: tuple[int, ...] = EOS,
    **options: object,
) -> EngineLoop:
    return EngineLoop(
        session or NullSession(capacity, strict=True),
        EngineOptions(artifact="", device="null", seed=5, **options),  # type: ignore[arg-type]
        eos=eos,
        clock=clock or Clock(),
    )


def run_all(loop: EngineLoop, requests: list[Request], most: int = 10_000) -> dict[int, Answer]:
    for request in requests:
        loop.add(request)
    answers: dict[int, Answer] = {}
    drain(loop, answers, most)
    return answers


def drain(loop: EngineLoop, answers: dict[int, Answer], most: int = 10_000) -> None:
    for _ in range(most):
        if not loop.has_work:
            loop.idle()
            return
        for event in loop.step():
            answers.setdefault(event.id, Answer()).feed(event)
    raise AssertionError(f"still busy after {most} steps")
