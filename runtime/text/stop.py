"""Stop strings over streamed text, however the tokens cut it.

Comes in: text pieces of one sequence. Goes out: the text that may be shown now; only what could
still become a stop string is held back. Used by generate.py for requests that have stop strings.
"""

from __future__ import annotations


class StopStrings:
    """The string that *ends* first wins, the longest of those: so the result does not depend on
    how text arrives in pieces.
    """

    __slots__ = ("_firsts", "_held", "_keep", "_longest", "_stops", "matched")

    def __init__(self, stops: tuple[str, ...], *, keep_match: bool) -> None:
        self._stops = stops
        self._keep = keep_match
        self._longest = max(map(len, stops))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None

    @property
    def holding(self) -> bool:
        return self._held != ""

    def feed(self, piece: str) -> str:
        """Text to show; after a match nothing more is."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            end, start, self.matched = min(hits)
            self._held = ""
            return text[: end if self._keep else start]
        cut = self._safe_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, text: str) -> int:
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._firsts:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(text)
