"""Where a step's time goes: the nodes of a plan, timed alone.

Comes in: an artifact. Nodes of one kind (every layer's qkv product, say) are replayed as one graph,
on the session's own weights and with the inputs of the step that ran last, so a layer's weights
have left the cache when its turn comes again. Out: microseconds by kind.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from bench.static_batch import StaticBatch
from conf.bench_schema import GpuConfig
from runtime.artifact import Artifact, Bucket, LaunchPlan, node_kind
from runtime.device.cuda import CudaSession
from runtime.device.launcher import Launcher
from runtime.device.staging import by_cost


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
        groups[node_kind(label)].append(index)
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
