"""Mixtures of experts on CUDA: pairs spread unevenly over the experts, tiles other than the
default's, and cubins at the sizes of served models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_harness import check_case, make_case, run_case

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.product import SHARED, TileConfig
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Source
from kernels.op import OPS, Sample
from kernels.ops.route import expert_order_reference
from kernels.ops.samples import floats, generator, live

KERNEL: dict[str, CudaKernel] = {k.name: k for k in KERNELS["cuda"]}
EXPERTS = 6

# Which experts each of the tokens goes to.
SPREADS = {
    "one expert has every token": [[4]] * 21,
    "the ends alone": [[0, 5], [5, 0]] * 5,
    "idle between": [[1, 3], [3, 1], [1, 3]] * 4,
    "one pair": [[2]],
    "a tile and one": [[0]] * 17 + [[5]],
}
TILE = TileConfig(block_n=32, block_m=16, block_k=32, warps=4, stages=2)
WAYS = {
    "maps": TILE,
    "pointers, wide": TileConfig(block_n=64, block_m=32, block_k=64, warps=4, stages=3, tma=False),
}


def spread_sample(op: str, ids: list[list[int]], inputs: int, outputs: int) -> Sample:
    """Experts of the op's product for `ids`; three tokens of the bucket are not there."""
    g = generator(7)
    used, choices = len(ids), len(ids[0])
    tokens = used + 3
    chosen = torch.full((tokens, choices), EXPERTS + 1, dtype=torch.int32)
    chosen[:used] = torch.tensor(ids, dtype=torch.int32)
    count = {"live": live(used)}
    first = op == "moe_gate_up"
    x = (tokens, inputs) if first else (tokens, choices, inputs)
    n = 2 * outputs if first else outputs
    args: dict[str, Any] = {
        **count,
        "x": floats(g, *x, used=used),
        **expert_order_reference({**count, "ids": chosen}, {"experts": EXPERTS}),
        "w": floats(g, EXPERTS, n, inputs, scale=inputs**-0.5),
        "bias": floats(g, EXPERTS * n),
    }
    return Sample(label=op, args=args, attrs={"act": "swiglu"} if first else {})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("op", ["moe_gate_up", "moe_down"])
def test_spreads(op: str, spread: str, way: str) -> None:
    sample = spread_sample(op, SPREADS[spread], inputs=96, outputs=40)
    case = make_case(OPS[op], sample, "bfloat16", "bfloat16")
    run_case(KERNEL[op], case, WAYS[way])
    check_case(case)


@pytest.mark.parametrize("fmt", ["int8g32", "int4g32", "fp8r"])
def test_stored_narrower(fmt: str) -> None:
    sample = spread_sample("moe_gate_up", SPREADS["idle between"], inputs=256, outputs=24)
    case = make_case(OPS["moe_gate_up"], sample, "bfloat16", fmt)
    config = TileConfig(block_n=32, block_m=16, block_k=128, warps=4, stages=2)
    run_case(KERNEL["moe_gate_up"], case, config)
    check_case(case)


@pytest.mark.parametrize("spread", SPREADS)
def test_order_in_several_blocks(spread: str) -> None:
    """A program's block is smaller than the bucket's pairs."""
    kernel, ids = KERNEL["expert_order"], SPREADS[spread]
    args = {"live": live(len(ids)), "ids": torch.tensor(ids, dtype=torch.int32)}
    sample = Sample(label=spread, args=args, attrs={"experts": EXPERTS})
    case = make_case(OPS["expert_order"], sample, "bfloat16")
    small = type(kernel.default(case.call))(block=8, warps=1)
    run_case(kernel, case, small)
    check_case(case)


def test_refused_configurations() -> None:
    sample = spread_sample("moe_down", SPREADS["one pair"], inputs=64, outputs=32)
    call = make_case(OPS["moe_down"], sample, "bfloat16", "bfloat16").call
    for config in (
        TileConfig(block_n=32, block_m=16, block_k=32, split=2),
        TileConfig(block_n=32, block_m=16, block_k=32, programs=4),
        TileConfig(block_n=32, block_m=16, block_k=32, rows_first=True),
    ):
        reason = KERNEL["moe_down"].valid(call, config) or ""
        assert "not split over inputs" in reason, config


# ---- cubins --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    width: int
    ffn: int
    experts: int
    choices: int
    score: str
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    scale: float = 1.0
    act: str = "swiglu"
    correction: bool = False
    bias: bool = False
    shared: bool = False


MODELS = {
    "mixtral-8x7b": Model(width=4096, ffn=14336, experts=8, choices=2, score="softmax"),
    "qwen3-30b-a3b": Model(width=2048, ffn=768, experts=128, choices=8, score="softmax"),
    "deepseek-v3": Model(
        width=7168,
        ffn=2048,
        experts=256,
        choices=8,
        score="sigmoid",
        groups=8,
        kept_groups=4,
        group_best=2,
        scale=2.5,
        correction=True,
        shared=True,
    ),
    "gpt-oss-20b": Model(
        width=2880,
        ffn=2880,
        experts=32,
        choices=4,
        score="chosen",
        act="swiglu_clamped",
        bias=True,
    ),
}
BUCKETS = (("decode", 1), ("decode", 8), ("decode", 64), ("mixed", 512))
FORMATS = ("bfloat16", "int8g32", "int4g32", "fp8r")


def calls(m: Model, kind: str, tokens: int, fmt: str) -> list[CallShape]:
    bf16, f32, i32 = "bfloat16", "float32", "int32"
    pairs = (tokens, m.choices)
    x = ((tokens, m.width), bf16)
    act = ((*pairs, m.ffn), bf16)
    y = ((*pairs, m.width), bf16)
    places = {"order": (pairs, i32), "starts": ((m.experts + 1,), i32)}

    def call(
        op: str, attrs: dict[str, Any], args: dict[str, tuple[tuple[int, ...], str]]
    ) -> CallShape:
        args = {"live": ((8,), i32), **args}
        return CallShape(
            op=op,
            shapes={name: shape for name, (shape, _) in args.items()},
            dtypes={name: dtype for name, (_, dtype) in args.items() if name != "w"},
            formats={"w": fmt} if "w" in args else {},
            attrs=attrs,
            kind=kind,
        )

    def experts(op: str, n: int, k: int, **args: tuple[tuple[int, ...], str]) -> CallShape:
        args = {**args, **places, "w": ((m.experts, n, k), "")}
        if m.bias:
            args["bias"] = ((m.experts * n,), f32)
        return call(op, {"act": m.act} if op == "moe_gate_up" else {}, args)

    chosen = {"ids": (pairs, i32), "weights": (pairs, f32)}
    correction = {"bias": ((m.experts,), f32)} if m.correction else {}
    rule = {
        "k": m.choices,
        "score": m.score,
        "groups": m.groups,
        "kept_groups": m.kept_groups,
        "group_best": m.group_best,
        "renormalise": m.score != "chosen",
        "scale": m.scale,
    }
    total = {"y": y, "weights": (pairs, f32), "residual": x, "out": x}
    return [
        call("route", rule, {"logits": ((tokens, m.experts), bf16), **correction, **chosen}),
        call("expert_order", {"experts": m.experts}, {"ids": (pairs, i32), **places}),
        experts("moe_gate_up", 2 * m.ffn, m.width, x=x, out=act),
        experts("moe_down", m.width, m.ffn, x=act, out=y),
        call("moe_combine", {}, {**total, "shared": x} if m.shared else total),
    ]


def check_cubins(wanted: list[CallShape], cache: Path) -> None:
    sources: dict[Source, str] = {}
    for one in wanted:
        kernels = [k for k in KERNEL.values() if k.op == one.op and not k.tuned_only]
        assert any(k.accepts(one) is None for k in kernels), one
        for kernel in kernels:
            if kernel.accepts(one) is not None:
                continue
            config = kernel.default(one)
            assert kernel.valid(one, config) is None, (one, config)
            for launch in kernel.launches(one, config):
                assert launch.source is not None
                sources[launch.source] = f"{kernel.name} {config} {one.shapes} {one.formats}"
    for source, (binary, _) in build_cuda(sources, cache).items():
        assert binary.stack == 0, f"{sources[source]} spills {binary.stack} bytes"
        assert binary.shared <= SHARED, sources[source]
        assert binary.pdl and binary.scratch == 0


def test_cubins(tmp_path: Path) -> None:
    check_cubins(calls(MODELS["gpt-oss-20b"], "decode", 8, "int4g32"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
def test_cubins_of_real_shapes(fmt: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    wanted = [c for m in MODELS.values() for bucket in BUCKETS for c in calls(m, *bucket, fmt)]
    check_cubins(wanted, tmp_path_factory.getbasetemp() / "cubins")
