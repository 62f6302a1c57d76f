"""Pascal VOC and COCO folders, read into one form.

Every annotation of a split is read and checked when the dataset is opened; images are decoded when asked
for. The annotations live in a few flat tensors rather than in one object an image, so that DataLoader
workers share them instead of copying them page by page as reference counts change.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ssdcore.objects import Target

__all__ = ["VOC_CLASSES", "DetectionDataset", "Target", "available_splits", "open_dataset", "read_rgb"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
OUTSIDE_TOLERANCE = 1.0  # pixels; VOC counts from 1, and COCO's x + w rounds past the edge
MAX_LISTED = 3  # names quoted in one error


class DetectionDataset(Dataset[tuple[Any, Target]]):
    """Images with boxes, from `open_dataset`.

    Item `i` is `(image, target)`, passed through `transform` where one is set. `image` is a
    `tv_tensors.Image` uint8 [3, H, W] in RGB, whatever the file's own 8-bit mode. `target` is a dict of

    - `boxes`: `tv_tensors.BoundingBoxes` float32 [G, 4] xyxy in pixels of the image, canvas_size (H, W)
    - `labels`: int64 [G]; label k is `classes[k - 1]`, 0 is background and never occurs
    - `ignore`: bool [G]; VOC's "difficult", COCO's "iscrowd"
    - `image_id`: int; COCO's own id, in VOC the position in the split

    Images without objects are kept, with G = 0. Boxes are kept as written: those of Pascal VOC count
    pixels from 1 with both ends included, and nothing is subtracted (as in torchvision), so they sit
    half a pixel off centre and one pixel small.

    Attributes:
        root: the folder that holds the images and annotations.
        split: the split's name.
        classes: class names, in the order of their labels.
        category_ids: the annotation file's own id of each class: COCO's category ids; 1..n in VOC. Classes
            that a COCO file does not know take the ids after its largest one.
        image_ids: int64 [N], the `image_id` of every image.
        problems: one line for everything found wrong in the annotations, naming the file.
        transform: None, or a callable `(image, target) -> (image, target)`; may be set at any time.
    """

    def __init__(
        self, root: Path, split: str, classes: Sequence[str], category_ids: Sequence[int], columns: _Columns
    ) -> None:
        self.root = root
        self.split = split
        self.classes = tuple(classes)
        self.category_ids = tuple(category_ids)
        self.problems = columns.problems
        self.transform: Callable[[Any, Target], tuple[Any, Target]] | None = None
        self.image_ids = torch.tensor(columns.image_ids, dtype=torch.int64)
        self._files = np.array(columns.files, dtype=np.str_)  # [N], relative to root, or absolute
        self._sizes = torch.tensor(columns.sizes, dtype=torch.int64).reshape(-1, 2)  # [N, 2] h, w
        self._offsets = torch.tensor(np.cumsum([0, *columns.counts]), dtype=torch.int64)  # [N + 1]
        self._boxes = torch.tensor(columns.boxes, dtype=torch.float32).reshape(-1, 4)  # [T, 4] xyxy
        self._labels = torch.tensor(columns.labels, dtype=torch.int64)
        self._ignore = torch.tensor(columns.ignore, dtype=torch.bool)
        self._areas = torch.tensor(columns.areas, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        """Decode image `index`; raise ValueError naming the file if that fails, or if its size is not the
        one that its annotations were made for (the EXIF orientation is applied only where it mends that)."""
        target = self.target(index)
        image = self._decode(index)
        if self.transform is not None:
            return self.transform(image, target)
        return image, target

    def image_path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / str(self._files[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` in pixels, as annotated."""
        height, width = self._sizes[index].tolist()
        return height, width

    def target(self, index: int) -> Target:
        """The target of image `index`, before any transform and without touching the image."""
        objects = self._objects(index)
        boxes = self._boxes[objects].clone()
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.image_size(index)),
            "labels": self._labels[objects].clone(),
            "ignore": self._ignore[objects].clone(),
            "image_id": int(self.image_ids[index]),
        }

    def areas(self, index: int) -> Tensor:
        """float64 [G]: the area by which COCO calls each object of image `index` small, medium or large.
        COCO's own is the mask's; where none is given, the box's."""
        return self._areas[self._objects(index)].clone()

    def _objects(self, index: int) -> slice:
        index = range(len(self))[index]  # takes negative indices, and raises IndexError past the end
        return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

    def _decode(self, index: int) -> Any:
        path = self.image_path(index)
        height, width = self.image_size(index)
        image = read_rgb(path, size=(height, width))
        if image.size != (width, height):
            raise ValueError(f"{path}: annotated as {width} x {height} pixels, but has {image.width} x {image.height}")
        return F.to_image(image)


def read_rgb(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    Args:
        path: the file, in any mode of at most 8 bits a channel.
        size: (height, width) in pixels; a file that is stored in this size is not turned.

    Raises:
        ValueError: naming the file, where it cannot be read or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            file.load()  # some formats turn themselves upright here
            # Pillow would clip the values of these modes at 255, which leaves most images white.
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {file.mode}, expected an image of 8 bits a channel")
            return (file if size == (file.height, file.width) else ImageOps.exif_transpose(file)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def open_dataset(root: str | Path, split: str, classes: Sequence[str] | None = None) -> DetectionDataset:
    """Open one split of a Pascal VOC or COCO folder; which of the two is seen from the files.

    - Pascal VOC: `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/<split>.txt`, in `root` or in a
      folder inside it such as `VOC2007` or `VOCdevkit/VOC2007`.
    - COCO: `annotations/instances_<split>.json`, with the images in `<split>/`, `images/<split>/`,
      `images/` or `root` itself; or `<split>/_annotations.coco.json` beside its images.

    Objects that could only do harm are dropped and reported in `problems`: boxes that are not four finite
    numbers, have no area or lie wholly outside the image. Boxes that reach out of the image are reported
    and kept.

    Args:
        root: the dataset's folder.
        split: the split's name; `available_splits` lists them.
        classes: class names in the order of their labels 1, 2, ..., such as those that a model was trained
            on. They may hold classes that the dataset lacks, and must hold every class that the split has
            objects of. By default all classes: in VOC the 20 of Pascal VOC if the annotations use no
            others, else the names found in all of `Annotations`, sorted; in COCO in the order of their
            category ids. Of COCO categories with one name, those that no object is of are passed over.

    Raises:
        ValueError: no known layout, no such split, an annotation file that cannot be parsed, an image or
            annotation file that is missing, objects of a class that is not in `classes`, or objects of two
            COCO categories with the same name.
    """
    root = Path(root)
    if classes is not None and len(set(classes)) != len(classes):
        raise ValueError(f"classes must differ from one another, got {list(classes)}")
    splits = _find_splits(root)
    if split not in splits:
        raise ValueError(f"no split {split!r} in {root}: it has {_listed(splits, len(splits))}")
    source = splits[split]
    if source.suffix == ".json":
        return _read_coco(root, split, source, classes, splits.values())
    return _read_voc(source.parents[2], split, source, classes)


def available_splits(root: str | Path) -> list[str]:
    """Names of the splits in a Pascal VOC or COCO folder, sorted; ValueError where it is neither."""
    return sorted(_find_splits(Path(root)))


def _find_splits(root: Path) -> dict[str, Path]:
    """The file that defines each split: a COCO JSON or a VOC list."""
    coco = {path.stem.removeprefix("instances_"): path for path in root.glob("annotations/instances_*.json")}
    coco |= {path.parent.name: path for path in root.glob("*/_annotations.coco.json")}
    if coco:
        return coco

    folders = [root] if (root / "Annotations").is_dir() else []
    folders = folders or [path.parent for path in (*root.glob("*/Annotations"), *root.glob("*/*/Annotations"))]
    if len(folders) > 1:
        raise ValueError(f"{root} holds more than one Pascal VOC folder, open one of them: {_listed(folders)}")
    for folder in folders:
        annotated = {path.stem for path in (folder / "Annotations").glob("*.xml")}
        lists = folder.glob("ImageSets/Main/*.txt")
        voc = {path.stem: path for path in lists if not _is_class_list(path, annotated)}
        if voc:
            return voc
    raise ValueError(
        f"no dataset in {root}: looked for annotations/instances_<split>.json or "
        "<split>/_annotations.coco.json (COCO), and for Annotations/*.xml with "
        "ImageSets/Main/<split>.txt (Pascal VOC)"
    )


def _is_class_list(path: Path, annotated: Set[str]) -> bool:
    """Whether a VOC list is one for classification (`cat_train.txt`): each line an image and -1, 0 or 1.

    The names of images may end so too, as in "img 0": then the whole line is one of those `annotated`.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return bool(lines) and all(line not in annotated and re.search(r"\s-?[01]$", line) for line in lines)


class _Columns:
    """The columns of a dataset, filled image by image; what is wrong with an object is found here."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.counts: list[int] = []
        self.boxes: list[tuple[float, ...]] = []
        self.labels: list[int] = []
        self.ignore: list[bool] = []
        self.areas: list[float] = []
        self.problems: list[str] = []

    def add_image(self, file: str, image_id: int, size: tuple[int, int]) -> None:
        self.files.append(file)
        self.image_ids.append(image_id)
        self.sizes.append(size)
        self.counts.append(0)

    def add_object(
        self,
        name: str,
        written: object,
        box: Sequence[float] | None,
        label: int,
        ignore: bool,
        area: float | None,
    ) -> None:
        """Add an object to the last image; `name` opens the line in `problems`, `box` is None where `written`
        is not four finite numbers."""
        height, width = self.sizes[-1]
        if box is None:
            self.problems.append(f"{name}: box {written} is not four finite numbers; dropped")
            return
        x1, y1, x2, y2 = box
        shown = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if x2 <= x1 or y2 <= y1:
            self.problems.append(f"{name}: {shown} has no area; dropped")
            return
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            self.problems.append(f"{name}: {shown} is outside the image, {width} x {height}; dropped")
            return
        if min(x1, y1, width - x2, height - y2) < -OUTSIDE_TOLERANCE:
            self.problems.append(f"{name}: {shown} reaches out of the image, {width} x {height}")
        self.boxes.append((x1, y1, x2, y2))
        self.labels.append(label)
        self.ignore.append(ignore)
        self.areas.append((x2 - x1) * (y2 - y1) if area is None else area)
        self.counts[-1] += 1

    def size_or_header(self, width: object, height: object, name: str, image: Path) -> tuple[int, int]:
        """(height, width) as annotated; from the image's own header where the annotations have none."""
        numbers = _finite_numbers((height, width), 2)
        if numbers is not None and min(numbers) >= 1:
            return int(numbers[0]), int(numbers[1])
        self.problems.append(f"{name}: no image size; taken from the image")
        try:
            with Image.open(image) as file:
                return file.height, file.width
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            raise ValueError(f"{image}: cannot be read as an image: {error}") from error


def _read_voc(root: Path, split: str, source: Path, classes: Sequence[str] | None) -> DetectionDataset:
    lines = source.read_text(encoding="utf-8").splitlines()
    stems = [line.strip() for line in lines if line.strip()]
    images = {path.stem: path for path in (root / "JPEGImages").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    annotations = {path.stem: path for path in sorted((root / "Annotations").glob("*.xml"))}
    _require(source, "annotation", [f"Annotations/{stem}.xml" for stem in stems if stem not in annotations])
    _require(source, "image", [f"JPEGImages/{stem}.jpg" for stem in stems if stem not in images])

    trees = {}
    names: set[str] = set()
    wanted = set(stems)
    for stem, path in annotations.items():
        # Every file, whatever the split: the splits must agree on the classes.
        if classes is not None and stem not in wanted:
            continue
        tree = _parse_xml(path)
        names |= {_text(node, "name") for node in tree.findall("object")}
        if stem in wanted:
            trees[stem] = tree
    if classes is None:
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)

    columns = _Columns()
    labels = {name: label for label, name in enumerate(classes, start=1)}
    others: Counter[str] = Counter()
    columns.problems += [
        f"{source.relative_to(root)}: {stem} is listed {count} times; kept once"
        for stem, count in Counter(stems).items()
        if count > 1
    ]
    for position, stem in enumerate(dict.fromkeys(stems)):
        tree = trees[stem]
        file = annotations[stem].relative_to(root).as_posix()
        size = columns.size_or_header(_text(tree, "size/width"), _text(tree, "size/height"), file, images[stem])
        columns.add_image(images[stem].relative_to(root).as_posix(), position, size)
        for number, node in enumerate(tree.findall("object"), start=1):
            name = _text(node, "name")
            if name not in labels:
                others[name] += 1
                continue
            written = tuple(_text(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            columns.add_object(
                f"{file}: object {number} ({name})",
                written,
                _finite_numbers(written, 4),
                labels[name],
                ignore=_text(node, "difficult") == "1",
                area=None,
            )
    _refuse_others(source, others, classes)
    return DetectionDataset(root, split, classes, range(1, len(classes) + 1), columns)


def _parse_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be parsed as XML: {error}") from error


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def _read_coco(
    root: Path, split: str, source: Path, classes: Sequence[str] | None, sources: Iterable[Path]
) -> DetectionDataset:
    content = _parse_coco(source)
    names = _coco_categories(source, content["categories"], sources)
    ids = {name: category_id for category_id, name in names.items()}
    if classes is None:
        classes = list(ids)
    # Ids that the file gives to none of its categories, so that no detection counts for a wrong one.
    new_ids = itertools.count(1 + max((category["id"] for category in content["categories"]), default=0))
    category_ids = [ids[name] if name in ids else next(new_ids) for name in classes]
    labels = {category_id: label for label, category_id in enumerate(category_ids, start=1)}

    images = {image["id"]: image for image in content["images"]}
    if len(images) != len(content["images"]):
        raise ValueError(f"{source}: two images have the same id")
    folder = _coco_image_folder(root, split, source, [image["file_name"] for image in images.values()])

    columns = _Columns()
    json_name = source.relative_to(root).as_posix()
    objects = defaultdict(list)
    others: Counter[str] = Counter()
    for annotation in content["annotations"]:
        name = f"{json_name}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in images:
            columns.problems.append(f"{name}: no image has the id {annotation['image_id']}; dropped")
        elif annotation["category_id"] not in names:
            columns.problems.append(f"{name}: no category has the id {annotation['category_id']}; dropped")
        elif annotation["category_id"] not in labels:
            others[names[annotation["category_id"]]] += 1
        else:
            objects[annotation["image_id"]].append(annotation)
    _refuse_others(source, others, classes)

    for image_id, image in images.items():
        path = folder / image["file_name"]
        name = f"{json_name}: image {image['file_name']}"
        size = columns.size_or_header(image.get("width"), image.get("height"), name, path)
        # A file_name may be an absolute path, of a file anywhere.
        file = path.relative_to(root) if path.is_relative_to(root) else path
        columns.add_image(file.as_posix(), image_id, size)
        for annotation in objects[image_id]:
            written = annotation.get("bbox")
            xywh = _finite_numbers(written, 4)
            area = _finite_numbers((annotation.get("area"),), 1)
            columns.add_object(
                f"{json_name}: annotation {annotation.get('id')} of {image['file_name']}",
                written,
                None if xywh is None else (xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]),
                labels[annotation["category_id"]],
                ignore=bool(annotation.get("iscrowd", 0)),
                area=None if area is None else area[0],
            )
    return DetectionDataset(root, split, classes, category_ids, columns)


def _coco_categories(source: Path, categories: Sequence[Mapping[str, Any]], sources: Iterable[Path]) -> dict[int, str]:
    """The names of the categories by id, sorted by id; of those with the same name, the one that is used."""
    names = {category["id"]: category["name"] for category in sorted(categories, key=lambda c: c["id"])}
    same = defaultdict(list)
    for category_id, name in names.items():
        same[name].append(category_id)
    if len(same) == len(names):
        return names

    # Roboflow's category 0 stands for all others, has no objects, and may share its name with a real one. The
    # files of all splits are asked what is used: the splits must agree on the classes.
    used = {annotation["category_id"] for path in sources for annotation in _parse_coco(path)["annotations"]}
    for name, category_ids in same.items():
        kept = [category_id for category_id in category_ids if category_id in used] or category_ids[-1:]
        if len(kept) > 1:
            raise ValueError(f"{source}: categories {_listed(kept)} have the same name, {name!r}, and objects each")
        for category_id in set(category_ids) - set(kept):
            del names[category_id]
    return names


def _parse_coco(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be parsed as JSON: {error}") from error
    needed = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for part, keys in needed.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list of {part!r}, so not COCO's object detection form")
        for entry in entries:
            if not isinstance(entry, dict) or not all(key in entry for key in keys):
                raise ValueError(f"{path}: each of {part!r} must have {_listed(keys)}, got {str(entry)[:200]}")
            if not all(isinstance(entry[key], int) for key in keys if key.endswith("id")):
                raise ValueError(f"{path}: ids in {part!r} must be integers, got {str(entry)[:200]}")
    return content


def _coco_image_folder(root: Path, split: str, source: Path, files: Sequence[str]) -> Path:
    if source.name == "_annotations.coco.json":
        folders = [source.parent]
    else:
        folders = [root / split, root / "images" / split, root / "images", root]
    holding = [folder for folder in folders if not files or (folder / files[0]).is_file()]
    if not holding:
        raise ValueError(f"{source}: image {files[0]} is in none of {_listed(folders, len(folders))}")
    _require(source, "image", [name for name in files if not (holding[0] / name).is_file()])
    return holding[0]


def _require(source: Path, kind: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(f"{source} lists {len(missing)} {kind} files that are missing: {_listed(missing)}")


def _refuse_others(source: Path, others: Counter[str], classes: Sequence[str]) -> None:
    """Raise ValueError where there are objects of `others`, counted by class: left out, they would become
    background to train on, and every detection of them a mistake."""
    if others:
        counts = _listed(f"{name} ({count} objects)" for name, count in sorted(others.items()))
        raise ValueError(
            f"{source} has objects of classes that are not in classes, {counts}: it is {_listed(classes, len(classes))}"
        )


def _finite_numbers(written: object, count: int) -> tuple[float, ...] | None:
    """`count` numbers, or their text, as finite floats; None where that is not what they are."""
    if not isinstance(written, Sequence) or len(written) != count:
        return None
    try:
        numbers = tuple(float(value) for value in written)
    except (TypeError, ValueError):
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def _listed(values: Iterable[object], most: int = MAX_LISTED) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
