"""How long a call takes, and the bandwidth that bounds it.

On a GPU a call is timed twice. `measure` starts with an idle GPU and an empty cache and ends with the last kernel, so
it includes the time that the CPU needs to launch the kernels. `measure_replay` times a CUDA graph of the same call,
which is the kernels alone. On a CPU the times are wall-clock times with as many threads as PyTorch has, and the caches
are left as they are.
"""

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Call = Callable[[], Any]
Phased = Callable[[], Generator[str, None, Any]]  # yields the name of each phase as the phase begins

CACHE_BYTES = 256 * 2**20  # overwritten before each run: more than the L2 cache of any GPU so far (H200: 60 MB)
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # more than any cache holds
WARM_UP_S, MEASURE_S = 0.1, 0.3  # per provider, so that a run of all cases takes minutes
MIN_RUNS, MAX_RUNS = 5, 200
PATIENCE_S = 1.5  # the most that `MIN_RUNS` runs may take; slow calls need fewer, because they vary less


@dataclass(frozen=True)
class Times:
    """Milliseconds per call, and how many calls were measured."""

    median: float
    p10: float
    p90: float
    runs: int


def summarise(milliseconds: list[float]) -> Times:
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else milliseconds
    return Times(statistics.median(milliseconds), deciles[0], deciles[-1], len(milliseconds))


def runs_for(seconds: float) -> int:
    """Return how often to time a call that takes `seconds`.

    As often as `MEASURE_S` allows, but at least `MIN_RUNS` times if these take at most `PATIENCE_S`, and at least once.
    """
    fewest = min(MIN_RUNS, int(PATIENCE_S / seconds))
    return max(1, min(MAX_RUNS, max(fewest, int(MEASURE_S / seconds))))


def in_turn(runs: Mapping[str, int]) -> Iterator[str]:
    """Yield each name as often as `runs` says, spread evenly, so that a disturbance affects all names alike."""
    rounds = max(runs.values(), default=0)
    for done in range(rounds):
        for name, wanted in runs.items():
            if (done + 1) * wanted // rounds > done * wanted // rounds:
                yield name


def measure(calls: Mapping[str, Call], device: str) -> dict[str, Times]:
    """Time `calls` in turn on `device` ("cpu" or "cuda"). Each call must have run before."""
    time_once = _once_on_gpu() if device == "cuda" else _once_on_cpu
    runs = {name: runs_for(_warm_up(call)) for name, call in calls.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for name in in_turn(runs):
            milliseconds[name].append(time_once(calls[name]))
    return {name: summarise(measured) for name, measured in milliseconds.items()}


def measure_replay(call: Call) -> Times | None:
    """Time a CUDA graph of `call`. Return None if the call waits for the GPU, because it cannot be captured then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # lazy initialisation must be over
            call()
        # A wait during the capture would abort it and leave PyTorch's allocator and random number generator in capture
        # mode. Therefore look for waits before the capture.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    runs = runs_for(_warm_up(graph.replay))
    time_once = _once_on_gpu(wait=False)
    return summarise([time_once(graph.replay) for _ in range(runs)])


def measure_phases(step: Phased, device: str, ahead: int = 0) -> tuple[Times, float, dict[str, float]]:
    """Time consecutive steps.

    On a GPU the GPU's own clock tells the phases apart, without a wait between them: a phase in which the CPU works
    while the GPU is still busy costs nothing.

    Args:
        step: the call.
        device: "cpu" or "cuda".
        ahead: steps that the data is fetched ahead. As many steps run before the clock starts, and at least twice as
            many are measured, so that data that was fetched earlier does not pass for speed.

    Returns:
        The times of single steps, the milliseconds per step over the whole measurement, and each phase's share of it.
    """
    clock = _GpuClock() if device == "cuda" else _CpuClock()

    def run() -> list[tuple[str, Any]]:
        return [*((name, clock.now()) for name in step()), ("end", clock.now())]

    for _ in range(ahead):
        run()
    runs = max(runs_for(_warm_up(run)), 2 * ahead)
    with _no_garbage_collection():
        steps = [run() for _ in range(runs)]
        clock.wait()
    spent: dict[str, float] = {}
    for (name, start), (_, end) in (pair for marks in steps for pair in pairwise(marks)):
        spent[name] = spent.get(name, 0.0) + clock.milliseconds(start, end)
    each = summarise([clock.milliseconds(marks[0][1], marks[-1][1]) for marks in steps])
    whole = clock.milliseconds(steps[0][0][1], steps[-1][-1][1]) / runs
    return each, whole, {name: part / sum(spent.values()) for name, part in spent.items()}


def finish(step: Generator[str, None, Any]) -> Any:
    """Run a call with phases to its end and return its result."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            return end.value


def copy_bandwidth(device: str) -> float:
    """Return the bandwidth of copying a large tensor in bytes per second, reads and writes both counted.

    It is that of the fastest tenth of the copies.
    """
    size = COPY_BYTES[device]
    if device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    copy["copy"]()
    return 2 * size / (measure(copy, device)["copy"].p10 / 1e3)


def _warm_up(call: Call) -> float:
    """Call at least once and for at least `WARM_UP_S`; return the seconds per call."""
    start = time.perf_counter()
    calls = 0
    while calls < 1 or time.perf_counter() - start < WARM_UP_S:
        call()
        if torch.cuda.is_initialized():  # otherwise work would pile up on the GPU
            torch.cuda.synchronize()
        calls += 1
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off, as `timeit` does, because a collection would hit one provider by chance."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _once_on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _once_on_gpu(*, wait: bool = True) -> Callable[[Call], float]:
    """Return a function that overwrites the cache and then times one call.

    With `wait` the GPU is idle when the clock starts, so that the time of launching the kernels counts.
    """
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once(call: Call) -> float:
        cache.zero_()
        if wait:
            torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return once


class _CpuClock:
    def now(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class _GpuClock:
    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)
