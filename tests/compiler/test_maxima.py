"""Largest numbers of rows go from the call that makes rows to the one that quantizes them."""

from __future__ import annotations

import pytest
import torch
from toy_specs import FAMILIES, SHAPE, ragged_run, toy, weight_of

from compiler.fuse import fuse
from compiler.interpret import Chunk, greedy_step, new_state, run
from compiler.maxima import MAXIMA_TOKENS, bucket_program, hand_on_maxima, without_maxima
from compiler.model import build
from compiler.precision import linear_inputs
from compiler.program import Program, rewrite, verify
from compiler.quantize import register  # noqa: F401  (fills SCHEMES)
from compiler.quantize.scheme import storage_formats
from runtime.artifact import Bucket


def quantizing(family: str) -> Program:
    """As a GPU runs it with quant=fp8dq."""
    spec = toy(family)
    formats = storage_formats(spec, dtype="bfloat16", scheme="fp8dq", group=0, head=True)
    return verify(linear_inputs(fuse(build(spec, SHAPE)), formats, "fp8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_is_told_the_largest_numbers_of_its_rows(family: str) -> None:
    spec, plain = toy(family), quantizing(family)
    program = verify(hand_on_maxima(plain))
    told = [call for call in program.calls if "x_amax" in call.ins]
    made = {program.producer(call.ins["x"]).op for call in told}  # type: ignore[union-attr]
    assert made <= {"embed", "attention", "linear"}
    if family == "oss":  # experts between all the linears that quantize
        assert len(told) == 3
    names = {call.ins[arg] for call in told for arg in ("x", "x_amax")}
    chunks = [
        Chunk(tokens=[5, 90, 13, 2, 2, 40, 61], pages=[3, 1], slot=0),
        Chunk(tokens=[7, 7, 31] * 6, pages=[0, 5], slot=1, variant=1),
    ]
    inputs = greedy_step(chunks, 16, SHAPE.edits)
    weight = weight_of(program, spec)
    held = run(program, inputs, new_state(program, 8), weight, keep=names)
    for call in told:
        x, amax = held[call.ins["x"]], held[call.ins["x_amax"]]
        live = int(inputs["live"][2 if program.values[call.ins["x"]].dims[0] == "seqs" else 0])
        norm = weight(call.ins["norm"]).double() if "norm" in call.ins else torch.ones(1)
        wanted = (x.double() * norm).abs().amax(1)
        torch.testing.assert_close(amax.amax(1)[:live].double(), wanted[:live], rtol=1e-6, atol=0)
    ours, theirs = ragged_run(program, spec), ragged_run(plain, spec)
    assert all(torch.equal(a["logits"], b["logits"]) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma", "deepseek"])
def test_what_is_added_can_be_taken_out(family: str) -> None:
    plain = quantizing(family)
    told = hand_on_maxima(plain)
    assert told.calls != plain.calls and hand_on_maxima(told) == told
    assert without_maxima(told) == plain
    few, many = (Bucket(name="", tokens=MAXIMA_TOKENS + more, seqs=8, pages=4) for more in (0, 1))
    assert bucket_program(told, few) == told and bucket_program(told, many) == plain


def test_every_product_of_a_dense_decoder_is_told() -> None:
    for family in ("llama", "qwen3"):
        calls = hand_on_maxima(quantizing(family)).calls
        quantize = [call for call in calls if call.attrs.get("x_format")]
        assert len(quantize) == 9 and all("x_amax" in call.ins for call in quantize)


def test_two_readers_with_norms_of_their_own_find_the_maxima_themselves() -> None:
    program = quantizing("llama")
    gate_up = next(call for call in program.calls if call.attrs.get("act") == "swiglu")
    (producer,) = [c for c in program.calls if gate_up.ins["x"] in c.outs.values()]
    other = next(n for n in program.values if n.endswith("attn_norm") and "1" in n)
    calls = []
    for call in program.calls:
        calls.append(call)
        if call is producer:
            second = {**gate_up.ins, "norm": other}
            calls.append(
                type(call)(op="linear", ins=second, outs={"out": "extra"}, attrs=gate_up.attrs)
            )
    extra = program.values[gate_up.outs["out"]]
    value = type(extra)(name="extra", dtype=extra.dtype, dims=extra.dims, kind="output")
    told = hand_on_maxima(rewrite(program, calls, {"extra": value}))
    readers = [c for c in told.calls if c.ins.get("x") == gate_up.ins["x"]]
    assert len(readers) == 2 and not any("x_amax" in call.ins for call in readers)


def test_programs_that_do_not_quantize_stay_as_they_are() -> None:
    program = fuse(build(toy("llama"), SHAPE))
    assert hand_on_maxima(program) == program
