"""What can go wrong, by who has to act. Exit codes are those of the artifact contract.

Every message says what, the two values that disagree, and what to do.
"""

from __future__ import annotations


class HeadstartError(Exception):
    """Base of all errors we raise on purpose; `exit_code` is what a command ends with."""

    exit_code = 1


class UsageError(HeadstartError):
    """Bad option or argument."""

    exit_code = 2


class IncompatibleTarget(HeadstartError):
    """The artifact is sound but this machine cannot run it."""

    exit_code = 3


class DamagedArtifact(HeadstartError):
    """A file of the artifact is not what the manifest says."""

    exit_code = 4


class DamagedCheckpoint(HeadstartError):
    """A checkpoint cannot be read or contradicts itself."""

    exit_code = 5


class NoSpace(HeadstartError):
    """Not enough memory or disk."""

    exit_code = 6


class Busy(HeadstartError):
    """Something else holds what is needed (a port, a lock)."""

    exit_code = 7


class InvalidRequest(HeadstartError):
    """A request is refused; `status` is its HTTP status, `param` the offending parameter."""

    exit_code = 2

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class EngineDead(HeadstartError):
    """The engine process ended while requests were in flight, or is not running."""

    exit_code = 1
