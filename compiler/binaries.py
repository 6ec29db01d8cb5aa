"""What plans and manifests say of a built cubin. Light: no torch, so that benchmarks can use it.

Comes in: a `Binary` of the toolchain. Goes out: its path in an artifact, its entry of the manifest,
and how numbers are packed for it. Called by the recorder and the packer.
"""

from __future__ import annotations

from kernels.launch import Binary
from runtime.artifact import CudaBinary, KernelParameter

PACK = {"i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}  # a Number's type for struct


def code_path(binary: Binary) -> str:
    return f"code/{binary.sha256}.cubin"


def described(binary: Binary) -> CudaBinary:
    """What the manifest says of a cubin."""
    return CudaBinary(
        path=code_path(binary),
        entry=binary.entry,
        block=binary.block,
        cluster=binary.cluster,
        shared=binary.shared,
        registers=binary.registers,
        stack=binary.stack,
        elf_abi=binary.elf_abi,
        parameters=tuple(
            KernelParameter(
                kind="null" if p.kind == "scratch" else p.kind, offset=p.offset, size=p.size
            )
            for p in binary.parameters
        ),
    )
