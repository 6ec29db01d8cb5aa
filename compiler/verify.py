"""Verification at compile time: how far quantization moves the logits, whether the finished
artifact computes what the reference does, and which tokens it gives on this machine.

Comes in: a design with its weights, and the artifact on a device. Goes out: the accuracy record (a
gate when `accuracy.max_delta` is set) and golden greedy tokens. Called by the pipeline and by
`inspect verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from compiler.design import Design
from compiler.errors import CompileError
from compiler.families.spec import MoeFfn, PoolSpec
from compiler.interpret import Chunk, greedy_step, new_state, run
from compiler.model import constants
from compiler.precision import linear_inputs
from compiler.program import Program
from compiler.store import exact, rounded
from compiler.weights import Weights
from conf.schema import CompileConfig
from kernels.cpu.layout import WIDENED
from runtime.artifact import Artifact, Golden
from runtime.device.base import Session, StepInput, StepOutput, open_session

PROMPT_TOKENS = 32
GOLDEN_TOKENS = 12
LOGPROB_WANTED = 2  # StepInput.row_flags
# Largest root-mean-square difference of logprobs between device and reference, in units of their
# spread. Kernels may round activations (to bfloat16, or to int8 per group), never more than that; a
# rounded activation sends some stored keys and values to the next code of an fp8 page, some inputs
# of linears to the next code of a quantized row.
DEVICE_LIMIT = {"float32": 0.01, "bfloat16": 0.05, "int8": 0.1, "int4": 0.2, "fp8": 0.1}
DEVICE_LIMIT |= {"fp8_e4m3": 0.1, "fp8_e5m2": 0.2, "fp8dq": 0.25}
# Times this where tokens choose experts: a rounded activation sends some to others, in a different
# place than the reference's rounded weights do. A defect is off by the spread itself.
EXPERTS_SLACK = 3.0
WeightOf = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`reference`: what the reference with stored weights gives: the logprob of each prompt token
    but the first; of an embedding model the vectors of the golden prompts."""

    accuracy: dict[str, float]
    reference: np.ndarray


def prompt(made: Design, seed: int = 0) -> list[int]:
    """Seeded tokens: the same for every compile of a shape."""
    count = min(PROMPT_TOKENS, made.buckets[-1].seqs, made.spec.context - GOLDEN_TOKENS)
    return [int(t) for t in np.random.default_rng(seed).integers(0, made.spec.vocab, count)]


def measure(made: Design, source: Weights) -> Measured:
    """Logits of every prompt position with the stored numbers, of weights and of KV pages, and with
    inputs of linears quantized as the program says, against the original ones, both in the
    reference interpreter: relative error, largest difference, share of equal best tokens. Of an
    embedding model the vectors of the golden prompts: relative error and largest difference."""
    weights = {weight.name: weight for weight in made.weights}
    fixed = constants(made.spec, made.shape.context)
    pooled = isinstance(made.spec.head, PoolSpec)
    compute = _vectors if pooled else _logits
    b = compute(made, made.program, lambda name: rounded(weights[name], source, fixed))
    a = b
    lossless = ("float32", WIDENED)
    if any(f not in lossless for f in (*made.formats.values(), made.shape.kv_dtype)):
        whole = linear_inputs(exact_pages(made.program), made.formats, "")
        a = compute(made, whole, lambda name: exact(weights[name], source, fixed))
    if pooled:
        return Measured(
            accuracy={
                "vector_error": round(float((a - b).norm() / a.norm()), 6),
                "vector_max": round(float((a - b).abs().max()), 6),
            },
            reference=b.numpy(),
        )
    targets = torch.tensor(prompt(made)[1:])[:, None]
    return Measured(
        accuracy={
            "logit_error": round(float((a - b).norm() / a.norm()), 6),
            "logit_max": round(float((a - b).abs().max()), 6),
            "top1": round(float((a.argmax(1) == b.argmax(1)).double().mean()), 6),
        },
        reference=b[:-1].log_softmax(1).gather(1, targets)[:, 0].numpy(),
    )


def exact_pages(program: Program) -> Program:
    """The program with keys and values kept as they were computed."""
    calls = (
        replace(call, attrs={**call.attrs, "kv_dtype": "float32"})
        if "kv_dtype" in call.attrs
        else call
        for call in program.calls
    )
    return replace(program, calls=tuple(calls))


def check_accuracy(accuracy: dict[str, float], config: CompileConfig) -> None:
    limit = config.accuracy.max_delta
    what = "vector" if "vector_error" in accuracy else "logit"
    if limit is not None and accuracy[f"{what}_error"] > limit:
        raise CompileError(
            f"quant={config.quant.scheme} dtype={config.dtype} kv.dtype={config.kv.dtype}: "
            f"relative {what} error {accuracy[f'{what}_error']:.4g} exceeds "
            f"accuracy.max_delta={limit:g}; choose smaller groups, another scheme or a larger limit"
        )


def _logits(made: Design, program: Program, weight: WeightOf) -> torch.Tensor:
    return _computed(made, program, [prompt(made)], weight, "logits", until="logits")


def _vectors(made: Design, program: Program, weight: WeightOf) -> torch.Tensor:
    return _computed(made, program, golden_prompts(made), weight, "embedding", until=None)


def _computed(
    made: Design,
    program: Program,
    prompts: list[list[int]],
    weight: WeightOf,
    name: str,
    *,
    until: str | None,
) -> torch.Tensor:
    """One value of the step that computes the prompts, each from its first token on."""
    size = made.shape.page_size
    tables = _tables(prompts, size, 0)
    chunks = [
        Chunk(tokens=tokens, pages=pages) for tokens, pages in zip(prompts, tables, strict=True)
    ]
    inputs = greedy_step(chunks, size, made.shape.edits, every_row=until is not None)
    state = new_state(program, sum(map(len, tables)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums, so the same record, on any number of cores
    try:
        with torch.inference_mode():
            out = run(program, inputs, state, weight, keep=(name,), until=until)
            return out[name].double()
    finally:
        torch.set_num_threads(threads)


def check_device(made: Design, measured: Measured, session: Session, scheme: str) -> float:
    """The device's logprobs of the prompt (or vectors of the golden prompts) against the
    reference's: the one test every compile makes of kernels, plans and packing together."""
    if isinstance(made.spec.head, PoolSpec):
        what = "vector"
        found = np.asarray(
            [golden.vector for golden in golden_vectors(session, golden_prompts(made))]
        )
    else:
        what, tokens = "logprob", prompt(made)
        rows = list(range(len(tokens) - 1))
        found = _step(session, [tokens], [0], rows=rows, targets=tokens[1:]).logprob
    difference = found.astype(np.float64) - measured.reference
    error = float(np.sqrt(np.mean(difference**2)) / max(float(measured.reference.std()), 1e-9))
    kv = made.shape.kv_dtype
    limit = max(DEVICE_LIMIT[scheme], DEVICE_LIMIT[kv] if kv.startswith("fp8") else 0.0)
    if scheme != "float32" and any(isinstance(layer.ffn, MoeFfn) for layer in made.spec.layers):
        limit *= EXPERTS_SLACK
    if not error <= limit:
        raise CompileError(
            f"the compiled model and the reference disagree: {what} error {error:.3g} exceeds "
            f"{limit:g} for {scheme} and {kv} pages; this is a defect of a kernel, please report it"
        )
    return error


def golden_tokens(session: Session, prompts: list[list[int]]) -> tuple[Golden, ...]:
    """Greedy tokens of each prompt, all in one batch, as `verify` will ask for them again."""
    tables = _tables(prompts, session.capacity.page_size, GOLDEN_TOKENS)
    rows = [sum(map(len, prompts[: i + 1])) - 1 for i in range(len(prompts))]
    first = _step(session, prompts, [0] * len(prompts), rows=rows, tables=tables)
    out = [first.token.tolist()]  # the next step overwrites the array
    for step in range(GOLDEN_TOKENS - 1):
        before = [len(tokens) + step for tokens in prompts]
        fed = [[-1 - slot] for slot in range(len(prompts))]
        later = _step(session, fed, before, rows=range(len(prompts)), tables=tables)
        out.append(later.token.tolist())
    return tuple(
        Golden(prompt=tuple(prompt), tokens=tuple(tokens))
        for prompt, tokens in zip(prompts, zip(*out, strict=True), strict=True)
    )


def golden_vectors(session: Session, prompts: list[list[int]]) -> tuple[Golden, ...]:
    """The vector of each prompt, one step each."""
    found = []
    for tokens in prompts:
        out = _step(session, [tokens], [0], rows=())
        assert out.embedding is not None
        vector = tuple(float(x) for x in out.embedding[0])
        found.append(Golden(prompt=tuple(tokens), vector=vector))
    return tuple(found)


def same_golden(one: Golden, two: Golden, kind: str) -> bool:
    """Equal tokens; vectors within what a kernel of that number format may differ by."""
    if one.tokens != two.tokens or len(one.vector) != len(two.vector):
        return False
    a, b = np.asarray(one.vector), np.asarray(two.vector)
    return bool(np.linalg.norm(a - b) <= DEVICE_LIMIT[kind] * np.linalg.norm(a))


def _tables(prompts: list[list[int]], size: int, room: int) -> list[list[int]]:
    """Pages for every prompt and `room` tokens more, one after the other."""
    tables: list[list[int]] = []
    used = 0
    for tokens in prompts:
        count = -(-(len(tokens) + room) // size)
        tables.append(list(range(used, used + count)))
        used += count
    return tables


def golden_prompts(made: Design) -> list[list[int]]:
    """One of a few tokens, and one longer; only one where a step holds a single sequence."""
    long = prompt(made, seed=1)
    return [long[:5], long][: min(2, made.buckets[-1].seqs)]


def golden_session(artifact: Artifact) -> Session:
    """A session with room for the verification steps only."""
    return open_session(artifact, kv_tokens=4 * (PROMPT_TOKENS + GOLDEN_TOKENS))


def _step(
    session: Session,
    chunks: list[list[int]],
    before: list[int],
    *,
    rows: Sequence[int],
    targets: list[int] | None = None,
    tables: list[list[int]] | None = None,
) -> StepOutput:
    """One greedy step: sequence s has `before[s]` tokens stored and adds `chunks[s]`."""
    size = session.capacity.page_size
    pages = tables or [list(range(-(-len(chunks[0]) // size)))]
    positions = [p for b, c in zip(before, chunks, strict=True) for p in range(b, b + len(c))]
    slots = [
        pages[s][p // size] * size + p % size
        for s, (b, c) in enumerate(zip(before, chunks, strict=True))
        for p in range(b, b + len(c))
    ]
    owner = [s for s, c in enumerate(chunks) for _ in c]
    count = len(rows)
    zero, one = np.zeros(count, np.float32), np.ones(count, np.float32)
    none = np.zeros(count, np.int32)

    def ints(values: Iterable[int]) -> npt.NDArray[np.int32]:
        return np.fromiter(values, np.int32)

    ticket = session.submit(
        StepInput(
            tokens=ints(t for c in chunks for t in c),
            positions=ints(positions),
            kv_slots=ints(slots),
            seq_start=ints(accumulate(map(len, chunks), initial=0)),
            seq_len=ints(b + len(c) for b, c in zip(before, chunks, strict=True)),
            pages=[ints(table) for table in pages],
            row_token=ints(rows),
            row_slot=ints(owner[row] for row in rows),
            row_target=ints(targets) if targets else none - 1,
            row_flags=none + LOGPROB_WANTED,
            row_top=none,
            temperature=zero,
            top_k=none,
            top_p=one,
            min_p=zero,
            frequency=zero,
            presence=zero,
            repetition=one,
            seed=np.zeros(count, np.int64),
            edits=np.zeros((0, 4), np.int32),
            rope_variant=np.zeros(len(positions), np.int32),  # as in the reference
        )
    )
    return session.collect(ticket)
