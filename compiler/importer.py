"""The import stage: a compile configuration in, everything a model brings out: spec, weights
(lazy), text files, digests.

The first stage of `compiler.pipeline`; nothing after it knows what a checkpoint is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import compiler.families.register
import compiler.quantize.register  # noqa: F401 - fills the registry
from compiler.checkpoint import Checkpoint, ConfigReader, read_json
from compiler.embedding import SentenceFiles, as_configured, matryoshka, read_sentence_files
from compiler.errors import CompileError
from compiler.families.family import family_of
from compiler.families.spec import ModelSpec
from compiler.hub import locate
from compiler.text import Text, made_up_text, read_text
from compiler.weights import Weights, checkpoint_weights, random_weights
from conf.resolve import model_name, resolve
from conf.schema import CompileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """`dtype`: what the checkpoint is stored as. `dimensions`: what vectors may be cut to.
    `dropped`: numbers of the checkpoint's tensors that the model does not use, by module.
    `digests`: SHA-256 by file name of everything the weights depend on.
    """

    name: str
    architectures: tuple[str, ...]
    spec: ModelSpec
    dtype: str
    weights: Weights
    text: Text
    digests: dict[str, str]
    dimensions: tuple[int, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)


def import_resolved(
    config: CompileConfig, sources: Mapping[str, str]
) -> tuple[Imported, CompileConfig, dict[str, str]]:
    """The model, the config without `auto`, and where each of its values came from."""
    model = import_model(config)
    resolved, origins = resolve(
        config,
        sources,
        checkpoint_dtype=model.dtype,
        context=model.spec.context,
        whole=model.spec.whole,
    )
    return model, resolved, origins


def import_model(config: CompileConfig) -> Imported:
    if config.weights == "random":
        return _random(config)
    directory = locate(config.model.source, config.model.revision)
    checkpoint = Checkpoint.open(directory)
    where = str(directory / "config.json")
    reader = ConfigReader(checkpoint.config, where)
    family = family_of(reader)
    files = read_sentence_files(directory)
    spec = as_configured(family.read(reader), family, config.model, files, checkpoint.config, where)
    if config.model.config:
        _check_shape(config, spec, checkpoint.config, files)
    weights = checkpoint_weights(family, spec, checkpoint)
    text = read_text(directory, checkpoint.config, spec.vocab, config.model.chat_template)
    digests = checkpoint.digests()
    digests |= {f"text/{name}": _digest(data) for name, data in text.files.items()}
    return Imported(
        name=model_name(config),
        architectures=tuple(checkpoint.config["architectures"]),
        spec=spec,
        dtype=checkpoint.dtype(),
        weights=weights,
        text=text,
        digests=digests,
        dimensions=matryoshka(config.model, checkpoint.config),
        dropped=weights.dropped,
    )


def _random(config: CompileConfig) -> Imported:
    """A shape without its weights: from the named config, or from the config.json of the source."""
    values, text_from = dict(config.model.config), None
    if "architectures" not in values:
        text_from = locate(config.model.source, config.model.revision)
        values = read_json(text_from / "config.json") | values
    reader = ConfigReader(values, f"model={config.model.name}")
    files = read_sentence_files(text_from) if text_from is not None else None
    where = f"model={config.model.name}"
    family = family_of(reader)
    spec = as_configured(family.read(reader), family, config.model, files, values, where)
    template = config.model.chat_template
    text: Text | None = None
    if text_from is not None:
        text = read_text(text_from, values, spec.vocab, template)
    if text is None or "tokenizer.json" not in text.files:
        text = made_up_text(values, spec.vocab, template)
    shape = json.dumps(values, sort_keys=True).encode()
    return Imported(
        name=model_name(config),
        architectures=tuple(values["architectures"]),
        spec=spec,
        dtype=published_dtype(values),
        weights=random_weights(spec, config.seed, published_dtype(values)),
        text=text,
        digests={
            "config.json": _digest(shape),
            "random": _digest(f"uniform-16bit/{config.seed}".encode()),
            **{f"text/{name}": _digest(data) for name, data in text.files.items()},
        },
        dimensions=matryoshka(config.model, values),
    )


def published_dtype(values: Mapping[str, Any]) -> str:
    """What config.json says the weights are stored as."""
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")


def _check_shape(
    config: CompileConfig,
    spec: ModelSpec,
    found: dict[str, Any],
    files: SentenceFiles | None,
) -> None:
    """The published config of a named shape, and any key given by hand, must describe the
    checkpoint that is there.
    """
    reader = ConfigReader(found | config.model.config, f"model={config.model.name}")
    family = family_of(reader)
    expected = as_configured(
        family.read(reader),
        family,
        config.model,
        files,
        found | config.model.config,
        f"model={config.model.name}",
    )
    for f in ModelSpec.__struct_fields__:
        a, b = getattr(expected, f), getattr(spec, f)
        if a != b:
            shown = f"{a} and {b}" if isinstance(a, int | str) else f"{f} that differ"
            raise CompileError(
                f"model={config.model.name} and the checkpoint {config.model.source} disagree "
                f"about {f}: {shown}; use model=hf model.source={config.model.source}"
            )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
