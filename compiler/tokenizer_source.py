"""A checkpoint's tokenizer files to one tokenizer.json.

tokenizer.json is taken as it is; a SentencePiece model or a tiktoken rank file is converted here,
with the tokens its class adds; what transformers can read without running foreign code
(vocab.json with merges.txt, vocab.txt, …) is converted by it. Called by `compiler.text`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.errors import CompileError
from compiler.sentencepiece_model import NoSentencePiece, sentencepiece_tokenizer
from compiler.tiktoken_ranks import parse_ranks, tiktoken_tokenizer
from compiler.tokenizer_rules import CLASSES, Rules, rules_of

CONVERTER = Path(__file__).resolve().parent / "convert_tokenizer.py"
OURS = ("tokenizer.model", "*.tiktoken", "tiktoken.model")
OTHERS = ("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokenizer_json(directory: Path, settings: Mapping[str, Any]) -> bytes | None:
    """`settings`: tokenizer_config.json. None when the checkpoint has no tokenizer. Raises
    CompileError, naming the file and the reason.
    """
    if (directory / "tokenizer.json").is_file():
        return (directory / "tokenizer.json").read_bytes()
    for pattern in OURS:
        for path in sorted(directory.glob(pattern)):
            return _convert(path, settings)
    if any(any(directory.glob(pattern)) for pattern in OTHERS):
        return _by_transformers(directory)
    if "AutoTokenizer" in (settings.get("auto_map") or {}):
        raise CompileError(
            f"{directory}: the tokenizer is Python code ({settings.get('tokenizer_class')}), which "
            "is never run, and there is no file we can read; put a tokenizer.json beside "
            "config.json"
        )
    return None


def _convert(path: Path, settings: Mapping[str, Any]) -> bytes:
    data, rules = path.read_bytes(), rules_of(settings)
    declared = _declared(settings)
    ranks = parse_ranks(data)
    if ranks is not None:
        if rules.pattern is None:
            known = ", ".join(sorted(name for name, r in CLASSES.items() if r.pattern))
            raise CompileError(
                f"{path}: a tiktoken rank file needs the split pattern of its tokenizer class, "
                f"and {settings.get('tokenizer_class')!r} is not one of: {known}; "
                "put a tokenizer.json beside config.json"
            )
        tokenizer, own = tiktoken_tokenizer(ranks, rules), list[str]()
        size = max(ranks.values()) + 1
    else:
        contents = frozenset(token["content"] for token in declared.values())
        contents |= frozenset(rules.specials)
        try:
            tokenizer, own = sentencepiece_tokenizer(data, contents)
        except NoSentencePiece as e:
            raise CompileError(
                f"{path}: the tokenizer cannot be converted ({e}); "
                "put a tokenizer.json beside config.json"
            ) from e
        size = tokenizer.get_vocab_size()
    table = tokenizer.get_vocab()
    listed = {table[text]: _flags(text) for text in own}
    listed |= {
        size + i: _flags(text, single_word=text in rules.words)
        for i, text in enumerate(rules.specials)
    }
    listed |= declared
    spellings = {token["content"] for token in listed.values()}
    if missing := [text for text in rules.prefix if text not in spellings]:
        raise CompileError(
            f"{path.parent}: {settings.get('tokenizer_class')} begins every text with "
            f"{missing[0]!r}, which tokenizer_config.json's added_tokens_decoder does not have; "
            "take that file from the model's repository"
        )
    return _with_added(json.loads(tokenizer.to_str()), dict(sorted(listed.items())), rules)


def _declared(settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens of `added_tokens_decoder`, by id."""
    tokens = settings.get("added_tokens_decoder") or {}
    return {
        int(i): _flags(token["content"], **{k: bool(token.get(k, False)) for k in FLAGS})
        for i, token in tokens.items()
    }


def _flags(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **dict.fromkeys(FLAGS, False), "special": True, **flags}


def _with_added(document: dict[str, Any], added: dict[int, dict[str, Any]], rules: Rules) -> bytes:
    """The document with added tokens at exactly their ids. The library numbers unknown ones on
    its own, so they are entries of the model's vocabulary too.
    """
    model = document["model"]
    table = model["vocab"]
    if isinstance(table, dict):
        held = {i: text for text, i in table.items()}
        for i, token in added.items():
            table.pop(held.get(i, ""), None)  # renamed
            table[token["content"]] = i
    else:
        low = min(score for _, score in table)
        for i, token in added.items():
            while len(table) <= i:
                table.append([f"<|unused_{len(table)}|>", low])
            table[i][0] = token["content"]
    document["added_tokens"] = [{"id": i, **token} for i, token in added.items()]
    if rules.prefix:
        ids = {token["content"]: i for i, token in added.items()}
        parts = [{"SpecialToken": {"id": text, "type_id": 0}} for text in rules.prefix]
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*parts, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                *parts,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in rules.prefix
            },
        }
    return json.dumps(document, ensure_ascii=False).encode()


def _by_transformers(directory: Path) -> bytes:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-P", str(CONVERTER), str(directory.resolve()), out]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CompileError(
                f"{directory}: the tokenizer cannot be converted ({reason}); "
                "put a tokenizer.json beside config.json"
            )
        return (Path(out) / "tokenizer.json").read_bytes()
