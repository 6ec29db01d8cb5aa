"""linear on CUDA: every epilogue with one row, the ways a tile is computed (split inputs, many
tiles per program, a first launch for norms), and cubins of real shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_harness import check_case, make_case, matrix_formats, run_case

import kernels.cuda.register  # noqa: F401
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.product import SHARED, TileConfig, VectorConfig
from kernels.kernel import KERNELS, CallShape
from kernels.op import Sample
from kernels.ops.linear import LINEAR

KERNEL: dict[str, CudaKernel] = {k.name: k for k in KERNELS["cuda"]}
# Products of fp8 activations: test_cuda_linear_fp8.py.
SAMPLES = {s.label: s for s in LINEAR.samples() if not s.attrs["x_format"]}
FORMATS = matrix_formats(LINEAR)


def one_row(sample: Sample) -> Sample:
    """The same call with its first row alone."""
    args = dict(sample.args)
    for name in ("rows", "residual_rows") if "rows" in args else ("x", "residual"):
        if name in args:
            args[name] = args[name][:1]
    args["live"] = args["live"].clamp(max=1)
    return Sample(label=sample.label, args=args, attrs=sample.attrs)


@pytest.mark.parametrize("label", SAMPLES)
def test_one_row(label: str) -> None:
    kernel = KERNEL["linear_vector"]
    sample = one_row(SAMPLES[label])
    for fmt in FORMATS:
        case = make_case(LINEAR, sample, "bfloat16", fmt, kind="decode")
        assert kernel.accepts(case.call) is None
        run_case(kernel, case)
        check_case(case)
    case = make_case(LINEAR, sample, "float32", "int4g32")
    run_case(kernel, case, VectorConfig(block_n=16, block_k=32, split=2, stages=1))
    check_case(case)


TILE = TileConfig(block_n=32, block_m=16, block_k=128, warps=4, stages=2)
WAYS = {
    "split": replace(TILE, split=2),
    "split by pointers": replace(TILE, split=2, tma=False),
    "persistent": replace(TILE, programs=3),
    "rows first": replace(TILE, rows_first=True),
    "rows first, split, persistent": replace(TILE, rows_first=True, split=2, programs=2),
    "rows left": replace(TILE, x_left=True, block_m=64, warps=8),
    "rows left by pointers, split": replace(TILE, x_left=True, block_m=64, split=2, tma=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", ["norm qkv", "softcap", "odd rows", "chunk", "gated scale"])
def test_ways_through_a_tile(way: str, label: str) -> None:
    kernel, config = KERNEL["linear_tiles"], WAYS[way]
    sample = SAMPLES[label]
    if config.rows_first and "norm" not in sample.args:
        case = make_case(LINEAR, sample, "bfloat16", "bfloat16")
        reason = kernel.valid(case.call, replace(config, split=1, block_k=32))
        assert reason == "there is nothing to do for a first launch"
        return
    for fmt in ("bfloat16",) if config.x_left else ("bfloat16", "int4g32", "fp8r"):
        case = make_case(LINEAR, sample, "bfloat16", fmt)
        small = config
        if sample.args["x"].shape[1] <= 128:
            small = replace(config, block_k=32 if fmt == "bfloat16" else 128)
            if small.split * small.block_k > sample.args["x"].shape[1]:
                small = replace(small, split=1)
        run_case(kernel, case, small)
        check_case(case)


def test_rows_do_not_depend_on_the_batch() -> None:
    """A row's result is the same bits beside other rows."""
    kernel = KERNEL["linear_tiles"]
    for label in ("odd rows", "chunk"):  # the second with its norm inside
        sample = SAMPLES[label]
        whole = make_case(LINEAR, sample, "bfloat16", "bfloat16", kind="decode")
        config = replace(kernel.default(whole.call), block_n=64, block_k=64)
        run_case(kernel, whole, config)
        args = {**sample.args, "live": sample.args["live"].clamp(max=2)}
        few = make_case(LINEAR, replace(sample, args=args), "bfloat16", "bfloat16")
        run_case(kernel, few, config)
        assert torch.equal(whole.memory["out"][:2], few.memory["out"][:2])


@pytest.mark.parametrize("rows", [1, 8, 64, 128, 256])
@pytest.mark.parametrize("fmt", ["bfloat16", "int8g32", "int4g128", "fp8r"])
def test_a_norm_costs_no_launch_in_a_decode_bucket(fmt: str, rows: int) -> None:
    shape = replace(call(rows, 6144, 4096, fmt, norm=True), kind="decode")
    kernel = KERNEL["linear_tiles"]
    assert len(kernel.launches(shape, kernel.default(shape))) == 1
    candidates = kernel.candidates(shape)
    assert any(config.rows_first for config in candidates) == (rows > 64)


def test_what_cannot_stand_on_the_left() -> None:
    kernel = KERNEL["linear_tiles"]
    config = TileConfig(block_n=128, block_m=128, block_k=128, warps=8, x_left=True)
    assert kernel.valid(call(128, 256, 256, norm=True), config) is None
    reason = kernel.valid(call(128, 256, 256, "int4g32", norm=True), config)
    assert reason == "weights as int4g32 are decoded in registers, on the left"
    reason = kernel.valid(call(128, 256, 256, norm=True), replace(config, block_m=32))
    assert reason == "block_m 32 on the left, 64 at least"


# ---- cubins --------------------------------------------------------------------------


def call(
    rows: int,
    n: int,
    k: int,
    fmt: str = "bfloat16",
    *,
    act: str = "",
    norm: bool = False,
    residual: bool = False,
    gather: bool = False,
    x: str = "bfloat16",
) -> CallShape:
    outputs = n // 2 if act else n
    shapes = {"live": (8,), "x": (rows, k), "w": (n, k), "out": (rows, outputs)}
    dtypes = {"live": "int32", "x": x, "out": x}
    if norm:
        shapes["norm"], dtypes["norm"] = (k,), "float32"
    if residual:
        shapes["residual"], dtypes["residual"] = (rows, outputs), x
    if gather:
        shapes["rows"], dtypes["rows"] = (rows,), "int32"
    attrs: dict[str, Any] = {"act": act, "eps": 1e-5, "scale": 1.0, "softcap": 0.0}
    return CallShape(
        op="linear",
        shapes=shapes,
        dtypes=dtypes,
        formats={"w": fmt},
        attrs={**attrs, "live_index": 2 if gather else 0},
    )


# (D, heads x head dim, q + k + v, ffn, vocabulary)
MODELS = {
    "llama3-8b": (4096, 4096, 6144, 14336, 128256),
    "llama3.2-1b": (2048, 2048, 3072, 8192, 128256),
    "qwen3-0.6b": (1024, 2048, 4096, 3072, 151936),
}


def calls(model: str, rows: int, fmt: str) -> list[CallShape]:
    d, heads, qkv, ffn, vocabulary = MODELS[model]
    return [
        call(rows, qkv, d, fmt, norm=True),
        call(rows, d, heads, fmt, residual=True),
        call(rows, 2 * ffn, d, fmt, norm=True, act="swiglu"),
        call(rows, d, ffn, fmt, residual=True),
        call(min(rows, 256), vocabulary, d, fmt, norm=True, gather=True),
    ]


def check_cubins(wanted: list[CallShape], cache: Path) -> None:
    sources = {}
    for one in wanted:
        for kernel in KERNELS["cuda"]:
            if kernel.op != "linear" or kernel.accepts(one) is not None or kernel.tuned_only:
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
    check_cubins(
        [
            call(1, 3072, 2048, norm=True),
            call(8, 2048, 8192, residual=True),
            call(64, 2 * 8192, 2048, "int4g32", norm=True, act="swiglu"),
            call(512, 2 * 8192, 2048, norm=True, act="swiglu"),
            replace(call(256, 3072, 2048, norm=True), kind="decode"),
        ],
        tmp_path,
    )


ROWS = [1, 8, 64, 256, 512, 4096]
STORED = ["bfloat16", "int8g32", "int4g32", "int4g128", "fp8r"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fmt", STORED)
def test_defaults_are_valid(fmt: str, model: str) -> None:
    for one in (c for rows in ROWS for c in calls(model, rows, fmt)):
        for kernel in KERNELS["cuda"]:
            if kernel.op == "linear" and kernel.accepts(one) is None:
                config = kernel.default(one)
                assert kernel.valid(one, config) is None, (kernel.name, config, one.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8, 64, 512])  # one of every regime
@pytest.mark.parametrize("fmt", STORED)
def test_cubins_of_real_shapes(
    fmt: str, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "cubins"
    check_cubins(calls("llama3-8b", rows, fmt), cache)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fmt", STORED)
def test_cubins_of_large_decode_buckets(
    fmt: str, model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Norms inside the product."""
    cache = tmp_path_factory.getbasetemp() / "cubins"
    shapes = [shape for rows in (128, 256) for shape in calls(model, rows, fmt)]
    check_cubins([replace(shape, kind="decode") for shape in shapes], cache)
