"""Read COCO's JSON, one file per split."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ssdcore.data.columns import Annotations, Columns, Reader, finite_numbers, inside, listed

REQUIRED_FIELDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id"),
    "categories": ("id", "name"),
}
LARGEST_ID = 2**63 - 1  # ids become tensors of int64
ROBOFLOW_NAME = "_annotations.coco.json"


def find(root: Path) -> dict[str, Reader]:
    """Find `annotations/instances_<split>.json` and `<split>/_annotations.coco.json`."""
    sources = {path.stem.removeprefix("instances_"): path for path in sorted(root.glob("annotations/instances_*.json"))}
    return _readers(root, sources | {path.parent.name: path for path in sorted(root.glob(f"*/{ROBOFLOW_NAME}"))})


def find_other_names(root: Path) -> dict[str, Reader]:
    """Find JSON files of any name in `root` or `annotations/` that have COCO's three lists.

    A single file is the split "all". Several files are splits of their names.
    """
    files = [path for path in sorted((*root.glob("*.json"), *root.glob("annotations/*.json"))) if _is_coco(path)]
    return _readers(root, {"all": files[0]} if len(files) == 1 else {path.stem: path for path in files})


def _readers(root: Path, sources: Mapping[str, Path]) -> dict[str, Reader]:
    return {split: partial(_read, root, split, path, sources.values()) for split, path in sources.items()}


def _is_coco(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and content.keys() >= REQUIRED_FIELDS.keys()


def _read(root: Path, split: str, source: Path, sources: Iterable[Path], classes: Sequence[str] | None) -> Annotations:
    content = _parse(source)
    names = _categories(source, content["categories"], sources)
    ids = {name: category_id for category_id, name in names.items()}
    if classes is None:
        classes = list(ids)
    # Classes that the file lacks get ids that none of its categories has. Otherwise an object detected as such a class
    # would be scored as one of another category.
    new_ids = itertools.count(1 + max((category["id"] for category in content["categories"]), default=0))
    category_ids = [ids[name] if name in ids else next(new_ids) for name in classes]
    labels = {category_id: label for label, category_id in enumerate(category_ids, start=1)}

    columns = Columns()
    json_name = source.relative_to(root).as_posix()
    images = _images(root, split, source, content["images"], columns)
    known_ids = {image["id"] for image in content["images"]}
    annotations_by_image = defaultdict(list)
    unknown_classes: Counter[str] = Counter()
    for annotation in content["annotations"]:
        description = f"{json_name}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in known_ids:
            columns.add_problem(f"{description}: no image has the id {annotation['image_id']}; dropped")
        elif annotation["category_id"] not in names:
            columns.add_problem(f"{description}: no category has the id {annotation['category_id']}; dropped")
        elif annotation["category_id"] not in labels:
            unknown_classes[names[annotation["category_id"]]] += 1
        else:
            annotations_by_image[annotation["image_id"]].append(annotation)
    columns.refuse_unknown_classes(source, unknown_classes, classes)
    _report_duplicates(columns, json_name, content)

    for image, path in images:
        size = (image.get("height"), image.get("width"))
        if not columns.add_image(root, path, image["id"], size, f"{json_name}: image {image['file_name']}"):
            continue
        for annotation in annotations_by_image[image["id"]]:
            annotated_box = annotation.get("bbox")
            xywh = finite_numbers(annotated_box, 4)
            area = finite_numbers((annotation.get("area"),), 1)
            columns.add_object(
                f"{json_name}: annotation {annotation.get('id')} of {image['file_name']}",
                annotated_box,
                None if xywh is None else (xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]),
                labels[annotation["category_id"]],
                ignore=bool(annotation.get("iscrowd", 0)),
                area=None if area is None else area[0],
            )
    return Annotations(root, classes, category_ids, columns)


def _categories(source: Path, categories: Sequence[Mapping[str, Any]], sources: Iterable[Path]) -> dict[int, str]:
    """The names of the categories by id, sorted by id.

    Of several categories with the same name, only the one with objects is included, or the last if none has objects.
    """
    names = {category["id"]: str(category["name"]) for category in sorted(categories, key=lambda c: c["id"])}
    ids_by_name = defaultdict(list)
    for category_id, name in names.items():
        ids_by_name[name].append(category_id)
    if len(ids_by_name) == len(names):
        return names

    # Roboflow adds a category 0 that stands for all others, without objects. It may have the name of a real category.
    # The files of all splits decide which categories have objects, because every split must get the same classes.
    used = {annotation["category_id"] for path in sources for annotation in _parse(path)["annotations"]}
    for name, category_ids in ids_by_name.items():
        included = [category_id for category_id in category_ids if category_id in used] or category_ids[-1:]
        if len(included) > 1:
            raise ValueError(
                f"{source}: categories {listed(included)} have the same name, {name!r}, and each has objects"
            )
        for category_id in set(category_ids) - set(included):
            del names[category_id]
    return names


def _parse(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be parsed as JSON: {error}") from error
    for part, fields in REQUIRED_FIELDS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list of {part!r}, which COCO's object detection format requires")
        for entry in entries:
            if not isinstance(entry, dict) or not all(field in entry for field in fields):
                raise ValueError(
                    f"{path}: each of {part!r} must have the fields {listed(fields)}, got {str(entry)[:200]}"
                )
            ids = [entry[field] for field in fields if field.endswith("id")]
            if not all(isinstance(number, int) and abs(number) <= LARGEST_ID for number in ids):
                raise ValueError(f"{path}: ids in {part!r} must be integers of 64 bits, got {str(entry)[:200]}")
            if part == "images" and not isinstance(entry["file_name"], str):
                raise ValueError(f"{path}: file_name must be a text, got {str(entry)[:200]}")
    return content


def _images(
    root: Path, split: str, source: Path, images: Sequence[dict[str, Any]], columns: Columns
) -> list[tuple[dict[str, Any], Path]]:
    """The images that exist, with their files. All others are errors."""
    if source.name == ROBOFLOW_NAME:
        folders = [source.parent]
    else:
        folders = [root / split, root / "images" / split, root / "images", root]
    # The first file that exists decides which folder the names are relative to.
    paths = ((folder, folder / image["file_name"]) for image in images for folder in folders)
    match = next((folder for folder, path in paths if inside(root, path) and path.is_file()), None)
    folder = match or folders[0]
    existing = []
    for image in images:
        name = image["file_name"]
        if Path(name).is_absolute() or not inside(root, folder / name):
            columns.errors.append(
                f"{source}: file_name of image {image['id']} must be a relative path that stays in {root}, got {name}"
            )
        elif not (folder / name).is_file():
            searched = folder if match else listed(folders, len(folders))
            columns.errors.append(f"{source}: image {name} is missing in {searched}")
        else:
            existing.append((image, folder / name))
    return existing


def _report_duplicates(columns: Columns, json_name: str, content: Mapping[str, list[dict[str, Any]]]) -> None:
    for category_id, count in _repeated(category["id"] for category in content["categories"]):
        columns.errors.append(f"{json_name}: {count} categories have the same id, {category_id}")
    for image_id, count in _repeated(image["id"] for image in content["images"]):
        columns.errors.append(f"{json_name}: {count} images have the same id, {image_id}")
    for name, count in _repeated(image["file_name"] for image in content["images"]):
        columns.add_problem(f"{json_name}: {count} images have the same file, {name}; used as is")
    ids = (annotation["id"] for annotation in content["annotations"] if "id" in annotation)
    for annotation_id, count in _repeated(ids):
        columns.add_problem(f"{json_name}: {count} annotations have the same id, {annotation_id}; all are used")


def _repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(value, count) for value, count in Counter(values).items() if count > 1]
