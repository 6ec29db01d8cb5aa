"""What this machine offers an engine: CPU features, cores and memory, as this process may use them.

Reads /proc, /sys and the control group. Called by cpu.py when a session is opened.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/gpus")


def cpu_features() -> frozenset[str]:
    """Feature names of the first CPU in /proc/cpuinfo (`flags` on x86, `Features` on arm)."""
    with open("/proc/cpuinfo") as info:
        for line in info:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def cores() -> int:
    """Physical cores this process may run on, within the control group's quota."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    count = len(siblings)
    limit = CGROUP / "cpu.max"
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            count = min(count, max(int(quota) // int(period), 1))
    return count


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    available = 0
    with open("/proc/meminfo") as info:
        for line in info:
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, max(int(most) - int(used.read_text()), 0))
    return available


def gpu_names() -> list[str]:
    """Product names of the NVIDIA GPUs the kernel driver shows, e.g. `NVIDIA H200`; no library is
    loaded for it."""
    names = []
    for path in sorted(NVIDIA.glob("*/information")):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                names.append(value.strip())
    return names
