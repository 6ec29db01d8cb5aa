"""Where a step's time goes: the nodes of a plan, timed alone, and cuBLAS on the same products.

Comes in: an artifact. Nodes of one kind (every layer's qkv product, say) are replayed as one graph,
on the session's own weights and with the inputs of the step that ran last, so a layer's weights
have left the cache when its turn comes again. Out: microseconds by kind, and for products the time
torch takes for the same sizes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from statistics import median
from typing import Any

from bench.static_batch import StaticBatch
from conf.bench_schema import GpuConfig
from runtime.artifact import Artifact, Bucket, LaunchPlan
from runtime.device.cuda import CudaSession
from runtime.device.launcher import Launcher
from runtime.device.staging import by_cost

COPIES = 8  # of a product's weight in the comparison, so that none stays in the cache


def nodes(config: GpuConfig, path: str) -> dict[str, Any]:
    artifact = Artifact.open(path)
    out: dict[str, Any] = {}
    static = StaticBatch.open(artifact)
    session = static.session
    assert isinstance(session, CudaSession)
    try:
        with Launcher() as launcher:
            for bucket in chosen(artifact, config.batch):
                # Leaves a decode step at this batch in the io arena.
                static.run(static.prompts(bucket.seqs, config.context, seed=0), 4)
                out[bucket.name] = kinds(launcher, session, artifact.plan(0, bucket.name))
    finally:
        static.close()
    return out


def chosen(artifact: Artifact, batches: list[int]) -> list[Bucket]:
    """The decode buckets of the batches, where the KV pool holds so many."""
    decode = [b for b in by_cost(artifact.manifest.buckets) if b.kind == "decode"]
    return [b for b in decode if b.seqs in batches]


def kinds(launcher: Launcher, session: CudaSession, plan: LaunchPlan) -> dict[str, Any]:
    """Microseconds of one node of each kind, and of all."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(plan.header.labels):
        groups[kind(label)].append(index)
    out: dict[str, Any] = {}
    for name, indices in {**groups, "all": list(range(len(plan.nodes)))}.items():
        graph = session.nodes(plan.header.bucket.name, indices)
        try:
            seconds = median(launcher.seconds(graph))
        finally:
            graph.close()
        count = 1 if name == "all" else len(indices)
        out[name] = {"nodes": len(indices), "us_each": seconds / count * 1e6}
    return out


def kind(label: str) -> str:
    """A label without the number of its layer."""
    return re.sub(r"\d+", "*", label)


def products(config: GpuConfig, path: str) -> dict[str, Any]:
    """What torch (cuBLAS) takes for the model's matrix products at each number of rows."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    artifact = Artifact.open(path)
    shapes = sorted({tuple(t.shape) for t in artifact.manifest.tensors[0] if len(t.shape) == 2})
    out: dict[str, Any] = {}
    for outputs, inputs in shapes:
        weights = torch.randn(COPIES, outputs, inputs, device="cuda", dtype=torch.bfloat16)
        for rows in sorted({*config.batch, *config.prefill}):
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            seconds = torch_seconds(torch, x, weights)
            out[f"{rows}x{inputs}x{outputs}"] = {
                "us": seconds * 1e6,
                "tflops": 2 * rows * inputs * outputs / seconds / 1e12,
            }
        del weights
    return out


def torch_seconds(torch: Any, x: Any, weights: Any) -> float:
    """One product, in a captured graph over rotating weights."""
    for w in weights[:2]:
        torch.mm(x, w.T)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for w in weights:
            torch.mm(x, w.T)
    times = []
    for _ in range(10):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3 / len(weights))
    return median(times)
