"""Llama 1-3.3, TinyLlama, SmolLM 1/2, Yi, DeepSeek-LLM: one class, told apart by sizes, rope and
tying.
"""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import FULL, QKVO, Parts, decoder_spec, layer_types
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)  # covers q, k, v and o
    config.require("rope_interleaved", (False,), False)
    config.require("layer_types", (None, [FULL] * config.integer("num_hidden_layers")), None)
    layer_types(config)
    return decoder_spec(
        config,
        Parts(
            name="llama",
            biases=QKVO if bias else (),
            ffn_bias=config.flag("mlp_bias", False),
        ),
    )


LLAMA = register(
    Family(name="llama", architectures=("LlamaForCausalLM",), spec=spec, names=llama_names)
)
