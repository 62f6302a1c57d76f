"""Open one split of a dataset, in whichever layout its folder has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssdcore.data import coco, voc, yolo
from ssdcore.data.columns import MAX_LISTED, Annotations, Reader, listed
from ssdcore.data.dataset import DetectionDataset
from ssdcore.data.split import PARTS, SPLIT_FILE, Division, divide, part_of, read_division, write_division

# In this order. The last two look for less, so they must not see what belongs to another layout.
LAYOUTS: dict[str, Callable[[Path], dict[str, Reader]]] = {
    "COCO": coco.find,
    "YOLO": yolo.find,
    "Pascal VOC": voc.find_lists,
    "images with XML": voc.find_folders,
    "COCO in files of other names": coco.find_other_names,
}


class Layout(NamedTuple):
    """The layout of a dataset, and a function that reads each of its splits."""

    name: str
    readers: dict[str, Reader]


def open_dataset(
    root: str | Path, split: str, classes: Sequence[str] | None = None, *, split_file: str | Path | None = None
) -> DetectionDataset:
    """Open one split of a dataset. The files present decide which layout it has, the first of these that fits:

    - COCO: `annotations/instances_<split>.json` with the images in `<split>/`, `images/<split>/`, `images/` or `root`;
      or `<split>/_annotations.coco.json` with the images beside it.
    - YOLO: `data.yaml` with `names` and with the images of `train`, `val` and `test`, as `ssdcore.data.yolo` describes.
    - Pascal VOC: `Annotations/*.xml`, `JPEGImages/` and `ImageSets/Main/<split>.txt`, in `root` or in a folder inside
      it, such as `VOC2007` or `VOCdevkit/VOC2007`.
    - Images with an XML file each, as labelImg and Roboflow write them: beside the images, or in `annotations/` with
      the images in `images/`. This may be `root`, whose images are the split "all"; or each folder in `root` is one.
    - COCO's JSON under another name, in `root` or `annotations/`: one file is the split "all".

    A dataset with one split can be divided by `make_split`. Then it has the splits "train" and "val".

    Unusable boxes are dropped and reported in `problems`: boxes that are not four finite numbers, that have no area,
    or that lie entirely outside the image; and objects of a class that has no name. Boxes that extend beyond the image
    by more than a pixel are reported but used as they are. Images without an XML file are left out and reported. In
    YOLO's layout, an image without a text file has no objects.

    Args:
        root: the dataset's folder.
        split: the name of the split; `available_splits` lists the names.
        classes: class names in the order of their labels 1, 2, ..., for example those that a model was trained on. The
            list may contain classes that the dataset lacks. It must contain every class that the split (of a divided
            dataset: the whole dataset) has objects of. By default all classes of the dataset. For XML these are the 20
            classes of Pascal VOC if the annotations use no others, and otherwise the names found in the XML files of
            all splits, sorted. For COCO and YOLO these are the categories in the order of their ids; of several COCO
            categories with the same name, those without objects are skipped.
        split_file: the file that `make_split` wrote. By default the one in `root`, if there is one.

    Raises:
        ValueError: the layout is unknown; the split does not exist; an annotation file cannot be parsed; an image or
            annotation file is missing, or its path leaves `root`; `classes` has duplicates or lacks a class that the
            split has objects of; two images have the same id; or two COCO categories with the same name both have
            objects. `ssdcore data check` lists all such errors.
    """
    root = Path(root)
    if classes is not None and len(set(classes)) != len(classes):
        raise ValueError(f"classes must not contain duplicates, got {list(classes)}")
    layout = find_layout(root)
    division = find_division(root, split_file)
    annotations = find_reader(layout, division, split, root)(classes)
    if annotations.columns.errors:
        raise ValueError(_joined(annotations, root))
    dataset = DetectionDataset(split, annotations)
    return part_of(dataset, division, split) if division and split in PARTS else dataset


def available_splits(root: str | Path, *, split_file: str | Path | None = None) -> list[str]:
    """Return the sorted names of the splits of a dataset; of one that `make_split` divided, "train" and "val".

    Raises:
        ValueError: the layout is unknown.
    """
    root = Path(root)
    layout = find_layout(root)
    return list(PARTS) if find_division(root, split_file) else sorted(layout.readers)


def make_split(root: str | Path, fraction: float, *, seed: int = 0, fallback: str | Path | None = None) -> Path:
    """Divide the images of a dataset that has one split into "train" and "val", and write the division down.

    The file is `ssdcore-split.json` in `root`, where every later call of `open_dataset` finds it. If `root` is not
    writable, the file is written to the folder `fallback`. A file that exists is used as it is, so that the same
    images stay held out. The division depends only on the seed and the names of the images.

    Args:
        root: the dataset's folder.
        fraction: of the images, for "train".
        seed: for another division.
        fallback: a folder, created if need be.

    Returns:
        The file, to be passed to `open_dataset` as `split_file` if it is not in `root`.

    Raises:
        ValueError: the dataset has several splits; or the file that exists has another fraction; or a part would be
            empty.
        OSError: the file cannot be written.
    """
    root = Path(root)
    existing = find_division(root, None if fallback is None else existing_split_file(root, fallback))
    if existing is not None:
        if existing.fraction != fraction:
            raise ValueError(
                f"{existing.path} holds a split of {existing.fraction}, got {fraction}: delete the file to divide again"
            )
        return existing.path
    splits = available_splits(root)
    if len(splits) != 1:
        raise ValueError(f"split needs a dataset with a single split, but {root} has {', '.join(splits)}")
    files = list(dict.fromkeys(open_dataset(root, splits[0]).files))
    division = Division(root / SPLIT_FILE, splits[0], fraction, seed, *divide(files, fraction, seed))
    try:
        write_division(division)
    except OSError:
        if fallback is None:
            raise
        Path(fallback).mkdir(parents=True, exist_ok=True)
        division = division._replace(path=Path(fallback) / SPLIT_FILE)
        write_division(division)
    return division.path


def existing_split_file(root: str | Path, run: str | Path) -> Path | None:
    """Return the split file in the folder of a run, else the one in the dataset's folder, else None.

    The run may have been trained on another dataset. Its file is passed over if it divides a split that the dataset
    does not have.
    """
    of_run, of_dataset = Path(run) / SPLIT_FILE, Path(root) / SPLIT_FILE
    if of_run.is_file() and read_division(of_run).source in find_layout(Path(root)).readers:
        return of_run
    return of_dataset if of_dataset.is_file() else None


def find_division(root: Path, split_file: str | Path | None = None) -> Division | None:
    """Return the content of `split_file`, by default of the one in `root`, or None if there is none."""
    path = Path(split_file) if split_file is not None else root / SPLIT_FILE
    return read_division(path) if split_file is not None or path.is_file() else None


def find_reader(layout: Layout, division: Division | None, split: str, root: Path) -> Reader:
    """Return what reads a split, or the split that is divided into it.

    Raises:
        ValueError: the dataset has no such split.
    """
    source = division.source if division and split in PARTS else split
    if source not in layout.readers:
        splits = PARTS if division and source == split else sorted(layout.readers)
        message = f"no split {source!r} in {root}: it has {listed(splits, len(splits))}"
        if division and source != split:
            message += f"; {division.path} divides {source!r}, so delete this file if the dataset has other splits now"
        raise ValueError(message)
    return layout.readers[source]


def find_layout(root: Path) -> Layout:
    """Find out which layout a dataset has.

    Raises:
        ValueError: none that is known.
    """
    if not root.is_dir():
        raise ValueError(f"no dataset in {root}: no such folder")
    for name, find in LAYOUTS.items():
        if readers := find(root):
            return Layout(name, readers)
    raise ValueError(
        f"no dataset in {root}: looked for annotations/instances_<split>.json or "
        "<split>/_annotations.coco.json (COCO), for data.yaml (YOLO), for Annotations/*.xml with "
        "ImageSets/Main/<split>.txt (Pascal VOC), and for images with XML files beside them or in annotations/"
    )


def _joined(annotations: Annotations, root: Path) -> str:
    errors = annotations.columns.errors
    more = f"; and {len(errors) - MAX_LISTED} more: `ssdcore data check {root}` lists all"
    return "; ".join(errors[:MAX_LISTED]) + (more if len(errors) > MAX_LISTED else "")
