"""InternLM 2 and 2.5: Llama with q, k, v packed by kv head, and dynamic NTK rope."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKVO, Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.names import Source, named
from compiler.families.spec import Attention, ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    biases = QKVO if config.flag("bias", False) else ()
    return decoder_spec(config, Parts(name="internlm2", biases=biases))


def by_kv_head(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    """Rows of wqkv: for every kv head its query heads, then the key, then the value."""
    base = part.removesuffix("_bias")
    if base not in ("q", "k", "v"):
        return None
    a = spec.layers[layer].mixer
    assert isinstance(a, Attention)
    group = a.heads // a.kv_heads
    places = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}
    kind, tail = ("weight", (spec.dim,)) if base == part else ("bias", ())
    view = (a.kv_heads, group + 2, a.head_dim, *tail)
    return (Source(tensor=f"attention.wqkv.{kind}", view=view, part=places[base]),)


MODULES = {
    "embed": "model.tok_embeddings",
    "layer": "model.layers.{i}",
    "attn_norm": "attention_norm",
    "o": "attention.wo",
    "ffn_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
    "final_norm": "model.norm",
    "head": "output",
}
INTERNLM2 = register(
    Family(
        name="internlm2",
        architectures=("InternLM2ForCausalLM",),
        spec=spec,
        names=named(MODULES, by_kv_head),
        ignored="attn_implementation",
    )
)
