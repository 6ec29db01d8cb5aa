"""Qwen 2 / 2.5 (biases on q, k, v) and Qwen 3 (RMS norm on every head of q and k)."""

from __future__ import annotations

from collections.abc import Callable

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


def sliding(
    config: ConfigReader, full: Callable[[int, int], bool] = lambda layer, first: layer < first
) -> Window:
    """Off unless `use_sliding_window`; then the listed layers slide, or all from
    `max_window_layers` on. `full`: of a layer and `max_window_layers`, where none are listed.
    """
    window = config.value("sliding_window", int, 4096) or None
    first = config.value("max_window_layers", int, 28)
    types = layer_types(config)
    if not config.flag("use_sliding_window", False):
        window = None

    def window_of(layer: int) -> int | None:
        whole = full(layer, first) if types is None else types[layer] == FULL
        return None if whole else window

    return window_of


def spec_qwen2(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, Parts(name="qwen2", biases=QKV, window=sliding(config)))


def parts_qwen3(config: ConfigReader, name: str) -> Parts:
    bias = config.flag("attention_bias", False)  # covers q, k, v and o
    return Parts(name=name, biases=QKVO if bias else (), qk_norm="head", window=sliding(config))


def spec_qwen3(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, parts_qwen3(config, "qwen3"))


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
