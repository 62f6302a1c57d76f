"""A moving average of a model's weights, which usually scores better than the weights of any one step."""

import copy
from typing import Any

import torch

from ssdcore.models import SSD


class MovingAverage:
    """An exponential moving average of a model's parameters and buffers.

    The statistics of batch normalisation are averaged like the parameters that they belong to. Counters are copied. The
    decay rises with the number of updates, so that the average of a short run does not consist of its initial weights.

    Source: the decay's rise, min(decay, (1 + n) / (10 + n)), is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: SSD, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: SSD) -> None:
        """Take the model's present weights into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        old, new = self.model.state_dict(), model.state_dict()
        floats = [name for name in old if old[name].is_floating_point()]
        torch._foreach_lerp_([old[name] for name in floats], [new[name] for name in floats], 1 - decay)
        counters = [name for name in old if not old[name].is_floating_point()]
        if counters:
            torch._foreach_copy_([old[name] for name in counters], [new[name] for name in counters])

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
