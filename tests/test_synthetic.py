"""The synthetic dataset is reproducible, is created as a whole or not at all, and has correct annotations."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torchvision.ops import box_iou

import ssdcore.synthetic
from ssdcore.data import open_dataset
from ssdcore.synthetic import SHAPES, _draw_image, _outline, _paint, make_synthetic


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(root: Path, train: int = 6, val: int = 3, size: int = 100, seed: int = 0) -> Path:
    return make_synthetic(root, train=train, val=val, size=size, seed=seed, progress=False)


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = digest(make(tmp_path / "a")), digest(make(tmp_path / "b"))
    assert first == second and len(first) == 6 + 3 + 2 + 1
    other = digest(make(tmp_path / "c", seed=1))
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))
    assert len(set(first.values())) == len(first)  # train and val share no image
    longer = digest(make(tmp_path / "d", train=8))
    assert all(first[name] == longer[name] for name in first if name.endswith(".jpg"))


def test_an_existing_dataset_is_reused_and_other_files_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "set")
    with pytest.raises(ValueError, match=r"contain the dataset .*'seed': 1.* contains .*'seed': 0"):
        make(root, seed=1)
    monkeypatch.setattr(ssdcore.synthetic, "_draw_image", None)  # drawing again would fail
    assert make(root) == root
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "unrelated/notes.txt").touch()
    with pytest.raises(ValueError, match="other files"):
        make(tmp_path / "unrelated")


def test_an_interruption_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0

    def interrupted(rng: np.random.Generator, size: int) -> object:
        nonlocal drawn
        drawn += 1
        if drawn == 4:
            raise KeyboardInterrupt
        return _draw_image(rng, size)

    (tmp_path / "set").mkdir()  # an empty folder may be used
    with monkeypatch.context() as patch:
        patch.setattr(ssdcore.synthetic, "_draw_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and not any((tmp_path / "set").iterdir())
    assert len(digest(make(tmp_path / "set"))) == 12


def test_two_processes_may_create_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process publishes the same dataset while this process draws."""

    def overtaken(rng: np.random.Generator, size: int) -> object:
        monkeypatch.setattr(ssdcore.synthetic, "_draw_image", _draw_image)
        make(tmp_path / "set")
        return _draw_image(rng, size)

    monkeypatch.setattr(ssdcore.synthetic, "_draw_image", overtaken)
    make(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(digest(tmp_path / "set")) == 12


def test_annotations_are_valid_and_cover_all_classes(tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path / "set", train=60, val=0, size=100), "train")
    assert dataset.problems == [] and dataset.classes == SHAPES
    counts: Counter[int] = Counter()
    classes: Counter[int] = Counter()
    for index in range(len(dataset)):
        target = dataset.target(index)
        boxes = target["boxes"]
        counts[len(boxes)] += 1
        classes.update(target["labels"].tolist())
        if len(boxes):
            assert boxes.min() >= 0 and boxes.max() <= 100
            assert (boxes[:, 2:] - boxes[:, :2]).min() >= 10  # 30 pixels of 300
            assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.25
    assert counts[0] > 0 and max(counts) == 6 and set(counts) == set(range(7))
    assert min(classes[label] for label in (1, 2, 3)) > 30
    image, _ = dataset[0]
    assert image.shape == (3, 100, 100)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_fit_their_shapes(shape: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        outline = _outline(rng, shape, rng.uniform(30, 60)) + rng.uniform(0, 30, 2)
        canvas = np.full((100, 100, 3), 100.0)
        _paint(rng, canvas, outline)
        y, x = np.nonzero(np.abs(canvas - 100).max(axis=-1) > 5)
        drawn = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        box = np.concatenate([outline.min(axis=0), outline.max(axis=0)])
        # Drawn pixels are whole, and the sharp corner of a triangle covers little of its last pixel.
        assert np.abs(drawn - box).max() <= 1.5


def test_colour_does_not_depend_on_the_class(tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path / "set", train=150, val=0), "train")
    colours: dict[int, list[np.ndarray]] = {1: [], 2: [], 3: []}
    for index in range(len(dataset)):
        image, target = dataset[index]
        for (x1, y1, x2, y2), label in zip(target["boxes"].long().tolist(), target["labels"].tolist(), strict=True):
            cx, cy = (x1 + x2) // 2, (y1 + y2) // 2
            colours[label].append(image[:, cy - 2 : cy + 3, cx - 2 : cx + 3].double().mean(dim=(1, 2)).numpy())
    means = np.array([np.mean(values, axis=0) for values in colours.values()])
    errors = np.array([np.std(values, axis=0) / len(values) ** 0.5 for values in colours.values()])
    assert (np.abs(means - means.mean(axis=0)) < 4 * errors).all()


@pytest.mark.parametrize("wrong", [{"train": -1}, {"val": -1}, {"size": 99}, {"seed": -1}])
def test_arguments_out_of_range_raise_value_error(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        make(tmp_path / "set", **wrong)
    assert not any(tmp_path.iterdir())
