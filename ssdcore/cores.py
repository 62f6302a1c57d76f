"""How many CPU cores this process may use."""

import os


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on.

    Containers and `taskset` may allow fewer cores than the machine has. macOS and Windows do not tell, so the cores of
    the whole machine count there.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
