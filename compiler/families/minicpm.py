"""MiniCPM 1 and 2: Llama with scaled embeddings, branches and logits."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    config.require("attention_bias", (False,), False)
    depth = config.integer("num_hidden_layers")
    dim, base = config.integer("hidden_size"), config.number("dim_model_base", 1.0)
    return decoder_spec(
        config,
        Parts(
            name="minicpm",
            embed_scale=config.number("scale_emb", 1.0),
            residual_scale=config.number("scale_depth", 1.0) / depth**0.5,
            head_scale=base / dim,
        ),
    )


MINICPM = register(
    Family(
        name="minicpm",
        architectures=("MiniCPMForCausalLM",),
        spec=spec,
        names=llama_names,
        defaults={"tie_word_embeddings": True},
    )
)
