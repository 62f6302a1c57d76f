"""Detecting in a dataset of which not every image can be read."""

from pathlib import Path

import pytest
import torch
from small_datasets import HEIGHT, WIDTH, coco_content, write_coco, write_damaged

from ssdcore.data import open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.models import ssd300_tiny


def test_nothing_is_detected_in_an_unreadable_image(tmp_path: Path) -> None:
    dataset = write_damaged(tmp_path)
    dataset.strict = False
    torch.manual_seed(0)
    with pytest.warns(UserWarning):
        detected = detect_dataset(ssd300_tiny(21), dataset, quiet=True)
    assert sorted(detected) == [0, 3]


def test_boxes_are_in_pixels_of_the_image_that_took_the_place(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.jpg", "width": 300, "height": 300},  # its file has another size
        {"id": 2, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
    ]
    dataset = open_dataset(write_coco(tmp_path, coco_content(images=images, annotations=[])), "train")
    dataset.strict = False
    torch.manual_seed(0)
    with pytest.warns(UserWarning):
        detected = detect_dataset(ssd300_tiny(3), dataset, quiet=True)
    assert list(detected) == [2] and len(detected[2]["boxes"]) > 0
    right, bottom = detected[2]["boxes"][:, 2:].amax(dim=0).tolist()
    assert right <= WIDTH + 1e-3 and bottom <= HEIGHT + 1e-3  # 300 * (40 / 300) in fp32 lies above 40
