"""How much memory a process may take before it is killed."""

from __future__ import annotations

import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_limit_bytes() -> float:
    """Of this process's control group (Linux, version 2 or 1), or the machine's memory where there is no lower one."""
    whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _LIMITS:
        try:
            told = path.read_text().strip()
        except OSError:
            continue
        return min(whole, float(told)) if told.isdigit() else whole
    return whole
