"""Every CUDA kernel on every sample of its op, interpreted on CPU memory, against the reference."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from cuda_harness import Case, cases, check_case, run_case

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS
from kernels.op import OPS

KERNEL: dict[str, CudaKernel] = {k.name: k for k in KERNELS["cuda"]}


@functools.cache
def all_cases(op: str, dtype: str) -> list[tuple[str, Case]]:
    return list(cases(OPS[op], dtype))


# Long in the interpreter. In float32 the executed plans run them too.
LONG = ("attention", "mla_attention", "linear_tiles", "moe_gate_up", "moe_down")
CASES = [
    pytest.param(
        name,
        dtype,
        marks=[pytest.mark.slow] if dtype == "float32" and name.startswith(LONG) else [],
    )
    for name, kernel in sorted(KERNEL.items())
    for dtype in ("bfloat16", "float32")
    if not kernel.tuned_only
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernel_equals_reference(name: str, dtype: str) -> None:
    kernel = KERNEL[name]
    served = 0
    for label, case in all_cases(kernel.op, dtype):
        if kernel.accepts(case.call) is not None:
            continue
        served += 1
        fresh = replace(case, memory={n: t.clone() for n, t in case.memory.items()})
        run_case(kernel, fresh)
        try:
            check_case(fresh)
        except AssertionError as error:
            raise AssertionError(f"{name} on {label}: {error}") from error
    if dtype == "bfloat16":
        assert served, f"no sample of {kernel.op} is accepted by {name}"


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_sample_has_a_kernel(name: str) -> None:
    kernels = [k for k in KERNEL.values() if k.op == name and not k.tuned_only]
    for label, case in all_cases(name, "bfloat16"):
        reasons = {k.name: k.accepts(case.call) for k in kernels}
        assert None in reasons.values(), f"{name} on {label}: {reasons or 'no kernel'}"
