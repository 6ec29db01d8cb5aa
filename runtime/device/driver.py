"""The CUDA driver as plain calls: values come out, errors are raised and say what to do.

Comes in: the module `cuda.bindings.driver`, which only cuda.py imports. Goes out: `Driver`, and the
GPU an artifact is to run on, checked. Everything else of the CUDA device takes a `Driver`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from runtime.artifact import Artifact, CudaBinary
from runtime.errors import HeadstartError, IncompatibleTarget

# What of the driver's errors the user can do something about.
REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free GPU memory (nvidia-smi shows who holds it) or lower "
    "kv_tokens",
    "CUDA_ERROR_NO_DEVICE": "run it on a machine with an NVIDIA GPU, or compile for target=cpu",
    "CUDA_ERROR_STUB_LIBRARY": "install the NVIDIA driver; a toolkit's stub stands in its place",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process holds the GPU for itself; end it",
    "CUDA_ERROR_DEVICE_NOT_LICENSED": "license the virtual GPU",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start the services of the NVIDIA driver (fabric manager)",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot: kernel module and driver library differ",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "update the NVIDIA driver",
    "CUDA_ERROR_NOT_SUPPORTED": "update the NVIDIA driver",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "compile the artifact for this GPU",
    "CUDA_ERROR_INVALID_IMAGE": "update the NVIDIA driver or compile the artifact again",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver",
}
# Edges with ports came with 12.3, programmatic ones work in graphs since 12.4.
DRIVER_FLOOR = 12040
ABI_FLOOR = {7: 12000, 8: 13000}  # ELF ABI of a cubin -> oldest driver that loads it


class DriverError(HeadstartError):
    """A call of the driver failed for a reason that is ours or the hardware's."""


class Driver:
    """`driver(name, *arguments)` calls the binding of that name; `api` has its types."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def __call__(self, name: str, *arguments: Any) -> Any:
        try:
            code, *values = getattr(self.api, name)(*arguments)
        except (AttributeError, RuntimeError) as error:  # the binding or the driver lacks it
            raise IncompatibleTarget(
                f"the CUDA driver offers no {name} ({error}); install the NVIDIA driver of CUDA "
                "12.4 or newer and cuda-bindings 13"
            ) from error
        if code != 0:
            raise failure(name, code)
        return values[0] if len(values) == 1 else tuple(values)

    def native(self, name: str, *arguments: Any) -> None:
        """The C function itself, with ctypes arguments: for what the bindings cannot pass."""
        code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
        if code != 0:
            raise failure(name, self.api.CUresult(code))


def failure(call: str, code: Any) -> HeadstartError:
    name = getattr(code, "name", str(code))
    if name in REMEDIES:
        return IncompatibleTarget(f"the CUDA driver says {name} to {call}; {REMEDIES[name]}")
    return DriverError(f"the CUDA driver says {name} to {call}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """`driver`: version as the driver counts (13000 is 13.0); `shared`: most dynamic shared memory
    of a block, bytes; `l2`: bytes of second-level cache."""

    index: int
    handle: Any
    name: str
    capability: tuple[int, int]
    driver: int
    multiprocessors: int
    shared: int
    l2: int


def find_gpu(driver: Driver, index: int) -> Gpu:
    """The GPU `index`, in the driver's order. Starts the driver."""
    driver("cuInit", 0)
    count = driver("cuDeviceGetCount")
    if count == 0:
        raise IncompatibleTarget(
            f"no NVIDIA GPU is visible; {REMEDIES['CUDA_ERROR_NO_DEVICE']} "
            "(CUDA_VISIBLE_DEVICES hides GPUs)"
        )
    if not 0 <= index < count:
        raise IncompatibleTarget(
            f"gpu={index}: this machine shows {count} GPU{'s' * (count > 1)}; give 0 to {count - 1}"
        )
    handle = driver("cuDeviceGet", index)
    kinds = driver.api.CUdevice_attribute

    def attribute(name: str) -> int:
        kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(driver("cuDeviceGetAttribute", kind, handle))

    return Gpu(
        index=index,
        handle=handle,
        name=driver("cuDeviceGetName", 256, handle).split(b"\0")[0].decode(),
        capability=(
            attribute("COMPUTE_CAPABILITY_MAJOR"),
            attribute("COMPUTE_CAPABILITY_MINOR"),
        ),
        driver=int(driver("cuDriverGetVersion")),
        multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
        shared=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        l2=attribute("L2_CACHE_SIZE"),
    )


def check_gpu(artifact: Artifact, gpu: Gpu) -> None:
    """Before anything is loaded: this GPU and driver run the artifact's code."""
    arch, kernels = artifact.manifest.target.machine, artifact.manifest.kernels
    try:
        check_architecture(arch, gpu)
        check_driver(gpu, {kernel.elf_abi for kernel in kernels})
        check_shared(gpu, kernels)
    except IncompatibleTarget as error:
        raise IncompatibleTarget(f"artifact {artifact.path}: {error}") from None


def check_architecture(arch: str, gpu: Gpu) -> None:
    """sm_90a runs on capability 9.0 alone, sm_90 on every 9.x from 9.0 on."""
    match = re.fullmatch(r"sm_(\d+)(\d)(a?)", arch)
    if match is None:
        raise IncompatibleTarget(f"its architecture {arch!r} is unknown; compile it again")
    wanted = int(match[1]), int(match[2])
    exact = gpu.capability == wanted
    newer = gpu.capability[0] == wanted[0] and gpu.capability[1] >= wanted[1]
    if not (exact if match[3] else newer):
        raise IncompatibleTarget(
            f"compiled for {arch}, GPU {gpu.index} ({gpu.name}) has compute capability "
            f"{gpu.capability[0]}.{gpu.capability[1]}; compile it for this GPU"
        )


def check_driver(gpu: Gpu, abis: Iterable[int]) -> None:
    floor = max((DRIVER_FLOOR, *(ABI_FLOOR.get(abi, 1 << 30) for abi in abis)))
    if floor == 1 << 30:
        raise IncompatibleTarget(
            f"cubins of ELF ABI {max(abis)}, this runtime knows {sorted(ABI_FLOOR)}; update it"
        )
    if gpu.driver < floor:
        raise IncompatibleTarget(
            f"needs the NVIDIA driver of CUDA {version(floor)}, found {version(gpu.driver)}; "
            "update the driver"
        )


def check_shared(gpu: Gpu, kernels: Iterable[CudaBinary]) -> None:
    for kernel in kernels:
        if kernel.shared > gpu.shared:
            raise IncompatibleTarget(
                f"kernel {kernel.entry} takes {kernel.shared} bytes of shared memory, GPU "
                f"{gpu.index} ({gpu.name}) offers {gpu.shared}; compile it for this GPU"
            )


def version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
