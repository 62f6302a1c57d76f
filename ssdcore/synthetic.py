"""A made-up detection data set: coloured shapes on noisy backgrounds, in COCO's form.

Small enough to train on in minutes without a GPU, and hard enough to need a detector: a shape's colour says
nothing about its class, sizes vary sixfold in area, and some images hold no object.
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

META = "synthetic.json"
VERSION = 1  # raise it when the same arguments come to give other images
SHARE_EMPTY = 0.1  # of the images
MAX_OBJECTS = 6  # per image
SIDE_RANGE = (0.15, 0.36)  # an object's longer side, in sides of the image: 45 to 108 pixels of 300
MAX_COVER = 0.25  # how much of the smaller of two boxes the other may cover
MIN_CONTRAST = 90.0  # RGB distance of a shape from the background under it
PLACEMENTS = 20  # tried for one object before it is given up
SUPERSAMPLING = 4  # per side, for smooth edges
JPEG_QUALITY = 90


def make_synthetic(
    root: str | Path,
    *,
    train: int = 1000,
    val: int = 200,
    size: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a set of circles, squares and triangles, or reuse the one that is there.

    The folder holds `train/*.jpg`, `val/*.jpg` and `annotations/instances_{train,val}.json`, for
    `open_dataset`. The same arguments give the same bytes (with one version of Pillow and NumPy). An image
    depends on the seed, its split and its number alone, so a longer set begins with the shorter one. The
    folder appears whole or not at all, also where several processes make it at once.

    Args:
        root: the folder to make; its parents are made too.
        train: number of training images.
        val: number of validation images.
        size: side of the square images in pixels, at least 100.
        seed: of the random numbers, at least 0.
        progress: show a progress bar.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: an argument out of range, or a folder that is not empty and holds anything else.
    """
    if min(train, val) < 0 or size < 100 or seed < 0:
        raise ValueError(
            "train, val and seed must be at least 0 and size at least 100, "
            f"got train={train}, val={val}, size={size}, seed={seed}"
        )
    root = Path(root)
    meta = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _holds(root, meta):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        made = Path(scratch) / root.name
        (made / "annotations").mkdir(parents=True)
        with tqdm(total=train + val, desc=f"drawing {root.name}", unit=" images", disable=not progress) as bar:
            for split_number, (split, count) in enumerate({"train": train, "val": val}.items()):
                _write_split(made, split, count, size, [seed, split_number], bar)
        (made / META).write_text(json.dumps(meta))
        _publish(made, root, meta)
    return root


def _holds(root: Path, meta: dict[str, int]) -> bool:
    """Whether `root` is this very set; False where it is free, ValueError where it is taken."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / META).read_text())
    except (OSError, ValueError):
        found = "something else"
    if found != meta:
        raise ValueError(f"{root} must be new, empty or hold the set {meta}, but holds {found}")
    return True


def _publish(made: Path, root: Path, meta: dict[str, int]) -> None:
    if root.exists() and not any(root.iterdir()):
        root.rmdir()  # os.rename replaces an empty folder on POSIX only
    try:
        made.rename(root)
    except OSError:
        # Another process may have published the same set since we looked.
        if not _holds(root, meta):
            raise


def _write_split(root: Path, split: str, count: int, size: int, seed: list[int], bar: tqdm) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels, objects = _draw_image(np.random.default_rng([*seed, number]), size)
        file_name = f"{number:06d}.jpg"
        Image.fromarray(pixels).save(root / split / file_name, quality=JPEG_QUALITY)
        images.append({"id": number + 1, "file_name": file_name, "width": size, "height": size})
        for category_id, (x1, y1, x2, y2) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
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
        "categories": [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


Box = tuple[float, float, float, float]  # xyxy in pixels


def _draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[tuple[int, Box]]]:
    """An image, uint8 [size, size, 3], and its objects: category id and box."""
    canvas = _background(rng, size)
    objects: list[tuple[int, Box]] = []
    wanted = 0 if rng.random() < SHARE_EMPTY else int(rng.integers(1, MAX_OBJECTS + 1))
    for _ in range(wanted):
        category_id = int(rng.integers(1, len(SHAPES) + 1))
        outline = _outline(rng, SHAPES[category_id - 1], size * rng.uniform(*SIDE_RANGE))  # [P, 2] x, y
        extent = outline.max(axis=0)
        for _ in range(PLACEMENTS):
            corner = rng.uniform(0, size - extent)
            box = (*corner.tolist(), *(corner + extent).tolist())
            if all(_cover(box, other) <= MAX_COVER for _, other in objects):
                _paint(rng, canvas, outline + corner)
                objects.append((category_id, box))
                break
    noise = rng.normal(0, rng.uniform(0, 12), canvas.shape)
    return (canvas + noise).clip(0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two colours with soft blotches, float64 [size, size, 3]."""
    first, second = rng.uniform(30, 225, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j]
    blend = (0.5 + 0.7 * (x * math.cos(angle) + y * math.sin(angle)))[..., None]  # 0.7: the half diagonal
    cells = int(rng.integers(3, 12))
    blotches = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blotches).resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return first + (second - first) * blend + rng.uniform(0, 0.3) * (smooth - 127.5)


def _outline(rng: np.random.Generator, shape: str, side: float) -> np.ndarray:
    """A shape's corners, float64 [P, 2] x, y, moved so that its box begins at (0, 0)."""
    corners = {"circle": 64, "square": 4, "triangle": 3}[shape]
    turn = rng.uniform(0, 2 * math.pi)
    if shape == "square":
        turn = math.pi / 4 + rng.uniform(-0.35, 0.35)  # within 20 degrees of upright
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points -= points.min(axis=0)
    stretch = np.array([rng.uniform(0.8, 1.0), 1.0])[rng.permutation(2)]
    return points / points.max() * stretch * side


def _cover(box: Box, other: Box) -> float:
    """Intersection over the smaller area."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return max(width, 0) * max(height, 0) / smaller


def _paint(rng: np.random.Generator, canvas: np.ndarray, points: np.ndarray) -> None:
    """Fill the polygon `points`, float64 [P, 2] x, y, with a colour that stands out, in place."""
    size = len(canvas)
    left, top = np.floor(points.min(axis=0)).astype(int)
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int), size)
    fine = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    corners = ((points - (left, top)) * SUPERSAMPLING - 0.5).ravel().tolist()  # Pillow: centres are integers
    ImageDraw.Draw(fine).polygon(corners, fill=255)
    mask = np.asarray(fine.reduce(SUPERSAMPLING), np.float64)[..., None] / 255

    patch = canvas[top:bottom, left:right]
    behind = patch.mean(axis=(0, 1))
    colour = behind
    while np.linalg.norm(colour - behind) < MIN_CONTRAST:
        hsv = (rng.random(), rng.uniform(0.3, 1.0), rng.uniform(0.3, 1.0))
        colour = 255 * np.array(colorsys.hsv_to_rgb(*hsv))
    patch += mask * (colour - patch)
