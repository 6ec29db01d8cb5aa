"""What running sequences hold: slots, pages, and the prefixes they publish. The one owner of each
resource.

A waiting sequence holds nothing. `enter` gives it a slot and pages for all its known tokens, `grow`
one more page, `leave` takes everything back; nothing else moves a page or a slot. Called by the
scheduler.
"""

from __future__ import annotations

from runtime.core.pages import PageLeak, PagePool, chain
from runtime.core.sequence import DECODE, DRAIN, Sequence, Slots
from runtime.device.base import I32, Capacity

SHARED_PAGES = 4  # a prompt waits for a running one that computes at least so many of its pages


class Holdings:
    """`pending`: prefix pages being computed, and by whom."""

    def __init__(self, capacity: Capacity, *, secret: bytes, prefix_cache: bool) -> None:
        self.pool = PagePool(capacity.pages)
        self.slots = Slots(capacity)
        self.running: dict[Sequence, None] = {}  # in order of admission
        self._page_size = capacity.page_size
        self._secret = secret
        self._prefix_cache = prefix_cache
        self._free_slots = list(range(capacity.slots - 1, -1, -1))
        self._pending: dict[bytes, Sequence] = {}

    def name_prefixes(self, seq: Sequence) -> None:
        """Keys of the full pages of a waiting sequence's tokens, and the rope they are computed
        with."""
        rule = self.slots.rope_rule
        if rule is not None:
            row = rule.row(len(seq.tokens) if rule.of == "sequence" else seq.prompt_size)
            if row != seq.rope_row:
                seq.rope_row = row
                seq.keys.clear()
        if self._prefix_cache:
            self._extend(seq, seq.tokens)

    def _extend(self, seq: Sequence, tokens: I32) -> None:
        salt, size = seq.request.salt, self._page_size
        chain(self._secret, salt, seq.rope_row, tokens, size, seq.keys)

    def matched(self, seq: Sequence) -> int:
        """Pages it would find in the cache now."""
        return self.pool.matched(seq.keys, self._reusable(seq))

    def comes_soon(self, seq: Sequence) -> bool:
        """A running prompt is computing a good part of what this one starts with: waiting is
        cheaper than computing it twice.
        """
        ahead = self.matched(seq) + SHARED_PAGES
        return ahead <= self._reusable(seq) and seq.keys[ahead - 1] in self._pending

    def enter(self, seq: Sequence, reserve: int) -> bool:
        """Slot and pages for a waiting sequence, or False and nothing changed when that would leave
        fewer than `reserve`.
        """
        pool, slots, size = self.pool, self.slots, self._page_size
        matched = self.matched(seq)
        found = seq.keys[:matched]
        fresh = -(-len(seq.tokens) // size) - matched
        if fresh + pool.unreferenced(found) + reserve > pool.available:
            return False
        pages = pool.take(found)  # first, so that what is allocated next does not evict them
        added = pool.allocate(fresh)
        if added is None:
            raise PageLeak(f"{fresh} pages were available and are not")
        pages += added
        slot = seq.slot = self._free_slots.pop()
        slots.enter(slot, seq)
        slots.table[slot, : len(pages)] = pages
        slots.room[slot] = len(pages) * size
        slots.length[slot] = matched * size
        self.running[seq] = None
        for key in seq.keys[matched:]:
            self._pending.setdefault(key, seq)
        return True

    def grow(self, seqs: list[Sequence]) -> list[int] | None:
        """One more page for each of these, or None and nothing changed."""
        pages = self.pool.allocate(len(seqs))
        for seq, page in zip(seqs, pages or (), strict=False):
            room = int(self.slots.room[seq.slot])
            self.slots.table[seq.slot, room // self._page_size] = page
            self.slots.room[seq.slot] = room + self._page_size
        return pages

    def publish(self, seq: Sequence, start: int, end: int) -> bool:
        """Prompt tokens [start, end) are submitted: steps run in order, so later ones may read
        their pages. True if any waiting sequence may now find more.
        """
        first, last = start // self._page_size, min(end // self._page_size, len(seq.keys))
        for page, key in zip(
            self.slots.table[seq.slot, first:last].tolist(), seq.keys[first:last], strict=True
        ):
            self.pool.publish(page, key)
            if self._pending.get(key) is seq:
                del self._pending[key]
        return last > first

    def leave(self, seq: Sequence, *, keep: bool) -> None:
        """Takes everything back. `keep`: its complete pages stay findable; otherwise none of its
        pages does.
        """
        slots, slot = self.slots, seq.slot
        pages = slots.held(slot)
        for key in seq.keys:
            if self._pending.get(key) is seq:
                del self._pending[key]
        if not keep:
            self.pool.withdraw(pages)
        elif self._prefix_cache and seq.state in (DECODE, DRAIN):
            # The newest known token came from a row that was collected, so everything before it was
            # computed soundly.
            sound = slots.seen(slot)[:-1][: int(slots.length[slot])]
            self._extend(seq, sound)
            for page, key in zip(pages, seq.keys[: len(sound) // self._page_size], strict=False):
                self.pool.publish(page, key)
        self.pool.release(pages)
        slots.leave(slot)
        self._free_slots.append(slot)
        del self.running[seq]
        seq.slot = -1

    def check(self) -> None:
        """The books agree with each other; raises PageLeak."""
        slots = [seq.slot for seq in self.running]
        owned = slots + self._free_slots
        if len(owned) != len(self.slots.sequences) or len(set(owned)) != len(owned):
            raise PageLeak(
                f"{len(slots)} slots in use and {len(self._free_slots)} free, of "
                f"{len(self.slots.sequences)}"
            )
        if not self.running and self._pending:
            raise PageLeak(f"nothing runs, but {len(self._pending)} pages are said to be computed")
        self.pool.check(self.slots.held(slot) for slot in slots)

    def _reusable(self, seq: Sequence) -> int:
        """Pages that may come from the cache: not the last token's, whose logits are wanted, nor
        those yet to be scored.
        """
        last = len(seq.tokens) - 1
        if seq.scores and seq.score_next < seq.prompt_size:
            last = min(last, seq.score_next - 1)
        return min(last // self._page_size, len(seq.keys))
