"""Where the weights of earlier compiles are: by the key of everything they depend on.

An entry names a published, immutable weights file and its checksums; the file itself stays in its
artifact and is linked, so the cache costs no space. Called by the pipeline.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from compiler.store import StoredWeight
from kernels.cache import key_of
from runtime.artifact import FileEntry, TensorEntry

ROOT = Path(__file__).resolve().parents[1]
# Code that decides the bytes of a weight, besides the libraries of `VERSIONS`.
CODE = (
    "compiler/store.py",
    "compiler/weights.py",
    "compiler/model.py",
    "compiler/quantize",
    "compiler/families",
    "kernels/cpu/layout.py",
    "kernels/cuda/layout.py",
    "runtime/weights_file.py",
)
VERSIONS = ("numpy", "torch", "torchao")


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str
    file: FileEntry
    tensors: tuple[TensorEntry, ...]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    path: Path
    entry: FileEntry
    tensors: tuple[TensorEntry, ...]


def key(
    digests: Mapping[str, str], weights: Sequence[StoredWeight], tensors: Sequence[TensorEntry]
) -> str:
    parts: dict[str, str | bytes] = {
        f"source/{name}": digest for name, digest in digests.items() if not name.startswith("text/")
    }
    parts["weights"] = repr(weights)
    parts["tensors"] = msgspec.json.encode(tensors)
    for name in CODE:
        path = ROOT / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            parts[f"code/{file.relative_to(ROOT)}"] = file.read_bytes()
    for name in VERSIONS:
        parts[f"version/{name}"] = metadata.version(name)
    return key_of(parts)


def find(cache: Path, key: str) -> Found | None:
    """The file of an entry, if it is still there and still what it was."""
    try:
        entry = msgspec.json.decode((cache / key).read_bytes(), type=Entry)
        with open(entry.path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == entry.file.sha256:
                return Found(path=Path(entry.path), entry=entry.file, tensors=entry.tensors)
    except (OSError, msgspec.DecodeError):
        return None  # gone or unreadable: the weights are written again
    return None


def remember(
    cache: Path, key: str, path: Path, file: FileEntry, tensors: tuple[TensorEntry, ...]
) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f".{key}-{secrets.token_hex(4)}"
    entry = Entry(path=str(path.resolve()), file=file, tensors=tensors)
    temporary.write_bytes(msgspec.json.encode(entry))
    os.replace(temporary, cache / key)
