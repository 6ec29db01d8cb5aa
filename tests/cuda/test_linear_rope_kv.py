"""linear_rope_kv on CUDA: the ways to the sums of whole heads, what does not fit, and cubins of
real shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_harness import check_case, make_case, run_case
from rowwise_calls import MODELS

import kernels.cuda.register  # noqa: F401
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.cuda.product import SHARED, TileConfig, VectorConfig
from kernels.cuda.rows import PROCESSORS
from kernels.kernel import KERNELS, CallShape
from kernels.op import Sample
from kernels.ops.linear_rope_kv import LINEAR_ROPE_KV

KERNEL: dict[str, CudaKernel] = {
    k.name: k for k in KERNELS["cuda"] if k.op == "linear_rope_kv" and not k.tuned_only
}
TILES, VECTOR = KERNEL["linear_rope_kv_tiles"], KERNEL["linear_rope_kv_vector"]
SAMPLES = {sample.label: sample for sample in LINEAR_ROPE_KV.samples()}
FORMATS = ("bfloat16", "int4g32", "fp8r")
TILE = TileConfig(block_n=64, block_m=16, block_k=32, warps=4, stages=2)
WAYS = {
    "split": replace(TILE, split=2),
    "split unevenly": replace(TILE, split=3, block_k=16),
    "persistent": replace(TILE, programs=2),
    "rows first": replace(TILE, rows_first=True),
    "rows left": replace(TILE, x_left=True, block_m=64),
    "in halves": replace(TILE, block_m=64, warps=1, tma=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("label", ["gqa", "head norms", "layer norms, clip", "no rope"])
def test_ways_through_a_tile(way: str, label: str) -> None:
    config = WAYS[way]
    if config.rows_first and "norm" not in SAMPLES[label].args:
        return
    for fmt in FORMATS[:1] if config.x_left else FORMATS:
        case = make_case(LINEAR_ROPE_KV, SAMPLES[label], "bfloat16", fmt)
        wide = config
        if fmt == "int4g32":
            wide = replace(config, block_k=128, split=1)
        run_case(TILES, case, wide)
        check_case(case)


@pytest.mark.parametrize("label", ["one", "interleaved, in part"])
def test_the_last_tile_of_a_head_finishes_it(label: str) -> None:
    for fmt in FORMATS:
        case = make_case(LINEAR_ROPE_KV, SAMPLES[label], "bfloat16", fmt, kind="decode")
        # A group of int4 is half a step, a step all inputs there are in one of the samples.
        config = VectorConfig(block_n=8, block_k=32, stages=1, split=2)
        run_case(VECTOR, case, config)
        check_case(case)


def test_rows_do_not_depend_on_the_batch() -> None:
    sample = SAMPLES["gqa"]
    args = {**sample.args, "live": sample.args["live"].clamp(max=2)}
    whole, few = (
        make_case(LINEAR_ROPE_KV, Sample(label="", args=a, attrs=sample.attrs), "bfloat16", "fp8r")
        for a in (sample.args, args)
    )
    for case in (whole, few):
        run_case(TILES, case, replace(TILE, split=2))
    assert torch.equal(whole.memory["q"][:2], few.memory["q"][:2])


@pytest.mark.parametrize("rows", [128, 256])
def test_the_tuner_may_fill_the_processors(rows: int) -> None:
    """48 tiles of 128 rows and columns, 96 with 256 rows: powers of two leave a quarter idle."""
    one = call("llama3-8b", rows)
    alone = (c for c in TILES.candidates(one) if not c.programs and not c.rows_first)
    programs = {math.prod(TILES.launches(one, config)[0].grid) for config in alone}
    assert max(n / (-(-n // PROCESSORS) * PROCESSORS) for n in programs) > 0.9


def test_what_does_not_fit_takes_two_launches() -> None:
    odd = make_case(LINEAR_ROPE_KV, SAMPLES["odd heads"], "bfloat16", "bfloat16").call
    assert TILES.accepts(odd) == "head_dim 48 is no power of two from 16 to 256"
    in_part = replace(odd, attrs={**odd.attrs, "head_dim": 64})
    assert TILES.accepts(in_part) == ("the halves of 24 turned dims do not part heads of 64 evenly")
    taken = [k for k in KERNEL.values() if k.accepts(odd) is None]
    assert [k.name for k in taken] == ["linear_tiles+rope_kv"]
    assert len(taken[0].launches(odd, taken[0].default(odd))) == 2
    narrow = make_case(LINEAR_ROPE_KV, SAMPLES["gqa"], "bfloat16", "bfloat16").call
    reason = TILES.valid(narrow, replace(TILE, block_n=16))
    assert reason == "block_n 16 is not a multiple of head_dim 32"


# ---- cubins --------------------------------------------------------------------------


def call(model: str, rows: int, fmt: str = "bfloat16", kind: str = "decode") -> CallShape:
    m = MODELS[model]
    dim, outputs = m.head_dim, (m.heads + 2 * m.kv_heads) * m.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "live": (8,),
        "x": (rows, m.width),
        "w": (outputs, m.width),
        "norm": (m.width,),
        "table": (rows, dim),
        "kv_slots": (rows,),
        "kv": (1 << 20,),
        "q": (rows, m.heads * dim),
    }
    if m.head_norms:
        shapes |= {"q_norm": (dim,), "k_norm": (dim,)}
    types = {"x": "bfloat16", "q": "bfloat16", "live": "int32", "kv_slots": "int32", "kv": "uint8"}
    layer = 2 * m.kv_heads * 16 * dim * 2
    attrs: dict[str, Any] = {
        **{name: kind() for name, kind in LINEAR_ROPE_KV.attrs.items()},
        "eps": 1e-5,
        "head_eps": 1e-6,
        "scale": 1.0,
        "heads": m.heads,
        "kv_heads": m.kv_heads,
        "head_dim": dim,
        "v_head_dim": dim,
        "page_size": 16,
        "layer_offset": layer,
        "page_bytes": 16 * layer,
        "kv_dtype": "bfloat16",
    }
    return CallShape(
        op="linear_rope_kv",
        shapes=shapes,
        dtypes={name: types.get(name, "float32") for name in shapes if name != "w"},
        formats={"w": fmt},
        attrs=attrs,
        kind=kind,
    )


def check_cubins(wanted: list[CallShape], cache: Path) -> None:
    """The first kernel that accepts a call, as the heuristic chooses."""
    sources = {}
    for one in wanted:
        kernel = next(k for k in KERNEL.values() if k.accepts(one) is None)
        config = kernel.default(one)
        assert kernel.valid(one, config) is None, (one, config)
        launches = kernel.launches(one, config)
        assert len(launches) == 1 or one.kind == "mixed"
        for launch in launches:
            assert launch.source is not None
            sources[launch.source] = f"{kernel.name} {config} {one.shapes} {one.formats}"
    for source, (binary, _) in build_cuda(sources, cache).items():
        assert binary.stack == 0, f"{sources[source]} spills {binary.stack} bytes"
        assert binary.shared <= SHARED, sources[source]
        assert binary.pdl and binary.scratch == 0


def test_cubins(tmp_path: Path) -> None:
    calls = [call("llama3.2-1b", 1), call("qwen3-0.6b", 64, "int4g32"), call("llama3-8b", 256)]
    check_cubins([*calls, call("qwen3-0.6b", 512, kind="mixed")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fmt", ["bfloat16", "int8g32", "int4g32", "int4g128", "fp8r"])
def test_cubins_of_real_shapes(fmt: str, model: str, tmp_path: Path) -> None:
    check_cubins(
        [
            *(call(model, rows, fmt) for rows in (1, 8, 64, 128, 256)),
            *(call(model, rows, fmt, "mixed") for rows in (64, 512, 4096)),
        ],
        tmp_path,
    )
