"""Mistral 7B and NeMo: Llama with a sliding window on every layer unless the file says null."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import FULL, Parts, decoder_spec, layer_types
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    # Absent means the class default of 4096 (v0.1 files), null means none (v0.2 and later); 0 is
    # an old spelling of null.
    written = config.value("sliding_window", int, None)
    window = (written or None) if "sliding_window" in config else 4096
    types = layer_types(config)

    def window_of(layer: int) -> int | None:
        return None if types is not None and types[layer] == FULL else window

    return decoder_spec(config, Parts(name="mistral", window=window_of))


MISTRAL = register(
    Family(
        name="mistral",
        architectures=("MistralForCausalLM",),
        bases=("MistralModel",),
        spec=spec,
        names=llama_names,
        prefix="model.",
        defaults={"num_key_value_heads": 8},
    )
)
