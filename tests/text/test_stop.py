"""Stop strings against a character-by-character oracle, for any way of cutting the text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.stop import StopStrings

LETTERS = st.text("ab \n", min_size=1, max_size=4)


def oracle(text: str, stops: tuple[str, ...], keep: bool) -> tuple[str, str | None]:
    """The first position at which some stop string has just ended; of those the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return (text[:end] if keep else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("ab \n", max_size=5), max_size=12),
    stops=st.lists(LETTERS, min_size=1, max_size=4, unique=True),
    keep=st.booleans(),
)
def test_equals_oracle_and_never_takes_text_back(pieces, stops, keep):
    stop = StopStrings(tuple(stops), keep_match=keep)
    want, matched = oracle("".join(pieces), tuple(stops), keep)
    shown = ""
    for piece in pieces:
        shown += stop.feed(piece)
        assert want.startswith(shown)
        if stop.matched is not None:
            break
    assert stop.matched == matched
    assert shown + ("" if matched else stop.flush()) == want


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=20), stops=st.lists(LETTERS, min_size=1, max_size=3))
def test_holds_back_no_more_than_a_possible_beginning(text, stops):
    stop = StopStrings(tuple(stops), keep_match=False)
    shown = stop.feed(text)
    if stop.matched is None:
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) and s != held for s in stops)
