"""What an engine is started with: the engine's share of ServeConfig, resolved, as plain data.

The HTTP process sends it to the worker as one JSON argument; the in-process Engine makes it from
keyword arguments.
"""

from __future__ import annotations

import msgspec

from conf.schema import ServeConfig
from runtime.errors import UsageError

POLICIES = ("lpm", "fcfs")
DEVICES = ("auto", "null")


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields as in ServeConfig and LimitsConfig; None means what their comments say. `seed` fixes
    the seeds the engine chooses for requests that bring none; `null_step_s` is the time a step
    takes on the null device.
    """

    artifact: str
    device: str = "auto"
    threads: int | None = None
    gpu: int | None = None
    kv_tokens: int | None = None
    max_running: int | None = None
    max_step_tokens: int | None = None
    policy: str = "lpm"
    overlap: bool = True
    prefix_cache: bool = True
    trust_artifact: str | None = None
    waiting_requests: int | None = None
    waiting_tokens: int | None = None
    queue_wait_s: float | None = 60.0
    request_s: float | None = 600.0
    seed: int | None = None
    null_step_s: float = 0.0

    def __post_init__(self) -> None:
        for name, valid in (("policy", POLICIES), ("device", DEVICES)):
            if getattr(self, name) not in valid:
                raise UsageError(
                    f"{name}: expected one of {', '.join(valid)}, got {getattr(self, name)!r}"
                )
        for name in (
            "threads",
            "kv_tokens",
            "max_running",
            "max_step_tokens",
            "waiting_requests",
            "waiting_tokens",
            "queue_wait_s",
            "request_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name}: expected a positive number or null, got {value}")
        if self.gpu is not None and self.gpu < 0:
            raise UsageError(f"gpu: expected an index from 0 on or null, got {self.gpu}")


def engine_options(serve: ServeConfig) -> EngineOptions:
    limits = serve.limits
    return EngineOptions(
        artifact=serve.artifact,
        device=serve.device,
        threads=serve.threads,
        gpu=serve.gpu,
        kv_tokens=serve.kv_tokens,
        max_running=serve.max_running,
        max_step_tokens=serve.max_step_tokens,
        policy=serve.policy,
        overlap=serve.overlap,
        prefix_cache=serve.prefix_cache,
        trust_artifact=serve.trust_artifact,
        waiting_requests=limits.waiting_requests,
        waiting_tokens=limits.waiting_tokens,
        queue_wait_s=limits.queue_wait_s,
        request_s=limits.request_s,
        null_step_s=serve.null_step_s,
    )
