"""What a call costs: its time, the memory, launches and waits it takes, and the bandwidth that bounds it.

On a GPU a time is taken twice. `measure` starts with an idle GPU and an empty cache and ends with the last kernel, so
it includes what the CPU needs to launch them; `measure_replay` times a CUDA graph of the same call, which is the
kernels alone. On a CPU times are wall-clock, with as many threads as PyTorch has, and nothing is flushed.
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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
Staged = Callable[[], Generator[str, None, Any]]  # yields the name of each stage as it begins

CACHE_BYTES = 256 * 2**20  # overwritten before each run: more than the L2 of any GPU so far (H200: 60 MB)
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # beyond any cache
WARM_UP_S, MEASURE_S = 0.1, 0.3  # a provider, so that a run of all cases takes minutes
FEWEST, MOST = 5, 200  # runs
PATIENCE_S = 1.5  # that the fewest runs may take; the noise of a slow call is small beside it
# Of the CPU for the GPU, as the driver calls them.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Times:
    """Milliseconds a call, and how many were measured."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Counts:
    """What one call takes; None where this device, or its profiler, does not tell."""

    peak_bytes: int | None  # the most that was allocated at once, its result included, its inputs not
    launches: int | None  # kernels, fills and copies on the GPU
    syncs: int | None  # times that the CPU waited for the GPU, as the profiler saw them


def summarise(milliseconds: list[float]) -> Times:
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive") if len(milliseconds) > 1 else milliseconds
    return Times(statistics.median(milliseconds), deciles[0], deciles[-1], len(milliseconds))


def runs_for(seconds: float) -> int:
    """How often to time a call that takes `seconds`: `FEWEST` times if that is soon done, else less, at least once."""
    fewest = min(FEWEST, int(PATIENCE_S / seconds))
    return max(1, min(MOST, max(fewest, int(MEASURE_S / seconds))))


def in_turn(runs: Mapping[str, int]) -> Iterator[str]:
    """Each name as often as `runs` says, spread evenly over the whole, so that a disturbance meets all alike."""
    rounds = max(runs.values(), default=0)
    for done in range(rounds):
        for name, wanted in runs.items():
            if (done + 1) * wanted // rounds > done * wanted // rounds:
                yield name


def measure(calls: Mapping[str, Call], device: str) -> dict[str, Times]:
    """Time `calls` in turn on `device` ("cpu" or "cuda"); each has run before."""
    time_once = _once_on_gpu() if device == "cuda" else _once_on_cpu
    runs = {name: runs_for(_warm_up(call)) for name, call in calls.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for name in in_turn(runs):
            milliseconds[name].append(time_once(calls[name]))
    return {name: summarise(measured) for name, measured in milliseconds.items()}


def measure_replay(call: Call) -> Times | None:
    """Time a CUDA graph of `call`; None if it waits for the GPU, so that it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # lazy initialisation must be over
            call()
        # A wait would abort the capture and leave PyTorch's allocator and random numbers in its state: ask before.
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


def measure_stages(step: Staged, device: str, ahead: int = 0) -> tuple[Times, float, dict[str, float]]:
    """Time consecutive steps: each of them, the milliseconds a step of the whole, and the share of each stage.

    On a GPU the stages are told apart on its own clock, without a wait between them: a stage that the CPU spends
    while the GPU is still busy costs nothing. With data fetched `ahead` steps, as many are spent before the clock
    starts and twice as many measured, so that what was fetched before does not pass for speed.
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
    """Run a staged call to its end: its result."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            return end.value


def count(call: Call, device: str) -> Counts:
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        return Counts(_peak(profiler), None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    # The raw events: the profiler's own objects would take minutes for a loop over classes.
    events = profiler.profiler.kineto_results.events()
    launches = sum(event.device_type() == DeviceType.CUDA for event in events)
    if launches == 0:  # the profiler may not look at this GPU
        return Counts(peak, None, None)
    return Counts(peak, launches, sum(event.name() in WAITS for event in events))


def copy_bandwidth(device: str) -> float:
    """Bytes a second that the fastest tenth of copies of a large tensor reads and writes, both counted."""
    size = COPY_BYTES[device]
    if device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    copy["copy"]()
    return 2 * size / (measure(copy, device)["copy"].p10 / 1e3)


def _warm_up(call: Call) -> float:
    """Seconds a call, at least one and for at least `WARM_UP_S`."""
    start = time.perf_counter()
    calls = 0
    while calls < 1 or time.perf_counter() - start < WARM_UP_S:
        call()
        if torch.cuda.is_initialized():  # else work would pile up on the GPU
            torch.cuda.synchronize()
        calls += 1
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As `timeit`: a collection is nobody's fault, and would meet one provider by chance."""
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
    """Times one call with the cache overwritten before; with `wait` on an idle GPU, so that launching counts."""
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


def _peak(profiler: profile) -> int:
    """The most memory that was allocated at once, of a profile's allocations and releases."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


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
