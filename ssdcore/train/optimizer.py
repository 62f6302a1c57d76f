"""The optimisers by name, and which parameters decay."""

from typing import Any

import torch
from torch import nn

from ssdcore.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser of the model's trained parameters.

    Raises:
        ValueError: nothing is trained; or the optimiser is LARS or LAMB, and timm is not installed.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ValueError(f"freeze must leave a parameter to train, got {config.freeze!r}")
    lr = config.scaled_lr
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr)
    try:
        from timm.optim import Lamb, Lars
    except ImportError as error:
        raise ValueError(f"optimizer {config.optimizer} comes from timm: pip install timm") from error
    layerwise: torch.optim.Optimizer
    if config.optimizer == "lars":
        layerwise = Lars(groups, lr, momentum=config.momentum)
    else:
        layerwise = Lamb(groups, lr, max_grad_norm=None)  # `clip_norm` clips
    return layerwise


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The trained parameters in groups with `weight_decay` and `lr_factor`.

    Biases and the scales of normalisations have one dimension. Decay would pull them towards 0, and no other part of
    the network would make up for that. Therefore `config.decay` is "weights" unless a published recipe has another.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bias = name.endswith("bias")
        decays = {"all": True, "weights": parameter.dim() > 1, "not-biases": not bias}[config.decay]
        key = (config.weight_decay if decays else 0.0, config.bias_lr if bias else 1.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr_factor": lr_factor}
        for (weight_decay, lr_factor), parameters in groups.items()
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
