"""One model shape end to end: compiled, then measured by the programs a user would run.

Comes in: a model's name. Goes out: figures of decode latency, prefill, start-up, restored plans and
serving. Every program is a child process; its figures are the JSON line it appends.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.peers.shape import Shape
from bench.server import Server
from compiler.tuned import load_records
from conf.bench_schema import GpuConfig
from runtime.artifact import Artifact

ROOM = 60 << 30  # bytes of all models' weights
OUTPUT = 64  # tokens of a decode run
LARGE = 64  # sequences from which one run is enough: its prefill takes seconds
TUNE_START_S, TUNE_POLL_S = 10.0, 2.0
SPARE = 16  # tokens that a run needs beyond its prompt


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


def folder(config: GpuConfig) -> str:
    """Where artifacts go: memory, if it has room for them, so that nothing waits for a disk. The
    same for all models: artifacts of one model share their weights."""
    if config.directory is not None:
        return config.directory
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).total > ROOM
    return str(memory / "headstart") if roomy else ".gpu"


def words(config: GpuConfig, model: str) -> list[str]:
    """The overrides of a compile that suit what is measured."""
    name, _, quant = model.partition("/")
    wanted = max(*config.prefill, config.context + 4 * OUTPUT, sum(config.serving))
    return [
        *(f"model={name}", "weights=random", f"target={config.hardware}"),
        *([f"quant={quant}"] if quant else []),
        f"shape.context={min(wanted, Shape.load(name).context)}",
        f"shape.max_seqs={max(config.batch)}",
        f"shape.max_tokens={max(config.prefill)}",
        *([f"records={config.records}"] if config.records else []),
    ]


def compiled(config: GpuConfig, model: str) -> dict[str, Any]:
    """The artifact to measure, given or made here."""
    if model in config.artifacts:
        path = config.artifacts[model]
        return {"artifact": path, "digest": Artifact.open(path).digest, "given": True}
    began = time.perf_counter()
    out = program(
        *("compiler", *words(config, model), f"out={folder(config)}", cache_option(config)),
        f"name=gpu-{model.replace('/', '-')}",
        f"accuracy.measure={str(model in config.verify).lower()}",
    )
    artifact = Artifact.open(out.strip().splitlines()[-1])
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.path),
        "digest": artifact.digest,
        "compile_s": time.perf_counter() - began,
        "weights_bytes": manifest.weights_bytes,
        "golden": len(manifest.golden),
        **manifest.accuracy,
    }


def tuned(config: GpuConfig, model: str) -> Iterator[dict[str, Any]]:
    """Kernels measured for the very shapes that the other sections use, for `seconds` less what a
    start takes. The records are written call by call, so what a kill leaves counts."""
    target, began = str(config.hardware), time.perf_counter()
    before = load_records(target, config.records).entries
    minutes = max(config.seconds - TUNE_START_S, 1.0) / 60
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "compiler.tune", *words(config, model)),
                *(f"limit={minutes:.3f}", cache_option(config)),
            ],
            stdout=log,
            stderr=log,
        )
        while process.poll() is None:
            time.sleep(TUNE_POLL_S)
            records = load_records(target, config.records)
            new = {k: v for k, v in records.entries.items() if before.get(k) != v}
            yield {
                "records": len(records.entries),
                "new": len(new),
                "partial": sum("partial" in entry for entry in new.values()),
                "failed": sum(map(len, records.failed.values())),
                "seconds": time.perf_counter() - began,
            }
        log.seek(0)
        text = log.read().decode(errors="replace").strip()
    print(text)
    if process.returncode:
        raise BenchError(f"compiler.tune ended with {process.returncode}: {text[-600:]}")


def decode(config: GpuConfig, model: str, artifact: str) -> Iterator[dict[str, Any]]:
    """Milliseconds a step at each batch, and the share of the bandwidth bound. A quantized model
    at batch one."""
    batches = config.batch if "/" not in model else [1]
    few, many = [b for b in batches if b < LARGE], [b for b in batches if b >= LARGE]
    out: dict[str, Any] = {}
    for part, runs in ((few, 3), (many, 1)):
        if not part:
            continue
        for line in measured(
            "bench.latency",
            *(f"artifact={artifact}", f"batch={listed(part)}"),
            *(f"input_len={config.context}", f"output_len={OUTPUT}"),
            *(f"runs={runs}", "warmup_decode=16"),
        ):
            out[f"batch_{line['batch_size']}"] = {
                "ms": 1e3 * line["median_decode_latency"],
                "bound_pct": line["bound_pct"],
                "bandwidth_gb_s": line["bandwidth_median"] / 1e9,
            }
        yield out


def prefill(config: GpuConfig, artifact: str) -> dict[str, Any]:
    """Milliseconds of one prompt of each length, or of the longest that fits."""
    longest = Artifact.open(artifact).manifest.model.context - SPARE
    out = {}
    for length in config.prefill:
        tokens = min(length, longest)
        (line,) = measured(
            "bench.latency",
            *(f"artifact={artifact}", "batch=[1]", f"input_len={tokens}", "output_len=6"),
            *("runs=5", "warmup_decode=2"),
        )
        out[f"tokens_{length}"] = {
            "tokens": tokens,
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


def serving(config: GpuConfig, artifact: str) -> Iterator[dict[str, Any]]:
    out: dict[str, Any] = {"prompt_tokens": config.serving[0], "output_tokens": config.serving[1]}
    vocab = Artifact.open(artifact).manifest.model.vocab
    with Server(artifact, timeout=120) as server:
        for rate in (*config.rates, None):
            (line,) = measured(
                "bench.serving",
                *(f"url={server.url}", f"vocab={vocab}", "dataset=random", "progress=false"),
                f"random.input_len={config.serving[0]}",
                f"random.output_len={config.serving[1]}",
                *("random.range_ratio=1", f"request_rate={'null' if rate is None else rate}"),
                f"num_prompts={max(int(config.load_s * (rate or 2 * max(config.rates))), 4)}",
            )
            names = ("median_ttft_ms", "median_itl_ms", "output_throughput", "failed")
            out["unlimited" if rate is None else f"rate_{rate:g}"] = {n: line[n] for n in names}
            yield out


def tokens_as_on_cpu(config: GpuConfig) -> dict[str, Any]:
    """The embedded tiny model in float32, greedy: the GPU's tokens beside the CPU's. Prompts of
    several lengths run together, so that chunks, mixed steps and decode all take part."""
    from runtime import Engine

    rng = np.random.default_rng(0)
    answers: list[list[list[int]]] = []
    for target in ("cpu", str(config.hardware)):
        artifact = tiny(config, target)
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


def tiny(config: GpuConfig, target: str) -> Artifact:
    """The embedded model in float32; for the CPU that of the bundle, if there is one: its libraries
    take a minute to build."""
    for path in Path(config.bundle).glob(f"tokens-{target}-*"):
        return Artifact.open(path)
    out = program("compiler", *tiny_words(target), f"out={folder(config)}", cache_option(config))
    return Artifact.open(out.strip().splitlines()[-1])


def tiny_words(target: str) -> list[str]:
    return ["model=tiny", f"target={target}", "dtype=float32", f"name=tokens-{target}"]


def listed(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values))}]"
