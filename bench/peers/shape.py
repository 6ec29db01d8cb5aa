"""The model shape that every peer runs: read from a Hugging Face `config.json` dict, filled with
seeded random weights.

`Shape` comes from `conf/model/<name>.yaml`; the GGUF writer and the torch peers take their tensors
from `random_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compiler.hub import locate
from conf.load import load
from conf.schema import CompileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama decoder. `config` is the published config.json it was read from."""

    name: str
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    rope_theta: float
    eps: float
    tied: bool
    config: dict[str, Any]

    @classmethod
    def of(cls, name: str, config: dict[str, Any]) -> Shape:
        heads = int(config["num_attention_heads"])
        return cls(
            name=name,
            dim=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads", heads)),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            ffn=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            context=int(config["max_position_embeddings"]),
            rope_theta=float(config.get("rope_theta", 10000.0)),
            eps=float(config.get("rms_norm_eps", 1e-5)),
            tied=bool(config.get("tie_word_embeddings", False)),
            config=config,
        )

    @classmethod
    def load(cls, name: str, dtype: str = "auto") -> Shape:
        """Of conf/model/<name>.yaml: the config written there, or that of its local checkpoint;
        published in `dtype` (auto: as it is)."""
        model = load(CompileConfig, "compile", [f"model={name}"]).config.model
        config = dict(model.config)
        if not config:
            folder = locate(model.source, model.revision)
            config = json.loads((folder / "config.json").read_text("utf-8"))
        return cls.of(name, config if dtype == "auto" else config | {"dtype": dtype})

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """(Hugging Face name, shape) of every tensor, in model order."""
        d, f = self.dim, self.ffn
        out: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocab, d))]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            out += [
                (p + "input_layernorm.weight", (d,)),
                (p + "self_attn.q_proj.weight", (self.heads * self.head_dim, d)),
                (p + "self_attn.k_proj.weight", (self.kv_width, d)),
                (p + "self_attn.v_proj.weight", (self.kv_width, d)),
                (p + "self_attn.o_proj.weight", (d, self.heads * self.head_dim)),
                (p + "post_attention_layernorm.weight", (d,)),
                (p + "mlp.gate_proj.weight", (f, d)),
                (p + "mlp.up_proj.weight", (f, d)),
                (p + "mlp.down_proj.weight", (d, f)),
            ]
        out.append(("model.norm.weight", (d,)))
        if not self.tied:
            out.append(("lm_head.weight", (self.vocab, d)))
        return out

    def random_weights(self, seed: int = 0) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Normal weights of standard deviation 0.02, norms one."""
        rng = np.random.default_rng(seed)
        for name, shape in self.tensors():
            if len(shape) == 1:
                yield name, np.ones(shape, np.float32)
            else:
                yield name, rng.standard_normal(shape, np.float32) * np.float32(0.02)
