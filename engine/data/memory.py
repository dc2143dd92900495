"""Where images live: on the device, in host memory, or on the disk."""

import os
from pathlib import Path

import torch


def home_of(num_bytes: int, device: torch.device) -> torch.device | None:
    """Where that many bytes of images live: the device, else the host, else None (neither has room for them)."""
    places = [device] * (device.type == "cuda") + [torch.device("cpu")]
    return next((place for place in places if num_bytes <= memory_limit(place)), None)


def memory_limit(device: torch.device) -> int:
    """Bytes that images may take: half of the GPU's free memory, half of this process's share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = _read_bytes("/proc/meminfo", "MemAvailable:", 1024)
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_read_bytes(f"/sys/fs/cgroup/memory.{what}") for what in ("max", "current"))  # a container's
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _read_bytes(path: str, key: str = "", unit: int = 1) -> int | None:
    """The first number in a kernel file, or on its line that begins with ``key``; None where there is none."""
    try:
        line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
        return int(line.removeprefix(key).split()[0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):
        return None
