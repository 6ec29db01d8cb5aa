"""What the option loader can refuse. One line: key, value, what would be valid. Ends a command
with exit code 2.
"""

from __future__ import annotations


class ConfigError(Exception):
    """An option is unknown, missing, of the wrong type or not one of its choices."""

    exit_code = 2
