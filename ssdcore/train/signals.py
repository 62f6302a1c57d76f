"""SIGTERM, with which schedulers and torchrun ask a run to end: it ends after the step that follows the signal."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM  # 143, what a shell reports of a process that SIGTERM ended


class Terminated(SystemExit):
    """The run was asked to end, and its state has been written. The process ends with code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CODE)
        self.message = message


class StopRequest:
    """Whether SIGTERM has arrived."""

    def __init__(self) -> None:
        self.arrived = False
        self.immediate = False  # set where there is no step to finish

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        self.arrived = True
        if self.immediate:
            raise Terminated("stopped by SIGTERM")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """SIGTERM raises `Terminated` at once in this block, whose work is repeated when the run is resumed."""
        self.immediate = True
        try:
            if self.arrived:
                raise Terminated("stopped by SIGTERM")
            yield
        finally:
            self.immediate = False


def leave_process_group(_worker: int) -> None:
    """Keep a process that loads data out of the run's process group.

    torchrun and `timeout` send SIGTERM to the whole group. A worker that it ended would end the run in the middle of a
    step. The run ends its workers itself.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Listen for SIGTERM, if this is the main thread. No other thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request.handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
