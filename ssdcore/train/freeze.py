"""Keep a part of a model as it is while the rest is trained."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssdcore.models import SSD

ALL_NORMS = "batchnorm"  # the name that means all layers of batch normalisation


def freeze(model: SSD, what: str | None) -> list[nn.Module]:
    """Freeze a part of `model`.

    Args:
        model: changed in place.
        what: a number N, for the first N layers of `model.backbone` that have parameters, in the order in which they
            are defined; 0 trains all parameters. Or the beginnings of parameters' names, separated by commas, such as
            "backbone.features"; "batchnorm" means all layers of batch normalisation. None changes nothing.

    Returns:
        The frozen layers of batch normalisation. They belong in eval mode during training, because their statistics
        would change otherwise.

    Raises:
        ValueError: there are fewer layers, or no parameter has such a name.
    """
    if what is not None and what.strip().isdigit():
        # Without the backbone itself, which may have a parameter of its own, as VGG's scale is.
        _, *inner = model.backbone.modules()
        layers = [layer for layer in inner if list(layer.parameters(recurse=False))]
        count = int(what)
        if count > len(layers):
            raise ValueError(f"freeze must be at most {len(layers)}, the layers of the backbone, got {count}")
        model.requires_grad_(True)
        for layer in layers[:count]:
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
    elif what is not None:
        for name in (part.strip() for part in what.split(",")):
            _freeze_named(model, name)
    return [layer for layer in _norms(model) if not any(p.requires_grad for p in layer.parameters())]


def _freeze_named(model: nn.Module, name: str) -> None:
    parameters = [p for full, p in model.named_parameters() if full == name or full.startswith(f"{name}.")]
    if name == ALL_NORMS:
        parameters = [p for layer in _norms(model) for p in layer.parameters()]
    elif not name or not parameters:
        tops = dict.fromkeys(".".join(full.split(".")[:2]) for full, _ in model.named_parameters())
        raise ValueError(f"freeze must name parameters, such as {', '.join(tops)}, got {name!r}")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.affine]
