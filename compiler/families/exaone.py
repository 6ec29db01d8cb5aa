"""EXAONE 3.0 and 3.5: Llama under other names."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.names import named
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, Parts(name="exaone"))


MODULES = {
    "embed": "transformer.wte",
    "layer": "transformer.h.{i}",
    "attn_norm": "ln_1",
    **{n: f"attn.attention.{n}_proj" for n in "qkv"},
    "o": "attn.attention.out_proj",
    "ffn_norm": "ln_2",
    "gate": "mlp.c_fc_0",
    "up": "mlp.c_fc_1",
    "down": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
EXAONE = register(
    Family(
        name="exaone",
        architectures=("ExaoneForCausalLM",),
        spec=spec,
        names=named(MODULES),
        unused=(r".*\.rotary\.inv_freq", r".*\.rotary_emb\.inv_freq"),
        spelling={
            "num_layers": "num_hidden_layers",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        defaults={"tie_word_embeddings": True},
        ignored="embed_dropout",
    )
)
