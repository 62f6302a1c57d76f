"""Finding out which layout a folder has."""

from pathlib import Path

import pytest
from small_datasets import coco_content, write_coco, write_voc, write_yolo

from ssdcore.data import available_splits, open_dataset
from ssdcore.data.opening import find_layout


def test_unknown_layouts_and_splits_raise_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for .*instances_<split>.*Annotations"):
        open_dataset(tmp_path, "train")
    write_voc(tmp_path, {"train": {"a": []}, "val": {}})
    with pytest.raises(ValueError, match=r"no split 'test' in .*: it has train, val"):
        open_dataset(tmp_path, "test")
    assert len(open_dataset(tmp_path, "val")) == 0


def test_the_layout_is_told_apart_by_the_files(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", coco_content())
    write_yolo(tmp_path / "yolo", "train: train/images\nnames: [red]", {"a": "0 0.5 0.5 0.2 0.2"})
    write_voc(tmp_path / "voc", {"train": {"a": []}})
    write_voc(tmp_path / "folders", {"train": {"a": []}})
    (tmp_path / "folders/ImageSets/Main/train.txt").unlink()
    write_coco(tmp_path / "other", coco_content(), "images", "result.json")
    names = {path.name: find_layout(path).name for path in tmp_path.iterdir()}
    assert names == {
        "coco": "COCO",
        "yolo": "YOLO",
        "voc": "Pascal VOC",
        "folders": "images with XML",
        "other": "COCO in files of other names",
    }


def test_a_missing_folder_raises_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset in .*none: no such folder"):
        available_splits(tmp_path / "none")
