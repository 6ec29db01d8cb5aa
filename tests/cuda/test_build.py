"""Cubins: built without a GPU, cached, reproducible, with the ABI they declare."""

from __future__ import annotations

from pathlib import Path

import pytest

import kernels.cuda.register  # noqa: F401
from kernels.cuda import cubin
from kernels.cuda.build import build_cuda
from kernels.kernel import KERNELS, CallShape
from kernels.launch import Source
from kernels.toolchain import ToolchainError

ROWS = {"a": (4, 300), "b": (4, 300), "out": (4, 300)}
CALL = CallShape(
    op="add",
    shapes={"live": (8,), **ROWS},
    dtypes={"live": "int32", **dict.fromkeys(ROWS, "bfloat16")},
    formats={},
    attrs={},
)


def source() -> Source:
    (kernel,) = [k for k in KERNELS["cuda"] if k.op == "add"]
    (launch,) = kernel.launches(CALL, kernel.default(CALL))
    assert launch.source is not None
    return launch.source


def test_a_cubin_is_the_same_in_every_build_and_says_its_abi(tmp_path: Path) -> None:
    wanted = source()
    (one, image), (two, again) = (
        build_cuda([wanted], tmp_path / name)[wanted] for name in ("one", "two")
    )
    assert image == again and one == two
    assert [p.offset for p in one.parameters] == [0, 8, 16, 24, 32, 40]
    assert [p.kind for p in one.parameters] == ["pointer"] * 4 + ["scratch", "null"]
    entries, _ = cubin.read(image)
    assert entries[one.entry].registers == one.registers > 0
    assert one.stack == 0 and one.elf_abi == 7 and one.pdl


def test_a_damaged_cache_entry_is_built_again(tmp_path: Path) -> None:
    wanted = source()
    before = build_cuda([wanted], tmp_path)[wanted]
    (entry,) = tmp_path.glob("cuda/*/kernel.bin")
    entry.write_bytes(entry.read_bytes()[:-1] + b"x")
    assert build_cuda([wanted], tmp_path)[wanted] == before


def test_errors_name_the_source(tmp_path: Path) -> None:
    wrong = Source(
        function="elementwise.elementwise_kernel", signature=(("a_ptr", "*bf16"),), constants=()
    )
    with pytest.raises(
        ToolchainError, match=r"elementwise\.elementwise_kernel: parameter '\w+' is given or"
    ):
        build_cuda([wrong], tmp_path)
    with pytest.raises(ToolchainError, match="'sm_70' is not supported"):
        build_cuda([source()], tmp_path, "sm_70")
    with pytest.raises(ToolchainError, match="no device code nothing"):
        build_cuda([Source(function="nothing.here", signature=(), constants=())], tmp_path)


def test_bytes_that_are_no_cubin() -> None:
    with pytest.raises(ValueError, match="not a cubin"):
        cubin.read(b"\x7fELG" + bytes(100))
