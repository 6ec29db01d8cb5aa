"""The code an artifact carries: native libraries of every CPU level, or the cubins of its plans.

Comes in: a design and a config. Goes out: files for the package and what the manifest says of them.
Called by the pipeline.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compiler.binaries import code_path, described
from compiler.design import Design
from conf.schema import CompileConfig
from kernels.cuda.build import all_versions
from kernels.launch import COUNTERS_BYTES
from kernels.toolchain import (
    ToolchainError,
    build_levels,
    compiler_version,
    find_compiler,
    machine_levels,
)
from runtime.artifact import CpuLibrary, CudaBinary, Target
from runtime.device.native import ABI
from runtime.errors import NoSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """`files`: path in the artifact -> bytes."""

    target: Target
    files: Mapping[str, bytes]
    versions: Mapping[str, str]
    libraries: tuple[CpuLibrary, ...] = ()
    kernels: tuple[CudaBinary, ...] = ()
    counters_bytes: int = 0


def build_code(made: Design, config: CompileConfig) -> Code:
    return cuda_code(made, config) if made.target == "cuda" else cpu_code(Path(config.cache))


def cpu_code(cache: Path) -> Code:
    """One native library per instruction-set level of this machine's architecture, best last."""
    levels = machine_levels()
    try:
        built = build_levels([level.name for level in levels], cache)
    except (ToolchainError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise NoSpace(
                f"kernels: no space left in cache={cache} or the temporary folder; free some"
            ) from error
        raise
    libraries, files = [], {}
    for level, path in zip(levels, built, strict=True):
        library = CpuLibrary(
            level=level.name, path=f"code/{level.name}.so", requires=level.requires
        )
        libraries.append(library)
        files[library.path] = path.read_bytes()
    return Code(
        target=Target(
            kind="cpu",
            machine=platform.machine(),
            levels=tuple(library.level for library in libraries),
            abi=ABI,
        ),
        files=files,
        versions={"c++": compiler_version(find_compiler())},
        libraries=tuple(libraries),
    )


def cuda_code(made: Design, config: CompileConfig) -> Code:
    """Each distinct cubin once."""
    binaries = {binary.sha256: binary for binary in made.binaries.values()}
    ordered = [binaries[sha] for sha in sorted(binaries)]
    return Code(
        target=Target(
            kind="cuda", machine=str(config.target.arch), levels=(config.target.name,), abi=ABI
        ),
        files={code_path(binary): made.images[binary.sha256] for binary in ordered},
        versions=all_versions(list(made.binaries)),
        kernels=tuple(described(binary) for binary in ordered),
        counters_bytes=COUNTERS_BYTES,
    )
