"""Divide a dataset without splits into train and val, and write the division down so that it stays the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssdcore.data.columns import listed
from ssdcore.data.dataset import DetectionDataset

SPLIT_FILE = "ssdcore-split.json"
PARTS = ("train", "val")


class Division(NamedTuple):
    """The content of a split file."""

    path: Path
    source: str  # the split of the dataset that is divided
    fraction: float  # of the images, for training
    seed: int
    train: list[str]  # image files, relative to the root
    val: list[str]

    def files(self, part: str) -> list[str]:
        """The image files of "train" or "val"."""
        return self.train if part == "train" else self.val


def divide(files: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Divide files at random, the same way for the same names and seed, on every machine and in any order of `files`.

    Args:
        files: unique names.
        fraction: of the files, for the first part, between 0 and 1.
        seed: any integer.

    Returns:
        Two sorted lists.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or leaves one of the parts empty.
    """
    count = round(fraction * len(files)) if 0 < fraction < 1 else 0
    if not 0 < count < len(files):
        raise ValueError(
            f"split must be a fraction between 0 and 1 that leaves images for both parts, got {fraction} for "
            f"{len(files)} images"
        )
    # Hashes instead of a random generator: no version of a library changes them.
    order = sorted(files, key=lambda name: (hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest(), name))
    return sorted(order[:count]), sorted(order[count:])


def read_division(path: Path) -> Division:
    """Read a split file.

    Raises:
        ValueError: the file is no split file. The message names it.
    """
    try:
        content = json.loads(path.read_bytes())
        return Division(
            path, str(content["source"]), float(content["fraction"]), int(content["seed"]),
            *([str(name) for name in content[part]] for part in PARTS),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a split file: {error!r}; delete it to divide again") from error


def write_division(division: Division) -> None:
    """Write a split file, as a whole or not at all."""
    from ssdcore.weights import write_atomically

    content = {name: value for name, value in division._asdict().items() if name != "path"}
    write_atomically(division.path, json.dumps(content, indent=1).encode())


def part_of(dataset: DetectionDataset, division: Division, part: str) -> DetectionDataset:
    """Return the "train" or "val" part of the divided dataset.

    Images that are in neither part, because they were added later, are left out and reported.

    Raises:
        ValueError: an image of the division is not in the dataset.
    """
    indices_of: dict[str, list[int]] = defaultdict(list)  # several images of COCO may have the same file
    for index, file in enumerate(dataset.files):
        indices_of[file].append(index)
    wanted = division.files(part)
    if missing := [file for file in wanted if file not in indices_of]:
        raise ValueError(
            f"{division.path} lists images that {dataset.root} does not have ({len(missing)}): {listed(missing)}; "
            "if images were removed, delete the file to divide the others again"
        )
    subset = dataset.subset([index for file in wanted for index in indices_of[file]])
    subset.split = part
    if added := indices_of.keys() - division.train - set(division.val):
        subset.add_problem(
            f"{division.path.name}: images in neither part ({len(added)}): {listed(sorted(added))}; left out "
            "(delete the file to divide the images again)"
        )
    return subset
