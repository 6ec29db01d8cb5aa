"""The table of families, the page that holds it, and the bytes of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs
from toy_specs import FAMILIES as TOYS
from toy_specs import SHAPES, toy, toy_config

import kernels.cpu.register  # noqa: F401  (fills KERNELS)
from compiler import report
from compiler.design import design
from compiler.errors import CompileError
from compiler.families.__main__ import DEGREES, fit, main, written
from compiler.families.family import FAMILIES
from compiler.families.names import logical_weights
from compiler.families.spec import ModelSpec
from compiler.families.table import named_shapes, read_shape, rows, text
from compiler.fuse import fuse
from compiler.inspect import inputs
from compiler.lower import accepting, call_shape, label
from compiler.model import StepShape, build
from compiler.quantize.scheme import storage_formats
from compiler.ranks import rank_fit, rank_spec
from compiler.store import stored_weights, weight_formats
from conf.schema import CompileConfig
from runtime.artifact import Artifact, Bucket
from runtime.device.staging import arena_sizes
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
    assert main(["--fit", "llama3-8b", "quant=int9"]) == 2
    assert main(["quant=int8"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "has no <!-- families -->" in errors[0] and "llama9: not a named shape" in errors[1]
    assert "quant=int9" in errors[2] and "belong to --fit MODEL" in errors[3]
    with pytest.raises(UsageError, match="to write between"):
        written("<!-- families -->\nopen")


def config_for(spec: ModelSpec, scheme: str = "none", group: int = 64) -> CompileConfig:
    """A CPU compile of short sequences, 512 tokens and 64 sequences a step."""
    config = toy_config(spec, scheme, "bfloat16")
    config.quant.group_size, config.quant.head, config.kv.dtype = group, False, "bfloat16"
    config.shape.context, config.shape.max_seqs, config.shape.max_tokens = 64, 64, 512
    return config


@pytest.mark.parametrize(("name", "mla"), SHAPES)
def test_ranks_together_hold_the_model(name: str, mla: str) -> None:
    """At every degree that divides the heads: each weight is cut along one axis, or is on every
    rank."""
    _, spec = read_shape(name, mla)
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


@pytest.mark.parametrize("family", TOYS)
def test_one_rank_is_the_whole_model(family: str) -> None:
    spec = toy(family)
    made = design(spec, toy_config(spec))
    figures = report.fit(made.weights_bytes, made.state, made.work_bytes, made.io_bytes)
    assert rank_fit(spec, toy_config(spec), 1) == figures


def test_one_rank_is_the_artifact(tiny_artifact: Path) -> None:
    manifest = Artifact.open(tiny_artifact).manifest
    spec, config, in_bfloat16 = inputs(manifest)
    figures = rank_fit(spec, config, 1, in_bfloat16)
    assert figures == manifest.report["fit"]
    weights, state, work, io = arena_sizes(manifest, 3)
    assert (figures["weights"], figures["work"]) == (weights, work)
    assert figures["token_state"] + 3 * figures["kv_page"] == state
    assert figures["io"] <= io


@pytest.mark.parametrize("seqs", [64, 256])
def test_fit_by_hand(seqs: int) -> None:
    """Four layers of Llama 3 70B in bfloat16 on 8 ranks: 64 heads and 8 kv heads of 128, width
    28672. The work arena is full in the down projection, or (of 256 sequences) where the logits are
    gathered."""
    _, spec = read_shape("llama3-70b")
    spec = structs.replace(spec, layers=spec.layers[:4])
    config = config_for(spec)
    config.shape.max_seqs = seqs
    dim, width, vocab, tokens = 8192, 28672 // 8, 128256, 512
    layer = dim * (8 * 128 + 2 * 128) + 8 * 128 * dim + 3 * dim * width
    frequencies = 4096  # 64 numbers, and what is left of their page
    weights = 2 * (4 * layer + 2 * vocab // 8 * dim) + 4 * (2 * 4 + 1) * dim + frequencies
    # Residual, the narrow input, the same as the kernel's copy, the angles of a step; and the
    # result, in the place of the largest block there is: the QKV projection's scratch, which is
    # its product and the kernel's copy of its input.
    largest = dim + (8 + 2) * 128
    down = tokens * 4 * (dim + 2 * width + 128 + largest)
    # The last hidden rows, the kernel's copy of them, own logits, all logits.
    head = seqs * 4 * (2 * dim + vocab // 8 + vocab)
    found = rank_fit(spec, config, 8)
    state = -(-(seqs * 4 * (1 + 2 * vocab)) // 4096) * 4096
    assert (found["weights"], found["token_state"]) == (weights, state)
    assert (found["work"], found["kv_token"]) == (max(down, head), 4 * 2 * 128 * 2)


@pytest.mark.parametrize("tp", DEGREES)
def test_keys_and_values_of_latent_attention_by_hand(tp: int) -> None:
    """Two layers of DeepSeek-V2-Lite: 16 heads with keys of 128 + 64 and values of 128, a latent of
    512. Latents are on every rank, expanded keys and values with their heads."""
    for form, width in (("absorbed", 512 + 64), ("plain", 16 // tp * (192 + 128))):
        _, spec = read_shape("deepseek-v2-lite", form)
        spec = structs.replace(spec, layers=spec.layers[:2])
        assert rank_fit(spec, config_for(spec), tp)["kv_token"] == 2 * width * 2


def test_a_fit_takes_the_form_of_latent_attention(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("target=cpu", "shape.context=64", "model.mla=plain")
    first = fit("deepseek-v2-lite", options).splitlines()[1]
    assert f"{report.size(27 * 16 * (192 + 128) * 2)}/token of context" in first
    assert main(["--fit", "llama3-8b", "model.mla=plain"]) == 2
    assert capsys.readouterr().err == (
        "error: model.mla=plain: model=llama3-8b has no latent attention to choose a form of; "
        "leave it out\n"
    )


def test_fewer_kv_heads_than_ranks_are_repeated() -> None:
    _, spec = read_shape("chatglm3-6b")  # two kv heads
    tokens = [rank_fit(spec, config_for(spec), tp)["kv_token"] for tp in DEGREES]
    assert tokens == [tokens[0], tokens[0] // 2, tokens[0] // 2, tokens[0] // 2]


def test_what_cannot_be_cut_says_so() -> None:
    _, spec = read_shape("qwen2-7b")
    with pytest.raises(CompileError, match="28 heads cannot be cut into 8 equal parts"):
        rank_spec(spec, 8)
    options = ("target=cpu", "shape.context=64")
    lines = fit("qwen2-0.5b", options).splitlines()
    _, small = read_shape("qwen2-0.5b")
    assert lines[2] == f"tp 2  {report.arenas(rank_fit(small, config_for(small), 2))}"
    assert lines[3] == "tp 4  14 heads cannot be cut into 4 equal parts; use fewer ranks"
    _, spec = read_shape("llama3-8b")
    with pytest.raises(CompileError, match="group_size=256 does not divide the 128 inputs"):
        rank_fit(spec, config_for(spec, "int8", 256), 32)


@pytest.mark.parametrize(("name", "mla"), SHAPES)
def test_every_named_shape_has_kernels(name: str, mla: str) -> None:
    """One layer of every kind, at the sizes of the real model."""
    _, spec = read_shape(name, mla)
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
