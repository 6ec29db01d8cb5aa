"""Result files of `bench.gpu`: several runs on one machine, read as one.

A command on a GPU is short, so a day's work is several runs; of a section that ran more than once
the last that found something counts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
