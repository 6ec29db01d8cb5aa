"""Placement never lets two living blocks share a byte; layouts are aligned and deterministic."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from toy_specs import SHAPE, toy

from compiler.memory import (
    ALIGN,
    Block,
    Stored,
    io_layout,
    place,
    state_layout,
    weights_layout,
)
from compiler.model import INPUTS, SAMPLED, build
from runtime.weights_file import check_tensors


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    spans = st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(0, 6))
    return [
        Block(name=f"b{i}", size=size, first=first, last=first + length)
        for i, (size, first, length) in enumerate(draw(st.lists(spans, max_size=14)))
    ]


@given(blocks())
def test_blocks_alive_together_do_not_overlap(some: list[Block]) -> None:
    offsets, total = place(some)
    for i, a in enumerate(some):
        assert offsets[a.name] % ALIGN == 0 and offsets[a.name] + a.size <= total
        for b in some[i + 1 :]:
            together = a.first <= b.last and b.first <= a.last
            apart = (
                offsets[a.name] + a.size <= offsets[b.name]
                or offsets[b.name] + b.size <= offsets[a.name]
            )
            assert apart or not together


@given(blocks(), st.randoms(use_true_random=False))
def test_placement_does_not_depend_on_the_order_given(some: list[Block], random) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)
    assert place(shuffled) == place(some)


def test_memory_is_reused_after_the_last_read() -> None:
    chain = [Block(name=str(i), size=1000, first=i, last=i + 1) for i in range(50)]
    assert place(chain)[1] == 2 * 1024


def test_io_has_inputs_in_upload_order_then_outputs() -> None:
    program = build(toy("llama"), SHAPE)
    io = io_layout(program, {"tokens": 8, "seqs": 3, "pages": 2})
    names = [field.name for field in io.fields]
    always = [name for name in INPUTS if name != "rope_variant"]
    assert names == ["masks", *always, "edits", *SAMPLED] and always[0] == "live"
    by_length = io_layout(build(toy("sinks"), SHAPE), {"tokens": 8, "seqs": 3, "pages": 2})
    assert [field.name for field in by_length.fields] == ["masks", *INPUTS, "edits", *SAMPLED]
    end = 0
    for field in io.fields:
        assert field.offset % ALIGN == 0 and field.offset >= end
        assert field.output == (field.offset >= io.upload_bytes)
        end = field.offset + int(np.prod(field.shape)) * np.dtype(field.dtype).itemsize
    assert end <= io.io_bytes
    shapes = {field.name: field.shape for field in io.fields}
    assert shapes["seq_start"] == (4,) and shapes["pages"] == (3, 2) and shapes["edits"] == (70, 4)
    assert shapes["masks"] == (3, 4), "a bit for each of 97 tokens"


def test_state_holds_token_state_then_pages() -> None:
    state, offsets = state_layout(build(toy("llama"), SHAPE), SHAPE)
    vocab, slots = 97, SHAPE.slots
    assert offsets["last_token"] == 0
    assert offsets["counts"] >= slots * 4
    assert offsets["bias"] >= offsets["counts"] + slots * vocab * 4
    assert state.pages_offset == offsets["kv"] >= offsets["bias"] + slots * vocab * 4
    assert state.pages_offset % 4096 == 0 and state.page_bytes == 2 * (2 * 2 * 16 * 16 * 4)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=12))
def test_weights_are_aligned_and_leave_no_hole(sizes: list[int]) -> None:
    stored = [Stored(name=f"w{i}", dtype="uint8", shape=(size,)) for i, size in enumerate(sizes)]
    tensors = weights_layout(stored)
    check_tensors(tensors, tensors[-1].offset + tensors[-1].size)
    real = {t.name: t for t in tensors if t.name.startswith("w")}
    assert [t.size for t in real.values()] == sizes
    for tensor in real.values():
        assert tensor.offset % (4096 if tensor.size >= 4096 else ALIGN) == 0
