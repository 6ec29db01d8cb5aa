"""Parameters in millions of published models with experts or latent attention, as their publishers
count them (DeepSeek V3 without the layer that predicts a second token; Grok-1 is told as 314B).
"""

PUBLISHED_MOE = {
    "mixtral-8x7b": 46702.8,
    "mixtral-8x22b": 140620.6,
    "qwen1.5-moe-a2.7b": 14315.8,
    "qwen2-57b-a14b": 57408.7,
    "qwen3-30b-a3b": 30532.1,
    "qwen3-235b-a22b": 235093.6,
    "deepseek-moe-16b": 16375.7,
    "deepseek-v2-lite": 15706.5,
    "deepseek-v2": 235741.4,
    "deepseek-v3": 671026.4,
    "deepseek-r1": 671026.4,
    "olmoe-1b-7b": 6919.2,
    "dbrx": 131596.5,
    "grok-1": 314000.0,
    "xverse-moe-a4.2b": 25800.0,
    "xverse-moe-a36b": 255400.0,
    "minicpm3-4b": 4073.9,
    "gpt-oss-20b": 20914.8,
    "gpt-oss-120b": 116829.2,
}
