"""Whether a checkpoint is an embedding model, and what it makes of its hidden states.

Comes in: the options of `model`, the checkpoint's sentence-transformers files (modules.json and the
config.json of each module) and its config.json. Goes out: the same spec with its head replaced by
pooling. Called by `compiler.importer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from compiler.checkpoint import read_json, read_json_value
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.family import Family
from compiler.families.layers import in_form
from compiler.families.spec import Attention, ModelSpec, PoolSpec
from conf.schema import ModelConfig

Pooling = Literal["last", "cls", "mean"]
CLS, MEAN, LAST = "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"
MODES: dict[str, Pooling] = {CLS: "cls", MEAN: "mean", LAST: "last"}
OTHER_MODES = (
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceFiles:
    """`context`: max_seq_length of sentence_bert_config.json."""

    pooling: Pooling
    normalise: bool
    context: int | None


def read_sentence_files(directory: Path) -> SentenceFiles | None:
    """None without modules.json. Raises CompileError for modules we do not have."""
    path = directory / "modules.json"
    if not path.is_file():
        return None
    pooling: Pooling | None = None
    normalise = False
    modules = read_json_value(path)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise DamagedCheckpoint(f"{path}: expected a list of modules")
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            pooling = _pooling(directory / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            normalise = True
        elif kind != "Transformer":
            raise CompileError(
                f"{path}: module {kind!r} is not supported; supported: Transformer, Pooling, "
                "Normalize"
            )
    if pooling is None:
        raise DamagedCheckpoint(f"{path}: has no Pooling module; give model.pooling")
    limits = directory / "sentence_bert_config.json"
    most = read_json(limits).get("max_seq_length") if limits.is_file() else None
    return SentenceFiles(pooling=pooling, normalise=normalise, context=most)


def _pooling(path: Path) -> Pooling:
    values = read_json(path)
    mode = values.get("pooling_mode")  # newer files
    if isinstance(mode, str):
        values[{"lasttoken": LAST, "cls": CLS, "mean": MEAN}.get(mode, mode)] = True
    wanted = [key for key in (*MODES, *OTHER_MODES) if values.get(key) is True]
    if len(wanted) != 1 or wanted[0] not in MODES:
        raise CompileError(
            f"{path}: pooling {', '.join(wanted) or 'none'} is not supported; supported: one of "
            f"{', '.join(MODES)}"
        )
    if values.get("include_prompt") is False:
        raise CompileError(f"{path}: include_prompt false is not supported")
    return MODES[wanted[0]]


def as_configured(
    spec: ModelSpec,
    family: Family,
    options: ModelConfig,
    files: SentenceFiles | None,
    values: Mapping[str, Any],
    where: str,
) -> ModelSpec:
    """What `family` read from `values` (a config.json), in the form of latent attention that is
    asked for, and as an embedding model if it is one. `is_causal` is how gte-Qwen2 files say their
    direction."""
    if options.mla != "auto":
        spec = in_form(spec, cast(Literal["absorbed", "plain"], options.mla), where)
    has_head = values["architectures"][0] not in family.bases
    causal = values.get("is_causal")
    return as_embedding(spec, options, files, has_head=has_head, causal=causal, where=where)


def as_embedding(
    spec: ModelSpec,
    options: ModelConfig,
    files: SentenceFiles | None,
    *,
    has_head: bool,
    causal: bool | None,
    where: str,
) -> ModelSpec:
    """The spec as an embedding model when the options or the files make it one, else as it is.
    `has_head`: the architecture has a language model head, so it may generate. `causal`: what
    config.json says of itself, if anything. Raises CompileError when something is missing.
    """
    pooling: str | None = options.pooling
    if pooling == "auto":
        pooling = files.pooling if files else None
    if pooling == "none" or (pooling is None and has_head):
        if not has_head:
            raise CompileError(f"{where}: has no language model head; give model.pooling=last|…")
        if causal is False:
            raise CompileError(
                f"{where}: says is_causal false, so it generates no text; give model.pooling=last"
            )
        given: dict[str, object] = {"normalize": options.normalize, "causal": options.causal}
        given["dimensions"] = options.dimensions or None
        for key, value in given.items():
            if value is not None:
                raise CompileError(
                    f"model.{key}={value}: only an embedding model has it; give model.pooling=last"
                )
        return spec
    if pooling is None:
        raise CompileError(
            f"{where}: a model without a head, and without modules.json to say how its hidden "
            "states are pooled; give model.pooling=last|cls|mean and model.normalize"
        )
    normalise = options.normalize
    if normalise is None:
        if files is None:
            raise CompileError(
                f"{where}: model.pooling={pooling} without modules.json; say also whether vectors "
                "are normalised: model.normalize=true|false"
            )
        normalise = files.normalise
    if options.causal is not None:
        causal = options.causal
    if causal is not None:
        spec = _directed(spec, causal, where)
    for wanted in options.dimensions:
        if not 0 < wanted <= spec.dim:
            raise CompileError(
                f"model.dimensions={wanted}: {where} gives vectors of {spec.dim} numbers"
            )
    pool = PoolSpec(pooling=cast(Pooling, pooling), normalise=normalise)
    context = min(spec.context, files.context or spec.context) if files else spec.context
    return msgspec.structs.replace(spec, head=pool, context=context)


def _directed(spec: ModelSpec, causal: bool, where: str) -> ModelSpec:
    """Every layer causal, or none."""
    layers = []
    for layer in spec.layers:
        mixer = layer.mixer
        if not isinstance(mixer, Attention):
            raise CompileError(f"{where}: model.causal is not supported with latent attention")
        if not causal and mixer.window is not None:
            if mixer.window < spec.context:
                raise CompileError(
                    f"{where}: attention both ways with a sliding window of {mixer.window} is not "
                    "supported"
                )
            mixer = msgspec.structs.replace(mixer, window=None)
        mixer = msgspec.structs.replace(mixer, causal=causal)
        layers.append(msgspec.structs.replace(layer, mixer=mixer))
    return msgspec.structs.replace(spec, layers=tuple(layers))


def matryoshka(options: ModelConfig, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths vectors may be cut to: the option, else config.json's `matryoshka_dimensions`."""
    given = options.dimensions or config.get("matryoshka_dimensions") or []
    return tuple(sorted({int(d) for d in given}))
