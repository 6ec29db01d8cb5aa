"""Every registered scheme against the definition of symmetric group quantization, computed here in
float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compiler.families.register
import compiler.quantize.register  # noqa: F401 - fills SCHEMES
from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError
from compiler.families.family import family_of
from compiler.families.names import logical_weights
from compiler.families.spec import ModelSpec
from compiler.quantize.scheme import (
    CHUNK,
    SCHEMES,
    GroupScheme,
    Scheme,
    dequantize,
    parse_format,
    storage_formats,
)
from conf.load import load
from conf.options import group_choices
from conf.schema import CompileConfig

GROUPS = (16, 32, 64, 128)
ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
INTEGERS = pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES.values() if isinstance(s, GroupScheme)], ids=lambda s: s.name
)


def weight(rows: int, columns: int) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    w[0] = 0  # a group without any size
    w[1, 0] = 40  # and one with an outlier
    return w


@INTEGERS
@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_definition(scheme: GroupScheme, group: int) -> None:
    w = weight(6, 256)
    codes, scale = scheme.quantize(w, group)
    assert codes.dtype == torch.int8 and codes.shape == w.shape
    assert scale.dtype == torch.float32 and scale.shape == (6, 256 // group)
    grouped = w.double().numpy().reshape(6, -1, group)
    expected = np.abs(grouped).max(-1) / ((scheme.high - scheme.low) / 2)
    np.testing.assert_allclose(scale[1:].numpy(), expected[1:], rtol=1e-6)
    exact = grouped / scale.double().numpy()[..., None]
    q = codes.numpy().reshape(exact.shape)
    assert q.min() >= scheme.low and q.max() <= scheme.high
    assert np.abs(q - np.clip(exact, scheme.low, scheme.high)).max() <= 0.5 + 1e-4
    assert not codes[0].any() and bool((scale[0] > 0).all())


@INTEGERS
def test_dequantize_is_within_half_a_step(scheme: GroupScheme) -> None:
    w = weight(8, 128).clamp(-2, 2)
    codes, scale = scheme.quantize(w, 32)
    step = scale.repeat_interleave(32, 1)
    # The largest positive value of an even range is clipped by half a step more.
    assert bool(((dequantize(codes, scale) - w).abs() <= step * 0.5001).all())


def test_fp8_rounds_to_the_nearest_code_of_a_scaled_row() -> None:
    """Against every finite e4m3 number, in float64."""
    w = weight(6, 64)
    w[1, 0] = 3
    fp8 = SCHEMES["fp8dq"]
    assert fp8.format(0) == SCHEMES["fp8"].format(0), "both schemes store the same weights"
    codes, scale = fp8.quantize(w, 0)
    assert codes.dtype == torch.uint8 and scale.shape == (6,) and scale.dtype == torch.float32
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    exact = w.double() / scale.double()[:, None]
    nearest = (exact[..., None] - numbers).abs().amin(-1)
    found = codes.view(torch.float8_e4m3fn).double()
    assert bool(((found - exact).abs() <= nearest + 1e-5).all())
    assert float(found.abs().amax()) == 448.0 and not found[0].any()
    stack, stack_scale = fp8.quantize(torch.stack((w, w * 2)), 0)
    assert torch.equal(stack[0], codes) and torch.equal(stack_scale[1, 1:], scale[1:] * 2)
    back = fp8.dequantize(codes, scale)
    assert bool(((back - w).abs() <= w.abs() / 15 + scale[:, None] * 2**-9).all())


@ALL
def test_chunks_and_input_dtype_change_nothing(scheme: Scheme) -> None:
    w = weight(3 * CHUNK // 4096 // 2, 4096).to(torch.bfloat16)
    codes, scale = scheme.quantize(w, 32)
    part, part_scale = scheme.quantize(w[-5:].float(), 32)
    assert torch.equal(codes[-5:], part) and torch.equal(scale[-5:], part_scale)


def spec_of(name: str) -> ModelSpec:
    values = load(CompileConfig, "compile", [f"model={name}"]).config.model.config
    reader = ConfigReader(values, name)
    return family_of(reader).read(reader)


def test_every_quant_choice_is_a_scheme_or_refused() -> None:
    assert set(group_choices("quant")) - {"none"} == SCHEMES.keys()


@ALL
def test_storage_formats(scheme: Scheme) -> None:
    for model, tied in (("qwen2-0.5b", True), ("qwen2-7b", False)):
        spec = spec_of(model)
        for head in (True, False):
            formats = storage_formats(
                spec, dtype="bfloat16", scheme=scheme.name, group=32, head=head
            )
            assert formats.keys() == logical_weights(spec).keys()
            assert formats["layers.3.down"] == scheme.format(32)
            assert formats["layers.3.q_bias"] == formats["final_norm"] == "float32"
            table = scheme.format(32) if head else "bfloat16"
            assert formats["embed"] == (table if tied else "bfloat16")
            assert formats.get("head") == (None if tied else table)
            for format in set(formats.values()) - {"float32", "bfloat16"}:
                found = parse_format(format)
                assert found is not None and found[1] == (32 if format.endswith("g32") else 0)
                assert found[0].format(32) == format == scheme.format(32)


def test_no_quantization_keeps_the_dtype() -> None:
    formats = storage_formats(
        spec_of("llama3-8b"), dtype="float32", scheme="none", group=32, head=True
    )
    assert set(formats.values()) == {"float32"}
    assert parse_format("float32") is None and parse_format("bfloat16") is None


def test_a_group_that_does_not_divide_names_both_numbers() -> None:
    with pytest.raises(CompileError, match=r"group_size=128 .* 576 inputs.*16, 32, 64"):
        storage_formats(
            spec_of("smollm-135m"), dtype="float32", scheme="int8", group=128, head=True
        )
