"""What a benchmark can fail with: one sentence, no traceback."""

from __future__ import annotations


class BenchError(Exception):
    """A benchmark cannot run or must not be believed."""

    exit_code = 1


class BenchUsage(BenchError):
    """An option is wrong or missing."""

    exit_code = 2
