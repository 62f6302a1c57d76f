"""YOLO's text files, in the folders that data.yaml names as Ultralytics and Roboflow write it."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_datasets import HEIGHT, WIDTH, write_image, write_yolo

from ssdcore.data import available_splits, open_dataset

ULTRALYTICS = "path: ../datasets/cells\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: red\n  4: white\n"
ROBOFLOW = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['red', 'white']\n"


def test_labels_are_fractions_of_the_image(tmp_path: Path) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "1 0.5 0.5 0.25 0.2\n0 0.1 0.2 0.1 0.1\n", "b": ""})
    dataset = open_dataset(tmp_path, "train")
    assert dataset.classes == ("red", "white") and dataset.category_ids == (0, 1)
    image, target = dataset[0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert target["labels"].tolist() == [2, 1] and not target["ignore"].any()
    torch.testing.assert_close(
        target["boxes"].as_subclass(torch.Tensor), torch.tensor([[15.0, 12, 25, 18], [2, 4.5, 6, 7.5]])
    )
    assert len(dataset.target(1)["boxes"]) == 0


def test_folders_of_ultralytics_are_found_and_classes_may_have_holes(tmp_path: Path) -> None:
    write_yolo(tmp_path, ULTRALYTICS, {"a": "4 0.5 0.5 0.2 0.2"}, "images/train/more")
    write_yolo(tmp_path, ULTRALYTICS, {"b": "0 0.5 0.5 0.2 0.2"}, "images/val")
    assert available_splits(tmp_path) == ["train", "val"]
    dataset = open_dataset(tmp_path, "train")
    assert dataset.files == ["images/train/more/a.jpg"]
    assert dataset.category_ids == (0, 4) and dataset.target(0)["labels"].tolist() == [2]
    other = open_dataset(tmp_path, "train", classes=["blue", "white"])
    assert other.category_ids == (5, 4) and other.target(0)["labels"].tolist() == [2]
    with pytest.raises(ValueError, match=r"must include .*data\.yaml.*; missing: red \(1 objects\); got white"):
        open_dataset(tmp_path, "val", classes=["white"])


def test_splits_that_the_file_names_but_the_folder_lacks_are_reported(tmp_path: Path) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "0 0.5 0.5 0.2 0.2"})
    write_yolo(tmp_path, ROBOFLOW, {"b": "0 0.5 0.5 0.2 0.2"}, "valid/images")
    assert available_splits(tmp_path) == ["train", "val"]
    assert open_dataset(tmp_path, "val").problems == []  # Roboflow names a test split always
    (tmp_path / "valid").rename(tmp_path / "validation")
    assert open_dataset(tmp_path, "train").problems == ["data.yaml: val: ../valid/images does not exist"]
    with pytest.raises(ValueError, match=r"has no split in .*: data\.yaml: train: elsewhere does not exist"):
        write_yolo(tmp_path, "train: elsewhere\nnames: [red]", {})
        available_splits(tmp_path)


def test_lists_of_images_are_relative_to_the_list(tmp_path: Path) -> None:
    yaml = "path: ./\ntrain: [train.txt]\nval: val.txt\nnames: [red]"
    write_yolo(tmp_path, yaml, {"a": "0 0.5 0.5 0.2 0.2", "b": "0 0.5 0.5 0.2 0.2"}, "images")
    (tmp_path / "train.txt").write_text("./images/b.jpg\n")
    (tmp_path / "val.txt").write_text("images/a.jpg\n")
    for split, file in (("train", "images/b.jpg"), ("val", "images/a.jpg")):
        dataset = open_dataset(tmp_path, split)
        assert dataset.files == [file] and len(dataset.target(0)["labels"]) == 1 and dataset.problems == []
    (tmp_path / "val.txt").write_text("images/none.jpg\n../x.jpg\n")
    with pytest.raises(ValueError, match=r"val\.txt: image images/none\.jpg is missing; .*must stay in .*, got \.\./x"):
        open_dataset(tmp_path, "val")


@pytest.mark.parametrize("entry", ["../elsewhere", "ABSOLUTE"])
def test_a_path_that_leaves_the_dataset_raises_an_error_that_names_it(tmp_path: Path, entry: str) -> None:
    write_image(tmp_path / "elsewhere/a.jpg")
    entry = entry.replace("ABSOLUTE", str(tmp_path / "elsewhere"))
    write_yolo(tmp_path / "root", f"train: {entry}\nnames: [red]", {})
    with pytest.raises(ValueError, match=rf"data\.yaml: train must stay in .*root, got {entry}"):
        open_dataset(tmp_path / "root", "train")


def test_without_splits_all_images_are_one(tmp_path: Path) -> None:
    write_yolo(tmp_path, "names: [red]", {"a": "0 0.5 0.5 0.2 0.2"}, "images")
    assert available_splits(tmp_path) == ["all"]
    assert open_dataset(tmp_path, "all").files == ["images/a.jpg"]


def test_polygons_become_their_extent(tmp_path: Path) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "0 0.1 0.2 0.5 0.1 0.3 0.9"})
    box = open_dataset(tmp_path, "train").target(0)["boxes"].as_subclass(torch.Tensor)
    torch.testing.assert_close(box, torch.tensor([[4.0, 3, 20, 27]]))


def test_unusable_lines_are_dropped_and_reported(tmp_path: Path) -> None:
    lines = [
        "0 0.5 0.5 0.2",
        "red 0.5 0.5 0.2 0.2",
        "7 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0 0.2",
        "0 0.5 0.5 0.2 0.2 0.9",
        "",
    ]
    write_yolo(tmp_path, ROBOFLOW, {"a": "\n".join(lines), "b": "0 0.5 0.5 0.2 0.2"})
    dataset = open_dataset(tmp_path, "train")
    assert len(dataset.target(0)["labels"]) == 0
    problems = [line for line in dataset.problems if "valid/images does not exist" not in line]
    assert [line.split(":")[:2] for line in problems] == [["train/labels/a.txt", f" line {i}"] for i in range(1, 6)]
    reasons = ("expected 5 numbers", "expected 5 numbers", "no name for class 7", "has no area", "expected 5 numbers")
    assert all(reason in line for line, reason in zip(problems, reasons, strict=True))


def test_labels_without_image_are_reported_and_images_without_labels_are_negatives(tmp_path: Path) -> None:
    write_yolo(tmp_path, "train: train/images\nnames: [red]", {"a": "0 0.5 0.5 0.2 0.2", "b": None})
    for name in ("c", "classes"):
        (tmp_path / f"train/labels/{name}.txt").write_text("0 0.5 0.5 0.2 0.2")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.files == ["train/images/a.jpg", "train/images/b.jpg"] and len(dataset.target(1)["labels"]) == 0
    assert dataset.problems == ["train/labels/c.txt: no image has this name; left out"]
    (tmp_path / "train/labels/a.txt").unlink()
    with pytest.raises(ValueError, match=r"no image of .* has labels; .*a\.jpg needs .*train/labels/a\.txt"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_always_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "0 0.25 0.5 0.5 1"})
    (tmp_path / "train/images/a.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(tmp_path / f"train/images/a{suffix}", exif=exif)  # as stored, it is brighter at the bottom
    image, target = open_dataset(tmp_path, "train")[0]
    height, width = (HEIGHT, WIDTH) if orientation == 3 else (WIDTH, HEIGHT)
    assert image.shape == (3, height, width) and target["boxes"].tolist() == [[0, 0, width / 2, height]]
    bright, dark = (image[:, 0], image[:, -1]) if orientation == 3 else (image[..., 0], image[..., -1])
    assert bright.float().mean() - dark.float().mean() > 200


def test_an_unreadable_header_raises_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "0 0.5 0.5 0.2 0.2"})
    (tmp_path / "train/images/a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as an image"):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [a", r"data\.yaml: cannot be parsed as YAML: .*line 1"),
        ("[1, 2]", r"data\.yaml: must be a mapping with names, got \[1, 2\]"),
        ("train: train/images", r"data\.yaml: names must be a list, .* got None"),
        ("names: {red: 0}", r"data\.yaml: names must be a list, .* got \{'red': 0\}"),
        ("names: [red, red]", r"data\.yaml: names must not contain duplicates, got red more than once"),
        ("names: !!python/object/apply:os.system ['true']", "cannot be parsed as YAML"),
    ],
)
def test_invalid_yaml_raises_value_error(tmp_path: Path, yaml: str, message: str) -> None:
    write_yolo(tmp_path, yaml, {"a": "0 0.5 0.5 0.2 0.2"})
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, "train")


def test_a_yaml_file_of_another_name_is_used_if_it_is_the_only_one(tmp_path: Path) -> None:
    write_yolo(tmp_path, ROBOFLOW, {"a": "0 0.5 0.5 0.2 0.2"})
    (tmp_path / "data.yaml").rename(tmp_path / "cells.yml")
    (tmp_path / "training.yaml").write_text("lr: 0.1")
    assert open_dataset(tmp_path, "train").classes == ("red", "white")
    (tmp_path / "other.yaml").write_text("names: [a]")
    with pytest.raises(ValueError, match="several YAML files with names; call one of them data"):
        open_dataset(tmp_path, "train")


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """Notebooks and macOS write copies into hidden folders and beside the files."""
    write_yolo(tmp_path, "train: train/images\nnames: [red]", {"a": "0 0.5 0.5 0.2 0.2", "._a": "?"})
    write_image(tmp_path / "train/images/.ipynb_checkpoints/a-checkpoint.jpg")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.files == ["train/images/a.jpg"] and dataset.problems == []


@pytest.mark.parametrize("folder", ["{root}/images", "lists/../images", "images"])
def test_lists_may_have_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    root = tmp_path / "cells"
    write_yolo(root, "train: train.txt\nnames: [red]", {"a": "0 0.5 0.5 0.2 0.2"}, "images")
    (root / "lists").mkdir()
    (root / "train.txt").write_text(f"{folder.format(root=root)}/a.jpg\nimages/a.jpg\n")
    monkeypatch.chdir(tmp_path)
    for given in (root, Path("cells"), Path("./cells/../cells")):
        dataset = open_dataset(given, "train")
        assert dataset.files == ["images/a.jpg"] and len(dataset.target(0)["labels"]) == 1


def test_problems_have_the_number_of_the_line_in_the_file(tmp_path: Path) -> None:
    write_yolo(tmp_path, "train: train/images\nnames: [red]", {"a": "0 0.5 0.5 0.2 0.2\n\n7 0.5 0.5 0.2 0.2\n"})
    assert open_dataset(tmp_path, "train").problems == [
        "train/labels/a.txt: line 3: data.yaml has no name for class 7; dropped"
    ]
