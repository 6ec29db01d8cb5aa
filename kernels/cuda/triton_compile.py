"""One Triton function to a cubin. Runs in a worker process of `kernels.cuda.build`, the only place
where Triton compiles.

The ABI is: declared parameters in order without constants, tensor descriptors expanded to the map,
its shape (int32) and strides (int64), then two pointers (global scratch, profile scratch). It is
read back from the cubin and held against the declaration.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from kernels.cuda import cubin
from kernels.cuda.build import ARCHITECTURES, versions
from kernels.launch import Binary, MapRecipe, Parameter, Source
from kernels.toolchain import ToolchainError

SIZES = {"i8": 1, "u8": 1, "i1": 1, "i16": 2, "fp16": 2, "bf16": 2, "i32": 4, "u32": 4, "fp32": 4}
SIZES |= {"i64": 8, "u64": 8, "fp64": 8}
# The device's element type codes of a tensor map, as the driver's encoder wants them.
_HOST_TYPE = {8: 10, 9: 8, 10: 9}


def compile_source(source: Source, arch: str) -> tuple[Binary, bytes]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = source.function.rpartition(".")
    function = getattr(importlib.import_module(f"kernels.cuda.code.{module}"), name)
    types, constants = dict(source.signature), dict(source.constants)
    names: list[str] = list(function.arg_names)
    if set(names) != {*types, *constants}:
        wrong = sorted(set(names) ^ {*types, *constants})
        raise ToolchainError(
            f"kernel {source.function}: parameter {wrong[0]!r} is given or missing"
        )
    declared = {n: types.get(n, "constexpr") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if declared[n][:1] == "*"
    }
    options: dict[str, Any] = {
        "num_warps": source.warps,
        "num_stages": source.stages,
        "num_ctas": source.ctas,
        "enable_fp_fusion": True,
    }
    if source.registers:
        options["maxnreg"] = source.registers
    compiled = triton.compile(
        ASTSource(fn=function, signature=declared, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", ARCHITECTURES[arch], 32),
        options=options,
    )
    facts, image, ptx = compiled.metadata, compiled.asm["cubin"], compiled.asm["ptx"]
    entries, elf_abi = cubin.read(image)
    entry = entries[facts.name]
    maps, parameters = _parameters(declared, list(facts.tensordesc_meta or []))
    found = entry.parameters
    if [p[2] for p in parameters] != [size for _, size in found]:
        raise ToolchainError(
            f"kernel {source.function}: declared parameters {parameters}, the cubin has {found}"
        )
    block = 32 * facts.num_warps
    if entry.block is None or entry.block[0] != block or facts.profile_scratch_size:
        raise ToolchainError(
            f"kernel {source.function}: expected {block} threads and no profiler, found "
            f"{entry.block} and {facts.profile_scratch_size} bytes of profile scratch"
        )
    return Binary(
        sha256=hashlib.sha256(image).hexdigest(),
        size=len(image),
        entry=facts.name,
        block=block,
        cluster=facts.num_ctas,
        shared=facts.shared,
        scratch=facts.global_scratch_size,
        scratch_align=facts.global_scratch_align,
        parameters=tuple(
            Parameter(name=n, kind=kind, offset=offset, size=size, axis=axis)
            for (n, kind, size, axis), (offset, _) in zip(parameters, found, strict=True)
        ),
        maps=maps,
        registers=entry.registers,
        stack=entry.stack,
        elf_abi=elf_abi,
        pdl="griddepcontrol.wait" in ptx,
        versions=versions(),
    ), image


def _parameters(
    declared: dict[str, str], recipes: list[dict[str, Any]]
) -> tuple[dict[str, MapRecipe], list[tuple[str, str, int, int]]]:
    """Map recipes by parameter, and (name, kind, size, axis) in ABI order."""
    maps: dict[str, MapRecipe] = {}
    result: list[tuple[str, str, int, int]] = []
    for name, type in declared.items():
        if type == "constexpr":
            continue
        if type.startswith("tensordesc"):
            recipe = recipes.pop(0)
            axes = len(recipe["block_size"])
            maps[name] = MapRecipe(
                element_type=_HOST_TYPE.get(recipe["elem_type"], recipe["elem_type"]),
                element_size=recipe["elem_size"],
                swizzle=recipe["swizzle"],
                box=tuple(recipe["block_size"]),
            )
            result.append((name, "tensormap", 128, 0))
            result += [(name, "shape", 4, axis) for axis in range(axes)]
            result += [(name, "stride", 8, axis) for axis in range(axes)]
        elif type[:1] == "*":
            result.append((name, "pointer", 8, 0))
        else:
            result.append((name, "number", SIZES[type], 0))
    return maps, [*result, ("", "scratch", 8, 0), ("", "null", 8, 0)]
