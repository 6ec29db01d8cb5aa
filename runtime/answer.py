"""The sequences of one offline call while their events come in.

Comes in: batches of events, in the reader's own thread. Goes out: `/generate` objects, whole or as
a stream. Used by `runtime.engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from runtime.errors import EngineDead, InvalidRequest
from runtime.request import Event
from runtime.text.call import Call
from runtime.text.sequence import Sequence

Output = dict[str, Any]


class Answer:
    """The sequences of one call, fed by the reader's own thread."""

    def __init__(self, call: Call, sequences: list[Sequence]) -> None:
        self._call = call
        self.sequences = sequences
        self.open = len(sequences)
        self._by_id = {seq.request.id: seq for seq in sequences}
        self._told: dict[int, int] = {}  # index -> ids in its last message
        self._fresh: dict[Sequence, None] = {}

    @property
    def live(self) -> bool:
        """Stop strings are seen here, so the engine must be told in time."""
        return any(prompt.sampling.stop for prompt in self._call.prompts)

    def feed(self, batch: list[Event] | EngineDead) -> list[int]:
        """Returns the ids whose text has ended while the engine still runs them."""
        if isinstance(batch, EngineDead):
            raise batch
        stopped: list[int] = []
        for event in batch:
            seq = self._by_id[event.id]
            if seq.finish is not None:
                continue
            seq.feed(event)
            self._fresh[seq] = None
            if seq.finish is not None:
                self.open -= 1
                if event.finish is None:
                    stopped.append(event.id)
        return stopped

    def told(self) -> Iterator[Output]:
        """Messages for what is new: the first token and the end at once, the rest every `interval`
        tokens.
        """
        for seq in self._fresh:
            count, before = len(seq.ids), self._told.get(seq.index, 0)
            if seq.finish is None and (
                seq.holding or (before and count - before < seq.interval) or not count
            ):
                continue
            self._told[seq.index] = count
            _raise(seq)
            output = seq.response()
            output["output_ids"] = list(seq.ids)  # the sequence goes on growing its own
            if not self._call.single:
                output["index"] = seq.index
            yield output
        self._fresh.clear()

    def result(
        self, show: Callable[[Sequence], Output] = Sequence.response
    ) -> Output | list[Output]:
        for seq in self.sequences:
            _raise(seq)
        outputs = [show(seq) for seq in self.sequences]
        return outputs[0] if self._call.single else outputs


def _raise(seq: Sequence) -> None:
    if seq.error is not None:
        message, status = seq.error
        raise InvalidRequest(message, status=status)
