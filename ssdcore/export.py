"""Write a whole detector to one file that runs without the code of this project's models.

The file's input is `images`, float32 [B, 3, S, S], RGB in 0..1: the normalisation is inside, the resizing is not. Its
outputs have fixed shapes: `boxes` float32 [B, D, 4] xyxy in pixels of the input, `scores` float32 [B, D], `labels`
int64 [B, D] and `num_detections` int32 [B], best first, padded with zeros and label -1.

There are two formats. A .pt2 file of `torch.export` holds the op `ssdcore::postprocess_detections`, which `import
ssdcore.kernels` defines. An .onnx file consists of ONNX's standard operators.

Both hold a JSON text under the name `ssdcore.json` (pt2, an extra file) or `ssdcore` (onnx, an entry of the metadata):
what `description` returns, and the fields `image_size` and `boxes`.
"""

import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssdcore.models import SSD
from ssdcore.weights import description, write_atomically

FORMATS = ("pt2", "onnx")
OUTPUTS = ("boxes", "scores", "labels", "num_detections")
ONNX_PACKAGES = ("onnx", "onnxscript")
OPSET = 18  # the oldest that PyTorch's exporter writes without conversion, so that older runtimes read the file
EXAMPLE_IMAGES = 2  # not 1, which the exporter would take for a constant


class Port(NamedTuple):
    """An input or an output of an exported file."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a name stands for a size that may vary


class Ports(NamedTuple):
    """The inputs and the outputs of an exported file, in its order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class _Detector(nn.Module):
    """From images to detections in pixels of the input, by name."""

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.model.postprocess(*self.model.predict(self.model.resize(images)))
        return {name: getattr(found, name) for name in OUTPUTS}


def export_model(
    model: SSD,
    path: str | Path,
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    *,
    batch_size: int | None = None,
) -> Ports:
    """Write `model` to a .pt2 or an .onnx file, as a whole or not at all.

    The settings of the postprocess (`score_threshold` and others) are constants of the file. A .pt2 file runs on the
    device that `model` is on. The scores and boxes of an .onnx file may differ from the model's in their last bits, so
    that detections whose scores are nearly equal may change places.

    Args:
        model: it is switched to eval mode and left there.
        path: the file, whose suffix chooses the format; its folder must exist.
        classes: `num_classes - 1` names; label i + 1 is `classes[i]`.
        category_ids: the dataset's id of each class. By default the labels 1, 2, ...
        batch_size: the number of images, 1 or more; None: any number.

    Returns:
        The names, dtypes and shapes of the inputs and outputs.

    Raises:
        ValueError: an argument is wrong, or a package that the format needs is missing.
    """
    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"path must end in .{' or .'.join(FORMATS)}, got {path}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, or None for any, got {batch_size}")
    if len(classes) != model.num_classes - 1:
        raise ValueError(f"classes must name the {model.num_classes - 1} classes of the model, got {len(classes)}")
    size = model.anchor_config.image_size
    ids = range(1, len(classes) + 1) if category_ids is None else category_ids
    metadata = json.dumps(
        {
            **description(model, list(classes), list(ids)),
            "image_size": size,
            "boxes": f"xyxy in pixels of the input, {size} x {size}",
        }
    )
    images = torch.zeros(batch_size or EXAMPLE_IMAGES, 3, size, size, device=model.anchors.device)
    write = _pt2 if path.suffix == ".pt2" else _onnx
    with torch.no_grad():
        write_atomically(path, write(_Detector(model).eval(), images, batch_size is None, metadata))
    batch: int | str = "batch" if batch_size is None else batch_size
    padded = (batch, model.max_detections)
    return Ports(
        (Port("images", "float32", (batch, 3, size, size)),),
        (
            Port("boxes", "float32", (*padded, 4)),
            Port("scores", "float32", padded),
            Port("labels", "int64", padded),
            Port("num_detections", "int32", (batch,)),
        ),
    )


def _pt2(detector: nn.Module, images: Tensor, dynamic: bool, metadata: str) -> bytes:
    free = {"images": {0: torch.export.Dim("batch", min=1)}} if dynamic else None
    program = torch.export.export(detector, (images,), dynamic_shapes=free)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"ssdcore.json": metadata})
    return file.getvalue()


def _onnx(detector: nn.Module, images: Tensor, dynamic: bool, metadata: str) -> bytes:
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ValueError(f"an .onnx file needs {', '.join(missing)}: pip install 'ssdcore[export]'")
    import onnx

    from ssdcore.onnx_postprocess import onnx_postprocess_detections

    program: Any = torch.onnx.export(
        detector,
        (images,),
        dynamo=True,
        dynamic_shapes={"images": {0: "batch"}} if dynamic else None,
        input_names=["images"],
        output_names=list(OUTPUTS),
        opset_version=OPSET,
        custom_translation_table={torch.ops.ssdcore.postprocess_detections.default: onnx_postprocess_detections},
        verbose=False,
    )
    program.model.metadata_props["ssdcore"] = metadata
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content
