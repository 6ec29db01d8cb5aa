"""SmolLM3: Llama without rope on every fourth layer."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.decoder import (
    FULL,
    QKVO,
    Parts,
    context,
    decoder_spec,
    head_dim,
    layer_types,
)
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.rope import rope_spec
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    count, interval = (
        config.integer("num_hidden_layers"),
        config.integer("no_rope_layer_interval", 4),
    )
    turns = config.value(
        "no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(count)]
    )
    if len(turns) != count or not set(turns) <= {0, 1}:
        raise DamagedCheckpoint(
            f"{config.where}: no_rope_layers has {len(turns)} entries, expected {count} of 0 or 1"
        )
    window = config.value("sliding_window", int, None)
    window = window if config.flag("use_sliding_window", False) else None
    types = layer_types(config)
    rope = rope_spec(config, head_dim(config), context(config), theta=2e6)

    def window_of(layer: int) -> int | None:
        full = bool(turns[layer]) if types is None else types[layer] == FULL
        return None if full else window

    return decoder_spec(
        config,
        Parts(
            name="smollm3",
            biases=QKVO if config.flag("attention_bias", False) else (),
            ffn_bias=config.flag("mlp_bias", False),
            rope=lambda layer: rope if turns[layer] else None,
            window=window_of,
        ),
    )


SMOLLM3 = register(
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        spec=spec,
        names=llama_names,
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True},
        ignored="max_window_layers",
    )
)
