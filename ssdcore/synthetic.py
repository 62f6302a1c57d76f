"""A synthetic detection dataset in COCO's format: coloured shapes on noisy backgrounds.

It is small enough to train on in minutes without a GPU, and hard enough to need a detector: the colour of a shape says
nothing about its class, the areas of the shapes vary sixfold, and some images contain no object.
"""

from __future__ import annotations

import colorsys
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

__all__ = ["SHAPES", "make_synthetic"]

SHAPES = ("circle", "square", "triangle")

META = "synthetic.json"  # file in the dataset's folder that records the arguments
VERSION = 1  # increase it whenever the same arguments give other images than before
SHARE_EMPTY = 0.1  # fraction of the images that contain no object
MAX_OBJECTS = 6  # per image
SIDE_RANGE = (0.15, 0.36)  # longer side of an object, in sides of the image (45 to 108 pixels of 300)
MAX_COVER = 0.25  # largest allowed intersection of two boxes, as a fraction of the smaller box's area
MIN_CONTRAST = 90.0  # Euclidean RGB distance between a shape and the mean colour behind it, channels in 0..255
PLACEMENTS = 20  # random positions to try for an object before it is left out
SUPERSAMPLING = 4  # subpixels per pixel and side, for smooth edges
JPEG_QUALITY = 90  # on Pillow's scale of 0 to 95


def make_synthetic(
    root: str | Path,
    *,
    train: int = 1000,
    val: int = 200,
    size: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a dataset of circles, squares and triangles, or reuse the one that `root` already contains.

    The folder contains `train/*.jpg`, `val/*.jpg` and `annotations/instances_{train,val}.json`, which `open_dataset`
    reads. The same arguments give the same bytes, with the same versions of Pillow and NumPy. An image depends only on
    the seed, its split and its index, so a larger dataset begins with the images of a smaller one. The folder is
    created as a whole or not at all, even if several processes create it at the same time.

    Args:
        root: the folder to create, including its parents.
        train: number of training images.
        val: number of validation images.
        size: side of the square images in pixels, at least 100.
        seed: seed of the random numbers, at least 0.
        progress: show a progress bar.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: an argument is out of range, or the folder contains anything else than this dataset.
    """
    if min(train, val) < 0 or size < 100 or seed < 0:
        raise ValueError(
            "train, val and seed must be at least 0 and size at least 100, "
            f"got train={train}, val={val}, size={size}, seed={seed}"
        )
    root = Path(root)
    meta = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _contains(root, meta):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        unpublished = Path(scratch) / root.name
        (unpublished / "annotations").mkdir(parents=True)
        with tqdm(total=train + val, desc=f"drawing {root.name}", unit=" images", disable=not progress) as bar:
            for split_number, (split, count) in enumerate({"train": train, "val": val}.items()):
                _write_split(unpublished, split, count, size, [seed, split_number], bar)
        (unpublished / META).write_text(json.dumps(meta))
        _publish(unpublished, root, meta)
    return root


def _contains(root: Path, meta: dict[str, int]) -> bool:
    """True if `root` contains the dataset `meta`, False if it is absent or empty; otherwise raises ValueError."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        existing = json.loads((root / META).read_text())
    except (OSError, ValueError):
        existing = "other files"
    if existing != meta:
        raise ValueError(f"{root} must be absent, empty or contain the dataset {meta}, but contains {existing}")
    return True


def _publish(unpublished: Path, root: Path, meta: dict[str, int]) -> None:
    """Move the finished folder to `root`, unless another process has done so."""
    if root.exists() and not any(root.iterdir()):
        root.rmdir()  # os.rename replaces an empty folder only on POSIX
    try:
        unpublished.rename(root)
    except OSError:
        # Another process may have published the same dataset since `root` was checked.
        if not _contains(root, meta):
            raise


def _write_split(root: Path, split: str, count: int, size: int, seed: list[int], bar: tqdm) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        pixels, objects = _draw_image(np.random.default_rng([*seed, index]), size)
        file_name = f"{index:06d}.jpg"
        Image.fromarray(pixels).save(root / split / file_name, quality=JPEG_QUALITY)
        images.append({"id": index + 1, "file_name": file_name, "width": size, "height": size})
        for category_id, (x1, y1, x2, y2) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": category_id,
                    "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                }
            )
        bar.update()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in enumerate(SHAPES, start=1)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


Box = tuple[float, float, float, float]  # xyxy in pixels


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, Box]]]:
    """Draw an image, uint8 [size, size, 3]. Return it with its objects, each a category id and a box."""
    canvas = _background(rng, size)
    objects: list[tuple[int, Box]] = []
    num_objects = 0 if rng.random() < SHARE_EMPTY else int(rng.integers(1, MAX_OBJECTS + 1))
    for _ in range(num_objects):
        category_id = int(rng.integers(1, len(SHAPES) + 1))
        outline = _outline(rng, SHAPES[category_id - 1], size * rng.uniform(*SIDE_RANGE))  # [P, 2] x, y
        extent = outline.max(axis=0)
        for _ in range(PLACEMENTS):
            corner = rng.uniform(0, size - extent)
            box = (*corner.tolist(), *(corner + extent).tolist())
            if all(_cover(box, other_box) <= MAX_COVER for _, other_box in objects):
                _paint(rng, canvas, outline + corner)
                objects.append((category_id, box))
                break
    noise = rng.normal(0, rng.uniform(0, 12), canvas.shape)
    return (canvas + noise).clip(0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a gradient between two colours with soft blotches, float64 [size, size, 3]."""
    first, second = rng.uniform(30, 225, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j]
    blend = (0.5 + 0.7 * (x * math.cos(angle) + y * math.sin(angle)))[..., None]  # 0.7: half the diagonal
    blotches_per_side = int(rng.integers(3, 12))
    blotches = rng.integers(0, 256, (blotches_per_side, blotches_per_side, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blotches).resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return first + (second - first) * blend + rng.uniform(0, 0.3) * (smooth - 127.5)


def _outline(rng: np.random.Generator, shape: str, side: float) -> np.ndarray:
    """Return the corners of a shape, float64 [P, 2] x, y. The upper left corner of the shape's box is (0, 0)."""
    corners = {"circle": 64, "square": 4, "triangle": 3}[shape]
    turn = rng.uniform(0, 2 * math.pi)
    if shape == "square":
        turn = math.pi / 4 + rng.uniform(-0.35, 0.35)  # at most 20 degrees from upright
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points -= points.min(axis=0)
    stretch = np.array([rng.uniform(0.8, 1.0), 1.0])[rng.permutation(2)]
    return points / points.max() * stretch * side


def _cover(box1: Box, box2: Box) -> float:
    """Return the area of the intersection of two boxes, divided by the smaller box's area."""
    width = min(box1[2], box2[2]) - max(box1[0], box2[0])
    height = min(box1[3], box2[3]) - max(box1[1], box2[1])
    smaller_area = min((box[2] - box[0]) * (box[3] - box[1]) for box in (box1, box2))
    return max(width, 0) * max(height, 0) / smaller_area


def _paint(rng: np.random.Generator, canvas: np.ndarray, points: np.ndarray) -> None:
    """Fill the polygon `points`, float64 [P, 2] x, y, with a colour of enough contrast. Changes `canvas` in place."""
    size = len(canvas)
    left, top = np.floor(points.min(axis=0)).astype(int)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int), size)
    enlarged = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    corners = ((points - (left, top)) * SUPERSAMPLING - 0.5).ravel().tolist()  # in Pillow, pixel centres are integers
    ImageDraw.Draw(enlarged).polygon(corners, fill=255)
    mask = np.asarray(enlarged.reduce(SUPERSAMPLING), np.float64)[..., None] / 255

    patch = canvas[top:bottom, left:right]
    background = patch.mean(axis=(0, 1))
    colour = background
    while np.linalg.norm(colour - background) < MIN_CONTRAST:
        hsv = (rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.3, 1.0))
        colour = 255 * np.array(colorsys.hsv_to_rgb(*hsv))
    patch += mask * (colour - patch)
