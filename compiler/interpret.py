"""The interpreter: runs a Program with the op references, in torch, one call after the other.

Comes in: a program, io inputs, state, a way to get each weight. Goes out: its outputs (and any temp
that is asked for). It is the oracle of fusion tests, of family tests and of `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compiler.program import Program, resolve
from kernels.op import OPS
from kernels.ops.kv import KvState

State = dict[str, Any]
NO_SIZES = {"tokens": 0, "seqs": 0, "pages": 0}  # state has no symbolic dims


def run(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    state: State,
    weight: Callable[[str], torch.Tensor],
    keep: Iterable[str] = (),
    until: str | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs by name, and the temps named in `keep`; with `until`, nothing after the call that
    writes it. State is updated in place; temps are dropped after their last use."""
    wanted = {*keep, *(v.name for v in program.values.values() if v.kind == "output")}
    last = {name: i for i, call in enumerate(program.calls) for name in call.ins.values()}
    live: dict[str, torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    for index, call in enumerate(program.calls):
        op = OPS[call.op]
        args: dict[str, Any] = {arg.name: None for arg in op.args if arg.role != "output"}
        for arg, name in call.ins.items():
            kind = program.values[name].kind
            if kind == "weight":
                args[arg] = weight(name)
            elif kind == "state":
                args[arg] = state[name]
            else:
                args[arg] = inputs[name] if kind == "input" else live[name]
        for arg, value in op.reference(args, dict(call.attrs)).items():
            if arg not in call.outs:
                continue  # an optional output that nobody reads
            live[call.outs[arg]] = value
            if call.outs[arg] in wanted:
                result[call.outs[arg]] = value
        if until in call.outs.values():
            break
        for name in call.ins.values():
            if last[name] == index:
                live.pop(name, None)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence in a step: `before` are already in its `pages`.
    `variant`: their row of rope frequencies."""

    tokens: Sequence[int]
    pages: Sequence[int]
    before: int = 0
    slot: int = 0
    variant: int = 0


def greedy_step(
    chunks: Sequence[Chunk], page_size: int, edits: int, every_row: bool = False
) -> dict[str, torch.Tensor]:
    """Io inputs of a step that samples greedily after each chunk, or scores `every_row`."""
    starts = [0]
    positions: list[int] = []
    kv_slots: list[int] = []
    for chunk in chunks:
        for position in range(chunk.before, chunk.before + len(chunk.tokens)):
            positions.append(position)
            page = chunk.pages[position // page_size]
            kv_slots.append(page * page_size + position % page_size)
        starts.append(len(positions))
    token_rows = list(range(len(positions))) if every_row else [end - 1 for end in starts[1:]]
    owner = [max(s for s, start in enumerate(starts[:-1]) if start <= t) for t in token_rows]
    rows, width = max(len(token_rows), len(chunks)), max(len(chunk.pages) for chunk in chunks)

    def ints(values: Sequence[int], size: int) -> torch.Tensor:
        return torch.tensor([*values, *[0] * (size - len(values))], dtype=torch.int32)

    padding = [ints([], width)] * (rows - len(chunks))
    live = [len(positions), len(chunks), len(token_rows), 0]
    inputs = {
        "live": ints(live, 8),
        "tokens": ints([t for chunk in chunks for t in chunk.tokens], len(positions)),
        "positions": ints(positions, len(positions)),
        "kv_slots": ints(kv_slots, len(positions)),
        "rope_variant": ints([c.variant for c in chunks for _ in c.tokens], len(positions)),
        "seq_start": ints(starts, rows + 1),
        "seq_len": ints([chunk.before + len(chunk.tokens) for chunk in chunks], rows),
        "pages": torch.stack([ints(c.pages, width) for c in chunks] + padding),
        "row_token": ints(token_rows, rows),
        "row_slot": ints([chunks[s].slot for s in owner], rows),
        "row_target": torch.full((rows,), -1, dtype=torch.int32),
        "row_flags": ints([], rows),
        "row_top": ints([], rows),
        "row_mask": torch.full((rows,), -1, dtype=torch.int32),
        "masks": torch.zeros(rows, 0, dtype=torch.int32),  # no row is constrained
        "top_k": ints([], rows),
        "seed": torch.zeros(rows, dtype=torch.int64),
        "edits": torch.zeros(edits, 4, dtype=torch.int32),
    }
    zero, one = torch.zeros(rows), torch.ones(rows)
    inputs |= {name: zero for name in ("temperature", "min_p", "frequency", "presence")}
    return inputs | {"top_p": one, "repetition": one}


def new_state(program: Program, pages: int) -> State:
    """Token state as a device starts with it, and an empty page pool."""
    shapes = {n: resolve(v.dims, NO_SIZES) for n, v in program.values.items() if v.kind == "state"}
    dtypes = {"last_token": torch.int32, "counts": torch.int32, "bias": torch.float32}
    state: State = {n: torch.zeros(shapes[n], dtype=t) for n, t in dtypes.items() if n in shapes}
    return state | {"kv": KvState(pages)}
