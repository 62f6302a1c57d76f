"""One file for a trained model: its tensors, and in the header all that is needed to build it again."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdcore.anchors import AnchorConfig
from ssdcore.model import MODELS, SSD


def description(model: SSD, classes: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
    """All that is needed, besides the tensors, to build `model` again; as JSON holds it."""
    about = {
        "model": model.name,
        "classes": classes,
        "category_ids": category_ids,
        "anchors": asdict(model.anchor_config),
        "image_mean": model.image_mean.flatten().tolist(),
        "image_std": model.image_std.flatten().tolist(),
    }
    built: dict[str, Any] = json.loads(json.dumps(about))
    return built


def save_weights(
    model: SSD, path: str | Path, classes: Sequence[str], category_ids: Sequence[int] | None = None
) -> None:
    """Write `model` and the names of its classes to one safetensors file, whole or not at all.

    Args:
        model: any of `MODELS`, on any device.
        path: the file; its folder must exist.
        classes: `num_classes - 1` names; label i + 1 is `classes[i]`.
        category_ids: as many numbers that the classes bear in the data set; by default the labels, from 1.

    Raises:
        ValueError: another number of names or ids.
    """
    from safetensors.torch import save

    if len(classes) != model.num_classes - 1:
        raise ValueError(f"classes must name the {model.num_classes - 1} classes of the model, got {len(classes)}")
    if category_ids is None:
        category_ids = range(1, len(classes) + 1)
    if len(category_ids) != len(classes):
        raise ValueError(f"category_ids must be one for each of {len(classes)} classes, got {len(category_ids)}")
    about = description(model, list(classes), list(category_ids))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"ssdcore": json.dumps(about)}))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SSD, tuple[str, ...]]:
    """The model that `save_weights` wrote, ready to detect, and the names of its classes.

    Raises:
        ValueError: no such file, or one that `save_weights` did not write.
    """
    about, tensors = _read(path)
    model = _build(about, len(about["classes"]) + 1)
    model.load_state_dict(tensors)
    return model.eval().to(device), tuple(about["classes"])


def category_ids(path: str | Path) -> tuple[int, ...]:
    """The numbers that the classes of `load_model` bear in the data set it was trained on."""
    about, _ = _read(path)
    return tuple(about["category_ids"])


def fine_tuned(path: str | Path, classes: Sequence[str]) -> tuple[SSD, list[str]]:
    """A model for other classes that starts from the weights in `path`.

    Unless the classes are the same, the head that tells them apart starts afresh.

    Returns:
        the model, and the names of the tensors that start afresh.

    Raises:
        ValueError: as `load_model`.
    """
    about, tensors = _read(path)
    model = _build(about, len(classes) + 1)
    own = model.state_dict()
    same = about["classes"] == list(classes)
    fresh = [] if same else [name for name in own if name.startswith("head.classification_head.")]
    model.load_state_dict(tensors | {name: own[name] for name in fresh})
    return model, fresh


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: an interruption leaves the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("ssdcore", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} was not written by ssdcore: its header does not say which model it is")
    return about, tensors


def _build(about: dict[str, Any], num_classes: int) -> SSD:
    anchors = {key: _tuples(value) for key, value in about["anchors"].items()}
    return MODELS[about["model"]](
        num_classes,
        anchors=AnchorConfig(**anchors),
        image_mean=about["image_mean"],
        image_std=about["image_std"],
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
