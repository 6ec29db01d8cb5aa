"""The accuracy record means what it says, and a device that computes something else is refused."""

from __future__ import annotations

import numpy as np
import pytest
from toy_specs import SHAPE, toy, toy_config

from compiler.design import design
from compiler.errors import CompileError
from compiler.model import constants
from compiler.store import pack, rounded
from compiler.verify import DEVICE_LIMIT, check_accuracy, check_device, measure, prompt
from compiler.weights import random_weights
from runtime.device.base import Capacity, StepInput, StepOutput

SPEC = toy("llama")
WEIGHTS = random_weights(SPEC, 0)


class FakeSession:
    """Answers every scored row with given logprobs."""

    def __init__(self, logprobs: np.ndarray) -> None:
        self.capacity = Capacity(context=64, vocab=97, page_size=16, pages=4, max_seqs=4,
                                 max_tokens=24, slots=4, edits=8)  # fmt: skip
        self.logprobs = logprobs.astype(np.float32)
        self.step: StepInput | None = None

    def submit(self, step: StepInput) -> int:
        self.step = step
        return 0

    def collect(self, ticket: int) -> StepOutput:
        rows = len(self.logprobs)
        none = np.zeros(rows, np.int32)
        return StepOutput(token=none, logprob=self.logprobs, top_ids=none, top_logprobs=none,
                          status=none, seconds=0.0)  # fmt: skip

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("scheme", "dtype", "low", "high"),
    [("none", "float32", 0, 0), ("none", "bfloat16", 1e-4, 0.02), ("int8", "float32", 1e-3, 0.05),
     ("int4", "float32", 0.02, 0.5)],
)  # fmt: skip
def test_error_grows_as_numbers_shrink(scheme: str, dtype: str, low: float, high: float) -> None:
    made = design(SPEC, toy_config(SPEC, scheme, dtype))
    accuracy = measure(made, WEIGHTS).accuracy
    assert low <= accuracy["logit_error"] <= high


def test_what_pages_lose_is_part_of_the_error() -> None:
    errors = []
    for kv in ("float32", "bfloat16", "fp8_e4m3", "fp8_e5m2"):
        config = toy_config(SPEC)
        config.kv.dtype = kv
        errors.append(measure(design(SPEC, config), WEIGHTS).accuracy["logit_error"])
    assert errors[0] == 0 and errors == sorted(set(errors)) and errors[-1] < 0.2


def test_the_gate_names_both_numbers() -> None:
    config = toy_config(SPEC, "int4")
    config.accuracy.max_delta = 0.5
    check_accuracy({"logit_error": 0.4}, config)
    with pytest.raises(CompileError, match=r"0\.6 exceeds accuracy\.max_delta=0\.5"):
        check_accuracy({"logit_error": 0.6}, config)


def test_rounded_weights_are_what_the_layout_stores() -> None:
    """Dequantized by hand from codes and scales of the packed arrays."""
    made = design(SPEC, toy_config(SPEC, "int8"))
    weight = next(w for w in made.weights if w.name == "layers.0.down")
    arrays = pack(weight, WEIGHTS, constants(SPEC, SHAPE.context))
    data, scale = arrays["layers.0.down.data"], arrays["layers.0.down.scale"]
    tiles, steps, outputs, inputs = data.shape
    codes = (
        (data ^ 128).view(np.int8).transpose(0, 2, 1, 3).reshape(tiles * outputs, steps * inputs)
    )
    scales = scale.astype(np.float32).transpose(0, 2, 1).reshape(tiles * outputs, -1)
    by_hand = codes * np.repeat(scales, 32, axis=1)
    found = rounded(weight, WEIGHTS, constants(SPEC, SHAPE.context))
    assert np.array_equal(by_hand[: len(found)], found.numpy())


def test_a_device_that_agrees_passes_and_is_asked_for_the_prompt() -> None:
    made = design(SPEC, toy_config(SPEC))
    measured = measure(made, WEIGHTS)
    session = FakeSession(measured.reference)
    assert check_device(made, measured, session, "float32") < 1e-6
    assert session.step is not None
    assert session.step.tokens.tolist() == prompt(made)
    assert session.step.row_target.tolist() == prompt(made)[1:]


@pytest.mark.parametrize("scheme", DEVICE_LIMIT)
def test_a_device_that_disagrees_is_refused(scheme: str) -> None:
    made = design(SPEC, toy_config(SPEC))
    measured = measure(made, WEIGHTS)
    wrong = np.roll(measured.reference, 1)
    with pytest.raises(CompileError, match="disagree"):
        check_device(made, measured, FakeSession(wrong), scheme)
    with pytest.raises(CompileError, match="disagree"):
        check_device(made, measured, FakeSession(wrong * np.nan), scheme)
