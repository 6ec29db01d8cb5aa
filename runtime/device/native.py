"""The native kernel library of an artifact: chosen for this CPU, opened from verified bytes, typed.

Comes in: an artifact. Goes out: a ctypes library whose functions are those of kernels/cpu/abi.h and
plan.cpp. Called by cpu.py.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p

from runtime.artifact import Artifact, CpuLibrary
from runtime.device.machine import cpu_features
from runtime.errors import DamagedArtifact, IncompatibleTarget

ABI = 3  # HS_ABI_VERSION of kernels/cpu/abi.h

SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "hs_open": (c_void_p, (c_int,)),
    "hs_close": (None, (c_void_p,)),
    "hs_plan": (c_void_p, (c_void_p, c_int, c_void_p, c_void_p)),
    "hs_plan_free": (None, (c_void_p,)),
    "hs_plan_profile": (None, (c_void_p, c_void_p)),
    "hs_submit": (
        c_int64,
        (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64),
    ),
    "hs_wait": (c_double, (c_void_p, c_int64)),
    "hs_run": (c_double, (c_void_p, c_void_p, c_void_p)),
    "hs_read": (c_int, (c_void_p, c_char_p, c_int64, c_void_p, c_int64)),
    "hs_crc32c": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int)),
}


def choose_library(artifact: Artifact) -> CpuLibrary:
    """The most demanding packed library that this CPU can run."""
    target, machine = artifact.manifest.target, os.uname().machine
    if target.kind != "cpu" or target.machine != machine:
        raise IncompatibleTarget(
            f"artifact {artifact.path} is for {target.kind} {target.machine}, this machine is cpu "
            f"{machine}; compile it for "
            "this target"
        )
    features = cpu_features()
    for library in reversed(artifact.manifest.libraries):
        if features.issuperset(library.requires):
            return library
    first = artifact.manifest.libraries[0] if artifact.manifest.libraries else None
    missing = sorted(set(first.requires) - features) if first else ["a packed library"]
    raise IncompatibleTarget(
        f"artifact {artifact.path} needs {', '.join(missing)}, this CPU does not offer that; "
        "compile it on this machine"
    )


def open_library(artifact: Artifact, library: CpuLibrary) -> ctypes.CDLL:
    for other in artifact.manifest.libraries:
        if other.path != library.path:
            artifact.read(other.path)  # not ours to run, but damage is told on every machine
    # Open as long as the library is loaded, which is for good: the loader takes a name that it has
    # seen for the library that it has, and a closed number would name the next artifact's too.
    fd = artifact.library(library.path)
    try:
        native = ctypes.CDLL(f"/proc/self/fd/{fd}")
    except OSError as error:
        os.close(fd)
        raise IncompatibleTarget(
            f"artifact {artifact.path}, file {library.path}: the loader says {error}; compile it "
            "on this machine"
        ) from error
    abi = symbol(native, "hs_abi", artifact, library)
    abi.restype, abi.argtypes = c_int, ()
    if abi() != ABI or artifact.manifest.target.abi != ABI:
        raise IncompatibleTarget(
            f"artifact {artifact.path}: its kernels speak ABI {abi()}, this runtime {ABI}; compile "
            "it again"
        )
    for name, (result, arguments) in SIGNATURES.items():
        function = symbol(native, name, artifact, library)
        function.restype, function.argtypes = result, arguments
    return native


def symbol(
    native: ctypes.CDLL, name: str, artifact: Artifact, library: CpuLibrary
) -> ctypes._NamedFuncPointer:
    try:
        return getattr(native, name)
    except AttributeError:
        raise DamagedArtifact(
            f"artifact {artifact.path}, file {library.path}: expected the symbol {name}, found "
            "none; compile it again"
        ) from None
