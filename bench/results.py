"""What every result carries and where it goes: the machine, the versions, one JSON line per result.

Called by every benchmark; `bench.compare` and `bench.report` read the lines back.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.errors import BenchUsage

PACKAGES = ("headstart", "numpy", "aiohttp", "msgspec", "torch", "transformers")


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory, kernel, load."""
    model, memory = platform.machine(), 0
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) * 1024
    return {
        "host": platform.node(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "load_1m": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: the field keeps its plain value
        return []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def warn_if_busy() -> None:
    """Says on stderr that other programs use the cores: medians will be those of the mixture."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.5 * cores:
        print(
            f"# load average {load:.1f} on {cores} cores: other work disturbs the figures",
            file=sys.stderr,
        )


def stamp(bench: str, result: dict[str, Any], *, artifact: str | None = None) -> dict[str, Any]:
    """`result` with what makes it comparable later. `artifact`: digest."""
    return {
        "bench": bench,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"artifact": artifact} if artifact else {}),
        **result,
        "machine": machine(),
        "versions": versions(),
    }


def append(path: str | None, line: dict[str, Any]) -> None:
    """Adds one JSON line to `path` (nothing without a path)."""
    if path is None:
        return
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def read(path: str) -> list[dict[str, Any]]:
    """The result lines of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise BenchUsage(f"cannot read results {path}: {e.strerror}") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as e:
            raise BenchUsage(f"{path}:{number} is not JSON ({e}): not a result file") from None
        if not isinstance(value, dict):
            raise BenchUsage(f"{path}:{number} is {type(value).__name__}, not a JSON object")
        lines.append(value)
    if not lines:
        raise BenchUsage(f"{path} holds no results")
    return lines
