"""`ssdcore evaluate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssdcore.cli.options import (
    Data,
    Device,
    Workers,
    find_device,
    open_split,
    option,
    score_text,
    share_cores,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from ssdcore.data import DetectionDataset
    from ssdcore.models import SSD


def evaluate(
    weights: Annotated[
        list[Path],
        typer.Option(
            help="Path of a trained model's model.safetensors. Repeat the option to average what several models "
            "detect, for example an SSD300 and an SSD512. Each sees the images at its own size."
        ),
    ],
    data: Data,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    flip: Annotated[
        bool, typer.Option("--flip", help="Detect in the mirror image of each image too, and average.")
    ] = False,
    output: Annotated[
        Path | None, option("Folder for the files. Default: a folder beside the first weights, named as the split.")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
) -> dict[str, Any]:
    """Evaluate a detector with the metrics of COCO and Pascal VOC.

    report.html shows the result: metrics, curves, confusions, the worst mistakes with their pictures, and the speed.

    metrics.json has the metrics, detections.json the detected objects in COCO's results format.

    Where several models or mirror images are averaged, NMS finds the boxes of the same object. Its score is the mean.
    """
    from ssdcore.detect import detect_dataset
    from ssdcore.environment import environment
    from ssdcore.evaluate import evaluate_detections, to_coco_results
    from ssdcore.report import write_report
    from ssdcore.stopwatch import Stopwatch
    from ssdcore.weights import write_atomically

    torch_device = find_device(device)
    models, classes = _models_to_evaluate(weights, torch_device)
    run = weights[0].parent
    output = output or run / split
    training = _training_record(run)
    if _training_record(output) is not None:
        raise ValueError(f"output must not be {output}, because its metrics.json, the record of a run, would be lost")
    dataset = _open_with_classes(data, split, classes, weights[0])
    num_workers = share_cores(workers)
    stopwatch = Stopwatch(torch_device)
    detections = detect_dataset(models, dataset, flip=flip, workers=num_workers, stopwatch=stopwatch)
    images_per_second = len(dataset) / sum(stopwatch.seconds.values())
    with stopwatch.part("scoring"):
        metrics = evaluate_detections(dataset, detections)
    described = {
        "weights": [str(path) for path in weights],
        "data": str(data),
        "split": split,
        "images": len(dataset),
        "settings": {
            "models": [_inference_settings(model) for model in models],
            "flip": flip,
            "workers": num_workers,
        },
        "environment": environment(torch_device),
        "speed": {"seconds": stopwatch.seconds, "images_per_second": images_per_second},
    }
    write_json(output / "metrics.json", described | metrics)
    write_atomically(output / "detections.json", json.dumps(to_coco_results(dataset, detections)).encode())
    write_report(output / "report.html", dataset, detections, described | metrics, training)
    for name, value in metrics["AP50_per_class"].items():
        print(f" AP50 of {name}: {score_text(value)}")
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stopwatch.seconds.items())
    print(f"{images_per_second:.1f} images per second without the scoring; {parts}")
    print(f"wrote report.html, metrics.json and detections.json to {output}")
    return metrics


def _models_to_evaluate(paths: list[Path], device: "torch.device") -> "tuple[list[SSD], tuple[str, ...]]":
    """The models, and the names of their classes, which must be the same."""
    from ssdcore.weights import load_model

    loaded = [load_model(path, device) for path in paths]
    classes = loaded[0][1]
    for path, (_, other_classes) in zip(paths, loaded, strict=True):
        if other_classes != classes:
            raise ValueError(
                f"the classes of all weights must be the same and in the same order: {paths[0]} has "
                f"{', '.join(classes)}; {path} has {', '.join(other_classes)}"
            )
    return [model for model, _ in loaded], classes


def _open_with_classes(data: Path, split: str, classes: "tuple[str, ...]", weights: Path) -> "DetectionDataset":
    """Open a split with the classes of the model in `weights`."""
    from ssdcore.data import open_dataset
    from ssdcore.data.opening import existing_split_file

    split_file = existing_split_file(data, run=weights.parent)
    dataset = open_split(data, split, split_file=split_file)
    if dataset.classes == classes:
        return dataset
    try:
        # This works if the model knows all classes that occur in the split, in any order.
        return open_dataset(data, split, classes, split_file=split_file)
    except ValueError as error:
        raise ValueError(
            f"the classes of {weights} must include those of {data}, {', '.join(dataset.classes)}; "
            f"got {', '.join(classes)}"
        ) from error


def _training_record(run: Path) -> dict[str, Any] | None:
    """The record that `train` wrote to the folder of the weights, if they come from a run."""
    try:
        record = json.loads((run / "metrics.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"settings", "epochs", "best"} <= record.keys() else None


def _inference_settings(model: "SSD") -> dict[str, Any]:
    """What the objects that a model detects depend on, besides its weights."""
    from ssdcore.weights.files import POSTPROCESS_FIELDS

    postprocess = {name: getattr(model, name) for name in POSTPROCESS_FIELDS}
    return {"model": model.name, "image_size": model.anchor_config.image_size, **postprocess}
