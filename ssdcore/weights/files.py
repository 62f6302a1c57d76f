"""Save a trained model to one safetensors file, and build the model again from that file alone.

The file's tensors are the weights. The file's header holds everything else that is needed, as JSON. A file without
settings of the postprocess, as older versions wrote it, means the defaults.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssdcore.anchors import AnchorConfig
from ssdcore.models import MODELS, SSD

HEADER_FIELDS = {"model", "classes", "category_ids", "anchors", "image_mean", "image_std"}  # see `description`
# Attributes of `SSD`.
POSTPROCESS_FIELDS = ("score_threshold", "iou_threshold", "topk_candidates", "max_detections", "clip_before_nms")
ANCHOR_FIELDS = {field.name for field in fields(AnchorConfig)}


def description(model: SSD, classes: Sequence[str], category_ids: Sequence[int]) -> dict[str, Any]:
    """Return everything besides the tensors that is needed to build `model` again.

    The value has passed through JSON (tuples are lists), so that it equals what is read back from a file.
    """
    header = {
        "model": model.name,
        "classes": classes,
        "category_ids": category_ids,
        "anchors": asdict(model.anchor_config),
        "image_mean": model.image_mean.flatten().tolist(),
        "image_std": model.image_std.flatten().tolist(),
        "postprocess": {name: getattr(model, name) for name in POSTPROCESS_FIELDS},
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(header))
    return as_read_back


def save_weights(
    model: SSD, path: str | Path, classes: Sequence[str], category_ids: Sequence[int] | None = None
) -> None:
    """Write `model` and the names of its classes to one safetensors file, as a whole or not at all.

    Args:
        model: any of `MODELS`, on any device.
        path: the file; its folder must exist.
        classes: `num_classes - 1` names; label i + 1 is `classes[i]`.
        category_ids: the dataset's id of each class. By default the labels 1, 2, ...

    Raises:
        ValueError: `classes` or `category_ids` has the wrong number of entries.
    """
    from safetensors.torch import save

    if len(classes) != model.num_classes - 1:
        raise ValueError(f"classes must name the {model.num_classes - 1} classes of the model, got {len(classes)}")
    if category_ids is None:
        category_ids = range(1, len(classes) + 1)
    if len(category_ids) != len(classes):
        raise ValueError(f"category_ids must have {len(classes)} entries, one per class, got {len(category_ids)}")
    header = description(model, list(classes), list(category_ids))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"ssdcore": json.dumps(header)}))


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[SSD, tuple[str, ...]]:
    """Build the model that `save_weights` wrote.

    Args:
        path: the file.
        device: where the model is placed.

    Returns:
        The model in eval mode, and the names of its classes; label i + 1 is the name at index i.

    Raises:
        ValueError: the file does not exist, `save_weights` did not write it, or it describes a model that this version
            does not know.
    """
    header, tensors = _read(path)
    model = _build(header, len(header["classes"]) + 1)
    _load_tensors(model, tensors, path)
    model.classes, model.category_ids = tuple(header["classes"]), tuple(header["category_ids"])
    return model.eval().to(device), model.classes


def fine_tuned(path: str | Path, classes: Sequence[str]) -> tuple[SSD, list[str]]:
    """Build a model for `classes` that starts training from the weights in `path`.

    If `classes` equals the classes in the file, all weights are loaded. Otherwise the classification head keeps its
    random initial weights, even if the number of classes is the same, because its weights distinguish other classes.

    Returns:
        The model, and the names of the tensors that keep their initial values.

    Raises:
        ValueError: the file does not exist, `save_weights` did not write it, or it describes a model that this version
            does not know.
    """
    header, tensors = _read(path)
    model = _build(header, len(classes) + 1)
    model.classes = tuple(classes)
    initial = model.state_dict()
    same_classes = header["classes"] == list(classes)
    not_loaded = [] if same_classes else [name for name in initial if name.startswith("head.classification_head.")]
    _load_tensors(model, tensors | {name: initial[name] for name in not_loaded}, path)
    return model, not_loaded


def is_own(path: str | Path) -> bool:
    """Whether `save_weights` wrote the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "ssdcore" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file as a whole or not at all: an interruption or a full disk leaves the old file in place.

    Raises:
        OSError: the file cannot be written. The message names it.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power failure could leave the new name with an empty file
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror or error}: cannot write {len(content):,} bytes to {path}"
        ) from error


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that `save_weights` wrote."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"no weights at {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("ssdcore", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file: {error}. `ssdcore convert` reads checkpoints of other projects"
        ) from error
    if header is None:
        raise ValueError(
            f"{path} was not written by ssdcore: its header does not describe a model. "
            "`ssdcore convert` reads checkpoints of other projects"
        )
    known = isinstance(header, dict) and header.keys() >= HEADER_FIELDS and set(header["anchors"]) <= ANCHOR_FIELDS
    if not (known and set(header.get("postprocess", {})) <= set(POSTPROCESS_FIELDS)):
        raise ValueError(f"{path} does not describe a model that this version of ssdcore knows")
    if header["model"] not in MODELS:
        raise ValueError(f"{path} cannot be loaded: ssdcore.models.MODELS has no builder of {header['model']!r}")
    return header, tensors


def _build(header: dict[str, Any], num_classes: int) -> SSD:
    anchors = {name: _tuples(value) for name, value in header["anchors"].items()}
    model = MODELS[header["model"]](
        num_classes,
        anchors=AnchorConfig(**anchors),
        image_mean=header["image_mean"],
        image_std=header["image_std"],
    )
    for name, value in header.get("postprocess", {}).items():
        setattr(model, name, value)
    return model


def _load_tensors(model: SSD, tensors: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit the model that its header describes") from error


def _tuples(value: Any) -> Any:
    """Turn lists into tuples at every depth, because JSON has no tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
