"""One CUDA C++ function (CUTLASS/CuTe headers) to a cubin, with nvcc.

nvcc needs no GPU. The packages `nvidia-cuda-nvcc`, `nvidia-cuda-runtime` and `nvidia-cuda-cccl`
bring compiler and headers (without them the machine's own CUDA toolkit is taken; its version is
part of every key), `nvidia-cutlass` (BSD-3) the CUTLASS headers. Runs in a worker process of
`kernels.cuda.build`.

A source includes "launch.cuh" after all other headers; it is made here from the `Source`. The
function is `extern "C"` and takes PARAMETERS, a macro made from the signature, so the ABI is the
declaration by construction: pointers and numbers as they are, tensor maps (`CUtensorMap`) by value.
Numbers among the constants are `constexpr`; text is a macro for an identifier (`none` when empty),
an absent slot one for `nullptr`; WARPS, STAGES and CLUSTER are macros. The constant SHARED is the
dynamic shared memory in bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path

from kernels.cuda import cubin
from kernels.cuda.kernel import SIZES
from kernels.launch import Binary, Constant, MapRecipe, Parameter, Source
from kernels.toolchain import ToolchainError

CODE = Path(__file__).parent / "code"
REMEDY = "pip install 'headstart[cutlass]'"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90",  # programmatic dependent launch
    "--expt-relaxed-constexpr",
)
TYPES = {
    "bf16": "__nv_bfloat16",
    "fp32": "float",
    "fp64": "double",
    "i32": "int",
    "i64": "long long",
    "i8": "signed char",
    "u8": "unsigned char",
}
# The driver's codes: element types of a tensor map, and the swizzle over 128 bytes.
MAP_TYPES = {"bf16": (9, 2), "fp8e4nv": (0, 1), "u8": (0, 1)}
SWIZZLE_128 = 3
# ptxas only warns when it gives up overlapping products or moving registers between warp groups.
LOSSES = ("wgmma", "setmaxnreg")
HEADER = "launch.cuh"
USUAL = Path("/usr/local/cuda")


def root() -> Path:
    """The folder of the CUDA toolkit: of its wheels, of the nvcc in PATH, or where it is usual."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for toolkit in sorted(Path(place).glob("cu*"), reverse=True):
            if (toolkit / "bin" / "nvcc").exists():
                return toolkit
    found = shutil.which("nvcc")
    for toolkit in (*([Path(found).resolve().parent.parent] if found else []), USUAL):
        parts = ("bin/nvcc", "bin/ptxas", "include/cuda_runtime.h")
        if all((toolkit / part).exists() for part in parts):
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


@cache
def missing() -> str | None:
    """Why sources in CUDA C++ cannot be built here, or None."""
    try:
        root(), cutlass()
    except ToolchainError as error:
        return str(error)
    return None


@cache
def version() -> str:
    """nvcc's version and that of the CUTLASS headers; ToolchainError where one is missing."""
    cutlass()
    done = _run([str(root() / "bin" / "nvcc"), "--version"])
    found = re.search(r"V(\d+\.\d+\.\d+)", done)
    return f"{found[1] if found else 'unknown'} cutlass {metadata.version('nvidia-cutlass')}"


def compile_source(source: Source, arch: str) -> tuple[Binary, bytes]:
    module, _, name = source.function.rpartition(".")
    tools, headers = root(), cutlass()
    with tempfile.TemporaryDirectory() as folder:
        ptx, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        (Path(folder) / HEADER).write_text(_header(source), "utf-8")
        nvcc = [str(tools / "bin" / "nvcc"), f"-arch={arch}", *FLAGS]
        includes = [folder, headers, tools / "include", tools / "include" / "cccl"]
        _run(
            [
                *nvcc,
                *(f"-I{include}" for include in includes),
                "-ptx",
                f"{module}.cu",
                "-o",
                str(ptx),
            ],
            CODE,
        )
        limit = [f"-maxrregcount={source.registers}"] if source.registers else []
        ptxas = str(tools / "bin" / "ptxas")
        _run([ptxas, f"-arch={arch}", "-O3", *limit, ptx.name, "-o", target.name], Path(folder))
        image, text = target.read_bytes(), ptx.read_text("utf-8")
    entries, elf_abi = cubin.read(image)
    if name not in entries:
        raise ToolchainError(
            f'kernel {source.function}: expected the extern "C" function {name} in {module}.cu, '
            f"found {', '.join(sorted(entries))}"
        )
    entry = entries[name]
    _check(source, entry)
    return Binary(
        sha256=hashlib.sha256(image).hexdigest(),
        size=len(image),
        entry=name,
        block=32 * source.warps,
        cluster=source.ctas,
        shared=int(dict(source.constants).get("SHARED") or 0),
        scratch=0,
        scratch_align=1,
        parameters=tuple(
            Parameter(name=n, kind=_kind(t), offset=offset, size=size)
            for (n, t), (offset, size) in zip(source.signature, entry.parameters, strict=True)
        ),
        maps={n: _recipe(t) for n, t in source.signature if _kind(t) == "tensormap"},
        registers=entry.registers,
        stack=entry.stack,
        elf_abi=elf_abi,
        pdl="griddepcontrol.wait" in text,
        versions={"nvcc": version()},
    ), image


def _header(source: Source) -> str:
    declared = ", ".join(f"{_declared(type)} {name}" for name, type in source.signature)
    lines = [
        f"#define PARAMETERS {declared}",
        f"#define WARPS {source.warps}",
        f"#define STAGES {source.stages}",
        f"#define CLUSTER {source.ctas}",
        *(_constant(name, value) for name, value in source.constants),
    ]
    return "\n".join(lines) + "\n"


def _constant(name: str, value: Constant) -> str:
    if value is None:
        return f"#define {name} nullptr"
    if isinstance(value, str):
        return f"#define {name} {value or 'none'}"
    type = {bool: "bool", int: "int", float: "float"}[value.__class__]
    return f"constexpr {type} {name} = {str(value).lower()}{'f' if type == 'float' else ''};"


def _declared(type: str) -> str:
    if _kind(type) == "tensormap":
        return "const __grid_constant__ CUtensorMap"
    return TYPES[type.removeprefix("*")] + ("*" if type[:1] == "*" else "")


def _kind(type: str) -> str:
    if type.startswith("tensordesc"):
        return "tensormap"
    return "pointer" if type[:1] == "*" else "number"


def _recipe(type: str) -> MapRecipe:
    """C++ sources take maps with boxes as declared, whose rows are swizzled over 128 bytes."""
    match = re.fullmatch(r"tensordesc<(\w+)\[([\d, ]+)\]>", type)
    if match is None or match[1] not in MAP_TYPES:
        raise ToolchainError(f"tensor map {type!r}: expected one of {', '.join(MAP_TYPES)}")
    code, size = MAP_TYPES[match[1]]
    box = tuple(int(n) for n in match[2].split(","))
    if box[-1] * size != 128 or max(box) > 256:
        raise ToolchainError(
            f"tensor map {type!r}: a box has rows of 128 bytes and sides of 256 at most"
        )
    return MapRecipe(element_type=code, element_size=size, swizzle=SWIZZLE_128, box=box)


def _check(source: Source, entry: cubin.Entry) -> None:
    """The cubin's parameters, threads and cluster against the declaration."""
    sizes = [
        {"tensormap": 128, "pointer": 8}.get(_kind(t)) or SIZES[t] for _, t in source.signature
    ]
    if [size for _, size in entry.parameters] != sizes:
        raise ToolchainError(
            f"kernel {source.function}: declared parameters of {sizes} bytes, the cubin has "
            f"{entry.parameters}"
        )
    cluster = (entry.cluster or (1, 1, 1))[0]
    threads = (entry.block or entry.most_threads or (0, 0, 0))[0]
    if cluster != source.ctas or threads != 32 * source.warps:
        raise ToolchainError(
            f"kernel {source.function}: expected {32 * source.warps} threads in clusters of "
            f"{source.ctas}, the cubin has {threads} in clusters of {cluster}"
        )


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be started: {error}; {REMEDY}") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        tool = Path(command[0]).name
        raise ToolchainError(f"{tool} ended with status {done.returncode}\n{tail}")
    for line in done.stderr.splitlines():
        if any(word in line for word in LOSSES):
            raise ToolchainError(line.strip())
    return done.stdout
