"""Every call of every program finds a CUDA kernel with a valid default, in both kinds of bucket."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec import structs
from toy_specs import FAMILIES, SHAPES, toy, toy_config

from compiler import report
from compiler.design import draft, nodes_of
from compiler.families.spec import ModelSpec
from compiler.families.table import read_shape
from compiler.lower import Node
from compiler.maxima import MAXIMA_TOKENS
from compiler.quantize.scheme import SCHEMES
from conf.schema import CompileConfig
from kernels.cuda.kernel import CudaKernel
from runtime.artifact import Bucket

CHOICES = ("none", *sorted(SCHEMES))
DECODE = Bucket(name="d8", tokens=8, seqs=8, pages=512, kind="decode")
MIXED = Bucket(name="t512", tokens=512, seqs=8, pages=512)


def cuda_config(spec: ModelSpec, scheme: str) -> CompileConfig:
    config = toy_config(spec, scheme=scheme, dtype="bfloat16")
    config.target.kind, config.target.name, config.target.arch = "cuda", "h200", "sm_90a"
    config.kv.dtype = "bfloat16"
    return config


def lowered(spec: ModelSpec, config: CompileConfig, buckets: Sequence[Bucket]) -> list[Node]:
    base = draft(spec, config)
    found = [node for b in buckets for node in nodes_of(base.program, base.weights, b, "cuda")]
    assert len(found) == len(buckets) * len(base.program.calls)
    for node in found:
        assert isinstance(node.kernel, CudaKernel)
        assert node.kernel.valid(node.shape, node.config) is None, node.shape
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", CHOICES)
def test_every_toy_program(family: str, scheme: str) -> None:
    spec = toy(family)
    lowered(spec, cuda_config(spec, scheme), (DECODE, MIXED))


@pytest.mark.parametrize(("name", "mla"), SHAPES)
def test_every_named_shape(name: str, mla: str) -> None:
    """One layer of every kind, at the sizes of the real model."""
    _, spec = read_shape(name, mla)
    spec = structs.replace(spec, layers=tuple(dict.fromkeys(spec.layers)))
    for scheme in CHOICES:
        config = cuda_config(spec, scheme)
        config.shape.context = min(spec.context, 8192)
        lowered(spec, config, (DECODE, MIXED))


@pytest.mark.parametrize("name", ["llama3-8b", "llama3.2-1b", "qwen3-0.6b"])
@pytest.mark.parametrize("scheme", CHOICES)
def test_launches_of_a_decode_layer(name: str, scheme: str) -> None:
    """Five for a dense decoder layer, with quantized activations one more, however many
    sequences."""
    _, spec = read_shape(name)
    for seqs in (1, 8, 64, 128, 256):
        bucket = Bucket(name=f"d{seqs}", tokens=seqs, seqs=seqs, pages=512, kind="decode")
        counts = []
        for layers in (2, 3):
            cut = structs.replace(spec, layers=spec.layers[:layers])
            config = cuda_config(cut, scheme)
            config.shape.context = 8192
            counts.append(sum(len(node.launches) for node in lowered(cut, config, (bucket,))))
        quantized = int(scheme == "fp8dq")  # heads are turned and stored by a launch of their own
        assert counts[1] - counts[0] == 5 + quantized, seqs
        # Beside them edits, embedding, angles, head and two of sampling.
        assert counts[0] <= 2 * (5 + quantized) + 8, seqs


def test_codes_of_many_rows_are_made_first() -> None:
    """Up to the limit in the products, beyond it in launches in front of them."""
    _, spec = read_shape("llama3-8b")
    cut = structs.replace(spec, layers=spec.layers[:2])
    config = cuda_config(cut, "fp8dq")
    config.shape.context = 8192
    for tokens, first in ((MAXIMA_TOKENS, False), (MAXIMA_TOKENS + 64, True)):
        bucket = Bucket(name="t", tokens=tokens, seqs=64, pages=512)
        nodes = lowered(cut, config, (bucket,))
        inner = [n for n in nodes if n.shape.attrs.get("x_format") and len(n.shape.shapes) > 3]
        made = [any("rows_kernel" in str(x.source) for x in node.launches) for node in inner]
        assert len(made) == 9 and all(flag == first for flag in made[:-1])
        assert any("x_amax" in node.shape.shapes for node in nodes) != first


@pytest.mark.parametrize(("scheme", "part"), [("none", 0.0), ("fp8", 0.0), ("fp8dq", 0.5)])
def test_operations_on_fp8_numbers_are_predicted_at_their_own_rate(
    scheme: str, part: float
) -> None:
    _, spec = read_shape("llama3.2-1b")
    cut = structs.replace(spec, layers=spec.layers[:2])
    base = draft(cut, cuda_config(cut, scheme))
    nodes = nodes_of(base.program, base.weights, MIXED, "cuda")
    cost = report.step_cost(nodes, {weight.name: weight for weight in base.weights})
    assert (cost["flops_fp8"] > part * cost["flops"]) == (part > 0)
    seconds = report.predict(cost, 1e18, 1e12, 2e12)
    assert seconds == pytest.approx((cost["flops"] - cost["flops_fp8"] / 2) / 1e12)


@pytest.mark.parametrize("scheme", ["fp8", "fp8dq"])
def test_which_calls_quantize_their_inputs(scheme: str) -> None:
    """Linears of quantized weights, under fp8dq alone; never stacks, nor the router."""
    spec = toy("moe")
    for head in (True, False):
        config = cuda_config(spec, scheme)
        config.quant.head = head
        calls = draft(spec, config).program.calls
        quantized = {c.ins["w"] for c in calls if c.attrs.get("x_format") == "fp8"}
        linears = {c.ins["w"] for c in calls if c.op in ("linear", "linear_rope_kv")}
        assert any(c.op == "moe_gate_up" for c in calls)
        if scheme == "fp8":
            assert not quantized
            continue
        kept = {name for name in linears if "router" in name}
        kept |= set() if head else {"embed" if spec.tied else "head"}
        assert kept and quantized == linears - kept


def test_of_a_table_only_the_rows_looked_up_are_read() -> None:
    """The norm's weight that an embedding takes for its rows' maxima is read whole."""
    spec = toy("llama")
    base = draft(spec, cuda_config(spec, "fp8dq"))
    weights = {weight.name: weight for weight in base.weights}
    nodes = nodes_of(base.program, base.weights, DECODE, "cuda")
    (embed,) = [node for node in nodes if node.call.op == "embed"]
    table, norm = (weights[embed.call.ins[arg]] for arg in ("table", "amax_norm"))
    rows, tokens = embed.shape.shapes["table"][0], DECODE.tokens
    looked_up = report.stored_bytes(table) * tokens // rows + report.stored_bytes(norm)
    assert report.step_cost([embed], weights)["read"] == looked_up + 4 * tokens
