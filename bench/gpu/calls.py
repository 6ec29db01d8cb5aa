"""Single calls of a model at chosen sizes: matrix products beside cuBLAS (through torch), those of
quantized activations beside torch's row-wise `_scaled_mm` too, attention beside the peaks of tensor
cores and memory, a skewed batch with our balanced split of keys beside a fixed one, and sampling
beside torch's sort.

Comes in: a model. Goes out: microseconds, rates and ratios. Our kernels are those a compile would
choose (records, else the default), timed by the tuner's own meter; both sides of a ratio are
measured one right after the other in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.device_bandwidth import DeviceBandwidth
from bench.gpu.model import words
from compiler.design import Draft, draft, nodes_of
from compiler.importer import import_resolved
from compiler.measure import Candidate, Meter, Task, tasks
from compiler.tune_inputs import Lengths
from compiler.tuned import call_key, load_records
from conf.bench_schema import GpuConfig
from conf.load import load
from conf.schema import CompileConfig
from kernels.launch import Source
from kernels.ops.linear import e4m3_rows
from runtime.artifact import Bucket
from runtime.device.launcher import Launcher

LAYERS = 2  # of the model: a call is the same in all, and the KV pages of two leave room
LONG, SHORT, SKEWED = 131072, 4096, 32  # keys of one sequence and of the others; sequences
FEW = (8, 16, 32, 64)  # rows of products that stream weights
MANY = (1024, 4096, 8192)  # rows of products that fill the tensor cores
PRODUCTS = ("linear", "linear_rope_kv")
KEYS, HELD = 32, 4096  # sequences and their keys where attention streams its pages
SAMPLED = 128  # rows of the batch that is sampled
PEAK = 8192  # side of the product that shows the tensor cores' peak
READ = 4 << 30  # bytes read to measure the bandwidth
ROUNDS = 10
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def calls(config: GpuConfig, model: str) -> Iterator[dict[str, Any]]:
    """The figures so far, after each part."""
    device = config.torch_device
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    base, settings = drafted(few_layers(config, model))
    sizes = Sizes(base)
    with Launcher() as launcher:
        meter = Meter(
            launcher,
            base,
            context=config.context,
            memory_gib=8.0,
            rounds=ROUNDS,
            cache=Path(config.cache),
            arch=str(settings.target.arch),
        )
        records = load_records(settings.target.name, config.records)
        side = PEAK if device == "cuda" else 64
        peak = 2 * side**3 / product_seconds(side, side, side, device) / 1e12
        out: dict[str, Any] = {"device": device, "peak_tflops": peak}
        size = min(READ, launcher.free_memory() // 4)
        reads = DeviceBandwidth(launcher, launcher.allocate(size), size, config.cache)
        try:
            out["decode"] = attention_decode(meter, sizes, records, reads)
        finally:
            reads.release()
        out["skewed"] = skewed(meter, sizes, records)
        yield out
        out["products"] = products(meter, sizes, records, device)
        out |= over_peers(list(out["products"].values()))
        yield out
        out["prefill"] = []
        for tokens in sizes.prompts:
            out["prefill"].append(attention_prefill(meter, sizes, records, tokens, device))
            yield out
        out["sampling"] = sampling(meter, sizes, records, device)
        yield out


def few_layers(config: GpuConfig, model: str) -> list[str]:
    """Options of a compile: a model of few layers that may hold a very long sequence."""
    longest = LONG + SHORT if config.torch_device == "cuda" else config.context
    given = [w for w in words(config, model) if not w.startswith("shape.context=")]
    shape = [f"model.config.num_hidden_layers={LAYERS}", f"shape.context={longest}"]
    if config.torch_device == "cuda":
        shape.append(f"model.config.max_position_embeddings={longest}")
    return [*given, *shape]


def drafted(given: Sequence[str]) -> tuple[Draft, CompileConfig]:
    """What a compile with these options would choose kernels for, and its options resolved."""
    loaded = load(CompileConfig, "compile", given)
    model, settings, _ = import_resolved(loaded.config, loaded.sources)
    return draft(model.spec, settings), settings


class Sizes:
    """The buckets there are, by what is measured in them."""

    def __init__(self, base: Draft) -> None:
        self.context = base.shape.context
        self.decode = [b for b in base.buckets if b.kind == "decode"]
        self.mixed = [b for b in base.buckets if b.kind == "mixed"]

    @property
    def products(self) -> list[Bucket]:
        few = [b for b in self.decode if b.seqs in FEW] or self.decode[-1:]
        many = [b for b in self.mixed if b.tokens in MANY] or self.mixed[-1:]
        return [*few, *many]

    @property
    def prompts(self) -> list[int]:
        """Lengths of one prompt."""
        longest = min(self.mixed[-1].tokens, self.context)
        return sorted({min(n, longest) for n in MANY})

    def holding(self, buckets: Sequence[Bucket], count: int) -> Bucket:
        """The smallest that holds so many tokens, or the largest."""
        return next((b for b in buckets if b.tokens >= count), buckets[-1])


def chosen(meter: Meter, bucket: Bucket, records: Any, op: str) -> list[tuple[Task, Candidate]]:
    """The distinct calls of an op in a bucket, each with the kernel a compile would choose."""
    found = list(tasks(meter.base, [bucket], [op]))
    nodes = nodes_of(meter.base.program, meter.base.weights, bucket, "cuda", records)
    choice = {call_key(n.shape): Candidate.of(n) for n in nodes}
    return [(task, choice[task.key]) for task in found]


def seconds(meter: Meter, task: Task, one: Candidate, held: Lengths | None = None) -> float:
    timed = meter.call(task, held)
    return timed.seconds(timed.calls(one))


# --- products -----------------------------------------------------------------------------------


def products(meter: Meter, sizes: Sizes, records: Any, device: str) -> dict[str, Any]:
    """Ours with what is fused into them, and torch's product alone: of bfloat16, and where ours
    quantizes its activations also of e4m3 codes."""
    out: dict[str, Any] = {}
    for bucket in sizes.products:
        for task, one in (c for op in PRODUCTS for c in chosen(meter, bucket, records, op)):
            weight = task.node.call.ins["w"]
            outputs, inputs = meter.base.program.values[weight].dims
            rows = task.node.shape.shapes["x"][0]
            assert isinstance(outputs, int) and isinstance(inputs, int)
            ours = seconds(meter, task, one)
            theirs = product_seconds(rows, inputs, outputs, device)
            out[f"{rows}x{inputs}x{outputs}"] = figures = {
                "rows": rows,
                "kernel": one.name,
                "us": ours * 1e6,
                "cublas_us": theirs * 1e6,
                "over_cublas": theirs / ours,
                "tflops": 2 * rows * inputs * outputs / ours / 1e12,
            }
            if task.node.shape.attrs.get("x_format") == "fp8":
                if reason := scaled_mm_refuses(inputs, outputs, device):
                    figures["no_scaled_mm"] = reason
                else:
                    theirs = product_seconds(rows, inputs, outputs, device, codes=True)
                    figures |= {"scaled_mm_us": theirs * 1e6, "over_scaled_mm": theirs / ours}
    return out


def over_peers(products: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric means of a peer's time over ours, of few rows and of many."""
    found: dict[str, float] = {}
    for name, least, most in (("few_rows", 0, 64), ("many_rows", 512, math.inf)):
        for peer in ("over_cublas", "over_scaled_mm"):
            ratios = [p[peer] for p in products if least <= p["rows"] <= most and peer in p]
            if ratios:
                found[f"{name}_{peer}"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return found


def scaled_mm_refuses(inputs: int, outputs: int, device: str) -> str | None:
    """Why torch's row-wise `_scaled_mm` cannot take a product, or None."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no _scaled_mm: 2.5 or newer has"
    if inputs % 16 or outputs % 16:
        return f"{inputs} inputs and {outputs} outputs: both must be multiples of 16"
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"compute capability {major}.{minor}: scales by row need 9.0"
    return None


def product_seconds(
    rows: int, inputs: int, outputs: int, device: str, *, codes: bool = False
) -> float:
    """Of torch's, over weights of which none stays in the cache; `codes`: e4m3 on both sides, with
    scales by row, instead of bfloat16."""
    size = (1 if codes else 2) * inputs * outputs
    copies = 1 if device == "cpu" else max(1, min(16, (160 << 20) // size))
    made = dict(device=device, dtype=torch.bfloat16)
    x = torch.randn(rows, inputs, **made) * 0.02  # type: ignore[call-overload]
    weights = torch.randn(copies, outputs, inputs, **made) * 0.02  # type: ignore[call-overload]
    if not codes:
        return torch_seconds([partial(torch.mm, x, w.T) for w in weights], device)
    return torch_seconds(
        [partial(scaled_mm, *e4m3_rows(x), *e4m3_rows(w)) for w in weights], device
    )


def scaled_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """e4m3 codes [R, K] by [N, K], scales [R] and [N] float32, to bfloat16 [R, N]."""
    a, b = x_scale[:, None], w_scale[None]
    return torch._scaled_mm(x, w.T, scale_a=a, scale_b=b, out_dtype=torch.bfloat16)


def torch_seconds(functions: Sequence[Callable[[], Any]], device: str) -> float:
    """Median time of one of them, in a captured graph of all; on the CPU of a plain call."""
    for function in functions:
        function()
    if device == "cpu":
        import time

        began = time.perf_counter()
        for function in functions:
            function()
        return (time.perf_counter() - began) / len(functions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    times = []
    for _ in range(ROUNDS + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(begun.elapsed_time(ended) / 1e3 / len(functions))
    return median(times[2:])


# --- attention ----------------------------------------------------------------------------------


def attention_prefill(
    meter: Meter, sizes: Sizes, records: Any, tokens: int, device: str
) -> dict[str, Any]:
    """One prompt from its first token on; beside it torch's fused attention on dense tensors."""
    bucket = sizes.holding(sizes.mixed, tokens)
    ((task, one), *_) = chosen(meter, bucket, records, "attention")
    attrs = task.node.shape.attrs
    heads, kv_heads, dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
    ours = seconds(meter, task, one, ([tokens], [tokens]))
    flops = 2 * heads * dim * tokens * (tokens + 1)  # two products, half of them masked
    made = dict(device=device, dtype=torch.bfloat16)
    q = torch.randn(1, heads, tokens, dim, **made)  # type: ignore[call-overload]
    k, v = (torch.randn(1, kv_heads, tokens, dim, **made) for _ in range(2))  # type: ignore[call-overload]
    attend = torch.nn.functional.scaled_dot_product_attention
    theirs = torch_seconds([lambda: attend(q, k, v, is_causal=True, enable_gqa=True)], device)
    return {
        "tokens": tokens,
        "kernel": one.name,
        "us": ours * 1e6,
        "tflops": flops / ours / 1e12,
        "torch_tflops": flops / theirs / 1e12,
    }


def attention_decode(
    meter: Meter, sizes: Sizes, records: Any, reads: DeviceBandwidth
) -> dict[str, Any]:
    """Sequences of equal length; bytes of their keys and values beside the measured reads."""
    bucket = sizes.holding(sizes.decode, KEYS)
    keys = min(HELD, sizes.context, meter.pool * meter.page // bucket.seqs)
    ((task, one), *_) = chosen(meter, bucket, records, "attention")
    before = reads.read()
    ours = seconds(meter, task, one, ([1] * bucket.seqs, [keys] * bucket.seqs))
    after = reads.read()
    size = bucket.seqs * keys * key_bytes(task)
    rate = (before.median + after.median) / 2
    return {
        "sequences": bucket.seqs,
        "keys": keys,
        "kernel": one.name,
        "us": ours * 1e6,
        "gb_s": size / ours / 1e9,
        "read_gb_s": rate / 1e9,
        "share_pct": 100 * size / ours / rate,
    }


def skewed(meter: Meter, sizes: Sizes, records: Any) -> dict[str, Any]:
    """One long sequence among short ones: the same kernel with equal shares of all keys for every
    program, and with as many programs for each sequence."""
    bucket = sizes.holding(sizes.decode, SKEWED)
    ((task, one), *_) = chosen(meter, bucket, records, "attention")
    fixed = Candidate(kernel=one.kernel, config=replace(one.config, balanced=False))
    balanced = Candidate(kernel=one.kernel, config=replace(one.config, balanced=True))
    both = replace(task, candidates=(*task.candidates, fixed, balanced))  # scratch for all of them
    room = meter.pool * meter.page
    longest = min(LONG, sizes.context, room // 2)
    short = max(min(SHORT, sizes.context, (room - longest) // bucket.seqs), 1)
    keys = [longest, *[short] * (bucket.seqs - 1)]
    held = ([1] * bucket.seqs, keys)
    timed = meter.call(both, held)
    times: dict[str, list[float]] = {"balanced": [], "static": []}
    for _ in range(3):  # in turn, so that a disturbance meets both
        times["balanced"].append(timed.seconds(timed.calls(balanced)))
        times["static"].append(timed.seconds(timed.calls(fixed)))
    ours, static = median(times["balanced"]), median(times["static"])
    return {
        "keys": {"longest": longest, "others": short, "sequences": bucket.seqs},
        "kernel": balanced.name,
        "us": ours * 1e6,
        "static_us": static * 1e6,
        "ratio": static / ours,
        "gb_s": sum(keys) * key_bytes(task) / ours / 1e9,
    }


def sampling(meter: Meter, sizes: Sizes, records: Any, device: str) -> dict[str, Any]:
    """Every row by temperature and top-p; torch: softmax, sort and running sum, without the draw.
    Logits are random: of such flat distributions most of the vocabulary stays."""
    bucket = sizes.holding(sizes.decode, SAMPLED)
    ((task, one), *_) = chosen(meter, bucket, records, "sample")
    timed = meter.call(task, None, {"temperature": 1.0, "top_p": 0.9})
    ours = timed.seconds(timed.calls(one))
    rows, vocab = task.node.shape.shapes["logits"]
    logits = torch.randn(rows, vocab, device=device)

    def sort() -> torch.Tensor:
        return torch.softmax(logits, -1).sort(-1, descending=True).values.cumsum(-1)

    theirs = torch_seconds([sort], device)
    return {
        "rows": rows,
        "vocab": vocab,
        "kernel": one.name,
        "us": ours * 1e6,
        "torch_us": theirs * 1e6,
        "ratio": theirs / ours,
    }


def key_bytes(task: Task) -> int:
    """Bytes of a token's keys and values in one layer."""
    attrs = task.node.shape.attrs
    return 2 * int(attrs["kv_heads"]) * int(attrs["head_dim"]) * BYTES.get(attrs["kv_dtype"], 1)


def sources(config: GpuConfig, model: str) -> list[Source]:
    """What `calls` needs built."""
    base, settings = drafted(few_layers(config, model))
    records, sizes = load_records(settings.target.name, config.records), Sizes(base)
    few = sizes.holding(sizes.decode, SKEWED)
    found: list[Source] = []
    for bucket in base.buckets:
        for node in nodes_of(base.program, base.weights, bucket, "cuda", records):
            one = Candidate.of(node)
            if node.shape.op in ("attention", "sample"):
                found += one.sources(node.shape)
                if node.shape.op == "attention" and bucket == few:
                    fixed = replace(one, config=replace(one.config, balanced=False))
                    found += fixed.sources(node.shape)
            elif node.shape.op in PRODUCTS and bucket in sizes.products:
                found += one.sources(node.shape)
    return list(dict.fromkeys(found))
