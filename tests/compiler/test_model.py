"""Programs of every structural variant, against golden printouts before and after fusion.

`pytest tests/compiler/test_model.py --golden` rewrites the printouts; look at the diff.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_specs import FAMILIES, ROPE, SHAPE, WIDE, toy

from compiler.errors import CompileError
from compiler.families.names import logical_weights
from compiler.fuse import fuse
from compiler.model import build, constants, page_bytes
from compiler.program import render

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", ["built", "fused"])
def test_printout(family: str, stage: str, request: pytest.FixtureRequest) -> None:
    program = build(toy(family, tied=family != "mistral"), SHAPE)
    text = render(program if stage == "built" else fuse(program))
    golden = GOLDEN / f"{family}.{stage}.txt"
    if request.config.getoption("--golden", default=False):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_program_reads_exactly_the_logical_weights(family: str) -> None:
    spec = toy(family, tied=False)
    names = {value.name for value in build(spec, SHAPE).weights()}
    assert names == {*logical_weights(spec), *constants(spec, SHAPE.context)}


def test_weights_come_in_load_order() -> None:
    spec = toy("qwen2")
    order = [v.name for v in build(spec, SHAPE).weights() if v.name in logical_weights(spec)]
    assert order[0] == "embed"
    assert [n.split(".")[1] for n in order if n.startswith("layers")] == sorted(
        n.split(".")[1] for n in order if n.startswith("layers")
    )


def test_constants_are_the_distinct_frequencies() -> None:
    fixed = constants(toy("mistral"), 64)
    assert np.array_equal(fixed["rope.0.inv_freq"], np.float32(ROPE.inv_freq))
    assert np.array_equal(fixed["rope.1.inv_freq"], np.float32(WIDE.inv_freq))
    assert len(fixed) == 2 and not constants(toy("norope"), 64)


def test_layers_do_not_overlap_in_a_page() -> None:
    spec = toy("llama", layers=3)
    calls = [call for call in build(spec, SHAPE).calls if call.op == "kv_write"]
    size = 2 * 2 * 16 * 16 * 4
    assert [call.attrs["layer_offset"] for call in calls] == [0, size, 2 * size]
    assert {call.attrs["page_bytes"] for call in calls} == {3 * size} == {page_bytes(spec, SHAPE)}


def test_unsupported_parts_are_refused() -> None:
    spec = toy("llama", layers=1)
    with pytest.raises(CompileError, match=r"int8.*fp8_e4m3"):
        build(spec, replace(SHAPE, kv_dtype="int8"))
