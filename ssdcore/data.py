"""Read detection datasets in the layout of Pascal VOC or COCO into one class, `DetectionDataset`.

Opening a dataset reads and checks all annotations of one split. Images are decoded later, one by one, when an item is
read. The annotations are stored in a few flat tensors rather than in one Python object per image, so that DataLoader
workers share their memory. Python objects would be copied page by page, because reading them changes their reference
counts.
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
OUTSIDE_TOLERANCE = 1.0  # pixels; VOC counts pixels from 1, and COCO's x + width can be rounded past the edge
MAX_LISTED = 3  # values quoted in one error message


class DetectionDataset(Dataset[tuple[Any, Target]]):
    """The images of one split with their annotated objects. `open_dataset` creates it.

    Item `i` is the pair `(image, target)`, passed through `transform` if one is set. `image` is a `tv_tensors.Image`
    uint8 [3, H, W] in RGB, whichever 8-bit mode the file has. `target` is a dict of

    - `boxes`: `tv_tensors.BoundingBoxes` float32 [G, 4] xyxy in pixels of the image, with canvas_size (H, W);
    - `labels`: int64 [G]; label k is `classes[k - 1]`. Label 0 is the background and never occurs;
    - `ignore`: bool [G]; VOC's "difficult", COCO's "iscrowd";
    - `image_id`: int; COCO's own id, or in VOC the index of the image in the split.

    Images without objects are included, with G = 0. Box coordinates are those of the annotation file. Pascal VOC counts
    pixels from 1 and includes both ends. As in torchvision, nothing is subtracted, so VOC boxes lie half a pixel off
    centre and are one pixel too small.

    Attributes:
        root: the folder that contains the images and annotations.
        split: the name of the split.
        classes: class names in the order of their labels.
        category_ids: the id of each class in the annotation file: COCO's category ids, or 1..n in VOC. Classes that a
            COCO file does not define get the ids after its largest one.
        image_ids: int64 [N], the `image_id` of every image.
        problems: one line for each problem in the annotations, which names the file and what was done about it.
        transform: None, or a callable `(image, target) -> (image, target)`. It may be set at any time.
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
        """Read image `index` and its target.

        The image is turned as its EXIF orientation says, unless it already has the annotated size.

        Raises:
            ValueError: the image cannot be decoded, or its size is not the annotated size. The message names the file.
        """
        target = self.target(index)
        image = self._decode(index)
        if self.transform is not None:
            return self.transform(image, target)
        return image, target

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.root / str(self._files[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """Return the annotated (height, width) of image `index` in pixels, without reading the image."""
        height, width = self._sizes[index].tolist()
        return height, width

    def target(self, index: int) -> Target:
        """Return a copy of the target of image `index` before any transform, without reading the image."""
        objects = self._objects(index)
        boxes = self._boxes[objects].clone()
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.image_size(index)),
            "labels": self._labels[objects].clone(),
            "ignore": self._ignore[objects].clone(),
            "image_id": int(self.image_ids[index]),
        }

    def areas(self, index: int) -> Tensor:
        """Return the areas of the objects of image `index` in square pixels, float64 [G].

        COCO's metrics call an object small, medium or large by this area. It is the `area` of the annotation (in COCO,
        the area of the object's mask), or the area of the box if the annotation has none.
        """
        return self._areas[self._objects(index)].clone()

    def _objects(self, index: int) -> slice:
        index = range(len(self))[index]  # accepts negative indices, and raises IndexError past the end
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
        path: the file, in any mode with at most 8 bits per channel.
        size: (height, width) in pixels. A file whose stored size equals `size` is not turned.

    Raises:
        ValueError: the file cannot be read, or has more than 8 bits per channel. The message names the file.
    """
    try:
        with Image.open(path) as file:
            file.load()  # for some formats, Pillow already applies the orientation here
            # Pillow would clip the values of these modes at 255, so that most images would become white.
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {file.mode}, expected an image with 8 bits per channel")
            return (file if size == (file.height, file.width) else ImageOps.exif_transpose(file)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types of exception
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def open_dataset(root: str | Path, split: str, classes: Sequence[str] | None = None) -> DetectionDataset:
    """Open one split of a Pascal VOC or COCO folder. The files present decide which layout it is.

    - Pascal VOC: `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/<split>.txt`, in `root` or in a folder inside
      it, such as `VOC2007` or `VOCdevkit/VOC2007`.
    - COCO: `annotations/instances_<split>.json` with the images in `<split>/`, `images/<split>/`, `images/` or `root`;
      or `<split>/_annotations.coco.json` with the images beside it.

    Unusable boxes are dropped and reported in `problems`: boxes that are not four finite numbers, that have no area,
    or that lie entirely outside the image. Boxes that extend beyond the image by more than a pixel are reported but
    used as they are.

    Args:
        root: the dataset's folder.
        split: the name of the split; `available_splits` lists the names.
        classes: class names in the order of their labels 1, 2, ..., for example those that a model was trained on. The
            list may contain classes that the dataset lacks. It must contain every class that the split has objects of.
            By default all classes of the dataset. For VOC these are the 20 classes of Pascal VOC if the annotations
            use no others, and otherwise the names found in all of `Annotations`, sorted. For COCO these are the
            categories in the order of their ids; of several categories with the same name, those without objects are
            skipped.

    Raises:
        ValueError: the layout is unknown; the split does not exist; an annotation file cannot be parsed; an image or
            annotation file is missing; `classes` has duplicates or lacks a class that the split has objects of; or two
            COCO categories with the same name both have objects.
    """
    root = Path(root)
    if classes is not None and len(set(classes)) != len(classes):
        raise ValueError(f"classes must not contain duplicates, got {list(classes)}")
    splits = _find_splits(root)
    if split not in splits:
        raise ValueError(f"no split {split!r} in {root}: it has {_listed(splits, len(splits))}")
    source = splits[split]
    if source.suffix == ".json":
        return _read_coco(root, split, source, classes, splits.values())
    return _read_voc(source.parents[2], split, source, classes)


def available_splits(root: str | Path) -> list[str]:
    """Return the sorted names of the splits in a Pascal VOC or COCO folder.

    Raises:
        ValueError: the folder has neither layout.
    """
    return sorted(_find_splits(Path(root)))


def _find_splits(root: Path) -> dict[str, Path]:
    """The file that defines each split: a COCO JSON file or a VOC list of images."""
    coco = {path.stem.removeprefix("instances_"): path for path in root.glob("annotations/instances_*.json")}
    coco |= {path.parent.name: path for path in root.glob("*/_annotations.coco.json")}
    if coco:
        return coco

    folders = [root] if (root / "Annotations").is_dir() else []
    folders = folders or [path.parent for path in (*root.glob("*/Annotations"), *root.glob("*/*/Annotations"))]
    if len(folders) > 1:
        raise ValueError(f"{root} contains more than one Pascal VOC folder; pass one of them: {_listed(folders)}")
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
    """Whether a VOC list is for image classification, as `cat_train.txt` is: an image name and -1, 0 or 1 per line.

    An image name may itself end like this, as "img 0" does. Then the whole line is a name in `annotated`.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return bool(lines) and all(line not in annotated and re.search(r"\s-?[01]$", line) for line in lines)


class _Columns:
    """The annotations of a split as columns, filled image by image. Also checks each object and collects problems."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.image_ids: list[int] = []
        self.sizes: list[tuple[int, int]] = []  # (height, width) in pixels
        self.counts: list[int] = []  # objects of each image
        self.boxes: list[tuple[float, ...]] = []  # xyxy
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
        description: str,
        annotated_box: object,
        box: Sequence[float] | None,
        label: int,
        ignore: bool,
        area: float | None,
    ) -> None:
        """Add an object to the image added last, unless its box is unusable.

        Args:
            description: file and object, with which a line in `problems` begins.
            annotated_box: the box as it is in the file, to be quoted.
            box: the same as xyxy, or None if it is not four finite numbers.
            label: 1 for the first class.
            ignore: VOC's "difficult", COCO's "iscrowd".
            area: in square pixels, or None for the area of the box.
        """
        height, width = self.sizes[-1]
        if box is None:
            self.problems.append(f"{description}: box {annotated_box} is not four finite numbers; dropped")
            return
        x1, y1, x2, y2 = box
        box_text = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
        if x2 <= x1 or y2 <= y1:
            self.problems.append(f"{description}: {box_text} has no area; dropped")
            return
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            self.problems.append(f"{description}: {box_text} is outside the image of {width} x {height}; dropped")
            return
        if min(x1, y1, width - x2, height - y2) < -OUTSIDE_TOLERANCE:
            self.problems.append(
                f"{description}: {box_text} extends beyond the image of {width} x {height}; used as is"
            )
        self.boxes.append((x1, y1, x2, y2))
        self.labels.append(label)
        self.ignore.append(ignore)
        self.areas.append((x2 - x1) * (y2 - y1) if area is None else area)
        self.counts[-1] += 1

    def size_or_header(self, width: object, height: object, description: str, image: Path) -> tuple[int, int]:
        """(height, width) as annotated, or from the header of the image file if the annotation has no valid size."""
        numbers = _finite_numbers((height, width), 2)
        if numbers is not None and min(numbers) >= 1:
            return int(numbers[0]), int(numbers[1])
        self.problems.append(f"{description}: no image size; used the size of the image file")
        try:
            with Image.open(image) as file:
                return file.height, file.width
        except Exception as error:  # Pillow's decoders raise many types of exception
            raise ValueError(f"{image}: cannot be read as an image: {error}") from error


def _read_voc(root: Path, split: str, source: Path, classes: Sequence[str] | None) -> DetectionDataset:
    lines = source.read_text(encoding="utf-8").splitlines()
    stems = [line.strip() for line in lines if line.strip()]
    images = {path.stem: path for path in (root / "JPEGImages").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    annotations = {path.stem: path for path in sorted((root / "Annotations").glob("*.xml"))}
    _require_files(source, "annotation", [f"Annotations/{stem}.xml" for stem in stems if stem not in annotations])
    _require_files(source, "image", [f"JPEGImages/{stem}.jpg" for stem in stems if stem not in images])

    trees = {}
    names: set[str] = set()
    in_split = set(stems)
    for stem, path in annotations.items():
        # By default the files of all splits are read, because every split must get the same classes.
        if classes is not None and stem not in in_split:
            continue
        tree = _parse_xml(path)
        names |= {_text(node, "name") for node in tree.findall("object")}
        if stem in in_split:
            trees[stem] = tree
    if classes is None:
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)

    columns = _Columns()
    labels = {name: label for label, name in enumerate(classes, start=1)}
    unknown_classes: Counter[str] = Counter()
    columns.problems += [
        f"{source.relative_to(root)}: {stem} is listed {count} times; used once"
        for stem, count in Counter(stems).items()
        if count > 1
    ]
    for image_id, stem in enumerate(dict.fromkeys(stems)):
        tree = trees[stem]
        file = annotations[stem].relative_to(root).as_posix()
        size = columns.size_or_header(_text(tree, "size/width"), _text(tree, "size/height"), file, images[stem])
        columns.add_image(images[stem].relative_to(root).as_posix(), image_id, size)
        for number, node in enumerate(tree.findall("object"), start=1):
            name = _text(node, "name")
            if name not in labels:
                unknown_classes[name] += 1
                continue
            annotated_box = tuple(_text(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            columns.add_object(
                f"{file}: object {number} ({name})",
                annotated_box,
                _finite_numbers(annotated_box, 4),
                labels[name],
                ignore=_text(node, "difficult") == "1",
                area=None,
            )
    _require_no_unknown_classes(source, unknown_classes, classes)
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
    # Classes that the file lacks get ids that none of its categories has. Otherwise an object detected as such a class
    # would be scored as one of another category.
    new_ids = itertools.count(1 + max((category["id"] for category in content["categories"]), default=0))
    category_ids = [ids[name] if name in ids else next(new_ids) for name in classes]
    labels = {category_id: label for label, category_id in enumerate(category_ids, start=1)}

    images = {image["id"]: image for image in content["images"]}
    if len(images) != len(content["images"]):
        raise ValueError(f"{source}: two images have the same id")
    folder = _coco_image_folder(root, split, source, [image["file_name"] for image in images.values()])

    columns = _Columns()
    json_name = source.relative_to(root).as_posix()
    annotations_by_image = defaultdict(list)
    unknown_classes: Counter[str] = Counter()
    for annotation in content["annotations"]:
        description = f"{json_name}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in images:
            columns.problems.append(f"{description}: no image has the id {annotation['image_id']}; dropped")
        elif annotation["category_id"] not in names:
            columns.problems.append(f"{description}: no category has the id {annotation['category_id']}; dropped")
        elif annotation["category_id"] not in labels:
            unknown_classes[names[annotation["category_id"]]] += 1
        else:
            annotations_by_image[annotation["image_id"]].append(annotation)
    _require_no_unknown_classes(source, unknown_classes, classes)

    for image_id, image in images.items():
        path = folder / image["file_name"]
        description = f"{json_name}: image {image['file_name']}"
        size = columns.size_or_header(image.get("width"), image.get("height"), description, path)
        # A file_name may be an absolute path outside `root`.
        file = path.relative_to(root) if path.is_relative_to(root) else path
        columns.add_image(file.as_posix(), image_id, size)
        for annotation in annotations_by_image[image_id]:
            annotated_box = annotation.get("bbox")
            xywh = _finite_numbers(annotated_box, 4)
            area = _finite_numbers((annotation.get("area"),), 1)
            columns.add_object(
                f"{json_name}: annotation {annotation.get('id')} of {image['file_name']}",
                annotated_box,
                None if xywh is None else (xywh[0], xywh[1], xywh[0] + xywh[2], xywh[1] + xywh[3]),
                labels[annotation["category_id"]],
                ignore=bool(annotation.get("iscrowd", 0)),
                area=None if area is None else area[0],
            )
    return DetectionDataset(root, split, classes, category_ids, columns)


def _coco_categories(source: Path, categories: Sequence[Mapping[str, Any]], sources: Iterable[Path]) -> dict[int, str]:
    """The names of the categories by id, sorted by id.

    Of several categories with the same name, only the one with objects is included, or the last if none has objects.
    """
    names = {category["id"]: category["name"] for category in sorted(categories, key=lambda c: c["id"])}
    ids_by_name = defaultdict(list)
    for category_id, name in names.items():
        ids_by_name[name].append(category_id)
    if len(ids_by_name) == len(names):
        return names

    # Roboflow adds a category 0 that stands for all others, without objects. It may have the name of a real category.
    # The files of all splits decide which categories have objects, because every split must get the same classes.
    used = {annotation["category_id"] for path in sources for annotation in _parse_coco(path)["annotations"]}
    for name, category_ids in ids_by_name.items():
        included = [category_id for category_id in category_ids if category_id in used] or category_ids[-1:]
        if len(included) > 1:
            raise ValueError(
                f"{source}: categories {_listed(included)} have the same name, {name!r}, and each has objects"
            )
        for category_id in set(category_ids) - set(included):
            del names[category_id]
    return names


def _parse_coco(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be parsed as JSON: {error}") from error
    required_fields = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for part, fields in required_fields.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list of {part!r}, which COCO's object detection format requires")
        for entry in entries:
            if not isinstance(entry, dict) or not all(field in entry for field in fields):
                raise ValueError(
                    f"{path}: each of {part!r} must have the fields {_listed(fields)}, got {str(entry)[:200]}"
                )
            if not all(isinstance(entry[field], int) for field in fields if field.endswith("id")):
                raise ValueError(f"{path}: ids in {part!r} must be integers, got {str(entry)[:200]}")
    return content


def _coco_image_folder(root: Path, split: str, source: Path, files: Sequence[str]) -> Path:
    """The folder that the file names in `source` are relative to. All files must exist in it."""
    if source.name == "_annotations.coco.json":
        folders = [source.parent]
    else:
        folders = [root / split, root / "images" / split, root / "images", root]
    matching = [folder for folder in folders if not files or (folder / files[0]).is_file()]
    if not matching:
        raise ValueError(f"{source}: image {files[0]} is in none of {_listed(folders, len(folders))}")
    _require_files(source, "image", [name for name in files if not (matching[0] / name).is_file()])
    return matching[0]


def _require_files(source: Path, kind: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(f"{source} lists {len(missing)} {kind} files that are missing: {_listed(missing)}")


def _require_no_unknown_classes(source: Path, unknown_classes: Counter[str], classes: Sequence[str]) -> None:
    """Raise ValueError if there are objects of other classes than `classes`.

    If they were dropped, training would treat them as background and scoring would count every detection of them as a
    false positive.
    """
    if unknown_classes:
        counts = _listed(f"{name} ({count} objects)" for name, count in sorted(unknown_classes.items()))
        raise ValueError(
            f"classes must include every class that {source} has objects of; "
            f"missing: {counts}; got {_listed(classes, len(classes))}"
        )


def _finite_numbers(values: object, count: int) -> tuple[float, ...] | None:
    """`values` as floats, or None unless they are `count` finite numbers or texts of such numbers."""
    if not isinstance(values, Sequence) or len(values) != count:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def _listed(values: Iterable[object], most: int = MAX_LISTED) -> str:
    """At most `most` of the values, separated by commas, and "..." if there are more."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")
