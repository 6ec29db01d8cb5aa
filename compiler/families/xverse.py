"""XVERSE dense: Llama under its own name."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, Parts(name="xverse"))


XVERSE = register(
    Family(
        name="xverse",
        architectures=("XverseForCausalLM",),
        spec=spec,
        names=llama_names,
        ignored="max_tokenizer_truncation",
    )
)
