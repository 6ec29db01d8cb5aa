"""The table of families, the page that holds it, and the bytes of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

import kernels.cpu.register  # noqa: F401  (fills KERNELS)
from compiler.errors import CompileError
from compiler.families.__main__ import DEGREES, fit, main, written
from compiler.families.family import FAMILIES
from compiler.families.names import logical_weights
from compiler.families.table import named_shapes, read_shape, rows, text
from compiler.fuse import fuse
from compiler.lower import accepting, call_shape, label
from compiler.model import StepShape, build
from compiler.quantize.scheme import storage_formats
from compiler.ranks import rank_fit, rank_spec
from compiler.report import size
from compiler.store import stored_weights, weight_formats
from runtime.artifact import Bucket
from runtime.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs"
# Matrices whose columns are cut; of the others the rows are, or nothing is.
ROW_PARALLEL = ("o", "down", "experts_down", "shared_down")


def test_docs_are_current() -> None:
    page = (DOCS / "models.md").read_text()
    assert page == written(page), "run python -m compiler.families --write docs/models.md"


def test_every_family_has_a_row() -> None:
    table = rows()
    assert [row.cells[0] for row in table] == sorted(FAMILIES)
    assert sum(len(row.shapes) for row in table) == len(named_shapes())
    shown = text(table)
    assert "gemma2" in shown and "softcap 50" in shown and "LongRope" in shown


def test_bad_pages_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert main(["--write", str(page)]) == 2
    assert main(["--fit", "llama9"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "has no <!-- families -->" in errors[0] and "llama9: not a named shape" in errors[1]
    with pytest.raises(UsageError, match="to write between"):
        written("<!-- families -->\nopen")


def step_shape() -> StepShape:
    return StepShape(slots=1, edits=0, page_size=16, kv_dtype="bfloat16", context=64)


@pytest.mark.parametrize("name", named_shapes())
def test_ranks_together_hold_the_model(name: str) -> None:
    """At every degree that divides the heads: each weight is cut along one axis, or is on every
    rank."""
    _, spec = read_shape(name)
    for tp in DEGREES[1:]:
        try:
            part = rank_spec(spec, tp)
        except CompileError as error:
            assert "cut" in str(error)
            continue
        whole, mine = logical_weights(spec), logical_weights(part)
        assert whole.keys() == mine.keys()
        for weight, shape in whole.items():
            short, own = weight.rsplit(".", 1)[-1], mine[weight]
            changed = [axis for axis in range(len(shape)) if shape[axis] != own[axis]]
            assert len(changed) <= 1
            if not changed:
                continue
            if len(shape) > 1 and short in ROW_PARALLEL:
                assert changed == [len(shape) - 1]
            axis = changed[0]
            copies = own[axis] * tp / shape[axis]  # more than 1: padding, or kv heads repeated
            repeated = short in ("k", "v", "k_bias", "v_bias", "k_norm")
            assert 1 <= copies < 1.01 or (repeated and copies <= tp)


def test_fit_by_hand() -> None:
    """Llama 3 70B in bfloat16 on 8 ranks: 64 heads and 8 kv heads of 128, width 28672."""
    _, spec = read_shape("llama3-70b")
    formats = storage_formats(spec, dtype="bfloat16", scheme="none", group=64, head=False)
    layer = 8192 * (8 * 128 + 2 * 128) + 8 * 128 * 8192 + 3 * 8192 * 28672 // 8
    weights = 2 * (80 * layer + 2 * 128256 // 8 * 8192) + 4 * (2 * 80 + 1) * 8192
    found = rank_fit(spec, formats, step_shape(), 8)
    assert found == {"weights": weights, "kv_token": 80 * 2 * 128 * 2}
    assert f"tp 8  weights {size(weights)} per rank" in fit("llama3-70b", "bfloat16", "none", 64)


def test_fewer_kv_heads_than_ranks_are_repeated() -> None:
    _, spec = read_shape("chatglm3-6b")  # two kv heads
    tokens = [rank_fit(spec, {}, step_shape(), tp)["kv_token"] for tp in DEGREES]
    assert tokens == [tokens[0], tokens[0] // 2, tokens[0] // 2, tokens[0] // 2]


def test_what_cannot_be_cut_says_so() -> None:
    _, spec = read_shape("qwen2-7b")
    with pytest.raises(CompileError, match="28 heads cannot be cut into 8 equal parts"):
        rank_spec(spec, 8)
    _, spec = read_shape("llama3-8b")
    formats = storage_formats(spec, dtype="bfloat16", scheme="int8", group=256, head=False)
    with pytest.raises(CompileError, match="group_size=256 does not divide the 128 inputs"):
        rank_fit(spec, formats, step_shape(), 32)


@pytest.mark.parametrize("name", named_shapes())
def test_every_named_shape_has_kernels(name: str) -> None:
    """One layer of every kind, at the sizes of the real model."""
    _, spec = read_shape(name)
    spec = structs.replace(spec, layers=tuple(dict.fromkeys(spec.layers)))
    shape = StepShape(
        slots=8, edits=100, page_size=16, kv_dtype="bfloat16", context=min(spec.context, 8192)
    )
    program = fuse(build(spec, shape))
    formats = storage_formats(spec, dtype="bfloat16", scheme="none", group=64, head=False)
    stored = weight_formats(stored_weights(program, formats, "cpu"))
    bucket = Bucket(name="t64", tokens=64, seqs=8, pages=512)
    for call in program.calls:
        assert accepting(call_shape(program, call, bucket, stored), "cpu", label(call))
