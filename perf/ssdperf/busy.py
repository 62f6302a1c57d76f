"""Another process that keeps a core busy, as a data loader's worker or another service does."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It ends when its standard input is closed, which the operating system does if the parent dies.
BUSY = """
import sys, threading
threading.Thread(target=sys.stdin.read).start()
while threading.active_count() > 1: pass
"""


@contextmanager
def one_core_busy() -> Iterator[None]:
    """Keep one core busy until the block ends, also if this process dies within it."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.kill()
        process.communicate()
