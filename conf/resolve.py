"""`auto` out of a compile configuration: a config and what the checkpoint says go in, a config
without `auto` comes out, with the source of every value. Values this version cannot compile are
refused here, before anything is read or allocated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from conf.errors import ConfigError
from conf.load import group_values
from conf.schema import CompileConfig, TargetConfig

DEFAULT_CONTEXT = 8192  # served context when none is asked for and the model has more


GPU_TARGETS = ("h200", "h100")
FP8_SCHEMES = ("fp8", "fp8dq")  # for GPUs; a scale per row, so no groups
GPU_FIELDS = ("arch", "memory_gib", "bandwidth_gb_s", "tflops", "tflops_fp8")  # of a target


def settle_target(
    config: CompileConfig, sources: Mapping[str, str], gpus: Sequence[str]
) -> tuple[CompileConfig, dict[str, str]]:
    """target=auto becomes the first of this machine's GPUs that there is a target for, else its
    CPU. `gpus`: product names, e.g. `NVIDIA H200`. Refuses figures of a GPU that were asked for
    beside a target that names none: auto would overwrite them."""
    if config.target.kind != "cuda":
        for key in GPU_FIELDS:
            if sources.get(f"target.{key}") == "override":
                raise ConfigError(
                    f"target.{key}={getattr(config.target, key)}: describes a GPU, and "
                    f"target={config.target.name} names none; leave it out or take target=h200"
                )
    if config.target.kind != "auto":
        return config, dict(sources)
    config, origin = deepcopy(config), dict(sources)
    name = next((t for gpu in gpus for t in GPU_TARGETS if t in gpu.lower()), "cpu")
    config.target = TargetConfig(**group_values("target", name))
    for key in [key for key in origin if key.startswith("target.")]:
        origin[key] = "this machine"
    return config, origin


def check_supported(config: CompileConfig, sources: Mapping[str, str]) -> None:
    """Refuse what no stage of this version can do, and what was asked for but changes nothing."""
    if config.target.kind == "cuda":
        for key in GPU_FIELDS:
            if getattr(config.target, key) is None:
                raise ConfigError(
                    f"target.{key}=null: a CUDA target needs it; take target=h200 or target=h100 "
                    "as a pattern"
                )
    elif config.records is not None:
        raise ConfigError(
            f"records={config.records}: tuning records are of GPUs, they do nothing for "
            f"target={config.target.name}; leave it out"
        )
    elif config.quant.scheme in FP8_SCHEMES:
        raise ConfigError(
            f"quant={config.quant.scheme}: needs a GPU with fp8 tensor cores; "
            "choices for target=cpu: none, int8, int4"
        )
    if config.quant.group_size not in (16, 32, 64, 128, 256):
        raise ConfigError(
            f"quant.group_size={config.quant.group_size}: not a choice; "
            "choices: 16, 32, 64, 128, 256"
        )
    if config.accuracy.max_delta is not None and not config.accuracy.measure:
        raise ConfigError(
            f"accuracy.max_delta={config.accuracy.max_delta:g} with accuracy.measure=false: a "
            "limit needs the measurement; leave one of them out"
        )
    if config.name is not None and not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ConfigError(
            f"name={config.name}: names a directory; use letters, digits, dots, dashes and "
            "underscores"
        )
    if config.parallel.tp > 1:
        raise ConfigError(
            f"parallel.tp={config.parallel.tp}: tensor parallelism is not supported yet by this "
            "version; use parallel.tp=1"
        )
    for key, value, why in _idle(config):
        if sources.get(key) == "override":
            raise ConfigError(f"{key}={value}: {why}")


def _idle(config: CompileConfig) -> Iterator[tuple[str, Any, str]]:
    """Options that change nothing beside the others, their values, and why."""
    quant, model = config.quant, config.model
    if quant.scheme in ("none", *FP8_SCHEMES):
        why = "has no groups; leave it out or take quant=int8 or quant=int4"
        yield "quant.group_size", quant.group_size, f"quant={quant.scheme} {why}"
    if quant.scheme == "none":
        why = "quant=none quantizes nothing; leave it out or take quant=int8"
        yield "quant.head", str(quant.head).lower(), why
    if config.weights == "checkpoint":
        why = "weights=checkpoint draws no numbers; leave it out or take weights=random"
        yield "seed", config.seed, why
    elif "architectures" in model.config:
        why = f"weights=random makes model={model.name} up; leave it out or take model=hf"
        yield "model.source", model.source, why
        yield "model.revision", model.revision, why


def resolve(
    config: CompileConfig,
    sources: Mapping[str, str],
    *,
    checkpoint_dtype: str,
    context: int,
    whole: bool = False,
) -> tuple[CompileConfig, dict[str, str]]:
    """`checkpoint_dtype`: float32, bfloat16 or float16, as the checkpoint is stored; `context`:
    the model's longest sequence; `whole`: it computes a sequence in one step. A target that is
    still `auto` is the CPU: `settle_target` knows the GPUs.
    """
    check_supported(config, sources)
    config, origin = settle_target(deepcopy(config), sources, ())

    def settle(section: Any, key: str, value: Any, why: str) -> None:
        setattr(section, key.rsplit(".", 1)[-1], value)
        origin[key] = why

    if config.dtype == "auto":
        # float16 has no stored form here. float32 keeps every bit of it; GPUs have matrix units
        # for bfloat16 alone.
        exact = checkpoint_dtype == "float32" or config.target.kind != "cuda"
        dtype = "float32" if exact and checkpoint_dtype != "bfloat16" else "bfloat16"
        settle(config, "dtype", dtype, f"checkpoint ({checkpoint_dtype})")
    if config.kv.dtype == "auto":
        settle(config.kv, "kv.dtype", config.dtype, "dtype")
    if config.shape.context is None:
        most = min(context, DEFAULT_CONTEXT, config.shape.max_tokens if whole else context)
        settle(config.shape, "shape.context", most, f"model ({context})")
    elif config.shape.context > context:
        raise ConfigError(
            f"shape.context={config.shape.context}: the model is made for {context} tokens; "
            f"use at most {context}"
        )
    elif whole and config.shape.context > config.shape.max_tokens:
        raise ConfigError(
            f"shape.context={config.shape.context}: exceeds shape.max_tokens="
            f"{config.shape.max_tokens}, and this model computes a sequence in one step; "
            f"use shape.max_tokens={config.shape.context}"
        )
    if config.name is None:
        settle(config, "name", model_name(config), "model")
    return config, origin


def model_name(config: CompileConfig) -> str:
    """What the artifact is called: `name`, else the named model, else the last part of the
    source.
    """
    if config.name:
        return config.name
    if config.model.name != "hf":
        return config.model.name
    return config.model.source.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].lower()
