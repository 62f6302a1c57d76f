"""Measure how the time of a job divides into its parts."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Adds up the seconds of each part of a job, such as the network's.

    At the end of a part it waits for the GPU, because the host does not: otherwise the work of one part would be
    counted in the next part that waits.

    Args:
        device: where the work is done.

    Attributes:
        seconds: by part, in the order in which the parts began first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the `with` block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] += time.perf_counter() - started

    def waits(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count only the time that it takes to get each of them."""
        with self.part(name):
            iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
