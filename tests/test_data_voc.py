"""Pascal VOC's XML: with lists, and as folders of images with XML."""

import os
from pathlib import Path

import pytest
import torch
from small_datasets import HEIGHT, WIDTH, Object, voc_xml, write_image, write_voc
from torchvision import tv_tensors

from ssdcore.data import VOC_CLASSES, DetectionDataset, available_splits, open_dataset


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


def test_missing_size_is_read_from_the_image_file(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "Annotations/a.xml").write_text("<annotation></annotation>")
    dataset = open_dataset(root, "train")
    assert dataset.image_size(0) == (HEIGHT, WIDTH)
    assert "no image size" in dataset.problems[0]


def test_invalid_or_missing_voc_files_raise_value_error(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    (root / "Annotations/b.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"b\.xml: cannot be parsed as XML"):
        open_dataset(root, "train")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(ValueError, match=r"train\.txt: b is listed, but Annotations/b\.xml is missing"):
        open_dataset(root, "train")
    write_voc(tmp_path / "other", {"train": {"a": []}})
    (tmp_path / "other/JPEGImages/a.jpg").unlink()
    with pytest.raises(ValueError, match=r"Annotations/a\.xml: the image a is missing"):
        open_dataset(tmp_path / "other", "train")


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


def write_folder(images: Path, xml: Path, objects: dict[str, list[Object]]) -> None:
    xml.mkdir(parents=True, exist_ok=True)
    for stem, of_image in objects.items():
        write_image(images / f"{stem}.jpg")
        (xml / f"{stem}.xml").write_text(voc_xml(of_image))


@pytest.mark.parametrize(
    ("images", "xml"),
    [(".", "."), ("images", "annotations"), ("images", "Annotations"), ("JPEGImages", "Annotations"), ("images",) * 2],
)
def test_images_with_xml_and_without_lists_are_one_split(tmp_path: Path, images: str, xml: str) -> None:
    write_folder(tmp_path / images, tmp_path / xml, {"b": [("dog", (1, 2, 11, 22))], "a": []})
    assert available_splits(tmp_path) == ["all"]
    dataset = open_dataset(tmp_path, "all")
    assert [dataset.image_path(i) for i in range(2)] == [tmp_path / images / "a.jpg", tmp_path / images / "b.jpg"]
    assert dataset.target(1)["boxes"].tolist() == [[1, 2, 11, 22]] and dataset.problems == []
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)


def test_folders_of_images_with_xml_are_splits_with_the_same_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", tmp_path / "train", {"a": [("worm", (1, 1, 5, 5))]})
    write_folder(tmp_path / "valid", tmp_path / "valid", {"b": [("bee", (1, 1, 5, 5))]})
    (tmp_path / "README.txt").write_text("not a split")
    assert available_splits(tmp_path) == ["train", "valid"]
    assert open_dataset(tmp_path, "train").classes == open_dataset(tmp_path, "valid").classes == ("bee", "worm")


def test_an_image_without_xml_is_left_out_and_reported(tmp_path: Path) -> None:
    write_folder(tmp_path, tmp_path, {"a": []})
    write_image(tmp_path / "later.jpg")
    dataset = open_dataset(tmp_path, "all")
    assert dataset.files == ["a.jpg"]
    assert len(dataset.problems) == 1 and dataset.problems[0].startswith("later.jpg: no XML file; left out")


def test_xml_without_image_raises_an_error_that_names_it(tmp_path: Path) -> None:
    write_folder(tmp_path, tmp_path, {"a": [], "b": []})
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"b\.xml: the image b is missing"):
        open_dataset(tmp_path, "all")


def test_xml_of_another_kind_raises_an_error_that_names_it(tmp_path: Path) -> None:
    write_folder(tmp_path, tmp_path, {"a": []})
    (tmp_path / "pom.xml").write_text("<project/>")
    with pytest.raises(ValueError, match=r"pom\.xml: must have the root element <annotation>, got <project>"):
        open_dataset(tmp_path, "all")


def test_two_images_of_one_name_are_reported(tmp_path: Path) -> None:
    write_folder(tmp_path, tmp_path, {"a": []})
    write_image(tmp_path / "a.png")
    dataset = open_dataset(tmp_path, "all")
    assert dataset.files == ["a.jpg"]
    assert dataset.problems == [f"{tmp_path / 'a.png'}: a.jpg has the same name; this file is left out"]


def test_an_object_without_a_class_name_is_dropped_and_reported(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": [("", (1, 1, 5, 5)), ("cat", (1, 1, 5, 5))]}})
    dataset = open_dataset(root, "train")
    assert dataset.target(0)["labels"].tolist() == [VOC_CLASSES.index("cat") + 1]
    assert dataset.problems == ["Annotations/a.xml: object 1: no class name; dropped"]


def test_names_of_any_language_are_read_with_a_byte_order_mark_too(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"Zelle-äöü": [("球", (1, 1, 5, 5))]}})
    (root / "ImageSets/Main/train.txt").write_bytes("\ufeffZelle-äöü\r\n".encode())
    dataset = open_dataset(root, "train")
    assert dataset.classes == ("球",) and dataset.files == ["JPEGImages/Zelle-äöü.jpg"]
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)
    (root / "ImageSets/Main/train.txt").write_bytes("Zelle-äöü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.txt: must be a text file in UTF-8"):
        open_dataset(root, "train")


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """macOS writes a file `._x` beside each file x on some disks."""
    root = write_voc(tmp_path, {"train": {"a": [("tabby", (1, 2, 11, 22))]}})
    for name in ("Annotations/._a.xml", "JPEGImages/._a.jpg", "ImageSets/Main/._train.txt"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    assert available_splits(root) == ["train"]
    dataset = open_dataset(root, "train")
    assert dataset.files == ["JPEGImages/a.jpg"] and dataset.classes == ("tabby",)


def test_an_unknown_encoding_raises_an_error_that_names_the_file(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "Annotations/a.xml").write_text('<?xml version="1.0" encoding="x-none"?><annotation/>')
    with pytest.raises(ValueError, match=r"a\.xml: cannot be parsed as XML: .*x-none"):
        open_dataset(root, "train")
