"""Qwen 2 / 2.5 (biases on q, k, v) and Qwen 3 (RMS norm on every head of q and k)."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import (
    FULL,
    QKV,
    QKVO,
    Parts,
    Window,
    decoder_spec,
    layer_types,
)
from compiler.families.family import Family, register
from compiler.families.names import llama_names
from compiler.families.spec import ModelSpec


def sliding(config: ConfigReader) -> Window:
    """Off unless `use_sliding_window`; then the listed layers slide, or all from
    `max_window_layers` on.
    """
    window = config.value("sliding_window", int, 4096) or None
    first = config.value("max_window_layers", int, 28)
    types = layer_types(config)
    if not config.flag("use_sliding_window", False):
        window = None

    def window_of(layer: int) -> int | None:
        full = layer < first if types is None else types[layer] == FULL
        return None if full else window

    return window_of


def spec_qwen2(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, Parts(name="qwen2", biases=QKV, window=sliding(config)))


def spec_qwen3(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)  # covers q, k, v and o
    parts = Parts(name="qwen3", biases=QKVO if bias else (), qk_norm="head", window=sliding(config))
    return decoder_spec(config, parts)


QWEN2 = register(
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        bases=("Qwen2Model",),
        spec=spec_qwen2,
        names=llama_names,
        prefix="model.",
        defaults={"num_key_value_heads": 32},
    )
)
QWEN3 = register(
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        bases=("Qwen3Model",),
        spec=spec_qwen3,
        names=llama_names,
        prefix="model.",
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    )
)
