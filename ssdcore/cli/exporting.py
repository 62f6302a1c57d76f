"""`ssdcore export`."""

from pathlib import Path
from typing import Annotated

import typer

from ssdcore.cli.options import Weights, find_device, option


def export(
    weights: Weights,
    format: Annotated[str, typer.Option(help="pt2, for PyTorch's torch.export; or onnx.")] = "pt2",
    output: Annotated[Path | None, option("File to write. Default: the weights' name, ending in .FORMAT.")] = None,
    batch: Annotated[str, typer.Option(help="Images per call: a number, or dynamic for any number.")] = "dynamic",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where the file runs. onnx: no difference.")] = "cpu",
) -> Path:
    """Write a detector with its postprocess to one file for other programs.

    The input is a batch of RGB images in 0..1, already resized. The normalisation is in the file.

    The outputs have fixed shapes: boxes (x1, y1, x2, y2 in pixels of the input), scores, labels and num_detections.
    """
    from ssdcore.export import FORMATS, export_model
    from ssdcore.weights import load_model

    if format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {format}")
    if batch != "dynamic" and not batch.isdecimal():
        raise ValueError(f"batch must be a number or dynamic, got {batch}")
    path = output or weights.with_suffix(f".{format}")
    if path.suffix != f".{format}":
        raise ValueError(f"output must end in .{format}, got {path}")
    model, classes = load_model(weights, find_device(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    batch_size = None if batch == "dynamic" else int(batch)
    inputs, outputs = export_model(model, path, classes, model.category_ids, batch_size=batch_size)
    print(f"wrote {path}: {model.name} with {len(classes)} classes, {path.stat().st_size / 1e6:.1f} MB")
    for kind, ports in (("input", inputs), ("output", outputs)):
        for name, dtype, shape in ports:
            print(f"  {kind:<6} {name:<14} {dtype:<7} [{', '.join(map(str, shape))}]")
    return path
