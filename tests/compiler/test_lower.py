"""Every call of every toy program finds a kernel; a call that finds none says why."""

from __future__ import annotations

import pytest
from toy_specs import FAMILIES, SHAPE, toy, toy_config

import kernels.cpu.register  # noqa: F401
from compiler.design import choose_buckets, design
from compiler.errors import CompileError
from compiler.fuse import fuse
from compiler.lower import lower
from compiler.model import build
from compiler.store import stored_weights, weight_formats
from runtime.artifact import Bucket

BUCKET = Bucket(name="t8", tokens=8, seqs=4, pages=4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["built", "fused"])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8g32", "int4g32"])
def test_every_call_is_lowered(family: str, stage: str, format: str) -> None:
    program = build(toy(family), SHAPE)
    if stage == "fused":
        program = fuse(program)
    matrices = {v.name for v in program.weights() if len(v.dims) == 2}
    parts = {part for name in matrices for part in program.values[name].parts or (name,)}
    weights = stored_weights(program, dict.fromkeys(parts, format), "cpu")
    nodes = lower(program, BUCKET, weight_formats(weights), "cpu")
    assert [node.kernel.op for node in nodes] == [call.op for call in program.calls]


def test_refusal_lists_kernels_and_reasons() -> None:
    program = fuse(build(toy("llama"), SHAPE))
    formats = {value.name: "float32" for value in program.weights()}
    formats["layers.0.qkv"] = "fp8"
    with pytest.raises(CompileError) as error:
        lower(program, BUCKET, formats, "cpu")
    text = str(error.value)
    assert "linear_rope_kv 0.q" in text
    assert "linear_rope_kv_f32:" in text and "linear_rope_kv_int4:" in text


def test_few_buckets_cover_one_token_to_the_largest_step() -> None:
    config = toy_config(toy("llama"))
    config.shape.max_seqs, config.shape.max_tokens, config.shape.context = 16, 100, 33
    buckets = choose_buckets(config)
    assert [(b.tokens, b.seqs, b.pages) for b in buckets] == [
        (1, 1, 3),
        (8, 8, 3),
        (16, 16, 3),
        (100, 16, 3),
    ]
    config.shape.max_tokens = 4
    assert [b.tokens for b in choose_buckets(config)] == [1, 4]


def test_a_weight_stored_in_two_forms_is_refused() -> None:
    program = fuse(build(toy("llama"), SHAPE))
    with pytest.raises(Exception, match=r"layers\.0\.qkv"):
        stored_weights(program, {"layers.0.q": "bfloat16"}, "cpu")


def test_design_of_a_group_that_does_not_divide() -> None:
    config = toy_config(toy("llama"), scheme="int8")
    config.quant.group_size = 128
    with pytest.raises(CompileError, match="group_size=128"):
        design(toy("llama"), config)
