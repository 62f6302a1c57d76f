"""The annotations of a split while a layout is read: columns that grow image by image, and what is wrong with them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssdcore.data.images import size_in_header

OUTSIDE_TOLERANCE = 1.0  # pixels; VOC counts pixels from 1, and COCO's x + width can be rounded past the edge
MAX_LISTED = 3  # values quoted in one error message

# Files may come from Windows, where editors begin UTF-8 with a byte order mark.
TEXT_ENCODING = "utf-8-sig"


class Columns:
    """The annotations of a split as columns, filled image by image. Also checks each object.

    Attributes:
        problems: what is wrong and was dealt with: one line each, which names the file and what was done, with the
            index of the image or None.
        errors: what makes the split unusable: one line each, which names the file.
    """

    def __init__(self) -> None:
        self.files: list[str] = []  # relative to the root
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []  # (height, width) in pixels
        self.counts: list[int] = []  # objects of each image
        self.boxes: list[tuple[float, ...]] = []  # xyxy
        self.labels: list[int] = []
        self.ignore: list[bool] = []
        self.areas: list[float] = []
        self.problems: list[tuple[int | None, str]] = []
        self.errors: list[str] = []

    def add_problem(self, text: str) -> None:
        """Report a problem of the split."""
        self.problems.append((None, text))

    def add_image(self, root: Path, file: Path, image_id: int, size: Sequence[object], description: str) -> bool:
        """Add an image, unless its size is neither annotated nor in the file's header.

        Args:
            root: the folder of the dataset.
            file: the image file, inside `root`.
            image_id: unique in the split.
            size: (height, width) as annotated. Unless they are two numbers from 1 on, the file's header is read.
            description: the annotation file and the image, with which a problem begins.

        Returns:
            Whether the image was added.
        """
        numbers = finite_numbers(size, 2)
        missing = numbers is None or min(numbers) < 1
        if numbers is None or missing:
            try:
                numbers = size_in_header(file)
            except ValueError as error:
                self.errors.append(str(error))
                return False
        self.files.append(Path(os.path.relpath(file, root)).as_posix())  # without ".."
        self.image_ids.append(image_id)
        self.sizes.append((int(numbers[0]), int(numbers[1])))
        self.counts.append(0)
        if missing:
            self._add_image_problem(f"{description}: no image size; used the size of the image file")
        return True

    def add_object(
        self,
        description: str,
        annotated_box: object,
        box: Sequence[float] | None,
        label: int,
        ignore: bool,
        area: float | None,
    ) -> None:
        """Add an object to the image added last, unless its box is unusable.

        Args:
            description: file and object, with which a problem begins.
            annotated_box: the box as it is in the file, to be quoted.
            box: the same as xyxy, or None if it is not four finite numbers.
            label: 1 for the first class.
            ignore: VOC's "difficult", COCO's "iscrowd".
            area: in square pixels, or None for the area of the box.
        """
        height, width = self.sizes[-1]
        if box is None:
            self._add_image_problem(f"{description}: box {annotated_box} is not four finite numbers; dropped")
            return
        x1, y1, x2, y2 = box
        box_text = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if x2 <= x1 or y2 <= y1:
            self._add_image_problem(f"{description}: {box_text} has no area; dropped")
            return
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            self._add_image_problem(f"{description}: {box_text} is outside the image of {width} x {height}; dropped")
            return
        if min(x1, y1, width - x2, height - y2) < -OUTSIDE_TOLERANCE:
            self._add_image_problem(
                f"{description}: {box_text} extends beyond the image of {width} x {height}; used as is"
            )
        self.boxes.append((x1, y1, x2, y2))
        self.labels.append(label)
        self.ignore.append(ignore)
        self.areas.append((x2 - x1) * (y2 - y1) if area is None else area)
        self.counts[-1] += 1

    def drop_object(self, description: str, reason: str) -> None:
        """Report an object of the image added last that is left out for another reason than its box."""
        self._add_image_problem(f"{description}: {reason}; dropped")

    def refuse_unknown_classes(self, source: Path, unknown_classes: Counter[str], classes: Sequence[str]) -> None:
        """Report an error if there are objects of other classes than `classes`.

        If they were dropped, training would treat them as background and scoring would count every detection of them
        as a false positive.
        """
        if unknown_classes:
            counts = listed(f"{name} ({count} objects)" for name, count in sorted(unknown_classes.items()))
            self.errors.append(
                f"classes must include every class that {source} has objects of; "
                f"missing: {counts}; got {listed(classes, len(classes))}"
            )

    def _add_image_problem(self, text: str) -> None:
        self.problems.append((len(self.files) - 1, text))


class Annotations(NamedTuple):
    """One split as its layout describes it."""

    root: Path  # the folder that contains images and annotations
    classes: Sequence[str]  # in the order of their labels
    category_ids: Sequence[int]
    columns: Columns
    upright: bool = False  # whether the annotations are of the images as turned upright by their EXIF orientation


# Reads a split. Takes class names in the order of their labels, or None for all classes of the dataset.
Reader = Callable[[Sequence[str] | None], Annotations]


def finite_numbers(values: object, count: int) -> tuple[float, ...] | None:
    """`values` as floats, or None unless they are `count` finite numbers or texts of such numbers."""
    if not isinstance(values, Sequence) or len(values) != count:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def listed(values: Iterable[object], most: int = MAX_LISTED) -> str:
    """At most `most` of the values, separated by commas, and "..." if there are more."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")


def read_lines(path: Path) -> list[str]:
    """The lines of `numbered_lines` alone."""
    return [line for _, line in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, without the spaces around them, each with its number from 1.

    Raises:
        ValueError: the file is not UTF-8. The message names it.
    """
    try:
        lines = path.read_text(encoding=TEXT_ENCODING).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be a text file in UTF-8: {error}") from error
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def inside(root: Path, path: Path) -> bool:
    """Whether `path` is in the folder `root` or below it, once its `..` are resolved.

    Symbolic links are not resolved, because datasets are often assembled from them.
    """
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root))
