"""Building blocks of op samples: seeded tensors, live counts and ragged batches over paged KV.

Everything beyond the live counts is poison (NaN, huge indices), so a kernel or reference that reads
it fails its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.op import Sample

POISON = 2**30  # an index that faults or gives garbage when used


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def live(tokens: int = 0, seqs: int = 0, rows: int = 0, edits: int = 0) -> Tensor:
    return torch.tensor([tokens, seqs, rows, edits, 0, 0, 0, 0], dtype=torch.int32)


def floats(g: torch.Generator, *shape: int, used: int | None = None, scale: float = 1.0) -> Tensor:
    """Normal values; rows from `used` on are NaN."""
    out = torch.randn(*shape, generator=g) * scale
    if used is not None:
        out[used:] = float("nan")
    return out


def padded(values: Sequence[int], size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    out = torch.full((size,), POISON, dtype=dtype)
    out[: len(values)] = torch.tensor(list(values), dtype=dtype)
    return out


def with_logit_rows(samples: Callable[[], list[Sample]]) -> Callable[[], list[Sample]]:
    """The samples, and the first one again with its rows counted as logit rows."""

    def more() -> list[Sample]:
        own = samples()
        first = own[0]
        args = {**first.args, "live": live(rows=int(first.args["live"][0]))}
        attrs = {**first.attrs, "live_index": 2}
        return [*own, Sample(label=f"{first.label}, logit rows", args=args, attrs=attrs)]

    return more


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A flat batch: `lengths[s] = (keys already stored, new tokens)`."""

    lengths: tuple[tuple[int, int], ...]
    tokens: int  # bucket sizes
    seqs: int
    pages: int
    pool_pages: int

    def page_tables(self, g: torch.Generator, page_size: int) -> list[list[int]]:
        """Disjoint pages in random order."""
        order = torch.randperm(self.pool_pages, generator=g).tolist()
        tables = []
        for before, new in self.lengths:
            need = -(-(before + new) // page_size)
            tables.append([order.pop() for _ in range(need)])
        return tables

    def arrays(self, tables: list[list[int]], page_size: int) -> dict[str, Tensor]:
        """The io inputs of a step: live, positions, kv_slots, seq_start, seq_len, pages."""
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        pages = torch.full((self.seqs, self.pages), POISON, dtype=torch.int32)
        for s, (before, new) in enumerate(self.lengths):
            for p in range(before, before + new):
                positions.append(p)
                slots.append(tables[s][p // page_size] * page_size + p % page_size)
            starts.append(len(positions))
            pages[s, : len(tables[s])] = torch.tensor(tables[s], dtype=torch.int32)
        return {
            "live": live(len(positions), len(self.lengths), len(self.lengths)),
            "positions": padded(positions, self.tokens),
            "kv_slots": padded(slots, self.tokens),
            "seq_start": padded(starts, self.seqs + 1),
            "seq_len": padded([b + n for b, n in self.lengths], self.seqs),
            "pages": pages,
        }


# Decode rows and prefill chunks together; lengths cross page and key-block boundaries; buckets are
# not full.
MIXED = Ragged(
    lengths=((0, 1), (15, 1), (16, 1), (300, 1), (0, 19), (13, 40), (127, 2)),
    tokens=72,
    seqs=9,
    pages=24,
    pool_pages=64,
)
# Whole sequences, as encoders take them.
WHOLE = Ragged(
    lengths=((0, 1), (0, 150), (0, 17), (0, 128)), tokens=300, seqs=5, pages=12, pool_pages=24
)
LONG_DECODE = Ragged(lengths=((1029, 1),), tokens=4, seqs=2, pages=66, pool_pages=80)
ONE_TOKEN = Ragged(lengths=((0, 1),), tokens=1, seqs=1, pages=1, pool_pages=2)
EMPTY = Ragged(lengths=(), tokens=4, seqs=2, pages=2, pool_pages=4)
