"""Problems solved in processes of their own, which are killed when their time is up.

A kernel whose programs wait for one another may hang, and a process that waits for such a kernel answers only SIGKILL.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from typing import NamedTuple

from ssdperf.progress import FAILED, PASSED

LEFT = "left"  # status of a problem that was not solved
MIN_S = 20.0  # a group that has less time left does not begin, because importing torch and compiling may take as long
REAP_S = 10.0  # for a killed process to go; the driver may hold it for a while if it has work on the GPU

Context = ForkContext | SpawnContext
Solve = Callable[[str], str]  # takes the name of a problem and returns what is wrong, or ""; it may raise


class Group(NamedTuple):
    """Problems that are solved one after the other in one process."""

    names: Sequence[str]
    limit_s: float  # until the process is killed, its start included


class Outcome(NamedTuple):
    name: str
    status: str  # PASSED, FAILED or LEFT
    note: str = ""  # what is wrong
    seconds: float = 0.0


def solve_groups(solve: Solve, groups: Sequence[Group], context: Context, seconds: float) -> Iterator[Outcome]:
    """Solve each group in a new process, and yield the outcome of each problem as soon as it is known.

    If a process hangs or dies, the problem that it was solving fails, the problems after it in its group are left, and
    the next group goes on.

    Args:
        solve: solves a problem. With "spawn" it must be picklable.
        groups: the problems.
        context: how processes start. A process that was forked cannot use the GPU if its parent has used it.
        seconds: for all groups together.
    """
    deadline = time.monotonic() + seconds
    for group in groups:
        limit = min(group.limit_s, deadline - time.monotonic())
        left = list(group.names)
        if left and limit >= min(MIN_S, group.limit_s):
            for outcome in _solve_group(solve, group.names, limit, context):
                left.remove(outcome.name)
                yield outcome
        yield from (Outcome(name, LEFT) for name in left)


def _solve_group(solve: Solve, names: Sequence[str], limit_s: float, context: Context) -> Iterator[Outcome]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(solve, names, sender), daemon=True)
    started = begun = time.monotonic()
    process.start()
    sender.close()  # the process has its own, so that its death ends the pipe
    try:
        for name in names:
            if receiver.poll(max(0.0, started + limit_s - time.monotonic())):
                try:
                    note, go_on = receiver.recv()
                except EOFError:
                    process.join(REAP_S)
                    note, go_on = f"its process died with exit code {process.exitcode}", False
            else:
                note, go_on = f"hung or too slow: killed {limit_s:.0f} s after its group began", False
            now = time.monotonic()
            yield Outcome(name, FAILED if note else PASSED, note, now - begun)
            if not go_on:
                return
            begun = now
    finally:
        process.kill()
        process.join(REAP_S)


def _serve(solve: Solve, names: Sequence[str], sender: Connection) -> None:
    """Solve the problems and send for each what is wrong, and whether the process can go on."""
    for name in names:
        try:
            note, go_on = solve(name), True
        except Exception as error:
            from ssdperf.measurement import error_text, gpu_is_lost  # takes seconds, and is hardly ever needed

            note, go_on = error_text(error), not gpu_is_lost()
        sender.send((note, go_on))
        if not go_on:
            return
