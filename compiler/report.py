"""What a compile tells about its result before and after it is made: does it fit, what does a step
cost, how long should it take.

Comes in: the plan of a compile (program, buckets, layouts). Goes out: figures for the manifest
(the same on every machine) and text for people. Called by the pipeline and by `inspect show`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from compiler.errors import NoSpace
from compiler.lower import Node
from compiler.memory import aligned
from compiler.store import StoredWeight
from kernels.op import OPS
from runtime import weights_file
from runtime.artifact import Bucket, CudaBinary, StateLayout

GIB = 1 << 30
# What a process needs besides the arenas: interpreter, tokenizer, HTTP buffers.
PROCESS_BYTES = 512 << 20


def fit(weights: int, state: StateLayout, work: int, io: int) -> dict[str, int]:
    """Bytes by arena; `kv_token` is what one token of context costs."""
    return {
        "weights": weights,
        "token_state": state.pages_offset,
        "kv_page": state.page_bytes,
        "kv_token": state.page_bytes // state.page_size,
        "work": work,
        "io": io,
        "fixed": weights + state.pages_offset + work + io,
    }


def step_cost(nodes: Sequence[Node], weights: Mapping[str, StoredWeight]) -> dict[str, int]:
    """Launches, bytes and operations of one full step, `flops_fp8` of them on fp8 numbers. Op
    contracts count what flows between calls; weights are added here as they are stored."""
    total = dict.fromkeys(("launches", "read", "written", "flops", "flops_fp8"), 0)
    for node in nodes:
        cost = OPS[node.call.op].cost(dict(node.shape.shapes), dict(node.call.attrs))
        total["read"] += cost.read + _weight_bytes(node, weights)
        total["written"] += cost.written
        total["flops"] += cost.flops
        if node.shape.attrs.get("x_format") == "fp8":
            total["flops_fp8"] += cost.flops
        total["launches"] += len(node.launches)
    return total


def _weight_bytes(node: Node, weights: Mapping[str, StoredWeight]) -> int:
    """Stored bytes of the weights a node reads: all of them, of a looked-up table the rows, of
    experts as many as there can be chosen."""
    total = 0
    for arg in OPS[node.call.op].args:
        if arg.role == "weight" and arg.name in node.call.ins:
            size = stored_bytes(weights[node.call.ins[arg.name]])
            if node.call.op == "embed" and arg.name == "table":
                tokens, rows = node.shape.shapes["tokens"][0], node.shape.shapes["table"][0]
                size = size * min(tokens, rows) // rows
            elif node.call.op in ("moe_gate_up", "moe_down"):
                tokens, choices = node.shape.shapes["order"]
                experts = node.shape.shapes["w"][0]
                size = size * min(tokens * choices, experts) // experts
            total += size
    return total


def check_fit(figures: Mapping[str, int], context: int, memory: int) -> str:
    """The fit report; NoSpace when not even one sequence of full length fits."""
    room = memory - PROCESS_BYTES - figures["fixed"]
    tokens = max(room, 0) // figures["kv_token"]
    need = figures["fixed"] + PROCESS_BYTES + context * figures["kv_token"]
    if tokens < context:
        raise NoSpace(
            f"target memory: {need / GIB:.2f} GiB are needed for one sequence of {context} tokens, "
            f"{memory / GIB:.2f} GiB are there; choose a smaller shape.context, quant or model"
        )
    return (
        f"fit  {arenas(figures)}\n"
        f"     {size(memory)} memory hold {tokens} tokens: "
        f"{tokens // context} sequences of {context}"
    )


def arenas(figures: Mapping[str, int]) -> str:
    """What `fit` found, in one line."""
    return (
        f"weights {size(figures['weights'])} + token state {size(figures['token_state'])} + "
        f"work {size(figures['work'])} + io {size(figures['io'])}; "
        f"{size(figures['kv_token'])}/token of context"
    )


def widened(names: Sequence[str]) -> str:
    """What is stored in half the bytes of float32."""
    return f"{len(names)} matrices hold bfloat16 numbers only: stored as such, exact in float32"


def predict(
    cost: Mapping[str, int],
    bandwidth: float,
    flops: float = math.inf,
    flops_fp8: float = math.inf,
) -> float:
    """Seconds of a step at `bandwidth` bytes, `flops` and (on fp8 numbers) `flops_fp8` operations
    per second: the larger of what memory and arithmetic take."""
    fp8 = cost["flops_fp8"]
    arithmetic = (cost["flops"] - fp8) / flops + fp8 / flops_fp8
    return max((cost["read"] + cost["written"]) / bandwidth, arithmetic)


def binaries(kernels: Sequence[CudaBinary]) -> str:
    """Registers, spills and shared memory of the cubins, in one line."""
    spilling = [k.entry for k in kernels if k.stack]
    return (
        f"kernels {len(kernels)} cubins: at most {max(k.registers for k in kernels)} registers and "
        f"{size(max(k.shared for k in kernels))} of shared memory, "
        + (f"spills in {', '.join(sorted(set(spilling)))}" if spilling else "no spills")
    )


def fallbacks(calls: Sequence[tuple[str, str]], buckets: int, gpu: str) -> str:
    """Which calls, as (label, bucket), have no tuning record; `buckets`: how many there are."""
    by_label: dict[str, list[str]] = {}
    for label, bucket in calls:
        by_label.setdefault(label, []).append(bucket)
    width = max(map(len, by_label))
    lines = [
        f"tuning  {len(calls)} calls have no record for {gpu} and take the heuristic's choice "
        "(python -m compiler.tune on the GPU measures them):"
    ]
    for label, names in by_label.items():
        where = "all buckets" if len(names) == buckets else " ".join(names)
        lines.append(f"        {label:<{width}}  {where}")
    return "\n".join(lines)


def read_bandwidth(threads: int, size: int = 128 << 20) -> float:
    """Bytes per second that `threads` threads read here, best of three."""
    data = np.ones(aligned(size, 8 * threads) // 8, np.int64)
    parts = np.array_split(data, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):  # the first one starts the threads
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def memory_bytes() -> int:
    """Memory of this machine."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    raise NoSpace("memory of this machine: /proc/meminfo has no MemTotal")


def render(
    buckets: Sequence[Bucket],
    costs: Mapping[str, Mapping[str, int]],
    bandwidth: float,
    flops: float = math.inf,
    flops_fp8: float = math.inf,
) -> str:
    lines = []
    for bucket in buckets:
        cost = costs[bucket.name]
        seconds = predict(cost, bandwidth, flops, flops_fp8)
        lines.append(
            f"step {bucket.name} at full context: {cost['launches']} launches, "
            f"{size(cost['read'])} read, "
            f"{cost['flops'] / 1e9:.2f} GFLOP, {seconds * 1e3:.2f} ms at "
            f"{bandwidth / 1e9:.1f} GB/s"
        )
    return "\n".join(lines)


def stored_bytes(weight: StoredWeight) -> int:
    return sum(
        int(np.prod(a.shape, dtype=np.int64)) * weights_file.itemsize(a.dtype)
        for a in weight.arrays
    )


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def dropped(family: str, modules: Mapping[str, int]) -> str:
    """`modules`: numbers of tensors left out, as `compiler.weights.by_module` counts them."""
    shown = ", ".join(f"{module} ({n})" for module, n in modules.items())
    return f"drop  {sum(modules.values())} tensors that family {family} does not use: {shown}"
