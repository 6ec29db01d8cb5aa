"""The scheduler's choices, resolved, and its counters.

Comes in: engine options and the session's sizes. Goes out: a `Policy` in which nothing is left to
be decided. Made by the engine loop, read by the scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.core.options import EngineOptions
from runtime.device.base import Capacity
from runtime.errors import UsageError

# Embedding models are asked for whole batches at once: their line holds at least one large one.
BATCH_REQUESTS, BATCH_TOKENS = 2048, 1 << 21
QUEUE_FACTOR = 4  # default bounds of the line: so many times the running slots, and the KV pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Choices of the serve config, resolved. None: no limit."""

    order: str = "lpm"
    max_running: int
    max_step_tokens: int
    waiting_requests: int
    waiting_tokens: int
    queue_wait_s: float | None = None
    request_s: float | None = None
    prefix_cache: bool = True


@dataclass(slots=True, kw_only=True)
class Counters:
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    retractions: int = 0
    aborted: int = 0


def resolve_policy(options: EngineOptions, capacity: Capacity) -> Policy:
    """No `auto` and no default survives; contradictions are refused."""
    sizes = {
        "max_running": (min(capacity.max_seqs, capacity.slots), "sequences"),
        "max_step_tokens": (capacity.max_tokens, "tokens"),
    }
    for name, (most, unit) in sizes.items():
        wanted = getattr(options, name)
        if wanted is not None and wanted > most:
            raise UsageError(
                f"{name}: asked for {wanted}, the artifact was compiled for steps of {most} "
                f"{unit}; ask for less or compile "
                f"with a larger shape"
            )
    tokens = options.max_step_tokens or capacity.max_tokens
    running = options.max_running or min(sizes["max_running"][0], tokens)
    if running > tokens:
        raise UsageError(
            f"max_running {running} is more than max_step_tokens {tokens}: every running sequence "
            "takes a token of a step"
        )
    pool = capacity.pages * capacity.page_size
    requests, line = QUEUE_FACTOR * running, QUEUE_FACTOR * pool
    if capacity.embedding:
        requests, line = max(requests, BATCH_REQUESTS), max(line, BATCH_TOKENS)
    return Policy(
        order=options.policy,
        max_running=running,
        max_step_tokens=tokens,
        waiting_requests=options.waiting_requests or requests,
        waiting_tokens=options.waiting_tokens or line,
        queue_wait_s=options.queue_wait_s,
        request_s=options.request_s,
        # Where later tokens change what earlier ones hold, no prefix can be shared.
        prefix_cache=options.prefix_cache and not capacity.whole,
    )
