"""The artifact: the directory a compile writes and a runtime maps. This module owns the format; the
compiler imports it.

Comes in: the path of an artifact. Goes out: its manifest and files, each checked before it is
believed. Levels: L0 is `Artifact.open` (name, schema, file set and sizes), L1 is done by the device
while weights load (`check_crcs`, `check_finite`), L2 is `verify`. Layout, publish protocol and
error texts: docs/artifact.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from runtime import weights_file
from runtime.artifact_files import (
    MANIFEST,
    REMEDY,
    check_files,
    check_manifest,
    damaged,
    open_plain,
    read_plain,
    seal,
)
from runtime.errors import DamagedArtifact, HeadstartError, UsageError
from runtime.manifest import (
    SCHEMA,
    TOOL,
    CpuLibrary,
    CudaBinary,
    EmbeddingInfo,
    FileEntry,
    Golden,
    KernelParameter,
    LengthRule,
    Manifest,
    ModelInfo,
    StateLayout,
    Target,
    TensorEntry,
    decode_manifest,
    digest,
    encode_manifest,
    plan_path,
    weights_path,
)
from runtime.plan import (
    ARENAS,
    FLAG_PROGRAMMATIC,
    NODE,
    PARAM,
    PARAM_ADDRESS,
    PARAM_BYTES,
    PARAM_LATE,
    PARAM_TENSORMAP,
    Bucket,
    IoField,
    KernelRef,
    LaunchPlan,
    PlanHeader,
    TensorMap,
    decode_plan,
    encode_plan,
    node_kind,
)

__all__ = [
    "ARENAS",
    "FLAG_PROGRAMMATIC",
    "MANIFEST",
    "NODE",
    "PARAM",
    "PARAM_ADDRESS",
    "PARAM_BYTES",
    "PARAM_LATE",
    "PARAM_TENSORMAP",
    "SCHEMA",
    "TOOL",
    "Artifact",
    "Bucket",
    "CpuLibrary",
    "CudaBinary",
    "EmbeddingInfo",
    "FileEntry",
    "Golden",
    "IoField",
    "KernelParameter",
    "KernelRef",
    "LaunchPlan",
    "LengthRule",
    "Manifest",
    "ModelInfo",
    "PlanHeader",
    "StateLayout",
    "Target",
    "TensorEntry",
    "TensorMap",
    "decode_manifest",
    "decode_plan",
    "digest",
    "encode_manifest",
    "encode_plan",
    "node_kind",
    "plan_path",
    "weights_path",
]

MANIFEST_LIMIT = 64 << 20


class Artifact:
    """An artifact that passed L0. `path` is its real directory, `digest` the SHA-256 in its
    name."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = path.name.rpartition("-")[2]
        self._files = {entry.path: entry for entry in manifest.files}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Artifact:
        given = Path(path)
        if not given.is_dir():
            found = "a file" if given.exists() else "nothing"
            raise UsageError(
                f"artifact {given}: expected a directory, found {found}; "
                "give the path that the compiler printed"
            )
        root = given.resolve()
        data = read_plain(root, MANIFEST, limit=MANIFEST_LIMIT)
        if digest(data) != root.name.rpartition("-")[2]:
            raise damaged(
                root, MANIFEST, f"expected the digest in the directory's name, found {digest(data)}"
            )
        try:
            manifest = decode_manifest(data)
            check_manifest(manifest)
        except HeadstartError as error:
            raise type(error)(f"artifact {root}, file {MANIFEST}: {error}; {REMEDY}") from error
        check_files(root, manifest)
        artifact = cls(root, manifest)
        for rank in range(manifest.ranks):
            artifact.weights_data(rank)
        return artifact

    def read(self, name: str) -> bytes:
        """A file of the manifest, its SHA-256 checked. Not for weights: those are checked per
        tensor while they load."""
        entry = self._files.get(name)
        if entry is None:
            raise damaged(self.path, name, "expected an entry in the manifest, found none")
        data = read_plain(self.path, name, limit=entry.size)
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise damaged(self.path, name, f"expected sha256 {entry.sha256}, found {found}")
        return data

    def text(self, name: str) -> bytes | None:
        """A file under text/, None when the artifact has none of that name."""
        return self.read(f"text/{name}") if f"text/{name}" in self._files else None

    def plan(self, rank: int, bucket: str) -> LaunchPlan:
        name = plan_path(rank, bucket)
        try:
            plan = decode_plan(self.read(name))
        except DamagedArtifact as error:
            raise (
                error
                if str(error).startswith("artifact ")
                else damaged(self.path, name, str(error))
            ) from error
        if (
            plan.header.bucket not in self.manifest.buckets
            or plan.header.io_bytes > self.manifest.io_bytes
        ):
            raise damaged(
                self.path, name, f"expected a bucket of the manifest, found {plan.header.bucket}"
            )
        return plan

    def library(self, name: str) -> int:
        """A descriptor to dlopen as /proc/self/fd/<n>: an anonymous, sealed copy of the checked
        bytes, so nothing can be swapped between check and use. It is the caller's to close."""
        entry = self._files.get(name)
        if entry is None or entry.role != "binary":
            raise damaged(
                self.path,
                name,
                f"expected the role binary, found {entry.role if entry else 'no entry'}",
            )
        fd = os.memfd_create(PurePosixPath(name).name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(fd), "wb") as copy:
                copy.write(self.read(name))
            seal(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def weights_data(self, rank: int) -> tuple[Path, int]:
        """The weights file and the offset of its data section; its header must be the one the
        manifest implies."""
        name = weights_path(rank)
        expected = weights_file.header(self.manifest.tensors[rank])
        if read_plain(self.path, name, limit=len(expected), whole=False) != expected:
            raise damaged(
                self.path,
                name,
                "expected the header that the manifest's tensors imply, found another",
            )
        return self.path / name, len(expected)

    def check_crcs(self, rank: int, found: Sequence[int]) -> None:
        """L1: `found` is the CRC-32C of every tensor of the rank as loaded, in manifest order."""
        for tensor, crc in zip(self.manifest.tensors[rank], found, strict=True):
            if tensor.crc32c != crc:
                raise damaged(
                    self.path,
                    weights_path(rank),
                    f"tensor {tensor.name}: expected crc32c {tensor.crc32c:08x}, found {crc:08x}",
                )

    def check_finite(self, rank: int, tensor: TensorEntry, part: npt.NDArray[np.uint8]) -> None:
        """L1: norms, biases and scales hold no infinity and no NaN, whatever made them. `part`: the
        tensor's bytes or whole elements of them."""
        small = len(tensor.shape) == 1 or tensor.name.endswith(".scale")
        if not small or tensor.dtype not in ("float32", "float16"):
            return
        if not np.isfinite(part.view(tensor.dtype)).all():
            what = f"tensor {tensor.name}: expected finite values, found others"
            raise damaged(self.path, weights_path(rank), what)

    def verify(self) -> None:
        """L2: the SHA-256 of every file."""
        for entry in self.manifest.files:
            with open_plain(self.path, entry.path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise damaged(
                    self.path, entry.path, f"expected sha256 {entry.sha256}, found {found}"
                )
