"""What a call takes besides time: memory, launches, and waits for the GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The driver's functions in which the CPU waits for the GPU, by the names that the profiler records.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Counts:
    """What one call takes; None where the device or its profiler does not tell."""

    peak_bytes: int | None  # the most that was allocated at once, including the result and excluding the inputs
    launches: int | None  # kernels, fills and copies on the GPU
    syncs: int | None  # times that the CPU waited for the GPU, as far as the profiler sees them


def count(call: Callable[[], Any], device: str) -> Counts:
    """Call once on `device` ("cpu" or "cuda") under the profiler."""
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
    # The raw events, because building the profiler's own objects would take minutes for a loop over classes.
    events = profiler.profiler.kineto_results.events()
    launches = sum(event.device_type() == DeviceType.CUDA for event in events)
    if launches == 0:  # this machine does not let the profiler look at its GPU
        return Counts(peak, None, None)
    return Counts(peak, launches, sum(event.name() in WAITS for event in events))


def _peak(profiler: profile) -> int:
    """Return the most bytes that were allocated at once, from a profile's allocations and releases."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
