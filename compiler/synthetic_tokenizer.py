"""A made-up byte-level BPE tokenizer of an exact vocabulary size, for named shapes whose weights
are random.

Text goes through it without loss and at about the tokens per character of a real one, so servers
and benchmarks behave as with the real model. Deterministic. Called by `compiler.text`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # most frequent first
SPACE = "Ġ"  # how byte-level BPE writes a space


def synthetic_tokenizer(vocab: int, specials: dict[int, str]) -> bytes | None:
    """tokenizer.json with ids 0 … vocab-1, `specials` at their ids; None if bytes and specials
    alone need more.
    """
    alphabet = byte_alphabet()
    merges: list[tuple[str, str]] = []
    wanted = vocab - len(alphabet) - len(specials)
    if wanted < 0:
        return None
    # Breadth first over letters: every two-letter piece, then every three-letter piece, … with and
    # without a space before.
    pieces = deque([SPACE, *LETTERS])
    while len(merges) < wanted:
        stem = pieces.popleft()
        letters = LETTERS[: wanted - len(merges)]
        merges += [(stem, letter) for letter in letters]
        pieces += [stem + letter for letter in letters]
    ids = (i for i in range(vocab) if i not in specials)
    tokens = [*alphabet, *(a + b for a, b in merges)]
    table = dict(zip(tokens, ids, strict=True)) | {text: i for i, text in specials.items()}
    return msgspec.json.encode(_document(table, merges, specials))


def _document(
    table: dict[str, int], merges: list[tuple[str, str]], specials: dict[int, str]
) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "special": True, **flags}
            for i, text in sorted(specials.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": table,
            "merges": merges,
        },
    }


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]
