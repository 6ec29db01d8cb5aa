"""The option surface: plain dataclasses, one field per option. Hydra composes YAML groups over
them; `conf.load` turns the result into these types, resolved and checked. Nothing here imports
hydra or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

MISSING: Any = "???"
NO_LIMIT = 2**62  # what null becomes in an option that is a limit: nothing reaches it


def option(
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A field whose value `conf.load` checks: one of `choices`, or (each element of a list) within
    `low` and `high`.
    """
    return field(default=default, metadata={"choices": choices, "low": low, "high": high})


@dataclass(slots=True)
class ModelConfig:
    """`source`: directory, hub id, or modelscope:<id>. `config`: the published config.json of a
    named shape, used by weights=random (and checked against the checkpoint's own otherwise).
    `chat_template`: a .jinja file or the name of a template, instead of the checkpoint's. `mla`: of
    a model with latent attention, how it is computed and what a page holds: auto (absorbed) |
    absorbed | plain (docs/architecture.md says when).

    Of an embedding model; auto and null are what the checkpoint says. `pooling`: which hidden
    states make its vectors (none: serve it as a generator); `normalize`: vectors have length 1;
    `causal`: tokens see no later ones; `dimensions`: lengths its vectors may be cut to
    (matryoshka).
    """

    name: str = MISSING
    source: str = MISSING
    revision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    mla: str = option("auto", choices=("auto", "absorbed", "plain"))
    pooling: str = option("auto", choices=("auto", "last", "cls", "mean", "none"))
    normalize: bool | None = None
    causal: bool | None = None
    dimensions: list[int] = field(default_factory=list)


@dataclass(slots=True)
class QuantConfig:
    """`scheme`: none | int8 | int4 (weights, symmetric groups of `group_size` along the input) |
    fp8 (weights, e4m3, a scale per output row; GPUs) | fp8dq (the same weights, and the activations
    of linears by row at run time; GPUs). `head`: also the LM head and tied embedding.
    """

    scheme: str = option("none", choices=("none", "int8", "int4", "fp8", "fp8dq"))
    group_size: int = option(32, low=16, high=256)
    head: bool = True


@dataclass(slots=True)
class ParallelConfig:
    tp: int = option(1, low=1)


@dataclass(slots=True)
class KvConfig:
    """`dtype`: auto (the model's `dtype`) | float32 | bfloat16 | fp8_e4m3 | fp8_e5m2 (half of
    bfloat16's memory; no scales: beyond 448 and 57344 they saturate). `page_size` in tokens: what
    the kernels are written for."""

    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "fp8_e4m3", "fp8_e5m2"))
    page_size: int = option(16, low=16, high=16)


@dataclass(slots=True)
class TargetConfig:
    """`kind`: auto (this machine's GPU, where there is a target for it, else its CPU) | cpu | cuda.
    Of a GPU also the architecture, its memory, and the rates that predicted step times are made
    with: memory bandwidth, dense bfloat16 and fp8 arithmetic.
    """

    name: str = MISSING
    kind: str = option(MISSING, choices=("auto", "cpu", "cuda"))
    arch: str | None = None
    memory_gib: float | None = option(None, low=1)
    bandwidth_gb_s: float | None = option(None, low=1)
    tflops: float | None = option(None, low=1)
    tflops_fp8: float | None = option(None, low=1)


@dataclass(slots=True)
class ShapeConfig:
    """Served shapes. `context`: longest sequence (null: the model's, at most 8192 unless given);
    `max_seqs`: sequences in a step; `max_tokens`: tokens in a step (chunked-prefill size).
    """

    context: int | None = option(None, low=16)
    max_seqs: int = option(64, low=1, high=4096)
    max_tokens: int = option(512, low=1, high=65536)


@dataclass(slots=True)
class AccuracyConfig:
    """`max_delta`: refuse a quantization whose relative logit error exceeds it (null: only
    record). `measure`: compute the model in the reference, for that error, the check of the device
    and the golden tokens; without it a compile of made-up weights takes half the time.
    """

    max_delta: float | None = option(None, low=0)
    measure: bool = True


@dataclass(slots=True)
class CompileConfig:
    """`records`: folder of the tuning records of GPUs (null: kernels/tuned)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16"))
    weights: str = option("checkpoint", choices=("checkpoint", "random"))
    seed: int = option(0, low=0, high=2**63 - 1)
    name: str | None = None
    out: str = "artifacts"
    cache: str = "~/.cache/headstart"
    records: str | None = None


@dataclass(slots=True)
class TuneConfig(CompileConfig):
    """What to compile, and how to measure it. `gpu`: index; `limit`: minutes for everything, builds
    included (what is measured by then stands); `rounds`: replays a median is taken of;
    `contenders`: candidates of a call tried in the whole step; `context`: tokens every sequence
    holds; `ops`: only these (empty: all); `again`: measure calls anew that have a record of these
    tools; `hang`: seconds after which a candidate that does not end counts as hung;
    `memory_gib`: of the GPU, for buffers. The result goes into `records`.
    """

    gpu: int = option(0, low=0)
    limit: float = option(9.0, low=0.01)
    rounds: int = option(20, low=1)
    contenders: int = option(2, low=0)
    context: int = option(1024, low=16)
    ops: list[str] = field(default_factory=list)
    again: bool = False
    hang: float = option(5.0, low=0.1)
    memory_gib: float = option(32.0, low=0.1)


def limit(default: float) -> Any:
    """A limit: positive, or null for none, of which the server warns."""
    return field(
        default=default, metadata={"low": 1e-3 if isinstance(default, float) else 1, "none": True}
    )


@dataclass(slots=True)
class LimitsConfig:
    """`limits` (docs/http.md): null is no limit, but for `waiting_requests` (4 x running sequences)
    and `waiting_tokens` (4 x KV pool), larger for embedding models. `step_s`: an engine without
    progress for this long, or 20 p99 steps, is replaced.
    """

    waiting_requests: int | None = option(None, low=1)
    waiting_tokens: int | None = option(None, low=1)
    queue_wait_s: float = limit(60.0)
    request_s: float = limit(600.0)
    send_stall_s: float = limit(30.0)
    header_s: float = limit(10.0)
    body_idle_s: float = limit(30.0)
    step_s: float = limit(10.0)
    connections: int = limit(2048)
    connections_per_address: int = limit(256)
    n: int = limit(128)
    prompts_per_request: int = limit(1024)
    stop_strings: int = limit(32)
    stop_bytes: int = limit(512)
    stop_token_ids: int = limit(128)
    logit_bias: int = limit(1024)
    grammar_bytes: int = limit(65536)
    regex_bytes: int = limit(4096)
    messages: int = limit(4096)

    def lifted(self) -> list[str]:
        """Names of the limits that were set to null."""
        return [f.name for f in fields(self) if getattr(self, f.name) == NO_LIMIT]


@dataclass(slots=True)
class ServeConfig:
    """`threads`: kernel threads (CPU; null: physical cores). `gpu`: index of the GPU (CUDA; null:
    the first). `kv_tokens`: KV pool size in tokens (null:
    from free memory, bounded). `max_running`, `max_step_tokens`: sequences and tokens in a step
    (null: what the artifact was compiled for). `policy`: lpm (longest cached prefix first) | fcfs.
    `device`: auto | null (no kernels: deterministic tokens, a step takes `null_step_s`; for load
    tests). `api_key` guards all but /health, `admin_api_key` the admin routes. `stream_interval`:
    tokens per stream event. `drain_s`: for running requests after SIGTERM. `trust_artifact`: the
    digest the artifact must have.
    """

    artifact: str = MISSING
    host: str = "127.0.0.1"
    port: int = option(30000, low=0, high=65535)
    served_model_name: str | None = None
    api_key: str | None = None
    admin_api_key: str | None = None
    device: str = option("auto", choices=("auto", "null"))
    threads: int | None = option(None, low=1)
    gpu: int | None = option(None, low=0)
    kv_tokens: int | None = option(None, low=1)
    max_running: int | None = option(None, low=1)
    max_step_tokens: int | None = option(None, low=1)
    policy: str = option("lpm", choices=("lpm", "fcfs"))
    overlap: bool = True
    prefix_cache: bool = True
    stream_interval: int = option(1, low=1)
    incremental_stream: bool = False
    drain_s: float = option(30.0, low=0)
    null_step_s: float = option(0.0, low=0)
    trust_artifact: str | None = None
    log_level: str = option("info", choices=("debug", "info", "warning", "error"))
    limits: LimitsConfig = field(default_factory=LimitsConfig)
