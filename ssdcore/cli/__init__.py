"""The command line: `ssdcore demo | train | evaluate | detect | export | models | convert | data check`.

Each command is also a Python function.

Modules that import torch are imported inside the functions that need them, so that `ssdcore --help` answers at once.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

EXTRA = ("matplotlib", "PIL", "pycocotools", "safetensors", "tensorboard", "torchvision", "tqdm", "typer", "yaml")
if missing := [name for name in EXTRA if find_spec(name) is None]:
    raise SystemExit(f"ssdcore's commands need {', '.join(missing)}: pip install 'ssdcore[train]'")

import typer  # noqa: E402

from ssdcore.cli.options import (  # noqa: E402
    Data,
    Device,
    Weights,
    Workers,
    _device,
    _open,
    _option,
    _require_model,
    _score,
    _share_cores,
)
from ssdcore.cli.training import train  # noqa: E402

if TYPE_CHECKING:
    import torch

    from ssdcore.data import DetectionDataset
    from ssdcore.models import SSD

DEMO_TRAIN, DEMO_VAL = 600, 150  # images; enough for an AP50 of 0.95, and few enough for minutes on two CPU cores
DEMO_EPOCHS = 20
DEMO_PICTURES = 12

app = typer.Typer(
    name="ssdcore",
    help="Train, evaluate and run SSD object detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(train)


def main() -> None:
    """Run the command line. Errors that the user can correct are printed as one line, without a traceback."""
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        # The message of an error from a worker process is a traceback, whose last line is the original error.
        message = str(error).strip()
        sys.exit(f"error: {message.splitlines()[-1] if message.startswith('Caught ') else message}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for dataset, model and results.")] = Path("demo"),
    device: Device = "auto",
    workers: Workers = None,
) -> dict[str, Any]:
    """Train ssd300_tiny on generated images of coloured shapes, evaluate it and draw detected objects.

    This takes a few minutes on two CPU cores. If it is interrupted, run it again to continue.
    """
    from ssdcore.synthetic import make_synthetic

    data = make_synthetic(output / "shapes", train=DEMO_TRAIN, val=DEMO_VAL)
    run = output / "run"
    # Without a validation split, so that the images that score the model do not choose its weights.
    train(
        data,
        output=run,
        val_split="none",
        epochs=DEMO_EPOCHS,
        device=device,
        workers=workers,
        resume=(run / "last.pt").exists(),
    )
    weights = run / "model.safetensors"
    metrics = evaluate([weights], data, split="val", output=output, device=device, workers=workers)
    pictures = detect(sorted((data / "val").glob("*.jpg"))[:DEMO_PICTURES], weights, output / "pictures", device=device)
    sheet = _contact_sheet(pictures, output / "detections.png")
    print(
        f"\nAP50 is {_score(metrics['AP50'])} on {DEMO_VAL} images that the model was not trained on."
        f"\nOpen {sheet} to see the detected objects in the first {DEMO_PICTURES} of these images."
        "\n\nTo use your own images, annotated in the layout of Pascal VOC, COCO or YOLO:"
        "\n  ssdcore data check DATASET_FOLDER"
        "\n  ssdcore train --data DATASET_FOLDER --output RUN_FOLDER"
        "\n  ssdcore evaluate --weights RUN_FOLDER/model.safetensors --data DATASET_FOLDER --split test"
        "\n  ssdcore detect --weights RUN_FOLDER/model.safetensors IMAGE ..."
    )
    return metrics


@app.command()
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
        Path | None, _option("Folder for the files. Default: a folder beside the first weights, named as the split.")
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

    torch_device = _device(device)
    models, classes = _models_to_evaluate(weights, torch_device)
    run = weights[0].parent
    output = output or run / split
    training = _training_record(run)
    if training is not None and output.resolve() == run.resolve():
        raise ValueError(f"output must not be {output}, because its metrics.json, the record of a run, would be lost")
    dataset = _open_with_classes(data, split, classes, weights[0])
    num_workers = _share_cores(workers)
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
    _write_json(output / "metrics.json", described | metrics)
    write_atomically(output / "detections.json", json.dumps(to_coco_results(dataset, detections)).encode())
    write_report(output / "report.html", dataset, detections, described | metrics, training)
    for name, value in metrics["AP50_per_class"].items():
        print(f" AP50 of {name}: {_score(value)}")
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stopwatch.seconds.items())
    print(f"{images_per_second:.1f} images per second without the scoring; {parts}")
    print(f"wrote report.html, metrics.json and detections.json to {output}")
    return metrics


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of image files.")],
    weights: Weights,
    output: Annotated[Path, typer.Option(help="Folder for pictures and JSON files.")] = Path("detections"),
    score_threshold: Annotated[float, typer.Option(help="Keep only objects with a higher score.", min=0, max=1)] = 0.5,
    device: Device = "auto",
) -> list[Path]:
    """Detect objects in images. Draws them, and writes them in COCO's results format.

    detections.json has image_id, category_id, bbox (x, y, width, height in pixels) and score of each object.

    category_id is the id of the class in the dataset that the model was trained on.

    images.json has the file of each image_id and the class name of each category_id.
    """
    from ssdcore.detect import detect_files
    from ssdcore.draw import draw_detections
    from ssdcore.evaluate import to_coco_results
    from ssdcore.weights import category_ids, load_model

    model, classes = load_model(weights, _device(device))
    ids = category_ids(weights)
    model.score_threshold = score_threshold
    output.mkdir(parents=True, exist_ok=True)
    photographs = _photographs(images)
    used_paths = {path.resolve() for path in photographs}  # a picture must replace no photograph and no other picture
    errors: list[str] = []
    files: list[dict[str, Any]] = []
    pictures: list[Path] = []
    detected_by_image_id = {}
    for image_id, (path, photograph, detected) in enumerate(detect_files(model, photographs, errors.append), start=1):
        picture = _unused_path(output, path.stem, used_paths)
        used_paths.add(picture.resolve())
        draw_detections(photograph, **detected, classes=classes).save(picture, quality=95)
        pictures.append(picture)
        detected_by_image_id[image_id] = detected
        files.append({"id": image_id, "file_name": str(path), "picture": picture.name})
    _write_json(output / "detections.json", to_coco_results(ids, detected_by_image_id))
    categories = [{"id": category_id, "name": name} for category_id, name in zip(ids, classes, strict=True)]
    _write_json(output / "images.json", {"images": files, "categories": categories})
    count = sum(len(detected["scores"]) for detected in detected_by_image_id.values())
    print(f"wrote {len(pictures)} pictures with {count} objects, detections.json and images.json to {output}")
    if errors:
        print("\n".join(f"error: {error}" for error in errors), file=sys.stderr)
        raise typer.Exit(1)
    return pictures


@app.command()
def export(
    weights: Weights,
    format: Annotated[str, typer.Option(help="pt2, for PyTorch's torch.export; or onnx.")] = "pt2",
    output: Annotated[Path | None, _option("File to write. Default: the weights' name, ending in .FORMAT.")] = None,
    batch: Annotated[str, typer.Option(help="Images per call: a number, or dynamic for any number.")] = "dynamic",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: where the file runs. onnx: no difference.")] = "cpu",
) -> Path:
    """Write a detector with its postprocess to one file for other programs.

    The input is a batch of RGB images in 0..1, already resized. The normalisation is in the file.

    The outputs have fixed shapes: boxes (x1, y1, x2, y2 in pixels of the input), scores, labels and num_detections.
    """
    from ssdcore.export import FORMATS, export_model
    from ssdcore.weights import category_ids, load_model

    if format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {format}")
    if batch != "dynamic" and not batch.isdecimal():
        raise ValueError(f"batch must be a number or dynamic, got {batch}")
    path = output or weights.with_suffix(f".{format}")
    if path.suffix != f".{format}":
        raise ValueError(f"output must end in .{format}, got {path}")
    model, classes = load_model(weights, _device(device))
    batch_size = None if batch == "dynamic" else int(batch)
    inputs, outputs = export_model(model, path, classes, category_ids(weights), batch_size=batch_size)
    print(f"wrote {path}: {model.name} with {len(classes)} classes, {path.stat().st_size / 1e6:.1f} MB")
    for kind, ports in (("input", inputs), ("output", outputs)):
        for name, dtype, shape in ports:
            print(f"  {kind:<6} {name:<14} {dtype:<7} [{', '.join(map(str, shape))}]")
    return path


@app.command()
def models() -> str:
    """List the models that `train --model` knows, with their sizes.

    The parameters and GMACs (10^9 multiply-accumulates for one image) are counted on this machine.
    """
    from ssdcore.models.facts import table

    text = table()
    print(text)
    return text


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth, .pt or .safetensors file.")],
    output: Annotated[Path, typer.Argument(help="Path of the new model.safetensors.")],
    classes: Annotated[
        Path | None,
        _option(
            "Text file with the name of a class per line, without the background. With another number of classes than "
            "the checkpoint's, the classification head starts at random, for training. Default: what the checkpoint "
            "says, or the names of Pascal VOC or COCO."
        ),
    ] = None,
    anchors: Annotated[
        str | None,
        _option(
            "voc or coco: the dataset for which the default boxes have their sizes. Default: what the checkpoint says, "
            "or what the project takes for this number of classes."
        ),
    ] = None,
) -> Path:
    """Convert another project's checkpoint to a model.safetensors that evaluate, detect and train --weights read.

    Known are torchvision's ssd300_vgg16, NVIDIA's SSD300 v1.1, and the SSDs on VGG-16 of amdegroot/ssd.pytorch,
    lufficc/SSD and MMDetection.
    """
    from ssdcore.weights import convert_file

    names = [line.strip() for line in classes.read_text().splitlines() if line.strip()] if classes else None
    output.parent.mkdir(parents=True, exist_ok=True)
    converted = convert_file(checkpoint, output, names, anchors)
    print(f"{checkpoint} is {converted.model.name} of {converted.project}; wrote {output}")
    print(f"classes: {', '.join(converted.classes)}")
    if converted.not_loaded:
        print(f"{checkpoint} has other classes: {len(converted.not_loaded)} tensors keep random weights:")
        print(", ".join(converted.not_loaded))
    return output


@data_app.command("check")
def check_data(
    data: Annotated[Path, typer.Argument(help="Dataset folder.")],
    model: Annotated[str, typer.Option(help="Model whose anchors are compared with the objects.")] = "ssd300_tiny",
    output: Annotated[
        Path | None, _option("Folder for the picture ground-truth.png. Default: runs/DATASET-check.")
    ] = None,
) -> list[str]:
    """List everything that is wrong with a dataset, count what it holds, and draw some images with their ground truth.

    The exit code is 0 if nothing is wrong, and 1 otherwise.
    """
    import torch

    from ssdcore.data.check import check_dataset, describe, draw_sheet
    from ssdcore.models import MODELS

    _require_model(model)
    with torch.device("meta"):
        config = MODELS[model](2).anchor_config
    report = check_dataset(data)
    print(describe(report, model, config))
    sheet = draw_sheet(report.datasets)
    if sheet is not None:
        path = (output or Path("runs") / f"{data.resolve().name}-check") / "ground-truth.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"\nwrote {path}, a picture of some images with their ground truth")
    if report.problems:
        raise typer.Exit(1)
    return report.notes


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
    dataset = _open(data, split, split_file=split_file)
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


def _photographs(paths: list[Path]) -> list[Path]:
    """The given files; for a folder, the image files in it, sorted by name."""
    from ssdcore.data import IMAGE_SUFFIXES

    photographs = []
    for path in paths:
        files_in_folder = sorted(file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and not files_in_folder:
            raise ValueError(f"no images in {path}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        photographs += files_in_folder if path.is_dir() else [path]
    return photographs


def _unused_path(folder: Path, stem: str, used_paths: set[Path]) -> Path:
    """`folder/stem.jpg`, or the first of `folder/stem-2.jpg`, `folder/stem-3.jpg`, ... that is not in `used_paths`."""
    path, number = folder / f"{stem}.jpg", 1
    while path.resolve() in used_paths:
        number += 1
        path = folder / f"{stem}-{number}.jpg"
    return path


def _contact_sheet(pictures: list[Path], path: Path) -> Path:
    from PIL import Image

    from ssdcore.draw import contact_sheet

    contact_sheet([Image.open(picture) for picture in pictures], columns=4).save(path)
    return path


def _write_json(path: Path, content: object) -> None:
    from ssdcore.weights import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2).encode())
