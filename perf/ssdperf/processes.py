"""A command run under a time limit, its output shown and kept in a log."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

READ_S = 5.0  # for the output of an ended command; a process that it left behind may hold the pipe open


class Ending(NamedTuple):
    code: int  # the exit status; negative: the number of the signal that ended the command
    out_of_time: bool


def run_limited(
    command: Sequence[str],
    *,
    seconds: float,
    grace: float,
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ending:
    """Run a command, copy its output to the terminal and append it to a log.

    After `seconds` the command gets SIGINT, as from Ctrl-C, so that it can save its work. After `grace` more seconds it
    and its children get SIGKILL. Ctrl-C in the terminal reaches the command in the same way.

    Args:
        command: the program and its arguments.
        seconds, grace: the limits.
        log: a file, which is created if there is none.
        folder: the working directory; by default this process's.
        environment: variables that are added to this process's.
    """
    deadline = time.monotonic() + seconds
    # A session of its own, so that SIGKILL reaches the command's children, and SIGINT only the command itself.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        reader.start()
        out_of_time = False
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            out_of_time = isinstance(error, subprocess.TimeoutExpired)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(READ_S)
    return Ending(process.returncode, out_of_time)


def _heed_interrupts() -> None:
    """Undo that a shell starts its background jobs, and all that these start, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _copy(output: IO[str], log: IO[str]) -> None:
    for line in output:
        sys.stdout.write(line)
        sys.stdout.flush()
        log.write(line)
        log.flush()
