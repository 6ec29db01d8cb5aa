"""MiniCPM 3: a dense decoder with latent attention and MiniCPM's scales."""

from __future__ import annotations

from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.families.deepseek import LATENT_NAMES, LATENT_PACKING, latent_decoder
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, named
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    plain = latent_decoder(config, "minicpm3", interleaved=False)
    branch = config.number("scale_depth", 1.4) / len(plain.layers) ** 0.5
    logits = config.number("dim_model_base", 256.0) / plain.dim
    return structs.replace(
        plain,
        layers=tuple(structs.replace(layer, residual_scale=branch) for layer in plain.layers),
        embed_scale=config.number("scale_emb", 12.0),
        head=structs.replace(plain.head, scale=logits),
    )


MINICPM3 = register(
    Family(
        name="minicpm3",
        architectures=("MiniCPM3ForCausalLM",),
        spec=spec,
        names=named(LLAMA_NAMES | LATENT_NAMES, LATENT_PACKING),
        defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    )
)
