"""The first Qwen: packed q, k, v with biases; rope and queries scaled by the prompt's length."""

from __future__ import annotations

from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.errors import DamagedCheckpoint
from compiler.families.decoder import QKV, Parts, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import named, packed
from compiler.families.rope import plain_rope
from compiler.families.spec import ModelSpec, QwenNtk


def spec(config: ConfigReader) -> ModelSpec:
    config.require("no_bias", (True,), True)  # of all linears but q, k and v
    config.require("rotary_pct", (1.0,), 1.0)
    trained, theta = config.integer("seq_length"), config.number("rotary_emb_base", 10000.0)
    rope = plain_rope(config, head_dim(config), theta)
    if config.flag("use_dynamic_ntk", True):
        rope = structs.replace(rope, by_length=QwenNtk(theta=theta, original=trained))
    both = config.integer("intermediate_size")  # of gate and up together
    if both % 2:
        raise DamagedCheckpoint(f"{config.where}: intermediate_size {both} is odd")
    return decoder_spec(
        config,
        Parts(
            name="qwen",
            biases=QKV,
            rope=lambda layer: rope,
            logn=trained if config.flag("use_logn_attn", True) else None,
            width=both // 2,
        ),
    )


MODULES = {
    "embed": "transformer.wte",
    "layer": "transformer.h.{i}",
    "attn_norm": "ln_1",
    "o": "attn.c_proj",
    "ffn_norm": "ln_2",
    "gate": "mlp.w2",
    "up": "mlp.w1",
    "down": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
QWEN1 = register(
    Family(
        name="qwen",
        architectures=("QWenLMHeadModel",),
        spec=spec,
        names=named(MODULES, packed(qkv="attn.c_attn")),
        unused=(r".*\.attn\.masked_bias", r".*\.rotary_emb\.inv_freq"),
        spelling={
            "layer_norm_epsilon": "rms_norm_eps",
            "kv_channels": "head_dim",
            "n_layer": "num_hidden_layers",
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        ignored=(
            "attn_dropout_prob emb_dropout_prob bf16 fp16 fp32 onnx_safe use_flash_attn scale_attn_weights"  # noqa: E501
            " softmax_in_fp32 use_cache_quantization use_cache_kernel"
        ),
    )
)
