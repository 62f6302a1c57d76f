"""COCO's JSON."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_datasets import HEIGHT, WIDTH, coco_content, write_coco, write_image

from ssdcore.data import available_splits, open_dataset


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


@pytest.mark.parametrize("folder", ["absolute", "../elsewhere", "../../elsewhere", "../../root/train/../../elsewhere"])
def test_a_file_name_that_leaves_the_dataset_raises_an_error_that_names_it(tmp_path: Path, folder: str) -> None:
    write_image(tmp_path / "elsewhere/a.jpg")
    write_image(tmp_path / "root/elsewhere/a.jpg")
    name = str(tmp_path / "root/train/a.jpg") if folder == "absolute" else f"{folder}/a.jpg"
    images = [{"id": 139, "file_name": name, "width": WIDTH, "height": HEIGHT}]
    root = write_coco(tmp_path / "root", coco_content(images=images))
    if folder == "../elsewhere":  # from train/ this is inside the dataset
        assert open_dataset(root, "train").files == ["elsewhere/a.jpg"]
    else:
        with pytest.raises(ValueError, match=rf"file_name of image 139 must be a relative .*, got {re.escape(name)}"):
            open_dataset(root, "train")


def test_a_file_outside_the_dataset_does_not_decide_where_the_images_are(tmp_path: Path) -> None:
    write_image(tmp_path / "elsewhere.jpg")
    size = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": i, "file_name": name} | size for i, name in enumerate((str(tmp_path / "elsewhere.jpg"), "a.jpg"))]
    root = write_coco(tmp_path / "root", coco_content(images=images, annotations=[]), "images")
    with pytest.raises(ValueError, match=r"file_name of image 0 must be (?!.*missing)"):
        open_dataset(root, "train")


def test_links_to_images_elsewhere_are_allowed(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "root", coco_content())
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    assert open_dataset(root, "train")[0][0].shape == (3, HEIGHT, WIDTH)


def test_duplicate_ids_and_files_are_reported(tmp_path: Path) -> None:
    annotation = {"id": 5, "image_id": 139, "category_id": 3, "bbox": [1, 2, 3, 4]}
    images = [{"id": i, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT} for i in (139, 7)]
    root = write_coco(tmp_path, coco_content(images=images, annotations=[annotation] * 2))
    dataset = open_dataset(root, "train")
    assert len(dataset.target(0)["boxes"]) == 2
    assert dataset.problems == [
        "annotations/instances_train.json: 2 images have the same file, a.jpg; used as is",
        "annotations/instances_train.json: 2 annotations have the same id, 5; all are used",
    ]


@pytest.mark.parametrize("names", [["labels.json"], ["annotations/train.json", "annotations/val.json"]])
def test_json_files_of_other_names_are_found(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_coco(tmp_path, coco_content(), "images", name)
    (tmp_path / "info.json").write_text('{"images": 3}')
    (tmp_path / "broken.json").write_text("{")
    splits = available_splits(tmp_path)
    assert splits == (["all"] if len(names) == 1 else ["train", "val"])
    dataset = open_dataset(tmp_path, splits[-1])
    assert dataset.files == ["images/a.jpg", "images/b.jpg"]


def test_all_errors_of_a_file_are_counted(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(5)]
    root = write_coco(tmp_path, coco_content(images=images, annotations=[]))
    with pytest.raises(ValueError, match=r"0\.jpg.*1\.jpg.*2\.jpg is missing.*; and 2 more: `ssdcore data check"):
        open_dataset(root, "train")


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
        (json.dumps(coco_content(images=[{"id": 1, "file_name": "a.jpg"}] * 2)), "2 images have the same id, 1"),
        (
            json.dumps(coco_content(images=[{"id": 1, "file_name": "c.jpg"}])),
            r"image c\.jpg is missing in .*train, .*images",
        ),
        (
            json.dumps(coco_content(images=[{"id": i, "file_name": f"{c}.jpg"} for i, c in enumerate("axy")])),
            r"image x\.jpg is missing in .*; .*image y\.jpg is missing in",
        ),
        (json.dumps(coco_content(categories=[{"id": i, "name": "x"} for i in (3, 18)])), "same name"),
    ],
)
def test_invalid_coco_files_raise_value_error(tmp_path: Path, content: str, message: str) -> None:
    root = write_coco(tmp_path, coco_content())
    (root / "annotations/instances_train.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(root, "train")


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("images", {"id": 2**70, "file_name": "a.jpg"}, "ids in 'images' must be integers of 64 bits"),
        ("images", {"id": 1, "file_name": 7}, "file_name must be a text"),
    ],
)
def test_values_of_other_types_raise_an_error_that_names_the_file(
    tmp_path: Path, part: str, entry: dict[str, object], message: str
) -> None:
    root = write_coco(tmp_path, coco_content(**{part: [entry]}))
    with pytest.raises(ValueError, match=rf"instances_train\.json: {message}, got"):
        open_dataset(root, "train")


def test_names_of_classes_may_be_numbers(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_content(categories=[{"id": 18, "name": 7}, {"id": 3, "name": 8}]))
    assert open_dataset(root, "train").classes == ("8", "7")


def test_two_categories_with_one_id_raise_an_error(tmp_path: Path) -> None:
    """Otherwise the objects of one would become those of the other."""
    categories = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 18, "name": "cow"}]
    root = write_coco(tmp_path, coco_content(categories=categories))
    with pytest.raises(ValueError, match=r"instances_train\.json: 2 categories have the same id, 3"):
        open_dataset(root, "train")
