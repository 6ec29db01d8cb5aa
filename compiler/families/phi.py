"""Phi-1, 1.5 and 2: LayerNorm, parallel branches, biases everywhere, a plain ffn, partial rope."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKVO, Parts, context, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, named
from compiler.families.rope import rope_spec
from compiler.families.spec import LayerNorm, ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    config.require("hidden_act", ("gelu_new",), "gelu_new")  # the tanh form
    config.require("qk_layernorm", (False,), False)
    rope = rope_spec(config, head_dim(config), context(config), partial=0.5)
    return decoder_spec(
        config,
        Parts(
            name="phi",
            norm=LayerNorm(eps=config.number("layer_norm_eps", 1e-5), bias=True),
            placement="parallel",
            biases=QKVO,
            rope=lambda layer: rope,
            ffn="plain",
            ffn_bias=True,
            act="gelu_tanh",
            head_bias=True,
        ),
    )


MODULES = LLAMA_NAMES | {
    "o": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "final_norm": "model.final_layernorm",
}
PHI = register(
    Family(name="phi", architectures=("PhiForCausalLM",), spec=spec, names=named(MODULES))
)
