"""Reading Pascal VOC and COCO folders: correct values, errors for unusable files, reports of unusable boxes."""

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from ssdcore.data import VOC_CLASSES, DetectionDataset, available_splits, open_dataset, read_rgb

WIDTH, HEIGHT = 40, 30

Object = tuple[str, Sequence[Any]]  # class name and xyxy


def write_image(path: Path, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert(mode).save(path, **options)


def write_voc(root: Path, splits: Mapping[str, Mapping[str, Sequence[Object]]], difficult: str = "0") -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, images in splits.items():
        (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
        for stem, objects in images.items():
            nodes = "".join(
                f"<object><name>{name}</name><difficult>{difficult}</difficult>"
                f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part><bndbox>"
                + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
                + "</bndbox></object>"
                for name, box in objects
            )
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
            (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{size}{nodes}</annotation>")
            write_image(root / f"JPEGImages/{stem}.jpg")
    return root


def coco_content(**changes: Any) -> dict[str, Any]:
    """Two images, the second without objects. The category ids are not consecutive and not sorted."""
    return {
        "images": [
            {"id": 139, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT},
            {"id": 7, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 18, "bbox": [1, 2, 10, 20], "area": 90.5, "iscrowd": 0},
            {"id": 2, "image_id": 139, "category_id": 3, "bbox": [5, 5, 4, 4], "area": 16, "iscrowd": 1},
        ],
    } | changes


def write_coco(root: Path, content: Any, images: str = "train", source: str | None = None) -> Path:
    path = root / (source or "annotations/instances_train.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for name in ("a.jpg", "b.jpg"):
        write_image(root / images / name)
    return root


def test_voc_annotations_are_read_as_they_are(tmp_path: Path) -> None:
    root = write_voc(
        tmp_path,
        {"train": {"000005": [("dog", (1, 2, 11, 22)), ("cat", (3, 3, 9, 9))]}, "val": {"x": []}},
        difficult="1",
    )
    dataset = open_dataset(root, "train")
    assert available_splits(root) == ["train", "val"]
    assert dataset.classes == VOC_CLASSES and dataset.category_ids == tuple(range(1, 21))
    assert dataset.problems == []
    image, target = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8 and image.shape == (3, HEIGHT, WIDTH)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].tolist() == [[1, 2, 11, 22], [3, 3, 9, 9]]  # nothing is subtracted
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [VOC_CLASSES.index("dog") + 1, VOC_CLASSES.index("cat") + 1]
    assert target["ignore"].tolist() == [True, True]
    assert target["image_id"] == 0
    assert dataset.areas(0).tolist() == [200, 36]
    assert dataset.image_path(0) == root / "JPEGImages/000005.jpg"


def test_voc_splits_have_the_same_classes(tmp_path: Path) -> None:
    splits = {"train": {"a": [("worm", (1, 1, 5, 5))]}, "val": {"b": [("bee", (1, 1, 5, 5))]}}
    root = write_voc(tmp_path, splits)
    assert open_dataset(root, "train").classes == open_dataset(root, "val").classes == ("bee", "worm")


@pytest.mark.parametrize("inside", ["VOC2007", "VOCdevkit/VOC2007"])
def test_voc_folder_may_be_inside_root_but_must_be_unique(tmp_path: Path, inside: str) -> None:
    write_voc(tmp_path / inside, {"test": {"a": []}})
    assert open_dataset(tmp_path, "test").image_path(0).is_file()
    write_voc(tmp_path / "VOC2012", {"test": {"a": []}})
    with pytest.raises(ValueError, match="more than one"):
        open_dataset(tmp_path, "test")


def test_voc_lists_of_image_labels_are_not_splits(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "ImageSets/Main/cat_train.txt").write_text("a -1\nb  1\n")
    assert available_splits(root) == ["train"]


def test_voc_image_names_may_end_in_a_number(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"img 0": [], "img 1": []}, "val": {"img": [], "b -1": []}})
    (root / "ImageSets/Main/cat_val.txt").write_text("img  1\nb -1 -1\n\n")
    assert available_splits(root) == ["train", "val"]
    assert len(open_dataset(root, "train")) == len(open_dataset(root, "val")) == 2


def test_voc_labels_follow_the_given_classes(tmp_path: Path) -> None:
    objects: list[Object] = [("dog", (1, 1, 5, 5)), ("cat", (2, 2, 6, 6))]
    root = write_voc(tmp_path, {"train": {"a": objects}, "val": {"b": objects[1:]}})
    dataset = open_dataset(root, "train", classes=["dog", "bird", "cat"])
    assert dataset.classes == ("dog", "bird", "cat") and dataset.category_ids == (1, 2, 3)
    assert dataset.target(0)["labels"].tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"must include .*train\.txt.*; missing: dog \(1 objects\); got bird, cat"):
        open_dataset(root, "train", classes=["bird", "cat"])
    assert open_dataset(root, "val", classes=["bird", "cat"]).target(0)["labels"].tolist() == [2]
    with pytest.raises(ValueError, match="duplicates"):
        open_dataset(root, "train", classes=["cat", "cat"])


def test_coco_labels_follow_the_given_classes(tmp_path: Path) -> None:
    categories = [*coco_content()["categories"], {"id": 90, "name": "unused"}]
    root = write_coco(tmp_path, coco_content(categories=categories))
    dataset = open_dataset(root, "train", classes=["dog", "car"])
    assert dataset.category_ids == (18, 3) and dataset.target(0)["labels"].tolist() == [1, 2]
    dataset = open_dataset(root, "train", classes=["cow", "dog", "hen", "car"])
    assert dataset.classes == ("cow", "dog", "hen", "car")
    assert dataset.category_ids == (91, 18, 92, 3)  # classes that the file lacks get ids after 90
    assert dataset.target(0)["labels"].tolist() == [2, 4]
    assert dataset.problems == []
    with pytest.raises(ValueError, match=r"must include .*train\.json.*; missing: car \(1 objects\); got dog, cow"):
        open_dataset(root, "train", classes=["dog", "cow"])


def test_coco_categories_with_the_same_name_count_as_one_class(tmp_path: Path) -> None:
    categories = [{"id": i, "name": name} for i, name in enumerate(("cell", "dot", "cell"))]
    annotation = {"image_id": 139, "bbox": [1, 2, 3, 4]}

    def write(split: str, used: Sequence[int]) -> None:
        annotations = [annotation | {"category_id": category_id} for category_id in used]
        content = coco_content(categories=categories, annotations=annotations)
        write_coco(tmp_path, content, split, f"{split}/_annotations.coco.json")

    write("train", [1, 2])
    write("valid", [1])
    write("test", [])
    datasets = [open_dataset(tmp_path, split) for split in ("train", "valid", "test")]
    assert {dataset.classes for dataset in datasets} == {("dot", "cell")}
    assert {dataset.category_ids for dataset in datasets} == {(1, 2)}
    assert datasets[0].target(0)["labels"].tolist() == [1, 2]

    write("train", [0, 1])
    datasets = [open_dataset(tmp_path, split) for split in ("train", "valid", "test")]
    assert {dataset.classes for dataset in datasets} == {("cell", "dot")}
    assert {dataset.category_ids for dataset in datasets} == {(0, 1)}

    write("train", [1])
    assert open_dataset(tmp_path, "test").category_ids == (1, 2)  # neither has objects, so the last is used

    write("train", [0])
    write("valid", [2])
    with pytest.raises(ValueError, match=r"_annotations\.coco\.json: categories 0, 2 have the same name, 'cell'"):
        open_dataset(tmp_path, "test")


def test_coco_file_name_may_be_an_absolute_path(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere/a.jpg"
    write_image(outside)
    images = [{"id": 139, "file_name": str(outside), "width": HEIGHT, "height": WIDTH}]
    dataset = open_dataset(write_coco(tmp_path / "root", coco_content(images=images)), "train")
    assert dataset.image_path(0) == outside
    with pytest.raises(ValueError, match=rf"^{re.escape(str(outside))}: annotated as"):
        dataset[0]


def test_coco_annotations_are_read_as_they_are(tmp_path: Path) -> None:
    dataset = open_dataset(write_coco(tmp_path, coco_content()), "train")
    assert dataset.classes == ("car", "dog") and dataset.category_ids == (3, 18)
    assert dataset.image_ids.tolist() == [139, 7]
    target = dataset.target(0)
    assert target["boxes"].tolist() == [[1, 2, 11, 22], [5, 5, 9, 9]]
    assert target["labels"].tolist() == [2, 1]
    assert target["ignore"].tolist() == [False, True]
    assert target["image_id"] == 139
    assert dataset.areas(0).tolist() == [90.5, 16]
    image, empty = dataset[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["ignore"].shape == (0,)


@pytest.mark.parametrize(
    ("images", "source"),
    [
        ("images/train", None),
        ("images", None),
        (".", None),
        ("train", "train/_annotations.coco.json"),
    ],
)
def test_coco_images_are_found_in_every_supported_folder(tmp_path: Path, images: str, source: str | None) -> None:
    root = write_coco(tmp_path, coco_content(), images, source)
    assert available_splits(root) == ["train"]
    dataset = open_dataset(root, "train")
    assert [dataset[i][0].shape for i in range(2)] == [(3, HEIGHT, WIDTH)] * 2


def test_unusable_boxes_are_dropped_and_reported(tmp_path: Path) -> None:
    unusable: list[Object] = [
        ("cat", (5, 5, 5, 9)),
        ("cat", (9, 5, 5, 9)),
        ("cat", ("nan", 5, 9, 9)),
        ("cat", ("left", 5, 9, 9)),
        ("cat", (41, 5, 50, 9)),
    ]
    beyond_image: list[Object] = [("cat", (30, 5, 45, 9))]
    within_tolerance: list[Object] = [("cat", (1, 1, WIDTH, HEIGHT)), ("cat", (0, 0, WIDTH + 1, HEIGHT))]
    root = write_voc(tmp_path, {"train": {"a": unusable, "b": beyond_image + within_tolerance}})
    dataset = open_dataset(root, "train")
    assert len(dataset.target(0)["boxes"]) == 0 and len(dataset.target(1)["boxes"]) == 3
    assert [line.split(":")[0] for line in dataset.problems] == ["Annotations/a.xml"] * 5 + ["Annotations/b.xml"]
    reasons = ("no area", "no area", "not four", "not four", "outside the image", "extends beyond")
    for line, reason in zip(dataset.problems, reasons, strict=True):
        assert reason in line

    annotation = {"image_id": 139, "category_id": 3, "bbox": [1, 2, 3, 4]}
    content = coco_content(
        annotations=[
            {"id": 5} | annotation | change
            for change in (
                {"bbox": [1, 2, 0, 5]},
                {"bbox": None},
                {"bbox": [1, 2, 3]},
                {"image_id": 1},
                {"category_id": 99},
                {},
            )
        ]
    )
    dataset = open_dataset(write_coco(tmp_path / "coco", content), "train")
    assert dataset.target(0)["boxes"].tolist() == [[1, 2, 4, 6]]
    assert dataset.areas(0).tolist() == [12]  # the area of the box, because none is annotated
    assert len(dataset.problems) == 5
    assert all(line.startswith("annotations/instances_train.json: annotation 5") for line in dataset.problems)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", ".jpg"), ("CMYK", ".jpg"), ("P", ".png"), ("RGBA", ".png"), ("1", ".png")]
)
def test_images_of_every_8_bit_mode_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "JPEGImages/a.jpg").unlink()
    write_image(root / f"JPEGImages/a{suffix}", mode)
    image, _ = open_dataset(root, "train")[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.uint8
    assert (image[:, -1].float().mean() - image[:, 0].float().mean()) > 200  # brighter at the bottom


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", ".png"), ("I;16", ".tif"), ("I", ".tif"), ("F", ".tif")])
def test_images_with_more_than_8_bits_raise_value_error(tmp_path: Path, mode: str, suffix: str) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "JPEGImages/a.jpg").unlink()
    write_image(root / f"JPEGImages/a{suffix}", mode)
    with pytest.raises(ValueError, match=rf"a\{suffix}: .* mode is {mode}, expected an image with 8 bits"):
        open_dataset(root, "train")[0]


def test_read_rgb_turns_images_upright_unless_they_have_the_given_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    path = tmp_path / "a.jpg"
    write_image(path, "L", exif=exif)
    image = read_rgb(path)
    assert image.mode == "RGB" and image.size == (HEIGHT, WIDTH)
    assert read_rgb(str(path), size=(WIDTH, HEIGHT)).size == (HEIGHT, WIDTH)
    assert read_rgb(path, size=(HEIGHT, WIDTH)).size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read"):
        read_rgb(tmp_path / "b.jpg")


def test_exif_orientation_is_applied_only_if_the_annotated_size_requires_it(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    write_image(root / "JPEGImages/a.jpg", exif=exif)
    assert open_dataset(root, "train")[0][0].shape == (3, HEIGHT, WIDTH)
    xml = root / "Annotations/a.xml"
    xml.write_text(f"<annotation><size><width>{HEIGHT}</width><height>{WIDTH}</height></size></annotation>")
    assert open_dataset(root, "train")[0][0].shape == (3, WIDTH, HEIGHT)
    write_image(root / "JPEGImages/a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: annotated as 30 x 40 pixels, but has 40 x 30"):
        open_dataset(root, "train")[0]


def test_missing_size_is_read_from_the_image_file(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "Annotations/a.xml").write_text("<annotation></annotation>")
    dataset = open_dataset(root, "train")
    assert dataset.image_size(0) == (HEIGHT, WIDTH)
    assert "no image size" in dataset.problems[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path: Path) -> None:
    path.write_bytes(b"\0" * 500)


@pytest.mark.parametrize("damage", [truncate, scramble])
def test_damaged_images_raise_an_error_that_names_the_file(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "JPEGImages/b.jpg")
    damage(root / "JPEGImages/b.jpg")
    dataset = open_dataset(root, "train")
    dataset[0]
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read"):
        dataset[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"instances_train\.json: cannot be parsed as JSON"),
        ("[]", "no list of 'images'"),
        (json.dumps(coco_content(annotations=None)), "no list of 'annotations'"),
        (json.dumps(coco_content(annotations=[{"image_id": 1}])), "must have the fields image_id, category_id"),
        (
            json.dumps(coco_content(annotations=[None])),
            r"train\.json: each of 'annotations' must have .*got None",
        ),
        (json.dumps(coco_content(images=[7])), r"train\.json: each of 'images' must have .*got 7"),
        (json.dumps(coco_content(categories=[3])), r"train\.json: each of 'categories' must have .*got 3"),
        (json.dumps(coco_content(images=[{"id": "a", "file_name": "a.jpg"}])), "must be integers"),
        (json.dumps(coco_content(images=[{"id": 1, "file_name": "a.jpg"}] * 2)), "two images"),
        (json.dumps(coco_content(images=[{"id": 1, "file_name": "c.jpg"}])), r"c\.jpg is in none of"),
        (
            json.dumps(coco_content(images=[{"id": i, "file_name": f"{c}.jpg"} for i, c in enumerate("axy")])),
            r"2 image files that are missing: x\.jpg, y\.jpg",
        ),
        (json.dumps(coco_content(categories=[{"id": i, "name": "x"} for i in (3, 18)])), "same name"),
    ],
)
def test_invalid_coco_files_raise_value_error(tmp_path: Path, content: str, message: str) -> None:
    root = write_coco(tmp_path, coco_content())
    (root / "annotations/instances_train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(root, "train")


def test_invalid_or_missing_voc_files_raise_value_error(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    (root / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"b\.xml: cannot be parsed as XML"):
        open_dataset(root, "train")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(ValueError, match=r"1 annotation files that are missing: Annotations/b\.xml"):
        open_dataset(root, "train")
    write_voc(tmp_path / "other", {"train": {"a": []}})
    (tmp_path / "other/JPEGImages/a.jpg").unlink()
    with pytest.raises(ValueError, match="1 image files that are missing"):
        open_dataset(tmp_path / "other", "train")


def test_unknown_layouts_and_splits_raise_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for .*instances_<split>.*Annotations"):
        open_dataset(tmp_path, "train")
    write_voc(tmp_path, {"train": {"a": []}, "val": {}})
    with pytest.raises(ValueError, match=r"no split 'test' in .*: it has train, val"):
        open_dataset(tmp_path, "test")
    assert len(open_dataset(tmp_path, "val")) == 0


def test_targets_are_copies(tmp_path: Path) -> None:
    dataset = open_dataset(write_coco(tmp_path, coco_content()), "train")
    before = dataset.target(0)["boxes"].clone()
    dataset.target(0)["boxes"].zero_()
    assert torch.equal(dataset.target(0)["boxes"], before)


def test_negative_indices_work_and_indices_past_the_end_raise(tmp_path: Path) -> None:
    dataset = open_dataset(write_coco(tmp_path, coco_content()), "train")
    assert dataset.target(-2)["image_id"] == 139 and dataset.target(-2)["labels"].tolist() == [2, 1]
    assert dataset.target(-1)["image_id"] == 7 and dataset.target(-1)["labels"].tolist() == []
    with pytest.raises(IndexError):
        dataset.target(2)


def add_mark(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return image, target | {"mark": True}


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_data_loader_workers_read_the_same_items(tmp_path: Path, start_method: str) -> None:
    dataset = open_dataset(write_coco(tmp_path, coco_content()), "train")
    dataset.transform = add_mark
    loader = DataLoader(dataset, num_workers=1, batch_size=None, multiprocessing_context=start_method)
    items = list(loader)
    assert [target["image_id"] for _, target in items] == [139, 7]
    assert all(target["mark"] for _, target in items)
    assert items[0][1]["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert torch.equal(items[0][0], dataset[0][0])


def test_a_pickled_dataset_is_small(tmp_path: Path) -> None:
    count = 2000
    images = [{"id": i, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT} for i in range(count)]
    annotations = [{"image_id": i, "category_id": 3, "bbox": [1, 2, 3, 4]} for i in range(count)]
    root = write_coco(tmp_path, coco_content(images=images, annotations=annotations))
    dataset = open_dataset(root, "train")
    # Bytes per object: box 16, label 8, area 8, ignore 1. Bytes per image: id 8, size 16, offset 8, and 11 letters of
    # 4 bytes for the file name.
    assert len(pickle.dumps(dataset)) < count * 120 + 5000


def bccd() -> Path:
    fallback = Path(__file__).parents[1].parent / "shared/data/bccd"
    return Path(os.environ.get("SSDCORE_BCCD", fallback))


@pytest.mark.skipif(not bccd().is_dir(), reason="needs the BCCD dataset; set SSDCORE_BCCD to its folder")
def test_bccd_has_the_known_numbers_of_images_and_objects() -> None:
    datasets: dict[str, DetectionDataset] = {name: open_dataset(bccd(), name) for name in available_splits(bccd())}
    assert {name: len(dataset) for name, dataset in datasets.items()} == {
        "test": 72,
        "train": 205,
        "trainval": 292,
        "val": 87,
    }
    assert all(dataset.classes == ("Platelets", "RBC", "WBC") for dataset in datasets.values())
    # 4,888 objects are annotated, of which two have no area.
    assert (
        sum(
            len(datasets[name].target(i)["labels"]) for name in ("trainval", "test") for i in range(len(datasets[name]))
        )
        == 4886
    )
    problems = datasets["trainval"].problems + datasets["test"].problems
    assert [line.split(":")[0] for line in problems] == [
        "Annotations/BloodImage_00338.xml",
        "Annotations/BloodImage_00343.xml",
    ]
    image, target = datasets["train"][0]
    assert image.shape == (3, *target["boxes"].canvas_size) == (3, 480, 640)
