"""The learning rate of every step."""

import math
from collections.abc import Sequence

from ssdcore.train.config import TrainConfig

DROP_FACTOR = 0.1


def lr_at(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` in a run of `steps`, counted from 0."""
    if config.schedule == "one-cycle":
        return config.scaled_lr * one_cycle(step, steps)
    return config.scaled_lr * with_drops(step, steps, config.drops, config.warmup_steps, config.warmup_start)


def one_cycle(step: int, steps: int) -> float:
    """Factor of the learning rate that rises over the first 30 % of the run and then falls to almost 0.

    Both parts follow a cosine. The rise starts at 0.04 (1 / 25, OneCycleLR's default).

    Source: Smith and Topin, "Super-Convergence" (2018), with the shape of torch's OneCycleLR.
    """
    peak = 0.3 * steps
    if step < peak:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * (step - peak) / (steps - peak))) / 2


def with_drops(
    step: int, steps: int, drops: Sequence[float], warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Factor of the learning rate that falls to a tenth after each of the parts `drops` of the run.

    It first rises linearly from `warmup_start` over `warmup_steps`, or over a tenth of the run if that is less.

    Source: Liu et al., SSD, section 3.1; the warm-up as in the recipes of lufficc, MMDetection and NVIDIA.
    """
    warmup_steps = min(warmup_steps, steps // 10)
    warm_up = warmup_start + (1 - warmup_start) * step / warmup_steps if step < warmup_steps else 1.0
    # Rounded, because 43 / 65 of 65 epochs are 43 epochs only up to the last bit.
    return warm_up * DROP_FACTOR ** sum(step >= round(part * steps) for part in drops)
