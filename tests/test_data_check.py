"""`ssdcore data check`: everything that is wrong, and what the dataset holds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_datasets import HEIGHT, WIDTH, coco_content, truncate, write_coco, write_image, write_voc, write_yolo
from typer.testing import CliRunner

from ssdcore import cli
from ssdcore.anchors import SSD300_COCO
from ssdcore.data import make_split, open_dataset
from ssdcore.data.check import check_dataset, describe, draw_sheet
from ssdcore.data.statistics import reach, relative_boxes, table_of_counts, table_of_sizes

CAT = ("cat", (1, 2, 31, 22))


def write_noise(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write_clean(root: Path) -> Path:
    """A dataset in which nothing is wrong and nothing is unusual."""
    write_voc(
        root, {"train": {"a": [CAT], "b": [CAT]}, "val": {"c": [CAT]}, "trainval": {"a": [CAT], "b": [CAT], "c": [CAT]}}
    )
    for seed, path in enumerate(sorted((root / "JPEGImages").iterdir())):
        write_noise(path, seed)
    return root


def check(root: Path) -> Any:
    return check_dataset(root, quiet=True)


def test_nothing_is_wrong_with_a_clean_dataset(tmp_path: Path) -> None:
    report = check(write_clean(tmp_path))
    assert report.problems == [] and report.notes == [] and report.layout == "Pascal VOC"
    assert describe(report, "ssd300_tiny", SSD300_COCO).endswith("no problems")


def test_all_problems_are_listed_not_only_the_first(tmp_path: Path) -> None:
    root = write_clean(tmp_path)
    (root / "ImageSets/Main/test.txt").write_text("none\nd\nd\n")
    write_noise(root / "JPEGImages/d.jpg", 9)
    (root / "Annotations/d.xml").write_text("<annotation>")
    write_image(root / "JPEGImages/a.jpg", size=(7, 9))
    truncate(root / "JPEGImages/b.jpg")
    objects = [("cat", (5, 5, 5, 9)), ("cat", (99, 5, 110, 9)), ("cat", (30, 5, 45, 9)), ("", (1, 1, 5, 5))]
    (root / "Annotations/c.xml").write_text(
        (root / "Annotations/c.xml")
        .read_text()
        .replace("<annotation>", "<annotation>" + "".join(map(voc_object, objects)))
    )
    problems = check(root).problems
    expected = [
        "ImageSets/Main/test.txt: none is listed, but Annotations/none.xml is missing",
        "Annotations/d.xml: cannot be parsed as XML: no element found: line 1, column 12",
        "ImageSets/Main/test.txt: d is listed 2 times; used once",
        "Annotations/c.xml: object 1 (cat): box (5, 5, 5, 9) has no area; dropped",
        "Annotations/c.xml: object 2 (cat): box (99, 5, 110, 9) is outside the image of 40 x 30; dropped",
        "Annotations/c.xml: object 3 (cat): box (30, 5, 45, 9) extends beyond the image of 40 x 30; used as is",
        "Annotations/c.xml: object 4: no class name; dropped",
        "JPEGImages/a.jpg: annotated as 40 x 30 pixels, but has 7 x 9",
    ]
    assert set(expected) <= set(problems)
    others = [line for line in problems if line not in expected]
    assert len(others) == 1 and others[0].startswith("JPEGImages/b.jpg: cannot be read as an image")


def voc_object(item: tuple[str, tuple[int, ...]]) -> str:
    name, box = item
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def test_a_file_that_cannot_be_parsed_does_not_hide_the_other_splits(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_content())
    (root / "annotations/instances_val.json").write_text("{")
    report = check(root)
    assert list(report.datasets) == ["train"]
    assert any(line.startswith("annotations/instances_val.json: cannot be parsed as JSON") for line in report.problems)


def test_images_in_two_splits_are_listed_also_as_copies(tmp_path: Path) -> None:
    root = write_clean(tmp_path)
    (root / "JPEGImages/c.jpg").write_bytes((root / "JPEGImages/a.jpg").read_bytes())
    (root / "ImageSets/Main/test.txt").write_text("b\n")
    problems = check(root).problems
    assert "JPEGImages/b.jpg: is in test and in train" in problems
    assert "JPEGImages/a.jpg: in train, has the same content as JPEGImages/c.jpg in val" in problems
    # trainval consists of train and val, which is no problem. That it shares images with test is one.
    assert "JPEGImages/b.jpg: is in test and in trainval" in problems
    assert len(problems) == 3


def test_copies_within_a_split_and_images_in_no_split_are_notes(tmp_path: Path) -> None:
    root = write_clean(tmp_path)
    (root / "JPEGImages/b.jpg").write_bytes((root / "JPEGImages/a.jpg").read_bytes())
    write_noise(root / "JPEGImages/unused.jpg", 7)
    report = check(root)
    assert report.problems == []
    assert report.notes == [
        "1 image with the same content as another image of their split: JPEGImages/b.jpg",
        "1 image in no split: JPEGImages/unused.jpg",
    ]


def test_images_of_unusual_kinds_are_notes_that_name_files(tmp_path: Path) -> None:
    images = [
        {"id": i, "file_name": f"{name}", "width": WIDTH, "height": HEIGHT}
        for i, name in enumerate(("grey.jpg", "cmyk.jpg", "alpha.png", "sixteen.png", "turned.jpg", "crowd.jpg"))
    ]
    crowd = {"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 1}
    root = write_coco(tmp_path, coco_content(images=images, annotations=[crowd]))
    for name in "ab":
        (root / f"train/{name}.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 3
    write_image(root / "train/grey.jpg", "L")
    write_image(root / "train/cmyk.jpg", "CMYK")
    write_image(root / "train/alpha.png", "RGBA")
    write_image(root / "train/sixteen.png", "I;16")
    write_image(root / "train/turned.jpg", exif=exif)
    write_noise(root / "train/crowd.jpg", 0)
    report = check(root)
    assert report.problems == []
    assert report.notes == [
        "5 images without objects; training leaves them out, unless --keep-empty is given: "
        "train/grey.jpg, train/cmyk.jpg, train/alpha.png, ...",
        "1 image with crowds or difficult objects only; training leaves them out: train/crowd.jpg",
        "1 image greyscale: train/grey.jpg",
        "1 image CMYK: train/cmyk.jpg",
        "1 image with alpha, which is dropped: train/alpha.png",
        "1 image of 16-bit greyscale, scaled to 8 bits: train/sixteen.png",
        "1 image with an EXIF orientation; turned unless the annotated size is the stored one: train/turned.jpg",
    ]


def test_classes_that_train_lacks_are_listed(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_content(), "train", "train/_annotations.coco.json")
    categories = [*coco_content()["categories"], {"id": 5, "name": "bird"}]
    write_coco(tmp_path, coco_content(categories=categories), "valid", "valid/_annotations.coco.json")
    assert "valid has classes that train lacks: bird" in check(tmp_path).problems


def test_a_divided_dataset_is_checked_by_its_parts(tmp_path: Path) -> None:
    labels: dict[str, str | None] = {f"img{i}": "0 0.5 0.5 0.5 0.5" for i in range(4)}
    write_yolo(tmp_path, "names: [red]", labels, "images")
    for i in range(4):
        write_noise(tmp_path / f"images/img{i}.jpg", i)
    make_split(tmp_path, 0.5)
    report = check(tmp_path)
    assert report.problems == [] and {split: len(d) for split, d in report.datasets.items()} == {"train": 2, "val": 2}


def test_tables_count_images_objects_and_sizes(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_content())
    datasets = {"train": open_dataset(root, "train")}
    rows = [line.split() for line in table_of_counts(datasets).splitlines()]
    assert rows == [
        ["train"],
        ["images", "2"],
        ["images", "without", "objects", "1"],
        ["objects", "ignored", "1"],
        ["objects", "2"],
        ["car", "1"],
        ["dog", "1"],
    ]
    boxes = relative_boxes(list(datasets.values()))  # without the ignored one
    torch.testing.assert_close(boxes, torch.tensor([[1 / 40, 2 / 30, 11 / 40, 22 / 30]]))
    wide = torch.tensor([[0.0, 0, 0.1, 0.1], [0, 0, 0.4, 0.1], [0, 0, 0.9, 0.1]])
    lines = [line.split() for line in table_of_sizes(wide).splitlines()]
    assert lines[1] == ["width", "/", "image", "0.100", "0.100", "0.400", "0.900", "0.900"]
    assert lines[3] == ["side", "in", "pixels", "of", "300", "x", "300", "30", "30", "60", "90", "90"]
    assert lines[4][-5:] == ["51", "51", "102", "154", "154"]


def test_objects_that_no_anchor_reaches_are_counted_by_size() -> None:
    pixels = torch.tensor(
        [
            [0.0, 0, 8, 8],  # small, and far smaller than the smallest anchor of 21 pixels
            [2, 2, 22, 22],  # small; the anchor at 12 of 21 pixels
            [50, 50, 114, 114],  # medium
            [0, 100, 250, 112],  # medium, too flat for an aspect ratio of 3
            [0, 0, 300, 300],  # large
            [0, 0, 300, 31],  # large, too flat
        ]
    )
    rows = {row.size: (row.objects, row.unreached) for row in reach(pixels / 300, SSD300_COCO)}
    assert rows == {"small": (2, 1), "medium": (2, 1), "large": (2, 1)}
    assert [row.objects for row in reach(torch.zeros(0, 4), SSD300_COCO)] == [0, 0, 0]


def test_the_sheet_shows_ground_truth_and_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    root = write_clean(tmp_path)
    truncate(root / "JPEGImages/b.jpg")
    sheet = draw_sheet(check(root).datasets)
    assert sheet is not None and sheet.size == (4 + 2 * 404, 4 + 304)  # a and c, enlarged tenfold
    assert draw_sheet({}) is None


def test_the_command_ends_with_what_it_made_and_fails_if_something_is_wrong(tmp_path: Path) -> None:
    root = write_clean(tmp_path / "data")
    arguments = ["data", "check", str(root), "--output", str(tmp_path / "out"), "--model", "ssd512_vgg16"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "no problems" in result.output and "512 x 512" in result.output
    assert f"wrote {tmp_path / 'out/ground-truth.png'}" in result.output.replace("\n", "")
    assert Image.open(tmp_path / "out/ground-truth.png").width > 400
    truncate(root / "JPEGImages/a.jpg")
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1 and "1 problem:" in result.output and "ground-truth.png" in result.output


def test_the_command_has_help() -> None:
    result = CliRunner().invoke(cli.app, ["data", "--help"])
    assert result.exit_code == 0 and "check" in result.output


def test_a_folder_in_which_nothing_can_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps({"images": []}))
    result = CliRunner().invoke(cli.app, ["data", "check", str(tmp_path)])
    assert result.exit_code == 1 and "no list of 'annotations'" in result.output and "wrote" not in result.output
    with pytest.raises(ValueError, match="no dataset in"):
        cli.check_data(tmp_path / "annotations")


def test_names_that_end_like_the_folder_are_printed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yolo(tmp_path / "cars", "names: [car]", {"a": "0 0.5 0.5 0.2 0.2"}, "images/oldcars")
    truncate(tmp_path / "cars/images/oldcars/a.jpg")
    monkeypatch.chdir(tmp_path)
    (problem,) = check(Path("cars")).problems
    assert problem.startswith("images/oldcars/a.jpg: cannot be read")
