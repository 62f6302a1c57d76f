"""Read YOLO's text files, one per image, in the folders that a YAML file names.

The YAML file has `names`, the classes as a list or by number, and `train`, `val` and `test`: each a folder of images, a
text file with the path of one image per line, or a list of such. The labels of `images/x.jpg` are in `labels/x.txt`:
the last folder `images` of the path is replaced. Without a folder `images`, they are beside the image. A line of it is
`class x y width height`, with the centre of the box and its size as fractions of the upright image; or a class and a
polygon `x1 y1 x2 y2 x3 y3 ...`, whose extent is the box.

Source: https://docs.ultralytics.com/datasets/detect/ and what Roboflow and CVAT export.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from ssdcore.data.columns import (
    Annotations,
    Columns,
    Reader,
    finite_numbers,
    inside,
    listed,
    numbered_lines,
    read_lines,
)
from ssdcore.data.images import images_in, size_in_header

SPLITS = ("train", "val", "test")
NO_LABELS = {"classes.txt", "labels.txt"}  # lists of class names that annotation tools write into a folder of labels


def find(root: Path) -> dict[str, Reader]:
    """Find the splits of `data.yaml`, or of the only other YAML file in `root` that has `names`.

    A YAML file that names no split is a dataset with the single split "all", the images in `root` and below.

    Raises:
        ValueError: `data.yaml` cannot be parsed; none of its splits exists, or one is outside `root`; or there are
            several YAML files with `names`.
    """
    source = _find_yaml(root)
    if source is None:
        return {}
    content = _parse(source)
    names = _class_names(source, content)
    declared = {split: content[split] for split in SPLITS if content.get(split)}
    if not declared:
        return {"all": partial(_read, root, source, names, [root], [])}
    places = {split: _places(root, source, content.get("path"), split, entry) for split, entry in declared.items()}
    absent = {
        split: f"{source.name}: {split}: {declared[split]} does not exist" for split in places if not places[split]
    }
    if len(absent) == len(declared):
        raise ValueError(f"{source} has no split in {root}: {'; '.join(absent.values())}")
    absent.pop("test", None)  # Roboflow's file names it always, also where an export does not have it
    problems = list(absent.values())
    return {split: partial(_read, root, source, names, found, problems) for split, found in places.items() if found}


def _find_yaml(root: Path) -> Path | None:
    if (root / "data.yaml").is_file():
        return root / "data.yaml"
    files = [path for path in sorted((*root.glob("*.yaml"), *root.glob("*.yml"))) if _has_names(path)]
    if len(files) > 1:
        raise ValueError(f"{root} has several YAML files with names; call one of them data.yaml: {listed(files)}")
    return files[0] if files else None


def _has_names(path: Path) -> bool:
    try:
        return bool(_parse(path).get("names"))
    except ValueError:
        return False


def _parse(path: Path) -> Mapping[str, Any]:
    import yaml  # not at the top, because the other layouts do not need PyYAML

    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be parsed as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping with names, got {str(content)[:100]}")
    return content


def _class_names(source: Path, content: Mapping[str, Any]) -> dict[int, str]:
    """The names of the classes by number, sorted by number."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(number, int) for number in names):
        raise ValueError(f"{source}: names must be a list, or a mapping from numbers to names, got {names}")
    repeated = [name for name, times in Counter(names.values()).items() if times > 1]
    if repeated:
        raise ValueError(f"{source}: names must not contain duplicates, got {listed(repeated)} more than once")
    return {number: str(names[number]) for number in sorted(names)}


def _places(root: Path, source: Path, path: object, split: str, entry: object) -> list[Path]:
    """The folders and lists of images of a split that exist in `root`.

    Ultralytics' `path` is often that of another machine, and Roboflow's entries begin with "../", although the folders
    lie beside the YAML file. Therefore the entry is looked for in `path`, in `root`, and in `root` without its "../".
    """
    places = []
    for text in map(str, entry if isinstance(entry, list) else [entry]):
        plain = text
        while plain.startswith("../"):
            plain = plain[3:]
        candidates = [root / str(path or "") / text, root / text, root / plain]
        found = next((place for place in candidates if inside(root, place) and place.exists()), None)
        if found is None and any(place.exists() for place in candidates):
            raise ValueError(f"{source}: {split} must stay in {root}, got {text}")
        places += [root / os.path.relpath(found, root)] if found else []
    return places


def _read(
    root: Path,
    source: Path,
    names: Mapping[int, str],
    places: Sequence[Path],
    problems: Sequence[str],
    classes: Sequence[str] | None,
) -> Annotations:
    numbers = {name: number for number, name in names.items()}
    if classes is None:
        classes = list(numbers)
    new_numbers = count(max(names, default=-1) + 1)
    category_ids = [numbers[name] if name in numbers else next(new_numbers) for name in classes]
    labels = {number: label for label, number in enumerate(category_ids, start=1)}

    columns = Columns()
    for problem in problems:
        columns.add_problem(problem)
    images = _images(root, places, columns)
    label_files = {image: _label_file(root, image) for image in images}
    if images and not any(file.is_file() for file in label_files.values()):
        image, file = next(iter(label_files.items()))
        columns.errors.append(f"{source}: no image of {listed(places)} has labels; {image} needs {file}")
    _report_unused_labels(root, label_files, columns)
    unknown_classes: Counter[str] = Counter()
    for image, file in label_files.items():
        try:
            height, width = size_in_header(image, upright=True)
            lines = numbered_lines(file) if file.is_file() else []
        except ValueError as error:
            columns.errors.append(str(error))
            continue
        columns.add_image(root, image, len(columns.files), (height, width), str(file))
        for number, line in lines:
            description = f"{file.relative_to(root).as_posix()}: line {number}"
            values = finite_numbers(line.split(), len(line.split()))
            if values is None or not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)):
                expected = "5 numbers (class, x, y, width, height), or a class and a polygon"
                columns.drop_object(description, f"expected {expected}, got {line[:100]!r}")
            elif values[0] not in names:
                columns.drop_object(description, f"{source.name} has no name for class {values[0]:g}")
            elif int(values[0]) not in labels:
                unknown_classes[names[int(values[0])]] += 1
            else:
                box = _box(values[1:], width, height)
                columns.add_object(description, line, box, labels[int(values[0])], ignore=False, area=None)
    columns.refuse_unknown_classes(source, unknown_classes, classes)
    return Annotations(root, classes, category_ids, columns, upright=True)


def _images(root: Path, places: Sequence[Path], columns: Columns) -> list[Path]:
    """The images in folders, also below them, and in lists, each once."""
    images: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            images |= dict.fromkeys(images_in(place, "**/*"))
            continue
        for line in read_lines(place):
            path = place.parent / line
            if not inside(root, path):
                columns.errors.append(f"{place}: images must stay in {root}, got {line}")
            elif not path.is_file():
                columns.errors.append(f"{place}: image {line} is missing")
            else:
                # The same path for the same image, however the lists write it.
                images[root / os.path.relpath(path, root)] = None
    return list(images)


def _label_file(root: Path, image: Path) -> Path:
    parts = list(PurePosixPath(image.relative_to(root).as_posix()).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return root.joinpath(*parts)


def _report_unused_labels(root: Path, label_files: Mapping[Path, Path], columns: Columns) -> None:
    """Report label files that belong to no image, also of another split."""
    folders = {file.parent: image.parent for image, file in label_files.items() if file.parent != image.parent}
    for label_folder, image_folder in sorted(folders.items()):
        stems = {path.stem for path in image_folder.iterdir()}
        for path in sorted(label_folder.glob("[!.]*.txt")):
            if path.stem not in stems and path.name not in NO_LABELS:
                columns.add_problem(f"{path.relative_to(root).as_posix()}: no image has this name; left out")


def _box(values: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The box in pixels, xyxy, of centre and size or of a polygon, both as fractions of the image."""
    if len(values) == 4:
        x, y, w, h = values
        return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    xs, ys = values[::2], values[1::2]
    return min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height
