"""Small models for compiler tests: one spec per structural variant, random logical weights, and a
helper that runs any program on the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from msgspec import structs

from compiler.families.names import logical_weights
from compiler.families.spec import (
    Attention,
    GatedFfn,
    HeadSpec,
    LayerNorm,
    LayerSpec,
    LongRope,
    Mla,
    ModelSpec,
    MoeFfn,
    PlainFfn,
    QkNorm,
    RmsNorm,
    RopeSpec,
    Router,
    SharedExperts,
)
from compiler.families.table import named_shapes
from compiler.interpret import Chunk, greedy_step, new_state, run
from compiler.model import StepShape, constants
from compiler.program import Program
from conf.options import CONF
from conf.schema import CompileConfig

SHAPE = StepShape(slots=4, edits=70, page_size=16, kv_dtype="float32", context=64)
ROPE = RopeSpec(rotary_dim=16, inv_freq=tuple(10000.0 ** (-i / 8) for i in range(8)))
WIDE = RopeSpec(rotary_dim=8, inv_freq=(1.0, 0.5, 0.25, 0.125), scale=1.25, interleaved=True)


LONG = RopeSpec(
    rotary_dim=16,
    inv_freq=ROPE.inv_freq,
    by_length=LongRope(original=32, long_freq=tuple(f / 3 for f in ROPE.inv_freq)),
)
EXTRAS = {
    "gemma": {"softcap": 2.0},
    "phi": {"biases": ("q", "k", "v", "o"), "alibi": (0.5, 0.25, 0.125, 0.0625), "rope": None},
    "cohere": {"qk_norm": QkNorm(norm=LayerNorm(eps=1e-5), over="heads"), "clip": 0.7},
    "sinks": {"sinks": True, "rope": LONG, "logn": 9},
    "olmo": {"qk_norm": QkNorm(norm=RmsNorm(eps=1e-6), over="row")},
}
# Mixtures: gated shared experts; groups, a correction and shared experts; gpt-oss.
MOE = {
    "moe": MoeFfn(
        experts=6,
        top_k=2,
        width=32,
        router=Router(score="softmax"),
        shared=SharedExperts(width=64, gated=True),
    ),
    "deepseek": MoeFfn(
        experts=8,
        top_k=3,
        width=32,
        router=Router(
            score="sigmoid",
            renormalise=True,
            scale=2.5,
            correction=True,
            groups=4,
            kept_groups=2,
            group_best=2,
        ),
        shared=SharedExperts(width=64),
    ),
    "oss": MoeFfn(
        experts=4,
        top_k=2,
        width=32,
        router=Router(score="chosen", bias=True),
        act="silu_clamped",
        bias=True,
    ),
}
PLACEMENTS = {"gemma": "sandwich", "phi": "parallel", "cohere": "parallel"}


def toy(family: str, layers: int = 2, tied: bool = True) -> ModelSpec:
    """`llama`, `mistral` (window, two ropes), `qwen2` (biases), `qwen3` (head norms), `norope`;
    `moe` and `deepseek` (a dense layer, then experts; the latter with latent attention, with and
    without a latent of queries), `expanded` (latent attention in its plain form), `oss` (experts
    with biases);
    `gemma` (sandwich norms, softcaps, scales), `phi` (parallel, LayerNorm, plain ffn, alibi, head
    bias), `cohere` (LayerNorm per head, clip), `sinks` (rope by length), `olmo` (row norm)."""
    norm: RmsNorm | LayerNorm = RmsNorm(eps=1e-5)
    ffn: GatedFfn | PlainFfn | MoeFfn = GatedFfn(width=96, bias=family == "qwen2")
    if family in ("phi", "cohere"):
        norm = LayerNorm(eps=1e-5, bias=family == "phi")
    if family == "phi":
        ffn = PlainFfn(width=96, act="gelu_tanh", bias=True)
    if family == "gemma":
        ffn = GatedFfn(width=96, act="gelu_tanh")

    def layer(index: int) -> LayerSpec:
        rope = {"norope": None, "mistral": (ROPE, WIDE)[index % 2]}.get(family, ROPE)
        mixer = Attention(
            heads=4,
            kv_heads=2,
            head_dim=16,
            rope=rope,
            scale=0.25,
            biases=("q", "k", "v", "o") if family == "qwen2" else (),
            qk_norm=QkNorm(norm=norm) if family == "qwen3" else None,
            window=5 if family == "mistral" else None,
        )
        latent = Mla(
            heads=4,
            latent=32,
            nope=32,
            value=16,
            rope=ROPE if family == "expanded" else WIDE,
            scale=0.2,
            norm=RmsNorm(eps=1e-6),
            q_latent=32 if index == 0 else None,
            bias=index == 0,
            form="plain" if family == "expanded" else "absorbed",
        )
        dense = family == "moe" and index == 0
        return LayerSpec(
            mixer=latent
            if family in ("deepseek", "expanded")
            else structs.replace(mixer, **EXTRAS.get(family, {})),
            ffn=ffn if dense else MOE.get(family, ffn),
            norm=norm,
            placement=PLACEMENTS.get(family, "pre"),
            residual_scale=0.4 if family in ("sinks", "moe") else 1.0,
        )

    return ModelSpec(
        family=family,
        dim=64,
        vocab=97,
        context=64,
        layers=tuple(layer(i) for i in range(layers)),
        final_norm=norm,
        head=HeadSpec(
            tied=tied,
            bias=family == "phi",
            scale=0.3 if family in ("cohere", "gemma") else 1.0,
            softcap=2.5 if family == "gemma" else None,
        ),
        embed_scale=8.0 if family == "gemma" else 1.0,
    )


PLAIN = ("llama", "mistral", "qwen2", "qwen3", "norope")
FAMILIES = (*PLAIN, "gemma", "phi", "cohere", "sinks", "olmo", "expanded", *MOE)


# Every named shape, those with latent attention in each of its forms: (name, form).
SHAPES = [
    pytest.param(name, form, id=f"{name}-{form}")
    for name in named_shapes()
    for form in (
        ("auto", "plain")
        if "kv_lora_rank" in (CONF / f"model/{name}.yaml").read_text()
        else ("auto",)
    )
]


def toy_config(spec: ModelSpec, scheme: str = "none", dtype: str = "float32") -> CompileConfig:
    config = CompileConfig(name="toy", dtype=dtype)
    config.quant.scheme, config.kv.dtype = scheme, "float32"
    config.target.name = config.target.kind = "cpu"
    config.shape.context, config.shape.max_seqs, config.shape.max_tokens = spec.context, 4, 24
    return config


def weight_of(program: Program, spec: ModelSpec) -> Callable[[str], torch.Tensor]:
    """Any weight of the program: constants, seeded logical weights, and concatenations of them."""
    fixed = {
        name: torch.from_numpy(value) for name, value in constants(spec, SHAPE.context).items()
    }
    logical = {}
    for index, (name, shape) in enumerate(logical_weights(spec).items()):
        g = torch.Generator().manual_seed(index)
        logical[name] = torch.randn(*shape, generator=g) * (0.3 if len(shape) == 1 else 0.12)
        if name.endswith("norm"):
            logical[name] += 1

    def weight(name: str) -> torch.Tensor:
        if name in fixed:
            return fixed[name]
        parts = program.values[name].parts or (name,)
        return torch.cat([logical[part] for part in parts])

    return weight


def ragged_run(program: Program, spec: ModelSpec) -> list[dict[str, torch.Tensor]]:
    """A prefill of two sequences, then a step that mixes a decode row and a prefill chunk."""
    state = new_state(program, 8)
    weight = weight_of(program, spec)
    steps: list[Sequence[Chunk]] = [
        [
            Chunk(tokens=[5, 90, 13, 2, 2, 40, 61], pages=[3, 1], slot=0),
            Chunk(tokens=[7, 7, 31] * 6, pages=[0, 5], slot=1, variant=1),
        ],
        [
            Chunk(tokens=[-1], pages=[3, 1], before=7, slot=0),
            Chunk(tokens=[8, 9, 10, 11], pages=[0, 5], before=18, slot=1, variant=1),
        ],
    ]
    return [
        run(program, greedy_step(chunks, 16, SHAPE.edits), state, weight, keep=("logits",))
        for chunks in steps
    ]
