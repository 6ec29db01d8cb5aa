"""What a compile can refuse, each with the exit code of the artifact contract."""

from __future__ import annotations

from runtime.errors import DamagedCheckpoint, HeadstartError, NoSpace, UsageError

__all__ = [
    "CompileError",
    "DamagedCheckpoint",
    "HeadstartError",
    "NoSpace",
    "ProgramError",
    "UsageError",
]


class CompileError(HeadstartError):
    """The chosen configuration cannot be compiled (an unsupported value, no kernel for a call, an
    accuracy gate)."""

    exit_code = 2


class ProgramError(HeadstartError):
    """A program or plan breaks its own rules: always our bug, found by the verifier."""

    exit_code = 1
