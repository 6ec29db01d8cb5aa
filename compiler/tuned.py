"""Tuning records: which kernel and configuration was measured to be best for a call on a GPU.

Comes in: `kernels/tuned/<gpu>.json`, written by `compiler.tune`. Goes out: choices for lowering. A
record names the versions it was measured with; a choice whose configuration the kernel no longer
has is ignored and the call counts as not measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compiler.errors import CompileError
from kernels.cuda.kernel import CudaKernel
from kernels.kernel import CallShape
from runtime.errors import UsageError

FOLDER = Path(__file__).parent.parent / "kernels" / "tuned"
# Where a layer's data lies does not change how fast a kernel is; nor does how much state there is
# beside what a step touches, or how many sequences there could be.
PLACES = ("layer_offset", "page_bytes", "live_index", "eps", "head_eps", "scale")
STATE = ("kv", "pages", "counts", "last_token", "edits", "seq_len", "seq_start")
SCHEMA = 2


def call_key(shape: CallShape) -> str:
    """What a measurement depends on, as text: op, kind, sizes, element types, formats, attributes
    (those that only say where data lies left out)."""
    arrays = [
        f"{arg}:{shape.formats.get(arg) or shape.dtypes[arg]}{list(dims)}".replace(" ", "")
        for arg, dims in sorted(shape.shapes.items())
        if arg not in STATE and not (shape.op == "sample" and arg == "bias")
    ]
    attrs = [f"{k}={v}" for k, v in sorted(shape.attrs.items()) if k not in PLACES]
    return " ".join((shape.op, shape.kind, *arrays, *attrs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """`entries`: call key -> {kernel, config, us}, and `partial` when its search was cut short.
    `versions`: what they were measured with.
    `failed`: call key -> candidates that hung or brought the device down, with what was seen."""

    gpu: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def choice(
        self, shape: CallShape, kernels: Sequence[CudaKernel]
    ) -> tuple[CudaKernel, Any] | None:
        """The recorded kernel and configuration, if both still exist and are valid."""
        entry = self.entries.get(call_key(shape))
        for kernel in kernels if entry else ():
            if kernel.name == entry["kernel"]:  # type: ignore[index]
                for config in kernel.candidates(shape):
                    if asdict(config) == entry["config"]:  # type: ignore[index]
                        return kernel, config
        return None


NO_RECORDS = Records()


def check_folder(folder: str | None) -> None:
    """Refuse a folder of records that is given to a compile and is not there."""
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise UsageError(
            f"records={folder}: is no directory; give the one that compiler.tune wrote, or leave "
            "it out"
        )


def load_records(gpu: str, folder: str | Path | None = None) -> Records:
    """Records of a GPU by its target name; empty when nothing was measured on it."""
    path = Path(folder or FOLDER).expanduser() / f"{gpu}.json"
    if not path.exists():
        return Records(gpu=gpu)
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["schema"] != SCHEMA:
            raise CompileError(f"{path}: schema is {data['schema']}, expected {SCHEMA}; tune again")
        return Records(
            gpu=gpu,
            versions=data["versions"],
            entries=data["entries"],
            failed=data["failed"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompileError(f"{path} is no tuning record: {error!r}; tune again") from error


def save_records(records: Records, folder: str | Path | None = None) -> Path:
    """Sorted, one entry a line: a diff shows what changed. The file is whole at every moment."""
    folder = Path(folder or FOLDER).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    text = (
        f'{{\n  "schema": {SCHEMA},\n  "gpu": {json.dumps(records.gpu)},\n  "versions": '
        f"{json.dumps(dict(records.versions), sort_keys=True)},\n"
        f'  "entries": {_lines(records.entries)},\n  "failed": {_lines(records.failed)}\n}}\n'
    )
    path = folder / f"{records.gpu}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
    return path


def _lines(table: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        f"    {json.dumps(key)}: {json.dumps(dict(value), sort_keys=True)}"
        for key, value in sorted(table.items())
    ]
    return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"
