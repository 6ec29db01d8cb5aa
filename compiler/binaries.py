"""What plans and manifests say of a built cubin. Light: no torch, so that benchmarks can use it.

Comes in: a `Binary` of the toolchain. Goes out: its path in an artifact, its entry of the manifest,
and how numbers are packed for it. Called by the recorder and the packer.
"""

from __future__ import annotations

from kernels.launch import Binary, Descriptor, MapRecipe
from runtime.artifact import CudaBinary, KernelParameter, TensorMap

PACK = {"i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}  # a Number's type for struct


def code_path(binary: Binary) -> str:
    return f"code/{binary.sha256}.cubin"


def tensor_map(slot: Descriptor, recipe: MapRecipe, arena: int, offset: int) -> TensorMap:
    """The map a binary expects over a slot that lies at `offset` of the arena."""
    return TensorMap(
        arena=arena,
        offset=offset,
        element_type=recipe.element_type,
        element_size=recipe.element_size,
        shape=slot.shape,
        strides=slot.strides,
        box=recipe.box,
        swizzle=recipe.swizzle,
    )


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
