"""Dividing a dataset without splits, the same way every time."""

import json
import os
from pathlib import Path

import pytest
from small_datasets import coco_content, write_coco, write_voc, write_yolo

from ssdcore.data import available_splits, make_split, open_dataset
from ssdcore.data.check import check_dataset
from ssdcore.data.opening import existing_split_file
from ssdcore.data.split import SPLIT_FILE, divide

LABELS: dict[str, str | None] = {f"img{i}": "0 0.5 0.5 0.2 0.2" for i in range(10)}


def write_undivided(root: Path) -> Path:
    return write_yolo(root, "names: [red]", LABELS, "images")


def test_the_division_depends_on_the_names_and_the_seed_alone() -> None:
    files = [f"{i}.jpg" for i in range(100)]
    train, val = divide(files, 0.8, 0)
    assert sorted(train + val) == sorted(files) and len(train) == 80
    assert divide(files[::-1], 0.8, 0) == (train, val) and divide(files, 0.8, 1) != (train, val)
    # Those with the highest sha256sum of "0/4.jpg" and so on. They must stay held out with every future version.
    assert divide([f"{i}.jpg" for i in range(10)], 0.7, 0)[1] == ["4.jpg", "5.jpg", "8.jpg"]


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 80, 0.01, 0.99, float("nan")])
def test_a_fraction_that_leaves_a_part_empty_raises_value_error(tmp_path: Path, fraction: float) -> None:
    root = write_undivided(tmp_path)
    with pytest.raises(ValueError, match=rf"split must be a fraction between 0 and 1 .* got {fraction} for 10 images"):
        make_split(root, fraction)
    assert not (root / SPLIT_FILE).exists()


def test_a_division_is_found_by_every_later_call(tmp_path: Path) -> None:
    root = write_undivided(tmp_path)
    path = make_split(root, 0.8)
    assert path == root / SPLIT_FILE and available_splits(root) == ["train", "val"]
    train, val = (open_dataset(root, split) for split in ("train", "val"))
    assert (len(train), len(val), train.split, val.split) == (8, 2, "train", "val")
    assert sorted(train.files + val.files) == sorted(f"images/{stem}.jpg" for stem in LABELS)
    assert len(open_dataset(root, "all")) == 10
    before = path.read_bytes()
    assert make_split(root, 0.8, seed=5) == path and path.read_bytes() == before
    with pytest.raises(ValueError, match=r"holds a split of 0\.8, got 0\.9: delete the file"):
        make_split(root, 0.9)


def test_a_folder_that_is_not_writable_leaves_the_file_in_the_run(tmp_path: Path) -> None:
    root = write_undivided(tmp_path / "data")
    # A folder of this name cannot be replaced by a file, also where the tests run as root.
    (root / SPLIT_FILE).mkdir()
    run = tmp_path / "runs/run"
    path = make_split(root, 0.8, fallback=run)
    assert path == run / SPLIT_FILE == existing_split_file(root, run)
    assert existing_split_file(root, tmp_path) is None
    assert make_split(root, 0.8, fallback=run) == path
    assert len(open_dataset(root, "val", split_file=path)) == 2
    assert available_splits(root, split_file=path) == ["train", "val"] and available_splits(root) == ["all"]
    with pytest.raises(OSError):
        make_split(root, 0.8)


def test_images_added_later_are_left_out_and_reported(tmp_path: Path) -> None:
    root = write_undivided(tmp_path)
    make_split(root, 0.8)
    write_yolo(root, "names: [red]", {"new": "0 0.5 0.5 0.2 0.2"}, "images")
    dataset = open_dataset(root, "val")
    assert len(dataset) == 2
    assert len(dataset.problems) == 1 and "images in neither part (1): images/new.jpg" in dataset.problems[0]


def test_images_removed_later_raise_an_error_that_names_them(tmp_path: Path) -> None:
    root = write_undivided(tmp_path)
    make_split(root, 0.8)
    (root / "images/img3.jpg").unlink()
    (root / "labels/img3.txt").unlink()
    part = "train" if "images/img3.jpg" in json.loads((root / SPLIT_FILE).read_text())["train"] else "val"
    with pytest.raises(ValueError, match=r"lists images that .* does not have \(1\): images/img3\.jpg; if .* delete"):
        open_dataset(root, part)


def test_a_dataset_with_splits_is_not_divided(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}, "test": {"b": []}})
    with pytest.raises(ValueError, match=r"needs a dataset with a single split, but .* has test, train"):
        make_split(root, 0.8)


def test_a_single_split_of_any_name_is_divided(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_content())
    make_split(root, 0.5)
    parts = [open_dataset(root, split) for split in ("train", "val")]
    assert sorted(part.image_ids.tolist() for part in parts) == [[7], [139]]
    assert sorted(len(part.target(0)["labels"]) for part in parts) == [0, 2]


@pytest.mark.parametrize("content", ["{", "[]", '{"source": "all"}', '{"source": "all", "fraction": "x"}'])
def test_an_invalid_split_file_raises_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    root = write_undivided(tmp_path)
    (root / SPLIT_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"ssdcore-split\.json: cannot be read as a split file.*; delete it"):
        available_splits(root)


def test_images_of_one_file_stay_together(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": name} for number, name in enumerate(["a.jpg", "b.jpg", "a.jpg"], start=1)]
    annotations = [{"image_id": number, "category_id": 3, "bbox": [1, 2, 3, number]} for number in (1, 2, 3)]
    content = coco_content(images=images, annotations=annotations)
    root = write_coco(tmp_path, content, "train", "train/_annotations.coco.json")
    make_split(root, 0.5)
    parts = [open_dataset(root, part).image_ids.tolist() for part in ("train", "val")]
    assert sorted(parts) == [[1, 3], [2]]


def test_names_of_files_need_not_be_valid_text(tmp_path: Path) -> None:
    root = write_undivided(tmp_path)
    for folder, suffix in (("images", ".jpg"), ("labels", ".txt")):
        (root / folder / f"img0{suffix}").rename(root / folder / os.fsdecode(b"caf\xe9" + suffix.encode()))
    make_split(root, 0.8)
    files = [file for part in ("train", "val") for file in open_dataset(root, part).files]
    assert len(files) == 10 and os.fsdecode(b"images/caf\xe9.jpg") in files


def test_the_split_file_of_a_run_on_another_dataset_is_passed_over(tmp_path: Path) -> None:
    run = make_split(write_undivided(tmp_path / "first"), 0.8).parent
    other = write_voc(tmp_path / "other", {"train": {"a": []}, "val": {"b": []}})
    assert existing_split_file(other, run) is None
    assert existing_split_file(tmp_path / "first", run) == run / SPLIT_FILE


def test_a_split_file_that_no_longer_fits_is_named(tmp_path: Path) -> None:
    root = write_undivided(tmp_path)
    make_split(root, 0.8)
    for split in ("train", "val"):
        write_yolo(
            root, "train: train/images\nval: val/images\nnames: [red]", {split: "0 0.5 0.5 0.2 0.2"}, f"{split}/images"
        )
    message = r"no split 'all' in .*: it has train, val; .*ssdcore-split\.json divides 'all', so delete this file"
    with pytest.raises(ValueError, match=message):
        open_dataset(root, "train")
    problems = check_dataset(root, quiet=True).problems
    assert len(problems) == 1 and "so delete this file" in problems[0]
