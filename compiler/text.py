"""The artifact's text/ files from a checkpoint directory: tokenizer.json, special tokens, chat
template, generation defaults.

Everything is normalised here, so the runtime has one form to read: token strings instead of
objects, one list of end tokens, one template. Called by `compiler.importer`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from compiler.chat_template import CHATML, chat_template, named_template
from compiler.checkpoint import read_json
from compiler.errors import DamagedCheckpoint
from compiler.synthetic_tokenizer import synthetic_tokenizer
from compiler.tokenizer_rules import Rules, rules_of
from compiler.tokenizer_source import tokenizer_json

SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """`files` go to text/ as they are."""

    files: dict[str, bytes]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_text(directory: Path, config: Mapping[str, Any], vocab: int, template: str | None) -> Text:
    """Text files of a checkpoint. Without any tokenizer in it there is none in the artifact: it
    serves token ids only.
    """
    settings = _optional_json(directory / "tokenizer_config.json")
    data = tokenizer_json(directory, settings)
    files, ids = {}, dict[str, int | None]()
    ends: list[int | None] = []
    generation = _optional_json(directory / "generation_config.json")
    if data is not None:
        tokenizer = _load(data, directory)
        _check_ids(tokenizer, vocab, directory)
        tokens = {key: _token_text(settings.get(key)) for key in SPECIALS}
        if tokens["eos_token"] is None or tokens["bos_token"] is None:
            listed = _optional_json(directory / "special_tokens_map.json")
            tokens |= {k: _token_text(listed.get(k)) for k in SPECIALS if tokens[k] is None}
        ids = {key: tokenizer.token_to_id(t) if t else None for key, t in tokens.items()}
        files["tokenizer.json"] = data
        # A tokenizer.json says itself what its class adds by default; a bare model file does not.
        ready = (directory / "tokenizer.json").is_file()
        rules = rules_of(settings)
        flags = _flags(settings, rules, defaults=not ready)
        files["tokenizer_config.json"] = _json(
            {
                **tokens,
                "add_bos_token": _adds(flags, tokenizer, "bos_token", ids),
                "add_eos_token": _adds(flags, tokenizer, "eos_token", ids),
            }
        )
        named = {key: text for key, text in tokens.items() if text is not None}
        source = chat_template(directory, settings, named, template)
        if source is not None:
            files["chat_template.jinja"] = source.encode()
            ends = [tokenizer.token_to_id(text) for text in rules.ends]
    eos = _ids(config, generation, "eos_token_id", vocab)
    for own in (ids.get("eos_token"), *ends):
        if own is not None and own not in eos:
            eos.append(own)
    bos = _ids(config, generation, "bos_token_id", vocab)
    defaults = {k: generation[k] for k in SAMPLING if generation.get(k) is not None}
    files["generation_config.json"] = _json({"eos_token_id": eos, **defaults})
    return Text(files=files, eos_token_ids=tuple(eos), bos_token_id=bos[0] if bos else None)


def made_up_text(config: Mapping[str, Any], vocab: int, template: str | None) -> Text:
    """Text files for a named shape without a checkpoint: a synthetic tokenizer and a ChatML
    template.
    """
    eos = _ids(config, {}, "eos_token_id", vocab)
    bos = _ids(config, {}, "bos_token_id", vocab)
    end = eos[0] if eos else vocab - 1
    start = (
        bos[0]
        if bos and bos[0] not in (end, *eos)
        else next(i for i in range(vocab - 1, -1, -1) if i not in (end, *eos))
    )
    specials = {i: f"<|special_{i}|>" for i in eos} | {end: "<|im_end|>", start: "<|im_start|>"}
    files: dict[str, bytes] = {}
    data = synthetic_tokenizer(vocab, specials)
    if data is not None:
        files["tokenizer.json"] = data
        tokens = {
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": None,
            "unk_token": None,
        }
        files["tokenizer_config.json"] = _json(
            {**tokens, "add_bos_token": False, "add_eos_token": False}
        )
        named = {"eos_token": "<|im_end|>"}
        source = named_template(template, {}, named) if template else CHATML
        files["chat_template.jinja"] = source.encode()
    eos = eos or [end]
    files["generation_config.json"] = _json({"eos_token_id": eos})
    return Text(files=files, eos_token_ids=tuple(eos), bos_token_id=bos[0] if bos else None)


# --- tokenizer ------------------------------------------------------------------------------------


def _load(data: bytes, directory: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except Exception as e:  # the library raises bare Exception
        raise DamagedCheckpoint(f"{directory / 'tokenizer.json'}: cannot be read ({e})") from e


def _check_ids(tokenizer: tokenizers.Tokenizer, vocab: int, directory: Path) -> None:
    token, top = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if top >= vocab:
        raise DamagedCheckpoint(
            f"{directory}: tokenizer gives {token!r} id {top}, but the model has {vocab} "
            "embeddings; remove the token or resize the model"
        )


def _flags(settings: dict[str, Any], rules: Rules, *, defaults: bool) -> dict[str, bool]:
    """What the tokenizer class makes of add_bos_token and add_eos_token. `defaults`: also of their
    absence.
    """
    usual = {"bos_token": rules.adds_bos and defaults, "eos_token": False}
    return {k: rules.flags and bool(settings.get(f"add_{k}", usual[k])) for k in usual}


def _adds(
    flags: dict[str, bool],
    tokenizer: tokenizers.Tokenizer,
    key: str,
    ids: dict[str, int | None],
) -> bool:
    """Whether every text starts (ends) with bos (eos): by the tokenizer's own post-processor, or
    by its class's flag.
    """
    token = ids[key]
    if token is None:
        return False
    return flags[key] or tokenizer.encode("a").ids[0 if key == "bos_token" else -1 :][:1] == [token]


def _token_text(token: Any) -> str | None:
    """Old files hold AddedToken objects."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], key: str, vocab: int
) -> list[int]:
    """Token ids of both files, first the model's own order, without duplicates and the
    placeholders -1 and null.
    """
    result: list[int] = []
    for source in (config, generation):
        value = source.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is None or token == -1:
                continue
            if not isinstance(token, int) or not 0 <= token < vocab:
                raise DamagedCheckpoint(f"{key} {token!r} is no token of a vocabulary of {vocab}")
            if token not in result:
                result.append(token)
    return result


# --- files ----------------------------------------------------------------------------------------


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
