"""Options of the benchmarks, one schema per program; composed over conf/bench/<program>.yaml. Times
are in seconds, lengths in tokens, rates per second. `option` fields are checked by `conf.load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.schema import MISSING, option


@dataclass(slots=True)
class LatencyConfig:
    """A static batch through the engine loop, without a server. `runs`: measured runs of each
    (batch, input_len, output_len), of which the medians are reported; four of every twelve decode
    steps do not count, so that `output_len` is 6 at least. `threads`: kernel threads (null: all
    cores). `profile`: one more run of each shape, which tells where its decode steps spend their
    time, by kind of node and by phase of the engine loop (artifacts for a CPU)."""

    artifact: str = MISSING
    batch: list[int] = field(default_factory=lambda: [1], metadata={"low": 1})
    input_len: int = option(1024, low=1)
    output_len: int = option(128, low=6)
    runs: int = option(3, low=1)
    warmup_decode: int = option(32, low=0)
    threads: int | None = option(None, low=1)
    policy: str = option("fcfs", choices=("fcfs", "lpm"))
    seed: int = 0
    profile: bool = False
    run_name: str = "default"
    output_file: str | None = None


@dataclass(slots=True)
class RandomDataset:
    """Lengths uniform in [range_ratio x len, len]."""

    input_len: int = option(1024, low=1)
    output_len: int = option(128, low=1)
    range_ratio: float = option(0.0, low=0, high=1)


@dataclass(slots=True)
class SharedPrefixDataset:
    groups: int = option(64, low=1)
    prompts_per_group: int = option(16, low=1)
    system_len: int = option(2048, low=1)
    question_len: int = option(128, low=1)
    output_len: int = option(256, low=1)


@dataclass(slots=True)
class ShareGptDataset:
    """`output_len`: null takes the length of the recorded answer. `context_len`: longer
    conversations are left out."""

    output_len: int | None = option(None, low=4)
    context_len: int | None = option(None, low=16)


@dataclass(slots=True)
class Goodput:
    """Service-level objectives in milliseconds; null: none."""

    ttft: float | None = option(None, low=0)
    tpot: float | None = option(None, low=0)
    e2el: float | None = option(None, low=0)


@dataclass(slots=True)
class ServingConfig:
    """Load on a running server. `backend`: native (/generate, SGLang's too), openai
    (/v1/completions) or openai-chat. `request_rate` null: as fast as the server takes them.
    `max_concurrency` null: no bound, but without a rate what our server runs at once.
    `tokenizer`: tokenizer.json, a directory with one, or an artifact; `vocab`: draws random token
    ids below it without a tokenizer."""

    url: str = "http://127.0.0.1:30000"
    backend: str = option("native", choices=("native", "openai", "openai-chat"))
    model: str | None = None
    api_key: str | None = None
    dataset: str = option("random", choices=("random", "sharegpt-file", "shared-prefix"))
    dataset_path: str | None = None
    tokenizer: str | None = None
    vocab: int | None = option(None, low=2)
    num_prompts: int = option(1000, low=1)
    request_rate: float | None = option(None, low=1e-6)
    max_concurrency: int | None = option(None, low=1)
    warmup_requests: int = option(1, low=0)
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = option(0.0, low=0)
    top_p: float = option(1.0, low=0, high=1)
    extra_body: dict[str, Any] = field(default_factory=dict)
    flush_cache: bool = False
    request_timeout: float = option(600.0, low=0.001)
    ready_timeout: float = option(60.0, low=0)
    seed: int = 42
    random: RandomDataset = field(default_factory=RandomDataset)
    shared_prefix: SharedPrefixDataset = field(default_factory=SharedPrefixDataset)
    sharegpt: ShareGptDataset = field(default_factory=ShareGptDataset)
    goodput: Goodput = field(default_factory=Goodput)
    tag: str | None = None
    output_file: str | None = None
    output_details: bool = False
    progress: bool = True


@dataclass(slots=True)
class StartupConfig:
    """`serve`: further options of runtime.serve. `repeat`: measured starts after one that warms the
    page cache."""

    artifact: str = MISSING
    repeat: int = option(5, low=1)
    timeout: float = option(60.0, low=0.1)
    serve: list[str] = field(default_factory=list)
    output_file: str | None = None


@dataclass(slots=True)
class RecoveryConfig:
    """`clients`: requests under way when the engine is killed, every other one a stream, each of
    `tokens`, so many that none has ended by then. `repeat`: servers started and killed."""

    artifact: str = MISSING
    clients: int = option(16, low=1)
    tokens: int = option(1000, low=2)
    repeat: int = option(3, low=1)
    timeout: float = option(60.0, low=0.1)
    serve: list[str] = field(default_factory=list)
    output_file: str | None = None


@dataclass(slots=True)
class StreamingConfig:
    """CPU time of the HTTP process per streamed token. With `artifact` a server with the null
    device is started for the run; otherwise `url` and `pid` (of the HTTP process) name a running
    one."""

    artifact: str | None = None
    url: str | None = None
    pid: int | None = option(None, low=1)
    streams: int = option(64, low=1)
    tokens: int = option(400, low=2)
    input_len: int = option(16, low=1)
    backend: str = option("openai-chat", choices=("native", "openai", "openai-chat"))
    runs: int = option(3, low=1)
    serve: list[str] = field(default_factory=list)
    output_file: str | None = None


@dataclass(slots=True)
class PeersConfig:
    """Ours against transformers, torch eager and llama.cpp, one model shape, random weights. A peer
    that is not installed is skipped with a line that says so. `checkpoint_dtype`: what the numbers
    of the weights are rounded to, as a checkpoint published in it would hold them (auto: as the
    shape is published); ours stores those of bfloat16 in half the bytes at fp32. `artifacts`:
    precision -> artifact of ours, compiled on demand where missing."""

    model: str = "smollm-135m"
    checkpoint_dtype: str = option("auto", choices=("auto", "float32", "bfloat16"))
    peers: list[str] = field(
        default_factory=lambda: ["headstart", "transformers", "torch", "llama.cpp"]
    )
    precision: list[str] = field(default_factory=lambda: ["fp32", "bf16", "int8", "int4"])
    batch: list[int] = field(default_factory=lambda: [1, 8], metadata={"low": 1})
    context: list[int] = field(default_factory=lambda: [256, 1024], metadata={"low": 1})
    prefill: list[int] = field(default_factory=lambda: [256], metadata={"low": 1})
    steps: int = option(16, low=4)
    rounds: int = option(5, low=1)
    threads: int | None = option(None, low=1)
    artifacts: dict[str, str] = field(default_factory=dict)
    directory: str = ".peers"
    output_file: str | None = None


@dataclass(slots=True)
class GpuConfig:
    """Everything that needs a GPU, in one bounded run. `sections`: which (empty: all, in order);
    `kernels`: those whose contracts are checked (empty: all). `seconds`: for all of them; `gpu`:
    its index (the children see no other). `models`: shapes measured end to end, `<name>` or
    `<name>/<quantization>`: the first with everything, then each of the others with its compile
    and decode. `tune`: each is then tuned, for `tune_s` seconds (the first; the others a third of
    that), and measured again; `records`: folder of the tuning records (null: kernels/tuned).
    `artifacts`: model -> artifact already compiled for this GPU, which is measured as it is
    (others are compiled with random weights into `directory`; null: in memory,
    /dev/shm/headstart, where that has room). `verify`: models whose compile compares the device
    with the reference, which takes a large one minutes. `hardware`: the target to compile for
    (null: by the GPU's name). `serving`: prompt and output tokens; `rates`: requests per second,
    each for `load_s` seconds, and then unlimited. `bundle`: see `make gpu-bundle`. `resume`: a
    folder for results and records of a run in several commands: what is done there is not done
    again; `output_file` then gets a copy of the results and has one of the records beside it.
    `torch_device=cpu` runs the parts that need torch on a GPU without one, to prove them: what
    they measure then means nothing."""

    sections: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    seconds: float = option(480.0, low=1)
    gpu: int = option(0, low=0)
    hardware: str | None = None
    models: list[str] = field(
        default_factory=lambda: [
            "llama3-8b",
            "llama3.2-1b",
            "llama3-8b/fp8",
            "llama3-8b/int4",
            "qwen3-0.6b",
            "llama3-8b/fp8dq",
            "llama3-8b/int8",
        ]
    )
    tune: bool = True
    tune_s: float = option(150.0, low=1)
    records: str | None = None
    resume: str | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    verify: list[str] = field(default_factory=lambda: ["llama3.2-1b"])
    batch: list[int] = field(default_factory=lambda: [1, 8, 32, 128, 256], metadata={"low": 1})
    prefill: list[int] = field(default_factory=lambda: [1024, 4096, 8192], metadata={"low": 1})
    context: int = option(1024, low=1)
    serving: list[int] = field(default_factory=lambda: [467, 256], metadata={"low": 1})
    rates: list[float] = field(default_factory=lambda: [8.0, 16.0, 32.0])
    load_s: float = option(8.0, low=0.5)
    cache: str = "~/.cache/headstart"
    directory: str | None = None
    bundle: str = ".gpu-bundle"
    torch_device: str = option("cuda", choices=("cuda", "cpu"))
    output_file: str | None = None


@dataclass(slots=True)
class BundleConfig(GpuConfig):
    """What `make gpu` of the same options and `make tune` need on a bare GPU machine, into
    `bundle`. `python`: that machine's; `minutes`: of building kernels, the most valuable first
    (what is not built by then is built over there); `jobs`: builds at a time (null: all cores);
    `wheels`: fetch them anew."""

    python: str = "3.12"
    minutes: float = option(30.0, low=0)
    jobs: int | None = option(None, low=1)
    wheels: bool = True


@dataclass(slots=True)
class CompareConfig:
    """Two result files. A metric may be worse by `threshold` (a fraction) before the exit code is
    1."""

    before: str = MISSING
    after: str = MISSING
    threshold: float = option(0.05, low=0)
    metrics: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ReportConfig:
    """A table of the result lines in `files`; with `plot`, `y` over `x` as one line per `by` into
    that file."""

    files: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    plot: str | None = None
    x: str = "batch_size"
    y: str = "overall_throughput"
    by: str = "run_name"
