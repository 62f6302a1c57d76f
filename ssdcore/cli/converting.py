"""`ssdcore convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ssdcore.cli.options import option


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file.")],
    output: Annotated[Path, typer.Argument(help="Path of the new model.safetensors.")],
    classes: Annotated[
        Path | None,
        option(
            "Text file with the name of a class per line, without the background. With another number of classes than "
            "the checkpoint's, the classification head starts at random, for training. Default: what the checkpoint "
            "says, or the names of Pascal VOC or COCO."
        ),
    ] = None,
    anchors: Annotated[
        str | None,
        option(
            "voc or coco: the dataset for which the default boxes have their sizes. Default: what the checkpoint says, "
            "or what the project takes for this number of classes."
        ),
    ] = None,
) -> Path:
    """Convert another project's checkpoint to a model.safetensors that evaluate, detect and train --weights read.

    Known are torchvision's ssd300_vgg16, NVIDIA's SSD300 v1.1, and the SSDs on VGG-16 of amdegroot/ssd.pytorch,
    lufficc/SSD and MMDetection.
    """
    from ssdcore.data.columns import read_lines
    from ssdcore.weights import convert_file

    names = read_lines(classes) if classes else None
    output.parent.mkdir(parents=True, exist_ok=True)
    converted = convert_file(checkpoint, output, names, anchors)
    print(f"{checkpoint} is {converted.model.name} of {converted.project}; wrote {output}")
    print(f"classes: {', '.join(converted.classes)}")
    if converted.not_loaded:
        print(f"{checkpoint} has other classes: {len(converted.not_loaded)} tensors keep random weights:")
        print(", ".join(converted.not_loaded))
    return output
