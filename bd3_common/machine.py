"""Resources of this machine that bound what a process may do."""

from __future__ import annotations

import os
import resource


def installed_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """Bytes that this process may have: those of the machine, or of ``ulimit -v`` where it allows less."""
    installed = installed_memory()
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    return installed if allowed == resource.RLIM_INFINITY else min(installed, allowed)
