"""CUDA attention beyond the op's samples: how work is shared out, against a float64 formula; and
binaries at the shapes of released models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_harness import Case, check_case, make_case, run_case

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda.attention import SHARED, MixedConfig, SplitConfig, TileConfig
from kernels.cuda.build import build_cuda
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Launch
from kernels.op import OPS
from kernels.ops.attention import attention_sample
from kernels.ops.kv import KV_DTYPES
from kernels.ops.samples import Ragged

KERNEL: dict[str, CudaKernel] = {k.name: k for k in KERNELS["cuda"]}
SPLIT = SplitConfig(rows=16, keys=16, warps=4, stages=2, programs=1)


def with_programs(programs: int) -> Any:
    """The decode kernel on a device that holds `programs` programs."""
    kernel = KERNEL["attention_decode"]

    def launches(call: CallShape, config: SplitConfig) -> tuple[Launch, ...]:
        (launch,) = kernel.launches(call, config)
        assert launch.source is not None
        constants = {**dict(launch.source.constants), "PROGRAMS": programs}
        source = replace(launch.source, constants=tuple(constants.items()))
        return (replace(launch, source=source, grid=(programs, 1, 1)),)

    size = programs * 2 * 16 * (16 + 2) * 4
    return replace(kernel, launches=launches, workspace=lambda call, config: size)


def decode(lengths: Sequence[int], window: int = 0, **options: Any) -> Case:
    """A decode bucket with room for one sequence more, head dim 16."""
    pages = [-(-n // 16) for n in lengths]
    ragged = Ragged(
        lengths=tuple((n - 1, 1) for n in lengths),
        tokens=len(lengths) + 1,
        seqs=len(lengths) + 1,
        pages=max(pages, default=1) + 1,
        pool_pages=sum(pages) + 1,
    )
    sample = attention_sample(
        9, "decode", ragged, heads=4, kv_heads=2, dim=16, window=window, **options
    )
    return make_case(OPS["attention"], sample, "float32", kind="decode")


def formula(case: Case) -> torch.Tensor:
    """softmax(q k^T scale) v in float64, key by key of the page table."""
    args, attrs = case.sample.args, case.sample.attrs
    layers = [layer.double() for layer in args["kv"].keys_and_values(attrs)]
    seqs = int(args["live"][1])
    out = torch.zeros(seqs, attrs["heads"], attrs["v_head_dim"], dtype=torch.float64)
    for s in range(seqs):
        length = int(args["seq_len"][s])
        first = max(0, length - attrs["window"]) if attrs["window"] else 0
        at = [(int(args["pages"][s, j // 16]), j % 16) for j in range(first, length)]
        for h in range(attrs["heads"]):
            kv = h // (attrs["heads"] // attrs["kv_heads"])
            k, v = (torch.stack([layer[p, kv, t] for p, t in at]) for layer in layers)
            q = args["q"][s].double().view(attrs["heads"], -1)[h]
            weight = torch.exp(k @ q * attrs["scale"])
            total = weight.sum()
            if "sinks" in args:
                total = total + math.exp(float(args["sinks"][h]))
            out[s, h] = weight @ v / total
    return out.flatten(1)


CASES = {
    "skew": decode([3, 1, 16, 170, 5, 17]),
    "exactly one block": decode([16]),
    "window edges": decode([15, 16, 17, 32, 33, 70], window=16),
    "window of one": decode([1, 16, 17, 40], window=1),
    "sinks": decode([90, 2], sinks=True),
    "empty": decode([]),
}


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_shares_merge_to_the_formula(label: str, programs: int) -> None:
    """Few programs hold whole tiles and both ends of shared ones; many share one tile."""
    case = CASES[label]
    fresh = replace(case, memory={n: t.clone() for n, t in case.memory.items()})
    run_case(with_programs(programs), fresh, SPLIT)
    check_case(fresh)
    got = fresh.memory["out"][: int(case.sample.args["live"][1])].double()
    torch.testing.assert_close(got, formula(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", ["skew", "window edges", "empty"])
def test_the_static_split_gives_the_same(label: str) -> None:
    """Its programs outnumber the blocks of most sequences."""
    case = CASES[label]
    fresh = replace(case, memory={n: t.clone() for n, t in case.memory.items()})
    run_case(KERNEL["attention_decode"], fresh, replace(SPLIT, balanced=False))
    check_case(fresh)


def test_blocks_of_every_size_and_edge() -> None:
    """Chunks whose ends meet the edges of pages, blocks, tiles and the window."""
    ragged = Ragged(
        lengths=((0, 16), (16, 16), (31, 9), (5, 1)), tokens=48, seqs=5, pages=3, pool_pages=8
    )
    config = MixedConfig(split=SPLIT, tile=TileConfig(rows=16, keys=16, warps=4, stages=2))
    for window in (0, 1, 7, 16):
        sample = attention_sample(3, "edges", ragged, heads=3, kv_heads=1, dim=16, window=window)
        case = make_case(OPS["attention"], sample, "float32")
        run_case(KERNEL["attention_mixed"], case, config)
        check_case(case)


def test_refusals_name_the_values() -> None:
    call = CASES["empty"].call
    accepts = KERNEL["attention_decode"].accepts

    def reason(**attrs: Any) -> str:
        return accepts(replace(call, attrs={**call.attrs, **attrs})) or ""

    assert "head_dim 24" in reason(head_dim=24)
    assert "v_head_dim 32 is not a multiple of 16 in 16..16" in reason(v_head_dim=32)
    assert "page_size 32 is not 16" in reason(page_size=32)
    assert "5 heads" in reason(heads=5)
    assert "mixed" in (accepts(replace(call, kind="mixed")) or "")
    big = replace(SPLIT, keys=4096)
    assert "bytes of shared memory" in (KERNEL["attention_decode"].valid(call, big) or "")


def call_of(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    seqs: int,
    context: int,
    rest: int = 0,
    **attrs: Any,
) -> CallShape:
    """An attention call of a bfloat16 model whose keys have `rest` dims more than its values; of
    latents where kv_heads is 0 (`dim` + 64 wide)."""
    kind = "decode" if tokens == seqs else "mixed"
    stored: dict[str, Any] = {"page_size": 16, "kv_dtype": "bfloat16", "scale": dim**-0.5}
    stored |= attrs
    size = 16 * KV_DTYPES[stored["kv_dtype"]].itemsize  # of a page's column
    if kv_heads:
        op, layer = "attention", size * kv_heads * (2 * dim + rest)
        q, out = heads * (dim + rest), heads * dim
        stored |= {"kv_heads": kv_heads, "head_dim": dim + rest, "v_head_dim": dim}
        stored |= {"causal": True, "window": 0, "softcap": 0.0, "logn": 0}
    else:
        op, layer, q, out = "mla_attention", size * (dim + 64), heads * (dim + 64), heads * dim
        stored |= {"latent": dim, "rotary": 64}
    stored |= {"heads": heads, "layer_offset": layer, "page_bytes": 3 * layer, **attrs}
    shapes = {"live": (8,), "q": (tokens, q), "kv": (3 * layer,), "seq_start": (seqs + 1,)}
    shapes |= {"seq_len": (seqs,), "pages": (seqs, context // 16), "out": (tokens, out)}
    dtypes = dict.fromkeys(shapes, "int32") | {"q": "bfloat16", "out": "bfloat16", "kv": "uint8"}
    return CallShape(op=op, shapes=shapes, dtypes=dtypes, formats={}, attrs=stored, kind=kind)


def with_maxima(call: CallShape) -> CallShape:
    """The call when products of fp8 activations read what it makes."""
    amax = {"out_amax": (call.shapes["out"][0], call.attrs["heads"])}
    dtypes = {**call.dtypes, "out_amax": "float32"}
    return replace(call, shapes={**call.shapes, **amax}, dtypes=dtypes)


def check_binaries(calls: Sequence[CallShape], cache: Path) -> None:
    launches: dict[Any, str] = {}
    for call in calls:
        (kernel,) = [k for k in KERNELS["cuda"] if k.op == call.op and k.accepts(call) is None]
        config = kernel.default(call)
        assert kernel.valid(call, config) is None
        for launch in kernel.launches(call, config):
            launches[launch.source] = f"{kernel.name} {config} at {dict(call.shapes)}"
    spills = []
    for source, (binary, _) in build_cuda(launches, cache).items():
        if binary.stack:
            spills.append(f"{launches[source]} spills {binary.stack} bytes in {source.function}")
        assert binary.shared <= SHARED and binary.pdl, launches[source]
    assert not spills, "\n".join(spills)


@pytest.mark.parametrize("kv", ["bfloat16", "fp8_e4m3"])
def test_binaries_of_llama3_8b(kv: str, tmp_path: Path) -> None:
    calls = [call_of(32, 8, 128, n, 64, 8192, kv_dtype=kv) for n in (64, 512)]
    check_binaries([*calls, with_maxima(calls[0])], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["fp8_e4m3", "fp8_e5m2"])
def test_binaries_over_fp8_pages(kv: str, tmp_path: Path) -> None:
    calls = []
    for heads, kv_heads, dim, rest in (
        (32, 8, 128, 0),
        (32, 8, 64, 0),
        (64, 8, 128, 0),
        (8, 4, 256, 0),
        (71, 1, 64, 0),
        (32, 32, 96, 0),
        (16, 16, 128, 64),
        (128, 0, 512, 0),
    ):
        for n in (1, 256, 4096):
            calls.append(call_of(heads, kv_heads, dim, n, min(n, 256), 8192, rest, kv_dtype=kv))
    calls.append(call_of(16, 8, 256, 512, 64, 8192, window=4096, softcap=50.0, kv_dtype=kv))
    check_binaries(calls, tmp_path)


@pytest.mark.slow
def test_binaries_at_released_shapes(tmp_path: Path) -> None:
    calls = []
    for heads, kv_heads, dim in ((32, 8, 128), (32, 8, 64), (16, 8, 128), (64, 8, 128)):
        calls += [call_of(heads, kv_heads, dim, n, n, 8192) for n in (1, 8, 64, 256)]
        calls += [call_of(heads, kv_heads, dim, n, 64, 131072) for n in (512, 4096)]
        calls += [with_maxima(call_of(heads, kv_heads, dim, n, 8, 8192)) for n in (8, 256)]
        calls.append(call_of(heads, kv_heads, dim, 64, 64, 131072))
    for heads, kv_heads, dim in ((8, 4, 256), (71, 1, 64), (32, 32, 96), (128, 0, 512)):
        calls += [call_of(heads, kv_heads, dim, n, 64, 8192) for n in (64, 512)]
    for heads, dim, rest in ((16, 128, 64), (40, 64, 32)):  # DeepSeek-V2-Lite, MiniCPM3, plain
        calls += [call_of(heads, heads, dim, n, n, 8192, rest) for n in (1, 8, 64, 256)]
        calls += [call_of(heads, heads, dim, n, 64, 8192, rest) for n in (512, 4096)]
    calls.append(call_of(16, 8, 256, 512, 64, 8192, window=4096, softcap=50.0))
    calls.append(call_of(12, 12, 64, 4096, 32, 512, causal=False))
    check_binaries(calls, tmp_path)
