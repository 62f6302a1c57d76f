"""`ssdcore demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ssdcore.cli.detecting import detect
from ssdcore.cli.evaluating import evaluate
from ssdcore.cli.options import Device, Workers, score_text
from ssdcore.cli.training import train

DEMO_TRAIN, DEMO_VAL = 600, 150  # images; enough for an AP50 of 0.95, and few enough for minutes on two CPU cores
DEMO_EPOCHS = 20
DEMO_PICTURES = 12


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
        f"\nAP50 is {score_text(metrics['AP50'])} on {DEMO_VAL} images that the model was not trained on."
        f"\nOpen {sheet} to see the detected objects in the first {DEMO_PICTURES} of these images."
        "\n\nTo use your own images, annotated in the layout of Pascal VOC, COCO or YOLO:"
        "\n  ssdcore data check DATASET_FOLDER"
        "\n  ssdcore train --data DATASET_FOLDER --output RUN_FOLDER"
        "\n  ssdcore evaluate --weights RUN_FOLDER/model.safetensors --data DATASET_FOLDER --split test"
        "\n  ssdcore detect --weights RUN_FOLDER/model.safetensors IMAGE ..."
    )
    return metrics


def _contact_sheet(pictures: list[Path], path: Path) -> Path:
    from PIL import Image

    from ssdcore.draw import contact_sheet

    contact_sheet([Image.open(picture) for picture in pictures], columns=4).save(path)
    return path
