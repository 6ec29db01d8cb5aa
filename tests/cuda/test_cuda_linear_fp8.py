"""linear on fp8 activations on CUDA: the ways a tile is computed, codes that depend on the row
alone, and cubins of real shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_harness import check_case, make_case, run_case
from test_cuda_linear import MODELS, ROWS, call, calls, check_cubins

import kernels.cuda.register  # noqa: F401
from kernels.cuda.interpret import execute
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.product import TileConfig
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Pointer
from kernels.ops.linear import LINEAR, e4m3_rows

KERNEL: CudaKernel = next(k for k in KERNELS["cuda"] if k.name == "linear_fp8")
SAMPLES = {s.label.removeprefix("fp8 "): s for s in LINEAR.samples() if s.attrs["x_format"]}
TILE = TileConfig(block_n=32, block_m=16, block_k=64, stages=2, rows_first=True)
WAYS = {
    "split": replace(TILE, split=2),
    "persistent": replace(TILE, programs=3),
    "by pointers, split, persistent": replace(TILE, tma=False, split=2, programs=2),
    "codes in every program": replace(TILE, rows_first=False),
    "codes in every program, by pointers, split": replace(
        TILE, rows_first=False, tma=False, split=2
    ),
}
INSIDE = replace(TILE, block_n=64, rows_first=False)
TOLD = {  # with maxima
    "on the right": INSIDE,
    "on the right, split, persistent": replace(INSIDE, split=2, programs=2),
    "on the left": replace(INSIDE, x_left=True, block_m=64),
    "on the left, by pointers, split": replace(INSIDE, x_left=True, block_m=64, tma=False, split=2),
    "two parts of a tile": replace(INSIDE, block_n=128, x_left=True, block_m=64, programs=2),
    "first": replace(INSIDE, rows_first=True),
}
LABELS = [label for label in SAMPLES if label.startswith("maxima")]


@pytest.mark.parametrize("way", TOLD)
@pytest.mark.parametrize("label", LABELS)
def test_codes_by_the_maxima_a_call_is_told(way: str, label: str) -> None:
    for dtype in ("bfloat16", "float32"):
        case = make_case(LINEAR, SAMPLES[label], dtype, "fp8r")
        config = TOLD[way]
        if config.split * config.block_k > case.call.shapes["w"][1]:
            config = replace(config, split=1)
        run_case(KERNEL, case, config)
        check_case(case)


def test_codes_are_the_same_wherever_they_are_made() -> None:
    """The same bits of every row, but that a norm's sum of squares has another order."""
    for label, exact in (("maxima", True), ("maxima, chunk", False)):
        found = []
        for config in (replace(INSIDE, rows_first=True), INSIDE):
            case = make_case(LINEAR, SAMPLES[label], "float32", "fp8r")
            run_case(KERNEL, case, config)
            found.append(case.memory["out"])
        assert not exact or torch.equal(*found)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_codes_are_made_by_what_is_told() -> None:
    """With twice the largest number, half the codes and twice their scale: the formula in float64,
    of a row without and with a norm."""
    for label, dtype in (("maxima", "float32"), ("maxima, chunk", "bfloat16")):
        sample = SAMPLES[label]
        args = {**sample.args, "x_amax": sample.args["x_amax"] * 2}
        case = make_case(LINEAR, replace(sample, args=args, wanted=()), dtype, "fp8r")
        case.memory["out"] = case.memory["out"].float()
        case.call = replace(case.call, dtypes={**case.call.dtypes, "out": "float32"})
        run_case(KERNEL, case, TOLD["on the left"])
        n, attrs = int(args["live"][0]), sample.attrs
        x, norm = args["x"][:n].double(), args.get("norm")
        v = x if norm is None else (args["x"][:n] * norm).double()
        scale = v.abs().amax(1).clamp(min=2.0**-100) * 2 / 448
        codes = (v / scale[:, None]).float().to(torch.float8_e4m3fn).double()
        y = codes * scale[:, None] @ case.state["w"].double().T
        if norm is not None:
            y = y / (x.square().mean(1, keepdim=True) + attrs["eps"]).sqrt()
        y = y * attrs["scale"] + (args["residual"][:n].double() if "residual" in args else 0)
        torch.testing.assert_close(case.memory["out"][:n].double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", ["norm qkv", "odd outputs", "head", "swiglu", "two choices"])
def test_ways_through_a_tile(way: str, label: str) -> None:
    case = make_case(LINEAR, SAMPLES[label], "bfloat16", "fp8r")
    config = WAYS[way]
    rows, k = case.call.shapes["out"][0], case.call.shapes["w"][1]
    if not config.rows_first and rows > 4:
        reason = f"{rows} rows without maxima, codes are made by every program of 4 at most"
        assert KERNEL.valid(case.call, config) == reason
        return
    if config.split * config.block_k > k:
        config = replace(config, split=1)
    run_case(KERNEL, case, config)
    check_case(case)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("block", [64, 256])  # a row in parts, and whole
def test_codes_are_those_of_the_contract(block: int, norm: bool) -> None:
    """The first launch's codes and scales of bfloat16 rows, bit for bit."""
    rows, k = 5, 200
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=g).bfloat16()
    x[1], x[2, 3] = 0, 900
    weight = torch.rand(k, generator=g) + 0.5
    codes, scales = torch.zeros(rows, k, dtype=torch.uint8), torch.zeros(rows)
    live = torch.tensor([rows - 1, 0], dtype=torch.int32)
    memory = {"live": live, "x": x, "norm": weight, "codes": codes, "scales": scales}
    types = {"live": "i32", "x": "bf16", "norm": "fp32", "codes": "fp8e4nv", "scales": "fp32"}
    slots = {name: Pointer(arg=name, type=type) for name, type in types.items()}
    execute(
        "linear_fp8.rows_kernel",
        (rows, 1, 1),
        {
            "live_ptr": slots["live"],
            "x_ptr": slots["x"],
            "norm_ptr": slots["norm"] if norm else None,
            "rows_ptr": None,
            "codes_ptr": slots["codes"],
            "scales_ptr": slots["scales"],
            **{"LIVE": 0, "K": k, "EPS": 1e-5 if norm else 0.0, "BLOCK": block},
        },
        lambda slot: memory[slot.arg].data_ptr(),
    )
    wide = x.float() * weight if norm else x.float()
    wanted, scale = e4m3_rows(wide)
    if norm:
        scale = scale * torch.rsqrt(x.float().square().mean(1) + 1e-5)
    assert torch.equal(codes[:-1], wanted.view(torch.uint8)[:-1])
    torch.testing.assert_close(scales[:-1], scale[:-1], rtol=1e-6, atol=0)
    assert not codes[-1].any() and scales[-1] == 0, "a row that is not live was written"


def test_rows_do_not_depend_on_the_batch_or_on_who_makes_the_codes() -> None:
    sample = SAMPLES["norm qkv"]
    whole = make_case(LINEAR, sample, "bfloat16", "fp8r")
    run_case(KERNEL, whole, TILE)
    args = {**sample.args, "live": sample.args["live"].clamp(max=2)}
    few = make_case(LINEAR, replace(sample, args=args), "bfloat16", "fp8r")
    run_case(KERNEL, few, TILE)
    assert torch.equal(whole.memory["out"][:2], few.memory["out"][:2])
    own = make_case(LINEAR, sample, "float32", "fp8r")
    run_case(KERNEL, own, replace(TILE, rows_first=False))
    first = make_case(LINEAR, sample, "float32", "fp8r")
    run_case(KERNEL, first, TILE)
    torch.testing.assert_close(own.memory["out"], first.memory["out"], rtol=1e-6, atol=1e-6)


# ---- cubins --------------------------------------------------------------------------


def fp8(shape: CallShape) -> CallShape:
    return replace(shape, attrs={**shape.attrs, "x_format": "fp8"})


def told(shape: CallShape) -> CallShape:
    """The call in a bucket of few tokens: it knows its rows' maxima and, but for the head, hands on
    those of its own."""
    (rows, outputs), (x_rows, k) = shape.shapes["out"], shape.shapes["x"]
    shapes, dtypes = {"x_amax": (x_rows, -(-k // 64))}, dict(shape.dtypes)
    if "rows" in shape.shapes:
        dtypes["out"] = "float32"
    else:
        shapes["out_amax"] = (rows, -(-outputs // 64))
        shapes |= {} if shape.attrs["act"] else {"amax_norm": (outputs,)}
    dtypes |= dict.fromkeys(shapes, "float32")
    return replace(fp8(shape), shapes={**shape.shapes, **shapes}, dtypes=dtypes, kind="decode")


def test_who_serves_what() -> None:
    """Activations in fp8 have one kernel for every number of rows, and it has nothing else."""
    kernels = [k for k in KERNELS["cuda"] if k.op == "linear" and not k.tuned_only]
    for rows in ROWS:
        shape = call(rows, 2048, 1024, "fp8r")
        assert [k.name for k in kernels if k.accepts(fp8(shape)) is None] == ["linear_fp8"]
        assert KERNEL.accepts(shape) == "x is bfloat16, not quantized to fp8"
        config = KERNEL.default(fp8(shape))
        assert KERNEL.valid(fp8(shape), config) is None and config.rows_first == (rows > 4)
        config = KERNEL.default(told(shape))
        assert KERNEL.valid(told(shape), config) is None and not config.rows_first
        head = told(call(rows, 2048, 1024, "fp8r", gather=True))
        assert KERNEL.default(head).rows_first == (rows > 64)
        assert {c.rows_first for c in KERNEL.candidates(told(shape))} == {True, False}
    other = KERNEL.accepts(fp8(call(8, 2048, 1024, "int8g32")))
    assert other == "w is int8g32: fp8 activations multiply fp8r weights"


def test_configurations_that_cannot_be() -> None:
    shape = fp8(call(512, 2048, 1000, "fp8r"))
    default = KERNEL.default(shape)
    assert not default.tma  # rows of 1000 bytes
    for config, words in (
        (replace(default, block_k=256), "128 at most (exact sums)"),
        (replace(default, tma=True), "1000 bytes cannot be described to TMA"),
        (replace(default, block_m=256), "256 accumulators per thread, 192 at most"),
        (replace(default, stages=8), "bytes of shared memory"),
        (replace(default, split=16), "split 16 of 8 steps"),
    ):
        assert words in (KERNEL.valid(shape, config) or ""), config
    shape = told(call(128, 2048, 1024, "fp8r"))
    default = KERNEL.default(shape)
    for config, words in (
        (replace(default, rows_first=True), "read from shared memory, on the right"),
        (replace(default, block_m=32), "block_m 32 on the left, 64 at least"),
        (replace(default, block_n=32), "block_n 32: maxima are of 64 columns"),
    ):
        assert words in (KERNEL.valid(shape, config) or ""), config


def test_cubins(tmp_path: Path) -> None:
    shapes = [
        call(1, 3072, 2048, "fp8r", norm=True),
        call(64, 2 * 8192, 2048, "fp8r", norm=True, act="swiglu"),
        call(512, 2048, 8192, "fp8r", residual=True),
    ]
    few = [
        call(8, 4096, 14336, "fp8r", residual=True),
        call(64, 2 * 8192, 2048, "fp8r", norm=True, act="swiglu"),
        call(256, 4096, 4096, "fp8r", residual=True),
    ]
    check_cubins([*map(fp8, shapes), *map(told, few)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 128, 256])
def test_cubins_of_codes_in_the_product(
    rows: int, model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "cubins"
    check_cubins([told(shape) for shape in calls(model, rows, "fp8r")], cache)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
def test_cubins_of_real_shapes(rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.getbasetemp() / "cubins"
    check_cubins([fp8(shape) for shape in calls("llama3-8b", rows, "fp8r")], cache)
