"""Every fusion rule alone, every subset and any order give the results of the unfused program."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_specs import FAMILIES, PLAIN, SHAPE, ragged_run, toy

from compiler.fuse import RULES, fuse, merge_qkv, norm_into_linear, residual_into_linear
from compiler.model import build
from compiler.program import Program, verify

EXPECTED: dict[str, list[dict[str, torch.Tensor]]] = {}


def same_results(program: Program, family: str) -> None:
    spec = toy(family)
    if family not in EXPECTED:
        EXPECTED[family] = ragged_run(build(spec, SHAPE), spec)
    for found, expected in zip(ragged_run(verify(program), spec), EXPECTED[family], strict=True):
        rows = 2
        torch.testing.assert_close(
            found["logits"][:rows], expected["logits"][:rows], rtol=1e-5, atol=1e-5
        )
        assert torch.equal(found["token"][:rows], expected["token"][:rows])


def applies(rule: str, family: str) -> bool:
    """Whether there is something to do for a rule."""
    layer_norms = family in ("phi", "cohere")
    return {
        # a norm over all heads stands between; latents have their own calls
        "merge_qkv": family not in ("olmo", "deepseek", "expanded"),
        "merge_gated": family not in ("phi", "oss"),
        "activation_into_linear": family == "phi",
        "norm_into_linear": not layer_norms,
        "residual_into_norm": family == "gemma",
        "residual_into_combine": family in ("moe", "deepseek", "oss"),
        "residual_into_linear": family != "gemma",
        "only_chosen_rows": False,  # nothing before the others
        "linear_into_rope_kv": False,
    }.get(rule, True)


# Rules that have something to do in a plain decoder, alone or after others.
NEVER = ("activation_into_linear", "residual_into_norm", "residual_into_combine")
PLAIN_RULES = [i for i, rule in enumerate(RULES) if rule.__name__ not in NEVER]
SUBSETS = [s for n in range(1, len(PLAIN_RULES) + 1) for s in combinations(PLAIN_RULES, n)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_alone(rule, family: str) -> None:
    program = build(toy(family), SHAPE)
    fused = rule(program)
    assert (len(fused.calls) < len(program.calls)) == applies(rule.__name__, family)
    same_results(fused, family)


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_every_subset(subset: tuple[int, ...]) -> None:
    program = build(toy("qwen3"), SHAPE)
    for index in subset:
        program = RULES[index](program)
    same_results(program, "qwen3")


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(len(RULES))), st.sampled_from(FAMILIES))
def test_any_order(order: list[int], family: str) -> None:
    program = build(toy(family), SHAPE)
    for index in order:
        program = RULES[index](program)
    same_results(program, family)


@pytest.mark.parametrize("family", PLAIN)
def test_a_fused_layer_is_five_calls(family: str) -> None:
    one, two = (fuse(build(toy(family, layers=n), SHAPE)) for n in (1, 2))
    tables = {"mistral": 1}.get(family, 0)  # the second layer brings its own rope
    assert len(two.calls) - len(one.calls) == 5 + tables
    assert fuse(two).calls == two.calls


@pytest.mark.parametrize("family", FAMILIES)
def test_what_has_one_projection_goes_into_the_cache_with_it(family: str) -> None:
    ops = [call.op for call in fuse(build(toy(family), SHAPE)).calls]
    before = [call.op for call in merge_qkv(build(toy(family), SHAPE)).calls]
    assert ops.count("linear_rope_kv") == before.count("rope_kv")
    assert "rope_kv" not in ops


def test_a_value_with_two_readers_is_not_swallowed() -> None:
    """norm feeds a linear and something else: the rule must leave it alone."""
    program = build(toy("llama", layers=1), SHAPE)
    names = {call.op for call in norm_into_linear(residual_into_linear(program)).calls}
    assert "rms_norm" in names  # the final norm is read by gather


# Of gemma norms stand behind the branches and read the residual; olmo is the same without one.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma", "olmo")])
def test_behind_the_last_attention_only_logit_rows_are_computed(family: str) -> None:
    program = fuse(build(toy(family), SHAPE))
    attention = ("attention", "mla_attention")
    last = max(i for i, call in enumerate(program.calls) if call.op in attention)
    late = program.calls[last + 1 :]
    # The values of latent attention come out per head, and where experts start is of no row.
    late = [call for call in late if call.op != "head_linear"]
    made = {name for call in late for arg, name in call.outs.items() if arg != "starts"}
    assert {program.values[name].dims[0] for name in made} == {"seqs"}
    assert not any(call.op == "gather" for call in late)
