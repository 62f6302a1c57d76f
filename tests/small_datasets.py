"""Writes small datasets in each layout, for the tests of `ssdcore.data`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssdcore.data import DetectionDataset, open_dataset

WIDTH, HEIGHT = 40, 30

Object = tuple[str, Sequence[Any]]  # class name and xyxy


def write_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)


def voc_xml(objects: Sequence[Object], difficult: str = "0") -> str:
    nodes = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{nodes}</annotation>"


def write_voc(root: Path, splits: Mapping[str, Mapping[str, Sequence[Object]]], difficult: str = "0") -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, images in splits.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            (root / f"Annotations/{stem}.xml").write_text(voc_xml(objects, difficult))
            write_image(root / f"JPEGImages/{stem}.jpg")
    return root


def coco_content(**changes: Any) -> dict[str, Any]:
    """Two images, the second without objects. The category ids are not consecutive and not sorted."""
    return {
        "images": [
            {"id": 139, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 18, "bbox": [1, 2, 10, 20], "area": 90.5, "iscrowd": 0},
            {"id": 2, "image_id": 139, "category_id": 3, "bbox": [5, 5, 4, 4], "area": 16, "iscrowd": 1},
        ],
    } | changes


def write_coco(root: Path, content: Any, images: str = "train", source: str | None = None) -> Path:
    path = root / (source or "annotations/instances_train.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for name in ("a.jpg", "b.jpg"):
        write_image(root / images / name)
    return root


def write_yolo(root: Path, yaml: str, labels: Mapping[str, str | None], images: str = "train/images") -> Path:
    """Writes `data.yaml`, and an image for each label file. A label file of None is not written."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data.yaml").write_text(yaml, encoding="utf-8")
    for stem, text in labels.items():
        write_image(root / images / f"{stem}.jpg")
        path = root / images.replace("images", "labels") / f"{stem}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
    return root


def truncate(path: Path) -> None:
    """Makes `path` a JPEG with a valid header, whose last bytes are missing."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def write_damaged(root: Path) -> DetectionDataset:
    """Five images with one object each, at x = 1 to 5. Images 1, 2 and 4 cannot be read."""
    write_voc(root, {"train": {f"{i}": [("cat", (i, 2, 11, 22))] for i in range(1, 6)}})
    truncate(root / "JPEGImages/2.jpg")
    write_image(root / "JPEGImages/3.png")
    (root / "JPEGImages/3.jpg").unlink()
    (root / "JPEGImages/3.png").write_bytes(b"no image")
    dataset = open_dataset(root, "train")
    (root / "JPEGImages/5.jpg").unlink()  # after the dataset was opened
    return dataset
