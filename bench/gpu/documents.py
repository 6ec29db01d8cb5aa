"""Result files of `bench.gpu`: several runs on one machine, read as one.

A command on a GPU is short, so a day's work is several runs; of a section that ran more than once
the last that found something counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchUsage


def merged(paths: Sequence[str]) -> dict[str, Any]:
    """{sections}. The runs must be of the same GPU."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    hardware: dict[str, str] = {}
    for path in paths:
        try:
            document = json.loads(Path(path).read_text("utf-8"))
            sections, hardware[path] = document["sections"], document["hardware"]
        except (OSError, ValueError, KeyError) as error:
            raise BenchUsage(f"{path} is no result of bench.gpu: {error!r}") from None
        for record in sections:
            key = record["section"], record["model"]
            if "figures" in record or key not in found:
                found[key] = record
    if len(set(hardware.values())) > 1:
        raise BenchUsage(
            f"results of different GPUs: {', '.join(f'{p}: {h}' for p, h in hardware.items())}"
        )
    return {"sections": list(found.values())}


def printed(name: str, table: Callable[[dict[str, Any]], str]) -> int:
    """The program `bench.gpu.<name>`: prints the table of the result files it is given."""
    if len(sys.argv) < 2:
        print(f"usage: python -m bench.gpu.{name} <result file of bench.gpu> …", file=sys.stderr)
        return 2
    try:
        print(table(merged(sys.argv[1:])))
    except BenchUsage as error:
        print(f"error: {error}", file=sys.stderr)
        return BenchUsage.exit_code
    return 0
