"""The dataset class: items, workers, subsets, and images that cannot be read."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_datasets import (
    HEIGHT,
    WIDTH,
    Object,
    coco_content,
    truncate,
    write_coco,
    write_damaged,
    write_image,
    write_voc,
)
from torch.utils.data import DataLoader

from ssdcore.data import open_dataset


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
            {"id": number} | annotation | change
            for number, change in enumerate(
                (
                    {"bbox": [1, 2, 0, 5]},
                    {"bbox": None},
                    {"bbox": [1, 2, 3]},
                    {"image_id": 1},
                    {"category_id": 99},
                    {},
                )
            )
        ]
    )
    dataset = open_dataset(write_coco(tmp_path / "coco", content), "train")
    assert dataset.target(0)["boxes"].tolist() == [[1, 2, 4, 6]]
    assert dataset.areas(0).tolist() == [12]  # the area of the box, because none is annotated
    assert len(dataset.problems) == 5
    assert all(line.startswith("annotations/instances_train.json: annotation ") for line in dataset.problems)


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


def first_coordinates(dataset: Any) -> list[int]:
    return [int(target["boxes"][0, 0]) for _, target in dataset]


def test_a_strict_dataset_raises_an_error_that_names_the_file(tmp_path: Path) -> None:
    dataset = write_damaged(tmp_path)
    assert dataset.strict
    for index, name in ((1, r"2\.jpg"), (2, r"3\.png"), (4, r"5\.jpg")):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            dataset[index]
    assert dataset.unreadable == []


def test_unreadable_images_are_replaced_by_the_next_readable_one(tmp_path: Path) -> None:
    dataset = write_damaged(tmp_path)
    dataset.strict = False
    with pytest.warns(UserWarning) as caught:
        assert first_coordinates(dataset[i] for i in range(5)) == [1, 4, 4, 4, 1]
    # Image 3 was tried twice, and is named once.
    assert [str(w.message).split(": ")[0] for w in caught] == [
        str(tmp_path / f"JPEGImages/{name}") for name in ("2.jpg", "3.png", "5.jpg")
    ]
    assert all("the next readable image takes its place" in str(w.message) for w in caught)
    assert dataset.unreadable == ["JPEGImages/2.jpg", "JPEGImages/3.png", "JPEGImages/5.jpg"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_coordinates([dataset[-1]]) == [1]


def test_an_image_of_another_size_is_replaced_too(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    write_image(root / "JPEGImages/a.jpg", size=(7, 7))
    dataset = open_dataset(root, "train")
    dataset.strict = False
    with pytest.warns(UserWarning, match=r"a\.jpg: annotated as 40 x 30 pixels, but has 7 x 7; the next"):
        assert dataset[0][1]["image_id"] == 1


def test_a_dataset_without_readable_images_raises_value_error(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    for name in "ab":
        truncate(root / f"JPEGImages/{name}.jpg")
    dataset = open_dataset(root, "train")
    dataset.strict = False
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no image of train can be read; .*b\.jpg"):
        dataset[1]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_report_unreadable_images_to_the_dataset(tmp_path: Path, start_method: str) -> None:
    dataset = write_damaged(tmp_path)
    dataset.strict = False
    loader = DataLoader(dataset, num_workers=1, batch_size=None, multiprocessing_context=start_method)
    assert first_coordinates(loader) == [1, 4, 4, 4, 1]
    assert dataset.unreadable == ["JPEGImages/2.jpg", "JPEGImages/3.png", "JPEGImages/5.jpg"]


def test_a_subset_has_the_objects_and_problems_of_its_images(tmp_path: Path) -> None:
    objects: list[list[Object]] = [
        [("cat", (1, 2, 11, 22)), ("dog", (2, 2, 9, 9))],
        [("cat", (5, 5, 5, 9))],
        [("dog", (3, 3, 9, 9))],
        [("cat", (4, 4, 50, 9))],
    ]
    root = write_voc(tmp_path, {"train": {f"{i}": of_image for i, of_image in enumerate(objects)}})
    dataset = open_dataset(root, "train")
    dataset.strict = False
    subset = dataset.subset([3, 0])
    assert subset.files == ["JPEGImages/3.jpg", "JPEGImages/0.jpg"] and subset.image_ids.tolist() == [3, 0]
    assert [subset.target(i)["boxes"].tolist() for i in (0, 1)] == [[[4, 4, 50, 9]], [[1, 2, 11, 22], [2, 2, 9, 9]]]
    assert [subset.areas(i).tolist() for i in (0, 1)] == [[230], [200, 49]]
    assert subset[1][1]["labels"].tolist() == dataset[0][1]["labels"].tolist()
    assert len(dataset.problems) == 2 and subset.problems == dataset.problems[1:]
    assert not subset.strict and len(dataset) == 4
    assert subset.subset([0]).problems == dataset.problems[1:] and subset.subset([1]).problems == []
    assert len(dataset.subset([])) == 0


def test_images_without_objects_are_trained_on_if_wanted_and_crowds_alone_never(tmp_path: Path) -> None:
    crowd = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    images = [{"id": i, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT} for i in range(4)]
    annotations = [crowd, crowd | {"image_id": 2}, crowd | {"image_id": 2, "iscrowd": 0}, crowd | {"image_id": 3}]
    root = write_coco(tmp_path, coco_content(images=images, annotations=annotations))
    dataset = open_dataset(root, "train")
    assert dataset.indices_to_train_on() == [2]
    assert dataset.indices_to_train_on(keep_empty=True) == [0, 2]
