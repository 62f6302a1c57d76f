"""List all that is wrong with a dataset, and what is unusual in it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from ssdcore.anchors import AnchorConfig
from ssdcore.cores import usable_cores
from ssdcore.data.columns import listed
from ssdcore.data.dataset import DetectionDataset
from ssdcore.data.images import Inspection, images_in
from ssdcore.data.opening import Layout, available_splits, find_division, find_layout, find_reader
from ssdcore.data.split import PARTS, Division, part_of
from ssdcore.data.statistics import reach, relative_boxes, table_of_counts, table_of_reach, table_of_sizes
from ssdcore.draw import contact_sheet, draw_detections

PICTURES = 24  # on a contact sheet
PICTURE_SIDE = 400  # pixels, the longer side of a picture on it
SHEET_COLUMNS = 6

# Splits that share images by definition: VOC's trainval is train and val.
OVERLAPPING = {frozenset(("trainval", "train")), frozenset(("trainval", "val"))}
PLAIN_MODE = "RGB"
MODES = {  # of Pillow; how `ssdcore.data.images` reads the modes that deserve a note
    "L": "greyscale",
    "1": "black and white",
    "CMYK": "CMYK",
    "RGBA": "with alpha, which is dropped",
    "LA": "greyscale with alpha, which is dropped",
    "PA": "with alpha, which is dropped",
    "P": "with a palette",
    "I;16": "of 16-bit greyscale, scaled to 8 bits",
    "I;16B": "of 16-bit greyscale, scaled to 8 bits",
}


class Report(NamedTuple):
    """What `check_dataset` found."""

    layout: str
    datasets: dict[str, DetectionDataset]  # the splits that could be read
    problems: list[str]  # what is wrong, one line each, with files relative to the dataset's folder
    notes: list[str]  # what is unusual but defined


def check_dataset(root: str | Path, *, quiet: bool = False) -> Report:
    """Read all annotations and all images of a dataset, and list everything that is wrong.

    Problems are: whatever `open_dataset` refuses or reports; images that cannot be decoded or do not have the annotated
    size; images that are in two splits, also as copies; and classes of a split that train lacks. Notes are: images
    without objects, with ignored objects only, of an unusual mode, turned by their EXIF orientation, copied within a
    split, or in no split.

    Args:
        root: the dataset's folder.
        quiet: show no progress bar.

    Raises:
        ValueError: the layout is unknown.
    """
    root = Path(os.path.abspath(root))  # whole, so that nothing else in a message looks like it
    layout, division = find_layout(root), find_division(root)
    problems: list[str] = []
    datasets: dict[str, DetectionDataset] = {}
    for split in available_splits(root):
        try:
            datasets[split] = _open(root, layout, division, split, problems)
        except ValueError as error:
            problems.append(str(error))
    inspections = _inspect(datasets, problems, quiet)
    problems += _images_in_two_splits(datasets, inspections)
    problems += _classes_that_differ(datasets)
    notes = [*_notes_on_objects(datasets), *_notes_on_images(inspections), *_images_in_no_split(root, datasets)]
    # Splits may share files, and then their problems.
    return Report(layout.name, datasets, [text.replace(f"{root}/", "") for text in dict.fromkeys(problems)], notes)


def describe(report: Report, model: str, config: AnchorConfig) -> str:
    """Return the report as text, with tables of counts, of the sizes of boxes, and of the reach of the anchors."""
    sections = [f"layout: {report.layout}"]
    if report.datasets:
        sections.append(table_of_counts(report.datasets))
        boxes = relative_boxes(_without_trainval(report.datasets))
        if len(boxes):
            sections.append(f"boxes of all splits (side: the square root of the area)\n{table_of_sizes(boxes)}")
            size = config.image_size
            sections.append(
                f"boxes that overlap no anchor of {model} with IoU >= 0.5, by their area in pixels of {size} x {size} "
                f"(small < 32², large >= 96²)\n{table_of_reach(reach(boxes, config))}"
            )
    sections.append(_list("note", report.notes))
    sections.append(_list("problem", report.problems))
    return "\n\n".join(section for section in sections if section)


def draw_sheet(datasets: Mapping[str, DetectionDataset]) -> Image.Image | None:
    """Draw images with their ground truth on one picture, or return None if there is no image that can be read.

    The images are spaced evenly over each split.
    """
    pictures = []
    splits = [dataset for dataset in _without_trainval(datasets) if len(dataset)]
    for dataset in splits:
        count = min(len(dataset), max(1, PICTURES // len(splits)))
        for index in (number * len(dataset) // count for number in range(count)):
            with suppress(ValueError):  # images that cannot be read are problems of the report
                pictures.append(_picture(dataset, index))
    return contact_sheet(pictures, SHEET_COLUMNS) if pictures else None


def _without_trainval(datasets: Mapping[str, DetectionDataset]) -> list[DetectionDataset]:
    """The datasets without trainval if its two parts are among them, so that every image occurs once."""
    redundant = {"trainval"} if {"train", "val"} <= datasets.keys() else set()
    return [dataset for split, dataset in datasets.items() if split not in redundant]


def _open(root: Path, layout: Layout, division: Division | None, split: str, problems: list[str]) -> DetectionDataset:
    """What can be read of a split, with everything else in `problems`."""
    annotations = find_reader(layout, division, split, root)(None)
    problems += annotations.columns.errors
    dataset = DetectionDataset(split, annotations)
    if division and split in PARTS:
        dataset = part_of(dataset, division, split)
    problems += dataset.problems
    return dataset


def _inspect(
    datasets: Mapping[str, DetectionDataset], problems: list[str], quiet: bool
) -> dict[str, dict[str, Inspection]]:
    """What is known of each image file that can be read, by split and file."""
    known: dict[Path, Inspection | str] = {}  # of files in several splits, each is read once
    inspections: dict[str, dict[str, Inspection]] = {}
    for split, dataset in datasets.items():
        unknown = [i for i in range(len(dataset)) if dataset.image_path(i) not in known]
        with ThreadPoolExecutor(usable_cores()) as pool:
            results = pool.map(lambda i, dataset=dataset: _inspection_or_error(dataset, i), unknown)
            bar = tqdm(results, desc=f"reading {split}", total=len(unknown), unit=" images", disable=quiet)
            known |= {dataset.image_path(i): result for i, result in zip(unknown, bar, strict=True)}
        results_of_split = {file: known[dataset.image_path(i)] for i, file in enumerate(dataset.files)}
        problems += [result for result in results_of_split.values() if isinstance(result, str)]
        inspections[split] = {f: result for f, result in results_of_split.items() if isinstance(result, Inspection)}
    return inspections


def _inspection_or_error(dataset: DetectionDataset, index: int) -> Inspection | str:
    try:
        return dataset.inspect(index)
    except ValueError as error:
        return str(error)


def _images_in_two_splits(
    datasets: Mapping[str, DetectionDataset], inspections: Mapping[str, Mapping[str, Inspection]]
) -> list[str]:
    problems = []
    for first, second in combinations(datasets, 2):
        if frozenset((first, second)) in OVERLAPPING:
            continue
        in_second = set(datasets[second].files)
        file_by_digest = {inspection.digest: file for file, inspection in inspections[second].items()}
        for file in datasets[first].files:
            inspection = inspections[first].get(file)
            copied = file_by_digest.get(inspection.digest) if inspection else None
            if file in in_second:
                problems.append(f"{file}: is in {first} and in {second}")
            elif copied is not None:
                problems.append(f"{file}: in {first}, has the same content as {copied} in {second}")
    return problems


def _classes_that_differ(datasets: Mapping[str, DetectionDataset]) -> list[str]:
    reference = next((split for split in ("trainval", "train") if split in datasets), None)
    if reference is None:
        return []
    return [
        f"{split} has classes that {reference} lacks: {', '.join(unknown)}"
        for split, dataset in datasets.items()
        if (unknown := [name for name in dataset.classes if name not in datasets[reference].classes])
    ]


def _notes_on_objects(datasets: Mapping[str, DetectionDataset]) -> list[str]:
    empty, ignored = {}, {}
    for dataset in datasets.values():
        trained = set(dataset.indices_to_train_on(keep_empty=True))
        for index, file in enumerate(dataset.files):
            if index not in trained:
                ignored[file] = True
            elif not len(dataset.target(index)["labels"]):
                empty[file] = True
    return [
        *_note("without objects; training leaves them out, unless --keep-empty is given", empty),
        *_note("with crowds or difficult objects only; training leaves them out", ignored),
    ]


def _notes_on_images(inspections: Mapping[str, Mapping[str, Inspection]]) -> list[str]:
    notes: dict[str, dict[str, bool]] = defaultdict(dict)
    copies: dict[str, bool] = {}
    for of_split in inspections.values():
        first_by_digest: dict[str, str] = {}
        for file, inspection in of_split.items():
            if inspection.mode != PLAIN_MODE:
                notes[MODES.get(inspection.mode, f"of mode {inspection.mode}")][file] = True
            if inspection.orientation != 1:
                notes["with an EXIF orientation; turned unless the annotated size is the stored one"][file] = True
            if first_by_digest.setdefault(inspection.digest, file) != file:
                copies[file] = True
    return [line for text, files in notes.items() for line in _note(text, files)] + _note(
        "with the same content as another image of their split", copies
    )


def _images_in_no_split(root: Path, datasets: Mapping[str, DetectionDataset]) -> list[str]:
    used = {(dataset.root / file).resolve() for dataset in datasets.values() for file in dataset.files}
    files = images_in(root, "**/*")
    unused = [path.relative_to(root).as_posix() for path in files if path.resolve() not in used]
    return _note("in no split", unused)


def _note(text: str, files: Iterable[str]) -> list[str]:
    names = list(files)
    return [f"{len(names)} image{'s' if len(names) > 1 else ''} {text}: {listed(names)}"] if names else []


def _list(kind: str, lines: Sequence[str]) -> str:
    if not lines:
        return "no problems" if kind == "problem" else ""
    header = f"{len(lines)} {kind}{'s' if len(lines) > 1 else ''}:"
    return "\n".join([header, *(f"  {line}" for line in lines)])


def _picture(dataset: DetectionDataset, index: int) -> Image.Image:
    image, target = dataset[index]
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = PICTURE_SIDE / max(picture.size)
    resized = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    return draw_detections(resized, target["boxes"] * scale, target["labels"], None, dataset.classes)
