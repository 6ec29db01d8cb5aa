"""What is asked of an engine and what it answers: plain msgspec data, sent as they are between
processes.

`Request` passed `runtime.core.admission.check` before the scheduler sees it: every integer is in
range, every float finite.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_TOP_LOGPROBS = 20

GrammarKind = Literal["json_schema", "regex", "ebnf", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an output's whole text must match; `kind` names the native field it was given in."""

    kind: GrammarKind
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engine-side sampling parameters. Text-level ones (stop strings, detokenizing) stay in the
    text layer.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # None: chosen by the engine
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # end only by length, stop ids, the grammar's end or abort
    grammar: Grammar | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="request"):
    """One sequence to generate, or to embed (max_new_tokens 0, an embedding model). `id` is ours,
    unique in this process."""

    id: int
    tokens: list[int]
    sampling: SamplingParams
    logprobs: bool = False  # logprob of every output token
    top_logprobs: int = 0
    prompt_logprobs_from: int = -1  # first prompt position to score, -1 = none
    priority: int = 0
    salt: bytes = b""  # tenant salt of the prefix cache key


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop a request; unknown ids are ignored (it may just have finished)."""

    id: int


class Control(msgspec.Struct, frozen=True, kw_only=True, tag="control"):
    """`flush_cache`, `stats`, `drain` (refuse new work, report when empty), `shutdown`; answered by
    one `ControlReply`.
    """

    id: int
    verb: str


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """`reason`: stop | length | abort; `matched`: the stop token id; `message` and `status` for an
    abort.
    """

    reason: str
    matched: int | None = None
    message: str | None = None
    status: int | None = None


# (logprob, token id) pairs of one position, best first
TopLogprobs = list[tuple[float, int]]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """News of one request: new tokens since the last event (with logprobs if asked), prompt
    logprobs once, the finish last.

    `prompt_logprobs` has one entry per prompt position from `prompt_logprobs_from` on (None for
    position 0); `cached_tokens` is told with the first tokens and with the finish, `retractions`
    with the finish; `queue_s`, seconds from arrival to first admission, with the first news of an
    admitted request; `embedding`, the float32 numbers (little-endian) an embedding model gives
    instead of tokens, with the finish.
    """

    id: int
    tokens: list[int] = []
    logprobs: list[float] = []
    top_logprobs: list[TopLogprobs] = []
    prompt_logprobs: list[float | None] = []
    prompt_top_logprobs: list[TopLogprobs | None] = []
    cached_tokens: int = 0
    retractions: int = 0
    queue_s: float | None = None
    embedding: bytes = b""
    finish: Finish | None = None


class Events(msgspec.Struct, frozen=True, kw_only=True, tag="events"):
    """All news of one engine step, one frame."""

    events: list[Event]


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Engine gauges and counters; also the heartbeat: `steps` grows while there is work."""

    steps: int
    running: int
    waiting: int
    waiting_tokens: int
    waiting_grammars: int  # requests whose grammars are being compiled
    pages_total: int
    pages_used: int  # referenced by running sequences
    pages_cached: int  # reusable, not referenced
    page_size: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    retractions: int
    aborted: int
    evicted_pages: int
    last_step_ms: float


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First message of an engine: what it can hold. `waiting_requests`: beside the `max_seqs` that
    run. `phases`: seconds since process start by phase name.
    """

    context: int
    vocab: int
    pages: int
    page_size: int
    max_seqs: int
    max_step_tokens: int
    waiting_requests: int
    phases: dict[str, float]


class ControlReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    id: int
    ok: bool
    message: str = ""
    stats: Stats | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine could not start or must end: one clear sentence and the exit code."""

    message: str
    exit_code: int


ToEngine = Request | Abort | Control
FromEngine = Ready | Events | Stats | ControlReply | Failed
