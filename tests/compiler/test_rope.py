"""Rope by length against its formulas; slopes and factors that families compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec import structs
from toy_specs import LONG, ROPE, toy

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError
from compiler.families.by_length import frequencies, length_rule, variants
from compiler.families.decoder import alibi_slopes, rounded_to_dtype
from compiler.families.spec import DynamicNtk, ModelSpec, QwenNtk, RopeSpec
from runtime.artifact import LengthRule


def with_rope(rope: RopeSpec) -> ModelSpec:
    spec = toy("llama", layers=1)
    (layer,) = spec.layers
    mixer = structs.replace(layer.mixer, rope=rope)
    return structs.replace(spec, layers=(structs.replace(layer, mixer=mixer),))


def test_within_the_original_length_there_is_one_row() -> None:
    rope = structs.replace(ROPE, by_length=DynamicNtk(theta=1e4, factor=2.0, original=64))
    assert variants(rope, 64) == 1 and variants(LONG, 32) == 1 and variants(LONG, 33) == 2
    assert length_rule(with_rope(rope), 64) is None
    assert length_rule(with_rope(ROPE), 10**6) is None


def test_dynamic_rows_are_one_per_length() -> None:
    rope = structs.replace(ROPE, by_length=DynamicNtk(theta=1e4, factor=2.0, original=64))
    rule = length_rule(with_rope(rope), 100)
    assert rule == LengthRule(of="token", bounds=(64,))
    table = frequencies(rope, 100)
    assert table.shape == (37, 8) == (variants(rope, 100), 8)
    for n in (64, 65, 100):
        base = 1e4 * (2 * max(n, 64) / 64 - 1) ** (16 / 14)
        want = [base ** (-2 * i / 16) for i in range(8)]
        np.testing.assert_allclose(table[rule.row(n)], want, rtol=1e-6)
    assert rule.row(3) == 0 and rule.last(70) is None


def test_qwen_rows_follow_the_prompt() -> None:
    rope = structs.replace(ROPE, by_length=QwenNtk(theta=1e4, original=16))
    rule = length_rule(with_rope(rope), 100)
    assert rule == LengthRule(of="prompt", bounds=(16, 32, 64))
    table = frequencies(rope, 100)
    for n in (1, 16, 17, 32, 33, 64, 65, 100):
        alpha = max(2 ** math.ceil(math.log2(n / 16) + 1) - 1, 1)
        base = 1e4 * alpha ** (16 / 14)
        want = [base ** (-2 * i / 16) for i in range(8)]
        np.testing.assert_allclose(table[rule.row(n)], want, rtol=1e-6)
    assert variants(rope, 64) == 3 and variants(rope, 65) == 4


def test_longrope_is_of_the_whole_sequence() -> None:
    rule = length_rule(with_rope(LONG), 64)
    assert rule == LengthRule(of="sequence", bounds=(32,))
    assert [rule.row(n) for n in (1, 32, 33, 64)] == [0, 0, 1, 1]
    assert [rule.last(n) for n in (1, 32, 33)] == [32, 32, None]


def test_two_rules_in_one_model_are_refused() -> None:
    spec = toy("llama")
    other = structs.replace(ROPE, by_length=QwenNtk(theta=1e4, original=16))
    layers = [
        structs.replace(layer, mixer=structs.replace(layer.mixer, rope=rope))
        for layer, rope in zip(spec.layers, (LONG, other), strict=True)
    ]
    with pytest.raises(CompileError, match="2 different rules"):
        length_rule(structs.replace(spec, layers=tuple(layers)), 64)


def test_alibi_slopes() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    forty = alibi_slopes(40)  # 32 of its own, then every second of 64
    assert len(forty) == 40 and forty[31] == 2**-8 and forty[32] == 2 ** (-8 / 64)


def test_embedding_scale_has_the_dtype_of_the_weights() -> None:
    scale = math.sqrt(3072)
    config = ConfigReader({"torch_dtype": "bfloat16"}, "c")
    assert rounded_to_dtype(config, scale) == 55.5
    assert rounded_to_dtype(ConfigReader({}, "c"), scale) == pytest.approx(scale, rel=1e-7)
