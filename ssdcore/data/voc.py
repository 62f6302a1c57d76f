"""Read Pascal VOC's XML, one file per image: with lists of the images of each split, or in folders of images."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path

from ssdcore.data.columns import Annotations, Columns, Reader, finite_numbers, listed, read_lines
from ssdcore.data.images import images_in

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

# Where the XML files and the images of one folder may lie, relative to it. labelImg writes XML beside the image or into
# a folder of the user's choice, Roboflow beside it.
XML_FOLDERS = (".", "annotations", "Annotations", "images")
XML_FILES = "[!.]*.xml"  # macOS writes a hidden file beside each file on some disks
IMAGE_FOLDERS = (".", "images", "JPEGImages")


def find_lists(root: Path) -> dict[str, Reader]:
    """Find the splits of a Pascal VOC folder, `root` or a folder inside it, by its lists `ImageSets/Main/<split>.txt`.

    Raises:
        ValueError: there is more than one such folder, or a list is no text in UTF-8.
    """
    folders = [root] if (root / "Annotations").is_dir() else []
    folders = folders or [path.parent for path in (*root.glob("*/Annotations"), *root.glob("*/*/Annotations"))]
    found: dict[Path, dict[str, Reader]] = {}
    for folder in folders:
        annotated = {path.stem for path in (folder / "Annotations").glob(XML_FILES)}
        lists = sorted(folder.glob("ImageSets/Main/[!.]*.txt"))
        splits = {path.stem: path for path in lists if not _is_class_list(path, annotated)}
        if splits:
            found[folder] = {name: partial(_read_list, folder, path) for name, path in splits.items()}
    if len(found) > 1:
        raise ValueError(f"{root} contains more than one Pascal VOC folder; pass one of them: {listed(found)}")
    return next(iter(found.values()), {})


def find_folders(root: Path) -> dict[str, Reader]:
    """Find folders of images with XML beside them, in `annotations/`, `Annotations/` or `images/`.

    `root` itself is the split "all". If it is no such folder, each folder inside it is a split of its name.
    """
    folders = {"all": root} if _xml_files(root) else {path.name: path for path in sorted(root.iterdir())}
    xml_files = {name: _xml_files(folder) for name, folder in folders.items() if folder.is_dir()}
    xml_files = {name: files for name, files in xml_files.items() if files}
    every_file = [path for files in xml_files.values() for path in files]
    return {name: partial(_read_folder, root, folders[name], files, every_file) for name, files in xml_files.items()}


def _xml_files(folder: Path) -> list[Path]:
    """The XML files of a folder of images, or an empty list if no image has the name of one."""
    images = _images(folder, Columns())
    for name in XML_FOLDERS:
        files = sorted((folder / name).glob(XML_FILES))
        if any(path.stem in images for path in files):
            return files
    return []


def _is_class_list(path: Path, annotated: Set[str]) -> bool:
    """Whether a VOC list is for image classification, as `cat_train.txt` is: an image name and -1, 0 or 1 per line.

    An image name may itself end like this, as "img 0" does. Then the whole line is a name in `annotated`.
    """
    lines = read_lines(path)
    return bool(lines) and all(line not in annotated and re.search(r"\s-?[01]$", line) for line in lines)


def _read_list(root: Path, source: Path, classes: Sequence[str] | None) -> Annotations:
    columns = Columns()
    stems = read_lines(source)
    xml_files = {path.stem: path for path in sorted((root / "Annotations").glob(XML_FILES))}
    for stem, count in Counter(stems).items():
        if stem not in xml_files:
            columns.errors.append(f"{source}: {stem} is listed, but Annotations/{stem}.xml is missing")
        if count > 1:
            columns.add_problem(f"{source.relative_to(root).as_posix()}: {stem} is listed {count} times; used once")
    listed_files = [xml_files[stem] for stem in dict.fromkeys(stems) if stem in xml_files]
    return _read_xml_files(root, root, source, listed_files, xml_files.values(), classes, columns)


def _read_folder(
    root: Path, folder: Path, xml_files: Sequence[Path], every_file: Iterable[Path], classes: Sequence[str] | None
) -> Annotations:
    columns = Columns()
    annotated = {path.stem for path in xml_files}
    for stem, image in _images(folder, Columns()).items():
        if stem not in annotated:
            # Whoever annotates image by image has not looked at this one yet. It would teach that nothing is there.
            columns.add_problem(
                f"{image.relative_to(root).as_posix()}: no XML file; left out (an image without objects needs an XML "
                "file without <object>)"
            )
    return _read_xml_files(root, folder, folder, xml_files, every_file, classes, columns)


def _images(folder: Path, columns: Columns) -> dict[str, Path]:
    """The images of a folder by stem. If two have the same stem, the first one by name is used."""
    images: dict[str, Path] = {}
    for name in IMAGE_FOLDERS:
        for path in images_in(folder / name):
            if images.setdefault(path.stem, path) != path:
                columns.add_problem(f"{path}: {images[path.stem].name} has the same name; this file is left out")
    return images


def _read_xml_files(
    root: Path,
    folder: Path,
    source: Path,
    xml_files: Iterable[Path],
    every_file: Iterable[Path],
    classes: Sequence[str] | None,
    columns: Columns,
) -> Annotations:
    """Read the images and XML files of one split.

    Args:
        root: the folder that all paths are relative to.
        folder: the folder that contains the images, as in `_images`.
        source: the file or folder that defines the split, for messages.
        xml_files: the files of the split.
        every_file: the files of all splits. By default they decide the classes, so that every split gets the same.
        classes: as in `open_dataset`.
        columns: empty, but for what is known to be wrong.
    """
    files = list(xml_files)
    trees = _parse(files if classes is not None else dict.fromkeys([*files, *every_file]), columns)
    if classes is None:
        names = {_text(node, "name") for tree in trees.values() for node in tree.findall("object")} - {""}
        classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    labels = {name: label for label, name in enumerate(classes, start=1)}
    images = _images(folder, columns)
    unknown_classes: Counter[str] = Counter()
    for number, path in enumerate(files):
        file = path.relative_to(root).as_posix()
        if path.stem not in images:
            columns.errors.append(f"{file}: the image {path.stem} is missing (.jpg, .png, ...)")
        if path.stem not in images or path not in trees:
            continue
        tree = trees[path]
        size = (_text(tree, "size/height"), _text(tree, "size/width"))
        if columns.add_image(root, images[path.stem], number, size, file):
            _add_objects(columns, tree, file, labels, unknown_classes)
    columns.refuse_unknown_classes(source, unknown_classes, classes)
    return Annotations(root, classes, range(1, len(classes) + 1), columns)


def _add_objects(
    columns: Columns, tree: ElementTree.Element, file: str, labels: Mapping[str, int], unknown_classes: Counter[str]
) -> None:
    for number, node in enumerate(tree.findall("object"), start=1):
        name = _text(node, "name")
        if not name:
            columns.drop_object(f"{file}: object {number}", "no class name")
        elif name not in labels:
            unknown_classes[name] += 1
        else:
            annotated_box = tuple(_text(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            columns.add_object(
                f"{file}: object {number} ({name})",
                annotated_box,
                finite_numbers(annotated_box, 4),
                labels[name],
                ignore=_text(node, "difficult") == "1",
                area=None,
            )


def _parse(files: Iterable[Path], columns: Columns) -> dict[Path, ElementTree.Element]:
    trees = {}
    for path in files:
        try:
            tree = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            columns.errors.append(f"{path}: cannot be parsed as XML: {error}")
            continue
        if tree.tag == "annotation":
            trees[path] = tree
        else:
            columns.errors.append(f"{path}: must have the root element <annotation>, got <{tree.tag}>")
    return trees


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()
