"""When each phase of a start ended, in seconds since the process was born (by the kernel's clock,
so imports count).
"""

from __future__ import annotations

import os
import time


class Phases:
    def __init__(self) -> None:
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        self._birth = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.seconds[name] = round(time.clock_gettime(time.CLOCK_BOOTTIME) - self._birth, 4)
