"""Merges of a byte-pair vocabulary that is stored as ranked pieces.

SentencePiece and tiktoken merge whichever neighbours give the best piece; tokenizer.json lists
pairs. Every way of cutting a piece in two pieces is therefore a merge, ranked by the piece.
"""

from __future__ import annotations

from collections.abc import Iterable


def merges(ranked: Iterable[str]) -> list[tuple[str, str]]:
    """`ranked`: pieces, best first."""
    order = list(ranked)
    known = set(order)
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in known and piece[cut:] in known
    ]
