"""The command line: `ssdcore demo | train | evaluate | detect`. Each command is a function to call as well."""

# Whatever imports torch is imported by the command that needs it: `ssdcore --help` answers at once.

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

EXTRA = ("matplotlib", "PIL", "pycocotools", "safetensors", "tensorboard", "torchvision", "tqdm", "typer")
if missing := [name for name in EXTRA if find_spec(name) is None]:
    raise SystemExit(f"ssdcore's commands need {', '.join(missing)}: pip install 'ssdcore[train]'")

import typer  # noqa: E402

from ssdcore.cores import usable_cores  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ssdcore.data import DetectionDataset
    from ssdcore.model import SSD

DEMO_TRAIN, DEMO_VAL = 600, 150  # images; enough for AP50 0.95, and for a few minutes on two CPU cores
DEMO_EPOCHS = 20
DEMO_PICTURES = 12
MAX_PROBLEMS = 3  # shown of a dataset's

app = typer.Typer(
    name="ssdcore",
    help="Train, score and use SSD300 detectors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is a GPU.")]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that read and augment images; by default half the cores, 8 at most.",
        show_default=False,
        min=0,
    ),
]


def main() -> None:
    """Run the command line; what the user can mend is told in one line, without a traceback."""
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        # A worker process sends its traceback as the message; what it is about stands in the last line.
        message = str(error).strip()
        sys.exit(f"error: {message.splitlines()[-1] if message.startswith('Caught ') else message}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, run and pictures.")] = Path("demo"),
    device: Device = "auto",
    workers: Workers = None,
) -> dict[str, Any]:
    """Make a data set of coloured shapes, train ssd300_tiny on it, score it, draw what it finds.

    A few minutes on two CPU cores. Repeated, it continues where it was interrupted.
    """
    from ssdcore.synthetic import make_synthetic

    data = make_synthetic(output / "shapes", train=DEMO_TRAIN, val=DEMO_VAL)
    run = output / "run"
    # Without a validation split: the images that score it have had no say in the training.
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
    metrics = evaluate(weights, data, split="val", output=output, device=device, workers=workers)
    pictures = detect(sorted((data / "val").glob("*.jpg"))[:DEMO_PICTURES], weights, output / "pictures", device=device)
    sheet = _contact_sheet(pictures, output / "detections.png")
    print(
        f"\nAP50 {_score(metrics['AP50'])} on {DEMO_VAL} images that it was not trained on."
        f"\nThe first {DEMO_PICTURES} of them, with what it found: {sheet}"
        "\n\nYour own images, in the form of Pascal VOC or COCO:"
        "\n  ssdcore train --data DIR --output RUN"
        "\n  ssdcore evaluate --weights RUN/model.safetensors --data DIR --split test"
        "\n  ssdcore detect --weights RUN/model.safetensors PHOTOGRAPH ..."
    )
    return metrics


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Folder in the form of Pascal VOC or COCO.")],
    model: Annotated[str, typer.Option(help="ssd300_tiny or ssd300_vgg16.")] = "ssd300_tiny",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the run; by default runs/DATA-MODEL.", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="By default 40 for ssd300_tiny, 120 for ssd300_vgg16, and more on a small set.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="By default 16 for ssd300_tiny, 32 for ssd300_vgg16.", show_default=False)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate; by default 2e-3 for ssd300_tiny, 1e-3 for ssd300_vgg16.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Start from these: a model.safetensors, of other classes too, or for ssd300_vgg16 the name of "
            "torchvision's backbone weights, IMAGENET1K_FEATURES. By default from scratch.",
            show_default=False,
        ),
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="By default trainval where there is one, else train.", show_default=False)
    ] = None,
    val_split: Annotated[
        str | None,
        typer.Option(
            help="Chooses the epoch to keep, by AP50; none: keep the last. By default val, unless the "
            "training split is trainval.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and augmentation.", min=0)] = 0,
    device: Device = "auto",
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
) -> dict[str, Any]:
    """Train a detector. An interrupted run continues with --resume, to the same end."""
    from ssdcore.data import available_splits
    from ssdcore.train import fit
    from ssdcore.weights import load_model

    splits = available_splits(data)
    train_split, val_split = _choose_splits(splits, train_split, val_split)
    train_set = _open(data, train_split)
    val_set = None if val_split is None else _open(data, val_split, train_set.classes)
    if val_set is not None and (shared := _images(train_set) & _images(val_set)):
        raise ValueError(f"{val_split} must not be trained on: {len(shared)} of its images are in {train_split} too")
    output = output or Path("runs") / f"{data.resolve().name}-{model}"
    if resume and (output / "model.safetensors").exists():
        net, _ = load_model(output / "model.safetensors")  # built as the run's was, whatever that started from
    else:
        net = _initial_model(model, weights, train_set.classes, seed)
    where = _device(device)
    print(
        f"training {model} for {', '.join(train_set.classes)} on {len(train_set)} images of {train_split}, "
        f"on {where.type}; keeping "
        + (f"the epoch with the best AP50 on {val_split}" if val_set else "the last epoch: no validation split")
    )
    try:
        record = fit(
            net,
            train_set,
            output,
            val_set=val_set,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            workers=_share_cores(workers),
            device=where,
            resume=resume,
        )
    except KeyboardInterrupt:
        if (output / "last.pt").exists():
            print(f"\nstopped; {output} holds the run as last saved: continue with --resume")
        raise typer.Exit(130) from None
    best = record["epochs"][record["best"] - 1]
    chosen = f"best AP50 on {val_split}, {_score(best['val']['AP50'])}" if val_set else "the last"
    print(f"wrote {output / 'model.safetensors'} (epoch {best['epoch']}: {chosen}), metrics.json and loss.png")
    return record


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Option(help="model.safetensors of a run.")],
    data: Annotated[Path, typer.Option(help="Folder in the form of Pascal VOC or COCO.")],
    split: Annotated[str, typer.Option(help="The split to score.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json; by default SPLIT beside the weights.", show_default=False),
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
) -> dict[str, Any]:
    """Score a detector: COCO's average precisions and Pascal VOC's."""
    from ssdcore.data import open_dataset
    from ssdcore.detect import detect_dataset
    from ssdcore.evaluate import evaluate_detections
    from ssdcore.weights import load_model

    model, classes = load_model(weights, _device(device))
    dataset = _open(data, split)
    if dataset.classes != classes:
        theirs = ", ".join(dataset.classes)
        try:
            dataset = open_dataset(data, split, classes)  # the same by name, in another order or more of them
        except ValueError as error:
            raise ValueError(f"{weights} knows the classes {', '.join(classes)}; {data} has {theirs}") from error
    metrics = evaluate_detections(dataset, detect_dataset(model, dataset, workers=_share_cores(workers)))
    output = output or weights.parent / split
    about = {"weights": str(weights), "data": str(data), "split": split, "images": len(dataset)}
    _write_json(output / "metrics.json", about | metrics)
    for name, value in metrics["AP50_per_class"].items():
        print(f" AP50 of {name}: {_score(value)}")
    print(f"wrote {output / 'metrics.json'}")
    return metrics


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Photographs, or folders of them.")],
    weights: Annotated[Path, typer.Option(help="model.safetensors of a run.")],
    output: Annotated[Path, typer.Option(help="Folder for pictures and detections.json.")] = Path("detections"),
    score_threshold: Annotated[float, typer.Option(help="Leave out what scores less.", min=0, max=1)] = 0.5,
    device: Device = "auto",
) -> list[Path]:
    """Find objects in photographs: draws them, and writes them in COCO's form for results.

    detections.json holds image_id, category_id (the class's number in the data set that the detector was trained
    on), bbox (x, y, width, height in pixels) and score; images.json tells which file has which image_id, and which
    class which category_id.
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
    taken = {path.resolve() for path in photographs}  # a picture never replaces a photograph, nor another picture
    errors: list[str] = []
    files: list[dict[str, Any]] = []
    pictures: dict[Path, None] = {}  # in order
    found = {}
    for path, photograph, one in detect_files(model, photographs, errors.append):
        picture, number = output / f"{path.stem}.jpg", 1
        while picture.resolve() in taken:
            number += 1
            picture = output / f"{path.stem}-{number}.jpg"
        taken.add(picture.resolve())
        draw_detections(photograph, **one, classes=classes).save(picture, quality=95)
        pictures[picture] = None
        found[len(pictures)] = one
        files.append({"id": len(pictures), "file_name": str(path), "picture": picture.name})
    _write_json(output / "detections.json", to_coco_results(ids, found))
    categories = [{"id": number, "name": name} for number, name in zip(ids, classes, strict=True)]
    _write_json(output / "images.json", {"images": files, "categories": categories})
    count = sum(len(one["scores"]) for one in found.values())
    print(f"wrote {len(pictures)} pictures with {count} objects, detections.json and images.json to {output}")
    if errors:
        print("\n".join(f"error: {error}" for error in errors), file=sys.stderr)
        raise typer.Exit(1)
    return list(pictures)


def _choose_splits(splits: list[str], train_split: str | None, val_split: str | None) -> tuple[str, str | None]:
    """The splits to train on and to choose weights by, where None was asked for."""
    train_split = train_split or ("trainval" if "trainval" in splits else "train")
    if val_split is None and train_split != "trainval":
        val_split = next((name for name in ("val", "valid", "validation") if name in splits), None)
    if val_split == "none":
        val_split = None
    if val_split is not None and val_split.lower().startswith("test"):
        raise ValueError(f"val-split must not be {val_split}: weights chosen by it would make its score worthless")
    return train_split, val_split


def _images(dataset: "DetectionDataset") -> set[Path]:
    return {dataset.image_path(i) for i in range(len(dataset))}


def _score(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _open(data: Path, split: str, classes: "Sequence[str] | None" = None) -> "DetectionDataset":
    """Open a split, and tell once what is wrong with it."""
    from ssdcore.data import open_dataset

    dataset = open_dataset(data, split, classes)
    if dataset.problems:
        print(f"{len(dataset.problems)} problems in {split} of {data}:")
        print("\n".join(f"  {problem}" for problem in dataset.problems[:MAX_PROBLEMS]))
        if len(dataset.problems) > MAX_PROBLEMS:
            print(f"  and {len(dataset.problems) - MAX_PROBLEMS} more")
    return dataset


def _initial_model(name: str, weights: str | None, classes: "Sequence[str]", seed: int) -> "SSD":
    """A model to train: from a file, on a pretrained backbone, or from scratch."""
    import torch
    from torchvision.models import VGG16_Weights

    from ssdcore.model import IMAGENET_MEAN, IMAGENET_STD, MODELS
    from ssdcore.weights import fine_tuned

    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    torch.manual_seed(seed)
    num_classes = len(classes) + 1
    if weights is None:
        return MODELS[name](num_classes, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    if name == "ssd300_vgg16" and weights in VGG16_Weights.__members__:
        return MODELS[name](num_classes, weights_backbone=weights)
    model, fresh = fine_tuned(weights, classes)
    if model.name != name:
        raise ValueError(f"{weights} holds a {model.name}, not a {name}")
    if fresh:
        print(f"{weights} is of other classes: {len(fresh)} tensors of the classification head start afresh")
    return model


def _device(name: str) -> "torch.device":
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto: there is no GPU that this PyTorch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _share_cores(workers: int | None) -> int:
    """How many workers, leaving them cores of their own: threads that wait for one another in every layer slow
    down twentyfold where anything else wants their core."""
    import torch

    cores = usable_cores()
    if workers is None:
        workers = min(8, cores // 2)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    return workers


def _photographs(paths: list[Path]) -> list[Path]:
    """The files, and for a folder the images in it, by name."""
    from ssdcore.data import IMAGE_SUFFIXES

    found = []
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if path.is_dir() and not inside:
            raise ValueError(f"no images in {path}: looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
        found += inside if path.is_dir() else [path]
    return found


def _contact_sheet(pictures: list[Path], path: Path) -> Path:
    from PIL import Image

    from ssdcore.draw import contact_sheet

    contact_sheet([Image.open(picture) for picture in pictures], columns=4).save(path)
    return path


def _write_json(path: Path, content: object) -> None:
    from ssdcore.weights import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2).encode())
