"""One CUDA C++ function (CUTLASS/CuTe headers) to a cubin, with the pip-installed nvcc.

nvcc needs no GPU. The packages `nvidia-cuda-nvcc`, `nvidia-cuda-runtime` and `nvidia-cuda-cccl`
bring compiler and headers, `nvidia-cutlass` (BSD-3) the CUTLASS headers. Constants of the source
become preprocessor definitions; the function is `extern "C"`. Runs in a worker process of
`kernels.cuda.build`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

from kernels.cuda import cubin
from kernels.launch import Binary, Parameter, Source
from kernels.toolchain import ToolchainError

CODE = Path(__file__).parent / "code"
REMEDY = "pip install 'headstart[cutlass]'"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-cubin",
    "--expt-relaxed-constexpr",
    "-Xcudafe=--display_error_number",
)


def root() -> Path:
    """The folder of the CUDA toolkit's wheels."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for toolkit in sorted(Path(place).glob("cu*"), reverse=True):
            if (toolkit / "bin" / "nvcc").exists():
                return toolkit
    raise ToolchainError(f"nvcc is not installed, it builds the CUTLASS kernels; {REMEDY}")


def cutlass() -> Path:
    """The CUTLASS headers."""
    spec = importlib.util.find_spec("cutlass_library")
    for place in (spec.submodule_search_locations or []) if spec else []:
        headers = Path(place) / "source" / "include"
        if (headers / "cute" / "tensor.hpp").exists():
            return headers
    raise ToolchainError(f"the CUTLASS headers are not installed; {REMEDY}")


def available() -> bool:
    try:
        return bool(root() and cutlass())
    except ToolchainError:
        return False


@cache
def version() -> str:
    """nvcc's version and that of the CUTLASS headers."""
    done = _run([str(root() / "bin" / "nvcc"), "--version"])
    found = re.search(r"V(\d+\.\d+\.\d+)", done)
    return f"{found[1] if found else 'unknown'} cutlass {metadata.version('nvidia-cutlass')}"


def compile_source(source: Source, arch: str) -> tuple[Binary, bytes]:
    module, _, name = source.function.rpartition(".")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.cubin"
        defines = [f"-D{key}={_literal(value)}" for key, value in source.constants]
        _run(
            [
                str(root() / "bin" / "nvcc"),
                *FLAGS,
                f"-gencode=arch=compute_{arch[3:]},code={arch}",
                f"-I{cutlass()}",
                f"-I{root() / 'include'}",
                f"-I{root() / 'include' / 'cccl'}",
                *defines,
                f"-DWARPS={source.warps}",
                f"-DSTAGES={source.stages}",
                f"{module}.cu",
                "-o",
                str(target),
            ],
            CODE,
        )
        image = target.read_bytes()
    entries, elf_abi = cubin.read(image)
    if name not in entries:
        raise ToolchainError(
            f'kernel {source.function}: expected the extern "C" function {name} in {module}.cu, '
            f"found {', '.join(sorted(entries))}"
        )
    entry = entries[name]
    kinds = [(n, "tensormap" if t.startswith("tensordesc") else t) for n, t in source.signature]
    if len(kinds) != len(entry.parameters):
        raise ToolchainError(
            f"kernel {source.function}: {len(kinds)} parameters are declared, the cubin has "
            f"{len(entry.parameters)}"
        )
    shared = re.search(r"^// shared: (\w+)$", (CODE / f"{module}.cu").read_text("utf-8"), re.M)
    return Binary(
        sha256=hashlib.sha256(image).hexdigest(),
        size=len(image),
        entry=name,
        block=32 * source.warps,
        cluster=source.ctas,
        shared=int(dict(source.constants).get(shared[1], 0) or 0) if shared else 0,
        scratch=0,
        scratch_align=1,
        parameters=tuple(
            Parameter(
                name=n,
                kind=t if t == "tensormap" else "pointer" if t[:1] == "*" else "number",
                offset=offset,
                size=size,
            )
            for (n, t), (offset, size) in zip(kinds, entry.parameters, strict=True)
        ),
        registers=entry.registers,
        stack=entry.stack,
        elf_abi=elf_abi,
        pdl=False,
        versions={"nvcc": version()},
    ), image


def _literal(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be started: {error}; {REMEDY}") from error
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise ToolchainError(f"nvcc ended with status {done.returncode}\n{tail}")
    return done.stdout
