"""A tiktoken rank file (base64 bytes and rank, one token a line) as a byte-level tokenizer.json.

Called by `compiler.tokenizer_source`.
"""

from __future__ import annotations

import base64
import binascii

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from compiler.byte_pairs import merges
from compiler.synthetic_tokenizer import byte_alphabet
from compiler.tokenizer_rules import Rules


def parse_ranks(data: bytes) -> dict[bytes, int] | None:
    """None when this is no rank file. Ranks are the token ids."""
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks or None


def tiktoken_tokenizer(ranks: dict[bytes, int], rules: Rules) -> Tokenizer:
    """`rules.pattern` is given. tiktoken takes a piece that is a token as it is: so does
    `ignore_merges`.
    """
    assert rules.pattern is not None
    alphabet = byte_alphabet()
    spelled = {"".join(alphabet[b] for b in token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=spelled,
            merges=merges(sorted(spelled, key=spelled.__getitem__)),
            ignore_merges=True,
        )
    )
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rules.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
