"""Small models for compiler tests: one spec per structural variant, random logical weights, and a
helper that runs any program on the reference interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    ModelSpec,
    PlainFfn,
    QkNorm,
    RmsNorm,
    RopeSpec,
)
from compiler.interpret import Chunk, greedy_step, new_state, run
from compiler.model import StepShape, constants
from compiler.program import Program
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
PLACEMENTS = {"gemma": "sandwich", "phi": "parallel", "cohere": "parallel"}


def toy(family: str, layers: int = 2, tied: bool = True) -> ModelSpec:
    """`llama`, `mistral` (window, two ropes), `qwen2` (biases), `qwen3` (head norms), `norope`;
    `gemma` (sandwich norms, softcaps, scales), `phi` (parallel, LayerNorm, plain ffn, alibi, head
    bias), `cohere` (LayerNorm per head, clip), `sinks` (rope by length), `olmo` (row norm)."""
    norm: RmsNorm | LayerNorm = RmsNorm(eps=1e-5)
    ffn: GatedFfn | PlainFfn = GatedFfn(width=96, bias=family == "qwen2")
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
        return LayerSpec(
            mixer=structs.replace(mixer, **EXTRAS.get(family, {})),
            ffn=ffn,
            norm=norm,
            placement=PLACEMENTS.get(family, "pre"),
            residual_scale=0.4 if family == "sinks" else 1.0,
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
FAMILIES = (*PLAIN, "gemma", "phi", "cohere", "sinks", "olmo")


def toy_config(spec: ModelSpec, scheme: str = "none", dtype: str = "float32") -> CompileConfig:
    config = CompileConfig(name="toy", dtype=dtype)
    config.quant.scheme, config.kv.dtype = scheme, "float32"
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
