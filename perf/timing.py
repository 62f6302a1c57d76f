"""How long a call takes: medians over many runs, on the device's own clock, with nothing left in its cache."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = 256 * 2**20  # more than the L2 of any GPU so far (H200: 60 MB), overwritten before each run
WARM_UP_S, MEASURE_S = 0.1, 0.5  # a case, so that a run of all of them takes minutes
FEWEST, MOST = 5, 200  # runs


@dataclass(frozen=True)
class Times:
    """Milliseconds a call, and how many were measured."""

    median: float
    p10: float
    p90: float
    runs: int


def summarise(milliseconds: list[float]) -> Times:
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Times(statistics.median(milliseconds), deciles[0], deciles[-1], len(milliseconds))


def measure(call: Callable[[], Any], device: str) -> Times:
    """Time `call` on `device` ("cpu" or "cuda"), launch overhead included."""
    start = time.perf_counter()
    calls = 0
    while calls < 2 or time.perf_counter() - start < WARM_UP_S:
        call()
        calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    estimate = (time.perf_counter() - start) / calls
    runs = min(MOST, max(FEWEST, int(MEASURE_S / estimate)))
    return summarise(_on_gpu(call, runs) if device == "cuda" else _on_cpu(call, runs))


def _on_cpu(call: Callable[[], Any], runs: int) -> list[float]:
    milliseconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds


def _on_gpu(call: Callable[[], Any], runs: int) -> list[float]:
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
