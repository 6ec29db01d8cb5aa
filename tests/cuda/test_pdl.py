"""Programmatic dependent launch is legal on every edge of every plan: `compiler.record` sets the
flag before each node whose cubin waits, and each kernel there is waits on every path, before it
touches memory. That the flag is set is checked on recorded plans (test_executing_plan.py), that the
cubins wait where they are built (test_build_all.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import cuda_harness
import pytest

import kernels.cuda.register
import kernels.ops.register  # noqa: F401
from kernels.cuda.build import CODE
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import KERNELS
from kernels.op import OPS

MEMORY = ("load", "store", "atomic_add", "atomic_max", "atomic_or", "atomic_cas", "load_rows")
WEIGHTS = {"w_ptr", "norm_ptr"}  # no kernel writes them


def touched(statement: ast.stmt) -> Iterator[str]:
    """Accesses to memory, but for loads of weights."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in MEMORY:
            names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            pointers = {name for name in names if name.endswith("_ptr")}
            if not (ast.unparse(node.func) == "tl.load" and pointers and pointers <= WEIGHTS):
                yield ast.unparse(node)


def entries() -> dict[str, ast.FunctionDef]:
    """Device functions that stand in plans: by convention those called `…_kernel`. Probes are
    measured alone."""
    return {
        f"{path.stem}.{node.name}": node
        for path in sorted(CODE.glob("*.py"))
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if path.stem != "probe"
    }


ENTRIES = entries()


@pytest.mark.parametrize("kernel", KERNELS["cuda"], ids=lambda kernel: kernel.name)
def test_launches_name_what_is_checked(kernel: CudaKernel) -> None:
    for _, case in cuda_harness.cases(OPS[kernel.op], "bfloat16"):
        if kernel.accepts(case.call) is None:
            for launch in kernel.launches(case.call, kernel.default(case.call)):
                assert launch.source is not None
                if launch.source.language == "triton":
                    assert launch.source.function in ENTRIES


@pytest.mark.parametrize("name", ENTRIES)
def test_kernels_wait_on_every_path_before_they_touch_memory(name: str) -> None:
    body = ENTRIES[name].body
    waits = [i for i, line in enumerate(body) if ast.unparse(line) == "pdl.wait()"]
    assert len(waits) == 1, f"{name} has {len(waits)} unconditional waits"
    for line in body[: waits[0]]:
        assert not any(isinstance(inner, ast.Return) for inner in ast.walk(line)), name
        assert not list(touched(line)), f"{name} touches memory before it waits"
