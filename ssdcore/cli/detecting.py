"""`ssdcore detect`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ssdcore.cli.options import Device, Weights, find_device, write_json


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
    from ssdcore.weights import load_model

    model, classes = load_model(weights, find_device(device))
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
    write_json(output / "detections.json", to_coco_results(model.category_ids, detected_by_image_id))
    categories = [
        {"id": category_id, "name": name} for category_id, name in zip(model.category_ids, classes, strict=True)
    ]
    write_json(output / "images.json", {"images": files, "categories": categories})
    count = sum(len(detected["scores"]) for detected in detected_by_image_id.values())
    print(f"wrote {len(pictures)} pictures with {count} objects, detections.json and images.json to {output}")
    if errors:
        print("\n".join(f"error: {error}" for error in errors), file=sys.stderr)
        raise typer.Exit(1)
    return pictures


def _photographs(paths: list[Path]) -> list[Path]:
    """The given files; for a folder, the image files in it, sorted by name."""
    from ssdcore.data.images import IMAGE_SUFFIXES, images_in

    photographs = []
    for path in paths:
        files_in_folder = images_in(path)
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
