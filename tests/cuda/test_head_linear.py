"""head_linear at the sizes of DeepSeek models: default configurations build without spills."""

from __future__ import annotations

from pathlib import Path

import pytest

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda.build import build_cuda
from kernels.cuda.product import SHARED
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Source

KERNEL = next(k for k in KERNELS["cuda"] if k.name == "head_linear")
HEADS = {"deepseek-v3": 128, "deepseek-v2-lite": 16}
LATENT, NOPE, ROTARY, VALUE = 512, 128, 64, 128
FORMATS = ("bfloat16", "int8g128", "int4g128", "fp8r")
ROWS = (1, 64, 512)  # decode, decode, mixed


def calls(heads: int, rows: int, format: str, x: str = "bfloat16") -> list[CallShape]:
    """The two products of a layer: queries into latents, attended latents into values."""
    shapes = {"live": (8,), "x": (rows, heads * (NOPE + ROTARY)), "w": (heads, LATENT, NOPE)}
    query = shapes | {"table": (rows, ROTARY), "out": (rows, heads * (LATENT + ROTARY))}
    value = shapes | {"x": (rows, heads * LATENT), "w": (heads, VALUE, LATENT)}
    value["out"] = (rows, heads * VALUE)
    return [
        CallShape(
            op="head_linear",
            shapes=args,
            dtypes={"live": "int32", "x": x, "out": x}
            | ({"table": "float32"} if "table" in args else {}),
            formats={"w": format},
            attrs={"heads": heads, "interleaved": True},
            kind="mixed" if rows == 512 else "decode",
        )
        for args in (query, value)
    ]


def check(wanted: list[CallShape], cache: Path) -> None:
    sources: dict[Source, CallShape] = {}
    for call in wanted:
        assert KERNEL.accepts(call) is None
        config = KERNEL.default(call)
        assert KERNEL.valid(call, config) is None
        (launch,) = KERNEL.launches(call, config)
        assert launch.source is not None
        sources[launch.source] = call
    for source, (binary, _) in build_cuda(list(sources), cache).items():
        what = f"{sources[source].shapes} {sources[source].formats} {dict(source.constants)}"
        assert binary.stack == 0, f"{what}: spills {binary.stack} bytes"
        assert binary.shared <= SHARED, f"{what}: {binary.shared} bytes of shared memory"
        assert binary.pdl and binary.scratch == 0, what


def test_defaults_build(tmp_path: Path) -> None:
    check([call for rows in (1, 512) for call in calls(128, rows, "bfloat16")], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", HEADS)
def test_every_format_builds(model: str, format: str, tmp_path: Path) -> None:
    check([call for rows in ROWS for call in calls(HEADS[model], rows, format)], tmp_path)


@pytest.mark.slow
def test_float32_activations_build(tmp_path: Path) -> None:
    wanted = [
        calls(16, rows, format, "float32") for rows in ROWS for format in ("float32", *FORMATS)
    ]
    check([call for each in wanted for call in each], tmp_path)


def test_rows_that_are_not_pairs_are_refused() -> None:
    call = calls(16, 1, "bfloat16")[0]
    call.shapes["table"] = (1, 7)
    assert KERNEL.accepts(call) == "7 rotated dims: pairs are rotated, an even number of dims"
