"""Turn checkpoints of other projects into models of this one."""

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssdcore.models import MODELS, SSD
from ssdcore.models.pretrained import read_safely
from ssdcore.weights.class_names import class_names
from ssdcore.weights.files import is_own, save_weights
from ssdcore.weights.sources import CLASS_HEAD, SOURCES, Source

CONTAINERS = ("model", "state_dict")  # where a checkpoint that holds more than weights has them
WRAPPERS = ("module.1.", "module.")  # DistributedDataParallel and NVIDIA's older code put these before every name
LEAST_LIKENESS = 0.5  # of a checkpoint to what a project saves: shared names over all names of both
LISTED = 3  # names in one error message
# The dataset of MMDetection's default boxes, by the image's size and the first number of `basesize_ratio_range`.
MMDETECTION_ANCHORS = {(300, 0.15): "coco", (300, 0.2): "voc", (512, 0.1): "coco", (512, 0.15): "voc"}


class Converted(NamedTuple):
    """A model from another project's checkpoint."""

    model: SSD  # in eval mode
    project: str
    classes: tuple[str, ...]  # the names of labels 1, 2, ...
    category_ids: tuple[int, ...]  # their ids in the dataset
    not_loaded: list[str]  # names of the tensors with random values, because the classes are others


def convert(
    checkpoint: Mapping[str, Any], classes: Sequence[str] | None = None, anchors: str | None = None
) -> Converted:
    """Build a model from what another project saved. The names and shapes of the tensors tell which project it was.

    The known checkpoints are those of torchvision's `ssd300_vgg16`; NVIDIA's SSD300 v1.1 with each of its ResNets;
    SSD300 of amdegroot/ssd.pytorch; SSD300 and SSD512 of lufficc/SSD and of MMDetection (version 2.14 or later).

    The model has the project's default boxes with their clip rule, normalisation of pixels, score and IoU thresholds
    and numbers of candidates and detections, and clips boxes before or after NMS as the project's code does. So it
    detects what that code detects, with these exceptions:

    - Boxes are clipped to the image in the end. The code of amdegroot, lufficc and NVIDIA leaves them as they are.
    - amdegroot, lufficc and MMDetection resize with OpenCV, which rounds pixels to integers, NVIDIA with PIL, which
      also averages where it shrinks. `ssdcore evaluate` and `ssdcore detect` average, `SSD.resize` does not.
    - MMDetection's code takes 1000 candidates from each feature map, among all classes, and drops boxes without area.
    - Widths and heights grow at most by 1000 / 16, as in torchvision and MMDetection. The others have no limit, and
      MMDetection also limits how much they shrink.
    - amdegroot, lufficc and MMDetection add 1e-10 to the norm of conv4_3's features. This changes no fp32 feature whose
      norm exceeds 1e-2.

    Args:
        checkpoint: tensors by name, or a dict that has them under "model" or "state_dict".
        classes: names of the classes without the background. If their number is not the checkpoint's, the
            classification head keeps random weights, for training. The default is what the checkpoint says
            (MMDetection), and otherwise Pascal VOC's names for 20 classes, COCO's for 80, and COCO's by id for 90.
        anchors: "voc" or "coco", the dataset that decides the sizes of the default boxes. The default is what the
            checkpoint says (MMDetection), and otherwise what the project takes for this number of classes.

    Raises:
        ValueError: no known project saves such tensors; tensors are missing, unexpected or of another shape; or the
            classes or the anchors are neither known nor given.
    """
    state = _state(checkpoint)
    source, names = _recognise(state)
    config = next(iter(source.anchors.values()))
    num_classes = max(2, state[names[f"{CLASS_HEAD}0.bias"]].numel() // config.anchors_per_cell[0])
    _check_shapes(source, names, state, num_classes)

    noted_classes, noted_anchors = _from_meta(checkpoint.get("meta"), config.image_size)
    if classes is None and len(noted_classes) == num_classes - 1:
        classes = noted_classes
    classes, ids = _classes_and_ids(classes, num_classes)
    anchors = anchors or noted_anchors or source.anchors_for(num_classes)
    if anchors is None:
        raise ValueError(
            f"anchors must be given, {' or '.join(source.anchors)}, because {num_classes - 1} classes "
            f"do not tell which default boxes {source.project} had"
        )
    if anchors not in source.anchors:
        raise ValueError(f"anchors must be {' or '.join(source.anchors)} for {source.project}, got {anchors!r}")

    model = MODELS[source.model](
        len(classes) + 1,
        anchors=source.anchors[anchors],
        image_mean=source.image_mean,
        image_std=source.image_std,
    )
    model.score_threshold = source.score_threshold
    model.iou_threshold = source.iou_threshold
    model.topk_candidates = source.topk_candidates
    model.max_detections = source.max_detections(num_classes)
    model.clip_before_nms = source.clip_before_nms
    same_classes = len(classes) + 1 == num_classes
    not_loaded = [] if same_classes else [ours for ours in names if ours.startswith(CLASS_HEAD)]
    loaded = {
        ours: source.our_order(ours, state[theirs], config.anchors_per_cell)
        for ours, theirs in names.items()
        if theirs in state and ours not in not_loaded
    }
    model.load_state_dict(model.state_dict() | loaded)
    model.classes, model.category_ids = classes, ids
    return Converted(model.eval(), source.project, classes, ids, not_loaded)


def convert_file(
    path: str | Path, output: str | Path, classes: Sequence[str] | None = None, anchors: str | None = None
) -> Converted:
    """Convert a .pth, .pt or .safetensors file of another project to a file that `load_model` reads.

    No code that the file may contain is run.

    Args:
        path: the checkpoint.
        output: the new file; its folder must exist.
        classes, anchors: those of `convert`.

    Raises:
        ValueError: as in `convert`; or the file cannot be read safely; or ssdcore wrote it.
    """
    path = Path(path)
    if is_own(path):
        raise ValueError(f"{path} needs no conversion: ssdcore wrote it, and reads it as it is")
    checkpoint = read_safely(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} must hold tensors by name, got {type(checkpoint).__name__}")
    if checkpoint.keys() >= {"trained", "settings"}:
        raise ValueError(f"{path} is the state of a run of ssdcore, whose weights are in model.safetensors beside it")
    try:
        converted = convert(checkpoint, classes, anchors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    save_weights(converted.model, output, converted.classes, converted.category_ids)
    return converted


def _state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, without what wrappers put before the names."""
    inner = next((checkpoint[key] for key in CONTAINERS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    state = {name: tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


@functools.cache
def _shapes(model: str, num_classes: int) -> dict[str, torch.Size]:
    """The shapes of a model's tensors, without memory for them."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in MODELS[model](num_classes).state_dict().items()}


def _recognise(state: Mapping[str, Tensor]) -> tuple[Source, dict[str, str]]:
    """The source that saves such tensors, and the source's names of our tensors."""
    names_by_source = [(source, source.their_names(_shapes(source.model, 2))) for source in SOURCES]

    def likeness(names: Mapping[str, str]) -> float:
        theirs = set(names.values())
        return len(theirs & state.keys()) / len(theirs | state.keys())

    source, names = max(names_by_source, key=lambda item: likeness(item[1]))
    if likeness(names) < LEAST_LIKENESS:
        projects = ", ".join(dict.fromkeys(f"{source.project}'s {source.model}" for source in SOURCES))
        raise ValueError(f"no known project saves such tensors: found {_listed(state)}; the known ones: {projects}")
    # Older versions of PyTorch saved no such counters, and no model here reads them.
    needed = {theirs for ours, theirs in names.items() if not ours.endswith(".num_batches_tracked")}
    missing, unexpected = needed - state.keys(), state.keys() - set(names.values())
    if missing or unexpected:
        raise ValueError(
            f"this is an incomplete {source.model} of {source.project}: "
            f"missing tensors: {_listed(missing)}; unexpected tensors: {_listed(unexpected)}"
        )
    return source, names


def _check_shapes(source: Source, names: Mapping[str, str], state: Mapping[str, Tensor], num_classes: int) -> None:
    expected = _shapes(source.model, num_classes)
    wrong = [
        f"{theirs} {list(state[theirs].shape)}, expected {list(expected[ours])}"
        for ours, theirs in names.items()
        if theirs in state and state[theirs].shape != expected[ours]
    ]
    if wrong:
        raise ValueError(f"this is no {source.model} of {source.project}: wrong shapes: {_listed(wrong)}")


def _classes_and_ids(classes: Sequence[str] | None, num_classes: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the classes, by default those of a published detector, and their ids in the dataset."""
    published = class_names(num_classes)
    if published is not None and (classes is None or tuple(classes) == published[0]):
        return published
    if classes is None:
        raise ValueError(f"classes must be given, because nothing names the {num_classes - 1} of this checkpoint")
    if len(set(classes)) != len(classes):
        raise ValueError(f"classes must not contain duplicates, got {list(classes)}")
    return tuple(classes), tuple(range(1, len(classes) + 1))


def _from_meta(meta: object, image_size: int) -> tuple[tuple[str, ...], str | None]:
    """The classes and the dataset of the default boxes, as MMDetection notes them beside the weights."""
    if not isinstance(meta, Mapping):
        return (), None
    dataset = meta.get("dataset_meta")  # of version 3
    classes = (
        (dataset.get("classes") or dataset.get("CLASSES")) if isinstance(dataset, Mapping) else meta.get("CLASSES")
    )
    text = str(meta.get("cfg") or meta.get("config"))  # the configuration, of version 3 or 2
    ratio = re.search(r"basesize_ratio_range=\(\s*([\d.]+)", text)
    return tuple(classes or ()), MMDETECTION_ANCHORS.get((image_size, float(ratio[1]))) if ratio else None


def _listed(names: Collection[str]) -> str:
    """The number of names, and the first of them."""
    if not names:
        return "none"
    return f"{len(names)}: {', '.join(sorted(names)[:LISTED])}{', ...' if len(names) > LISTED else ''}"
