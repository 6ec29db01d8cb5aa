"""One model shape end to end: compiled, then measured by the programs a user would run.

Comes in: a model's name. Goes out: figures of decode latency, prefill, start-up, restored plans and
serving. Every program is a child process; its figures are the JSON line it appends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.server import Server
from conf.bench_schema import GpuConfig
from runtime.artifact import Artifact

SERVING = (467, 256)  # prompt and output tokens of a published serving table
RATES = (8.0, 16.0, 32.0, None)  # requests per second
SERVE_S = 8  # of load at each rate


def program(*words: str) -> str:
    """Runs `python -m …`; its stdout."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def cache_option(config: GpuConfig) -> str:
    """The cache folder as an override: Hydra's grammar has no bare `~`."""
    return f"cache={Path(config.cache).expanduser()}"


def measured(*words: str) -> list[dict[str, Any]]:
    """The result lines of a benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        program(*words, f"output_file={path}")
        return [json.loads(line) for line in path.read_text().splitlines()]


def compiled(config: GpuConfig, model: str) -> dict[str, Any]:
    """The artifact to measure, given or made here."""
    if model in config.artifacts:
        path = config.artifacts[model]
        return {"artifact": path, "digest": Artifact.open(path).digest, "given": True}
    began = time.perf_counter()
    out = program(
        "compiler",
        *(f"model={model}", "weights=random", f"target={config.hardware}"),
        *(f"out={config.directory}", cache_option(config), f"name=gpu-{model}"),
        f"shape.context={max(max(config.prefill) + 2 * config.context, sum(SERVING))}",
        f"shape.max_seqs={max(config.batch)}",
        f"shape.max_tokens={max(config.prefill)}",
    )
    path = out.strip().splitlines()[-1]
    seconds = time.perf_counter() - began
    return {"artifact": path, "digest": Artifact.open(path).digest, "compile_s": seconds}


def decode(config: GpuConfig, artifact: str) -> dict[str, Any]:
    """Milliseconds a step at each batch, and the share of the bandwidth bound."""
    lines = measured(
        "bench.latency",
        *(f"artifact={artifact}", f"batch={listed(config.batch)}", f"input_len={config.context}"),
        *("output_len=64", "runs=3", "warmup_decode=16"),
    )
    return {
        f"batch_{line['batch_size']}": {
            "ms": 1e3 * line["median_decode_latency"],
            "bound_pct": line["bound_pct"],
        }
        for line in lines
    }


def prefill(config: GpuConfig, artifact: str) -> dict[str, Any]:
    out = {}
    for length in config.prefill:
        (line,) = measured(
            "bench.latency",
            *(f"artifact={artifact}", "batch=[1]", f"input_len={length}", "output_len=4"),
            *("runs=5", "warmup_decode=2"),
        )
        out[f"tokens_{length}"] = {
            "ms": 1e3 * line["prefill_latency"],
            "tokens_per_s": line["prefill_throughput"],
        }
    return out


def startup(config: GpuConfig, artifact: str) -> dict[str, Any]:
    (line,) = measured("bench.startup", f"artifact={artifact}", "repeat=3")
    return dict(line["median_seconds"])


def restore(config: GpuConfig, artifact: str) -> dict[str, Any]:
    """Seconds of each phase of opening a session, in this process, weights in the page cache."""
    from runtime.device.cuda import CudaSession

    opened = Artifact.open(artifact)
    phases: dict[str, float] = {}
    began = last = time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        phases[f"{phase}_s"] = now - last
        last = now

    session = CudaSession(opened, mark=mark)
    ready = time.perf_counter() - began
    session.complete()
    plans = session.plan_seconds
    session.close()
    return {
        **phases,
        "ready_s": ready,
        "plans": len(plans),
        "all_plans_s": sum(plans.values()),
        "slowest_plan_s": max(plans.values()),
    }


def serving(config: GpuConfig, artifact: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    prompt, output = SERVING
    vocab = Artifact.open(artifact).manifest.model.vocab
    with Server(artifact, timeout=120) as server:
        for rate in RATES:
            (line,) = measured(
                "bench.serving",
                *(f"url={server.url}", f"vocab={vocab}", "dataset=random", "progress=false"),
                *(f"random.input_len={prompt}", f"random.output_len={output}"),
                *("random.range_ratio=1", f"request_rate={'null' if rate is None else rate}"),
                f"num_prompts={int(SERVE_S * (rate or 64))}",
            )
            names = ("median_ttft_ms", "median_itl_ms", "output_throughput", "failed")
            out["unlimited" if rate is None else f"rate_{rate:g}"] = {n: line[n] for n in names}
    return out


def tokens_as_on_cpu(config: GpuConfig) -> dict[str, Any]:
    """The embedded tiny model in float32, greedy: the GPU's tokens beside the CPU's. Prompts of
    several lengths run together, so that chunks, mixed steps and decode all take part."""
    from runtime import Engine

    rng = np.random.default_rng(0)
    answers: list[list[list[int]]] = []
    for target in ("cpu", str(config.hardware)):
        path = program(
            *("compiler", "model=tiny", f"target={target}", "dtype=float32"),
            *(f"out={config.directory}", cache_option(config), f"name=tokens-{target}"),
        )
        artifact = Artifact.open(path.strip().splitlines()[-1])
        vocab = artifact.manifest.model.vocab
        prompts = [rng.integers(0, vocab, 5 + 9 * i).tolist() for i in range(4)]
        rng = np.random.default_rng(0)
        with Engine(str(artifact.path)) as engine:
            parameters = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
            results = engine.generate(input_ids=prompts, sampling_params=parameters)
        answers.append([result["output_ids"] for result in results])
    pairs = list(zip(*answers, strict=True))
    return {
        "tokens": sum(len(cpu) for cpu, _ in pairs),
        "equal": sum(a == b for cpu, gpu in pairs for a, b in zip(cpu, gpu, strict=True)),
        "sequences_equal": sum(cpu == gpu for cpu, gpu in pairs),
    }


def listed(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values))}]"
