"""Families end to end on paper: logits of the compiled program, run by the op references, against
transformers: whole prefill, chunked prefill, decode, and several sequences in one ragged batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy_models

from compiler.fuse import fuse
from compiler.importer import import_model
from compiler.interpret import Chunk, State, greedy_step, new_state, run
from compiler.model import StepShape, build, constants
from compiler.program import Program
from compiler.store import exact, stored_weights
from conf.schema import CompileConfig

pytest.importorskip("transformers")
PAGE = 16
TOKENS = [(7 * i * i + 3 * i) % 128 for i in range(40)]
CASES = [  # the others run on the device, in test_end_to_end.py
    pytest.param(toy_models.RECIPES[family][0], id=family)
    for family in ("llama", "qwen2", "gemma2", "stablelm", "cohere2", "phi")
]


class Subject:
    """A toy checkpoint imported, fused and run step by step, beside the model it was saved from."""

    def __init__(self, recipe: toy_models.Recipe, directory: Path) -> None:
        self.reference = toy_models.save(recipe, directory)
        config = CompileConfig(name="toy", dtype="float32")
        config.model.name, config.model.source = "hf", str(directory)
        imported = import_model(config)
        shape = StepShape(slots=4, edits=8, page_size=PAGE, kv_dtype="float32", context=64)
        self.program: Program = fuse(build(imported.spec, shape))
        self.edits = shape.edits
        weights = {weight.name: weight for weight in stored_weights(self.program, {}, "cpu")}
        fixed = constants(imported.spec, shape.context)
        self.weight: Callable[[str], torch.Tensor] = lambda name: exact(
            weights[name], imported.weights, fixed
        )

    def state(self) -> State:
        return new_state(self.program, 16)

    def step(self, state: State, *chunks: Chunk, every_row: bool = True) -> torch.Tensor:
        inputs = greedy_step(chunks, PAGE, self.edits, every_row=every_row)
        with torch.inference_mode():
            found = run(self.program, inputs, state, self.weight, keep=("logits",))
        return found["logits"][: int(inputs["live"][2])]

    def expected(self, tokens: list[int]) -> torch.Tensor:
        return self.reference.logits(tokens)


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("toy"))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_prefill(subject: Subject) -> None:
    chunk = Chunk(tokens=TOKENS, pages=[5, 0, 9])
    close(subject.step(subject.state(), chunk), subject.expected(TOKENS))


def test_chunked_prefill_then_decode(subject: Subject) -> None:
    state, pages, rows = subject.state(), [4, 3, 8], []
    for start, end in ((0, 1), (1, 18), (18, 33), *((i, i + 1) for i in range(33, len(TOKENS)))):
        rows.append(subject.step(state, Chunk(tokens=TOKENS[start:end], pages=pages, before=start)))
    close(torch.cat(rows), subject.expected(TOKENS))


def test_ragged_batch(subject: Subject) -> None:
    """Decode rows and prefill chunks of four sequences in one step."""
    prompts = [TOKENS[:20], TOKENS[5:12], TOKENS[30:31], TOKENS[2:36]]
    pages = [[0, 1], [2], [3], [6, 4, 5]]
    done = [19, 3, 0, 17]
    state = subject.state()
    for slot, (tokens, table, before) in enumerate(zip(prompts, pages, done, strict=True)):
        if before:
            subject.step(state, Chunk(tokens=tokens[:before], pages=table, slot=slot))
    chunks = [
        Chunk(tokens=tokens[before:], pages=table, before=before, slot=slot)
        for slot, (tokens, table, before) in enumerate(zip(prompts, pages, done, strict=True))
    ]
    last = subject.step(state, *chunks, every_row=False)
    close(last, torch.stack([subject.expected(tokens)[-1] for tokens in prompts]))


def test_greedy_tokens_fed_back_on_the_device(subject: Subject) -> None:
    """A token of -1 - slot reads what the last step sampled there."""
    state, prompt, found = subject.state(), TOKENS[:9], []
    for step in range(8):
        tokens, before = (prompt, 0) if step == 0 else ([-1], len(prompt) + step - 1)
        logits = subject.step(
            state, Chunk(tokens=tokens, pages=[7, 2], before=before), every_row=False
        )
        found.append(int(logits[-1].argmax()))
    reference = list(prompt)
    for _ in range(8):
        reference.append(int(subject.expected(reference)[-1].argmax()))
    assert found == reference[len(prompt) :]
    assert int(state["last_token"][0]) == found[-1]
    assert int(state["counts"][0].sum()) == 8
