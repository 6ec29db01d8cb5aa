"""The grammar fields of a request, checked for size; whether a grammar is right only its compile
can say (runtime/grammar).

Comes in: what a client set of `json_schema`, `regex`, `ebnf`, `structural_tag`. Goes out: a
`Grammar`, or InvalidRequest. Used by sampling.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from conf.schema import LimitsConfig
from runtime.errors import InvalidRequest
from runtime.request import Grammar, GrammarKind

KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)
EXCLUSIVE = "Only one of json_schema, regex, ebnf, or structural_tag can be set."


def read_grammar(given: Mapping[GrammarKind, str | None], limits: LimitsConfig) -> Grammar | None:
    """An empty text is no grammar."""
    grammars = [Grammar(kind=kind, text=text) for kind, text in given.items() if text]
    if len(grammars) > 1:
        raise InvalidRequest(EXCLUSIVE, param=grammars[1].kind)
    for grammar in grammars:
        most = limits.regex_bytes if grammar.kind == "regex" else limits.grammar_bytes
        try:
            size = len(grammar.text.encode())
        except UnicodeEncodeError:  # no JSON body can hold one, a caller's string can
            raise InvalidRequest(
                f"{grammar.kind} must be Unicode text, got half of a surrogate pair.",
                param=grammar.kind,
            ) from None
        if size > most:
            raise InvalidRequest(
                f"{grammar.kind} is {size} bytes, over the {most}-byte limit", param=grammar.kind
            )
    return grammars[0] if grammars else None
