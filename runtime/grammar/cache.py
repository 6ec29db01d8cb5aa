"""Compiled grammars, bounded in bytes: those used last stay. Memory only."""

from __future__ import annotations

from collections import OrderedDict

from llguidance import LLMatcher as Matcher

from runtime.request import Grammar

LEAST = 4096  # bytes of an entry beside its text


class GrammarCache:
    """An entry is a matcher that is copied for each use, or the reason of a refusal."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[Grammar, tuple[Matcher | str, int]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, grammar: Grammar) -> Matcher | str | None:
        entry = self._entries.get(grammar)
        if entry is None:
            return None
        self._entries.move_to_end(grammar)
        return entry[0]

    def put(self, grammar: Grammar, entry: Matcher | str, size: int) -> None:
        """`size`: bytes the matcher takes."""
        size += LEAST + 4 * len(grammar.text)
        if grammar in self._entries or size > self._most:
            return
        self._entries[grammar] = entry, size
        self.bytes += size
        while self.bytes > self._most:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
