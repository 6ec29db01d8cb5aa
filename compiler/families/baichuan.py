"""Baichuan 1 and 2: packed q, k, v; the 7B with rope, the 13B with alibi; version 2 with the rows
of the head scaled to length 1.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compiler.checkpoint import ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.decoder import Parts, alibi_slopes, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, Source, named, packed
from compiler.families.rope import plain_rope
from compiler.families.spec import ModelSpec

VERSION_2 = 125696  # its vocabulary: nothing else in the files tells the versions apart


def spec(config: ConfigReader) -> ModelSpec:
    # The two sizes are different code under one name: the 7B's files have
    # max_position_embeddings, the 13B's only model_max_length.
    positions = config.has("max_position_embeddings")
    size = config.integer("model_max_length", config.integer("max_position_embeddings", 4096))
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if dim in (4096, 5120) and positions != (dim == 4096):
        raise DamagedCheckpoint(
            f"{config.where}: hidden_size {dim} and max_position_embeddings "
            f"{'present' if positions else 'missing'} contradict each other: the 7B (4096) has "
            "rope positions, the 13B (5120) alibi"
        )
    rope = plain_rope(config, head_dim(config), 10000.0) if positions else None
    return decoder_spec(
        config,
        Parts(
            name="baichuan",
            context=size,
            rope=lambda layer: rope,
            alibi=None if positions else alibi_slopes(heads),
        ),
    )


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1, eps=1e-12)


PACKED = packed(qkv="self_attn.W_pack")


def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    if part == "head" and spec.vocab == VERSION_2:
        return (Source(tensor="lm_head.weight", then=unit_rows),)
    return PACKED(spec, layer, part)


BAICHUAN = register(
    Family(
        name="baichuan",
        architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        spec=spec,
        names=named(LLAMA_NAMES, packing),
        ignored="_from_model_config gradient_checkpointing z_loss_weight",
    )
)
