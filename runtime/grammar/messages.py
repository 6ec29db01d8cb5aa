"""What an engine and its grammar worker say to each other, and the bounds the worker keeps."""

from __future__ import annotations

import msgspec

from runtime.request import Grammar

GOES_ON, COMPLETE, FAILED = range(3)  # of a sequence, after a token


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`eos`: tokens that end a text; `slots`: rows of the table of masks. A grammar compiles within
    `seconds` and `memory` bytes, compiled ones take at most `cache` bytes."""

    vocab: int
    eos: tuple[int, ...]
    slots: int
    seconds: float = 2.0
    memory: int = 256 << 20
    cache: int = 64 << 20


class Compile(msgspec.Struct, frozen=True, kw_only=True, tag="compile"):
    """Answered by one `Compiled`. From then on the worker follows the sequence `id`."""

    id: int
    grammar: Grammar


class Advance(msgspec.Struct, frozen=True, kw_only=True, tag="advance"):
    """(id, token, slot) of sequences that have one more token, -1: none. The mask of each one's
    next token is written into its slot's row of the table; answered by one `Advanced`."""

    rows: list[tuple[int, int, int]]


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """These sequences have ended; unknown ids are ignored."""

    ids: list[int]


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """The worker's first message. `error`: why it cannot serve this model; then it ends."""

    error: str | None = None


class Compiled(msgspec.Struct, frozen=True, kw_only=True, tag="compiled"):
    id: int
    error: str | None = None


class Advanced(msgspec.Struct, frozen=True, kw_only=True, tag="advanced"):
    """(GOES_ON | COMPLETE | FAILED, the failure's text) per row. A complete one takes no further
    token, and has no mask."""

    states: list[tuple[int, str]]


ToWorker = Compile | Advance | Forget
FromWorker = Started | Compiled | Advanced
