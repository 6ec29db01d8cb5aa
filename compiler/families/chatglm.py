"""ChatGLM 2 and 3, and GLM-4 in the same format: packed q, k, v and gate, up; half of each head
rotates, in neighbouring pairs.
"""

from __future__ import annotations

from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.decoder import QKV, Parts, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import named, packed
from compiler.families.rope import plain_rope
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    for key in ("rmsnorm", "post_layer_norm", "multi_query_attention", "original_rope"):
        config.require(key, (True,), True)  # without multi-query the packing differs
    for key in ("add_bias_linear", "apply_residual_connection_post_layernorm", "interleaved_qkv"):
        config.require(key, (False,), False)
    config.require("pre_seq_len", (None,), None)
    config.require("quantization_bit", (0,), 0)
    ratio, dim = config.number("rope_ratio", 1.0), head_dim(config)
    if ratio <= 0:
        raise DamagedCheckpoint(f"{config.where}: rope_ratio is {ratio}, expected more than 0")
    # ChatGLM2-6B-32k divides positions by the ratio; later models multiply the base. No key tells
    # them apart.
    divides = "chatglm2" in config.text("_name_or_path", "")
    theta = 10000.0 if divides else 10000.0 * ratio
    rope = plain_rope(config, dim // 2, theta, interleaved=True)
    if divides:
        rope = structs.replace(rope, inv_freq=tuple(f / ratio for f in rope.inv_freq))
    return decoder_spec(
        config,
        Parts(
            name="chatglm",
            biases=QKV if config.flag("add_qkv_bias", False) else (),
            rope=lambda layer: rope,
        ),
    )


MODULES = {
    "embed": "transformer.embedding.word_embeddings",
    "layer": "transformer.encoder.layers.{i}",
    "attn_norm": "input_layernorm",
    "o": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "down": "mlp.dense_4h_to_h",
    "final_norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
}
CHATGLM = register(
    Family(
        name="chatglm",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        spec=spec,
        names=named(
            MODULES, packed(qkv="self_attention.query_key_value", gate_up="mlp.dense_h_to_4h")
        ),
        unused=(r"transformer\.rotary_pos_emb\.inv_freq",),
        spelling={
            "num_layers": "num_hidden_layers",
            "padded_vocab_size": "vocab_size",
            "ffn_hidden_size": "intermediate_size",
            "kv_channels": "head_dim",
            "multi_query_group_num": "num_key_value_heads",
            "layernorm_epsilon": "rms_norm_eps",
            "seq_length": "max_position_embeddings",
        },
        ignored=(
            "apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion"
            " classifier_dropout fp32_residual_connection prefix_projection"
        ),
    )
)
