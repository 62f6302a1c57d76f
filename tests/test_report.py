"""The report's numbers are those of the metrics, and its page is one file that loads nothing and runs nothing."""

import base64
import html.parser
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import NOWHERE, A, B, C, make_dataset, make_detections, random_objects

from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.evaluate import evaluate_detections
from ssdcore.report import matches as m
from ssdcore.report import write_report
from ssdcore.report.charts import Series, line_chart
from ssdcore.report.html import Html, tag
from ssdcore.report.matches import match_objects
from ssdcore.report.mistakes import worst_false_alarms, worst_misses
from ssdcore.synthetic import SHAPES, make_synthetic

CLASSES = ("cat", "dog", "eel")


def matched(annotated: Any, detected: Mapping[int, Any]) -> m.Matches:
    return match_objects(make_dataset(annotated), make_detections(detected))


def one_of_each() -> m.Matches:
    """Found: A. Missed: B, and C below a score of 0.3. False alarms: A again, B as another class, and nothing."""
    annotated = [[(A, 1, False), (B, 2, False)], [(C, 3, False)]]
    detected = {10: [(A, 1, 0.9), (A, 1, 0.8), (B, 3, 0.7)], 20: [(NOWHERE, 2, 0.6), (C, 3, 0.3)]}
    return matched(annotated, detected)


def test_counts_at_a_threshold_equal_those_made_by_hand() -> None:
    matches = one_of_each()
    assert m.counts(matches, 0.1) == m.Counts(true_positives=2, false_positives=3, missed=1)
    assert m.counts(matches, 0.5) == m.Counts(true_positives=1, false_positives=3, missed=2)
    assert m.counts(matches, 0.5, label=1) == m.Counts(1, 1, 0)
    assert m.counts(matches, 0.95) == m.Counts(0, 0, 3)
    at = m.counts(matches, 0.1)
    assert (at.precision, at.recall) == (2 / 5, 2 / 3)
    assert at.f1 == pytest.approx(2 / (5 / 2 + 3 / 2))
    assert m.Counts(0, 0, 3).precision is None and m.Counts(0, 2, 0).recall is None and m.Counts(0, 0, 0).f1 is None


def test_a_score_equal_to_the_threshold_is_not_above_it() -> None:
    matches = matched([[(A, 1, False)]], {10: [(A, 1, 0.5)]})
    assert m.counts(matches, 0.5) == m.Counts(0, 0, 1)
    assert m.confusion_matrix(matches, 1, 0.5).tolist() == [[0, 1], [0, 0]]


def test_the_best_threshold_has_the_highest_f1_and_is_the_lowest_of_equal_ones() -> None:
    matches = matched([[(A, 1, False)]], {10: [(A, 1, 0.52), (NOWHERE, 1, 0.22)]})
    assert m.best_threshold(matches) == m.best_threshold(matches, 1) == 0.25
    assert m.best_threshold(matches, 2) == min(m.THRESHOLDS)


def test_confusions_equal_those_made_by_hand() -> None:
    matches = one_of_each()
    assert m.confusion_matrix(matches, 3, 0.5).tolist() == [
        [1, 0, 0, 0],
        [0, 0, 1, 0],  # the dog was detected as an eel
        [0, 0, 0, 1],
        [1, 1, 0, 0],
    ]
    assert m.confusion_matrix(matches, 3, 0.1)[2].tolist() == [0, 0, 1, 0]


def test_the_best_score_takes_an_object_of_another_class_first() -> None:
    matches = matched([[(A, 1, False)]], {10: [(A, 2, 0.6), (A, 3, 0.7)]})
    assert m.confusion_matrix(matches, 3, 0.1).tolist() == [[0, 0, 1, 0], [0] * 4, [0] * 4, [0, 1, 0, 0]]


def test_ignored_objects_count_nowhere() -> None:
    matches = matched([[(A, 1, False), (B, 1, True)]], {10: [(A, 1, 0.9), (B, 1, 0.8)]})
    assert m.counts(matches, 0.1) == m.Counts(1, 0, 0)
    assert m.confusion_matrix(matches, 1, 0.1).tolist() == [[1, 0], [0, 0]]
    assert not worst_misses(matches, CLASSES, 0.1, 9) and not worst_false_alarms(matches, CLASSES, 0.1, 9)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 1000]))
def test_curves_counts_and_confusions_agree_with_the_metrics(seed: int, different_scores: int) -> None:
    images, detected = random_objects(np.random.default_rng(seed))
    rounded = {
        image_id: [(box, label, round(score * different_scores) / different_scores) for box, label, score in objects]
        for image_id, objects in detected.items()
    }
    dataset, detections = make_dataset(images), make_detections(rounded)
    metrics = evaluate_detections(dataset, detections, quiet=True)
    matches = match_objects(dataset, detections)
    for label, name in enumerate(CLASSES, start=1):
        precision = m.precision_at_recalls(matches, label)
        expected = metrics["AP50_per_class"][name]
        assert (precision is None) == (expected is None)
        if precision is not None:
            assert precision.mean() == pytest.approx(expected, abs=1e-9)  # COCOeval adds 2e-16 to a divisor
    annotated = [sum(label == k and not ignore for image in images for _, label, ignore in image) for k in (1, 2, 3)]
    for threshold in (0.05, 0.5):
        by_class = [m.counts(matches, threshold, label) for label in (1, 2, 3)]
        assert [c.true_positives + c.missed for c in by_class] == annotated
        matrix = m.confusion_matrix(matches, 3, threshold)
        assert matrix.diagonal()[:3].tolist() == [c.true_positives for c in by_class]
        assert matrix.sum(axis=1)[:3].tolist() == annotated
        assert matrix.sum(axis=0)[:3].tolist() == [c.true_positives + c.false_positives for c in by_class]


def test_the_worst_mistakes_come_first_with_what_happened() -> None:
    small, shifted = (600, 0, 640, 40), (60, 0, 160, 100)  # shifted has an IoU of 0.25 with A
    annotated = [[(A, 1, False), (B, 2, False)], [(C, 3, False), (small, 1, False)]]
    detected = {
        10: [(A, 1, 0.9), (A, 1, 0.8), (B, 3, 0.7), (shifted, 1, 0.6)],
        20: [(NOWHERE, 2, 0.95), (C, 3, 0.3)],
    }
    matches = matched(annotated, detected)
    misses = worst_misses(matches, CLASSES, 0.5, 9)
    assert [(miss.image, miss.label, miss.score) for miss in misses] == [(0, 2, None), (1, 1, None), (1, 3, None)]
    assert [miss.text for miss in misses] == [
        "not found; the nearest box is eel 0.70 with an IoU of 1.00",
        "not found, and no box is near",
        "found with a score of 0.30 only",
    ]
    alarms = worst_false_alarms(matches, CLASSES, 0.5, 9)
    assert [alarm.score for alarm in alarms] == pytest.approx([0.95, 0.8, 0.7, 0.6])
    assert [alarm.text for alarm in alarms] == [
        "nothing of this class is annotated here",
        "an object that another box was matched with",
        "annotated as dog",
        "a box that is off, with an IoU of 0.25",
    ]
    assert len(worst_misses(matches, CLASSES, 0.5, 2)) == len(worst_false_alarms(matches, CLASSES, 0.5, 2)) == 2


class Page(html.parser.HTMLParser):
    """The elements of a page in order, and a failed test if an end tag does not fit."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[list[str]]] = {}  # the cells of each row of the tables in each section
        self.source = path.read_text(encoding="utf-8")
        self.section = ""
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in ("img", "meta"):
            self.open.append(name)
        if name == "section":
            self.section = dict(attrs)["id"] or ""
            self.sections[self.section] = []
        elif name == "tr":
            self.sections[self.section].append([])
        elif name in ("th", "td"):
            self.sections[self.section][-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.sections[self.section][-1][-1] += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    folder = make_synthetic(tmp_path_factory.mktemp("data") / "shapes", train=1, val=6, progress=False)
    return open_dataset(folder, "val")


def imperfect(dataset: DetectionDataset) -> dict[int, dict[str, torch.Tensor]]:
    """Most objects of a dataset, moved a little, some with the next class; and a false alarm in each image."""
    generator = torch.Generator().manual_seed(0)
    detections = {}
    for index in range(len(dataset)):
        target = dataset.target(index)
        boxes = target["boxes"].as_subclass(torch.Tensor)
        kept = torch.rand(len(boxes), generator=generator) < 0.8
        boxes = boxes[kept] + 3 * torch.randn(int(kept.sum()), 4, generator=generator)
        labels = target["labels"][kept]
        labels[::4] = labels[::4] % len(dataset.classes) + 1
        scores = torch.rand(len(boxes) + 1, generator=generator).sort(descending=True).values
        detections[target["image_id"]] = {
            "boxes": torch.cat([boxes, torch.tensor([[1.0, 2, 40, 50]])]),
            "labels": torch.cat([labels, torch.tensor([1])]),
            "scores": scores,
        }
    return detections


def described(dataset: DetectionDataset, detections: Any, **changes: Any) -> dict[str, Any]:
    """The content of a metrics.json."""
    return {
        "weights": ["model.safetensors"],
        "data": "shapes",
        "split": "val",
        "images": len(dataset),
        "settings": {"models": [{"model": "ssd300_tiny", "image_size": 300}], "flip": False},
        "environment": {"device": "a device"},
        "speed": {"seconds": {"reading": 1.0, "network": 3.0}, "images_per_second": 1.5},
        **evaluate_detections(dataset, detections, quiet=True),
        **changes,
    }


def training(*scores: float | None) -> dict[str, Any]:
    epochs = [
        {"epoch": k, "classification": 2.0 / k, "bbox_regression": 1.0 / k, "lr": 1e-3, "val": {"AP50": score}}
        for k, score in enumerate(scores, start=1)
    ]
    return {"settings": {"batch_size": 16, "classes": list(SHAPES)}, "epochs": epochs, "best": 2}


@pytest.fixture(scope="module")
def whole(shapes: DetectionDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    detections = imperfect(shapes)
    metrics = described(shapes, detections)
    write_report(path, shapes, detections, metrics, training(None, 0.25, 0.5))
    return Page(path), json.loads(json.dumps(metrics))


def test_the_report_has_every_section_and_links_to_it(whole: tuple[Page, Any]) -> None:
    page, _ = whole
    assert list(page.sections) == [
        "metrics", "classes", "training", "precision-and-recall", "score-thresholds", "confusions", "worst-misses",
        "worst-false-alarms", "speed", "settings",
    ]  # fmt: skip
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in page.sections]
    assert page.source.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme: dark" in page.source


def test_the_report_loads_and_runs_nothing(whole: tuple[Page, Any]) -> None:
    page, _ = whole
    text = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")
    sources = [image["src"] or "" for image in page.all("img")]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert picture.format == "JPEG" and max(picture.size) == 340


def test_the_numbers_are_those_of_the_metrics(whole: tuple[Page, Any], shapes: DetectionDataset) -> None:
    page, metrics = whole
    shown = {name: value for name, value, _ in page.sections["metrics"][1:]}
    assert len(shown) == 14
    for name, value in shown.items():
        assert value == ("–" if metrics[name] is None else f"{metrics[name]:.3f}")  # noqa: RUF001
    for name, objects, *averages in page.sections["classes"][1:]:
        per_class = (metrics[f"{metric}_per_class"][name] for metric in ("AP", "AP50", "VOC07", "VOC12"))
        assert averages[:4] == [f"{value:.3f}" for value in per_class]
        label = shapes.classes.index(name) + 1
        assert int(objects) == sum(int((shapes.target(i)["labels"] == label).sum()) for i in range(len(shapes)))
    matches = match_objects(shapes, imperfect(shapes))
    rows = page.sections["score-thresholds"][1:]
    assert len(rows) == 19
    for threshold, found, false_alarms, missed, precision, recall, f1 in rows:
        at = m.counts(matches, float(threshold))
        assert (int(found), int(false_alarms), int(missed)) == (at.true_positives, at.false_positives, at.missed)
        rates = (("–" if value is None else f"{value:.3f}") for value in (at.precision, at.recall, at.f1))  # noqa: RUF001
        assert [precision, recall, f1] == list(rates)
    best = m.best_threshold(matches)
    assert [row.get("aria-current") for row in page.all("tr")].count("true") == 1
    shown_matrix = [[int(cell) for cell in row[1:]] for row in page.sections["confusions"][1:]]
    assert shown_matrix == m.confusion_matrix(matches, 3, best).tolist()
    assert page.sections["speed"][1:] == [
        ["reading", "1.00", "166.67", "25 %", ""],
        ["network", "3.00", "500.00", "75 %", ""],
    ]
    assert ["training: batch size", "16"] in page.sections["settings"]


def test_the_curves_of_the_training_have_a_point_per_epoch(whole: tuple[Page, Any]) -> None:
    page, _ = whole
    lines = [(line["points"] or "").split() for line in page.all("polyline")]
    assert [len(points) for points in lines[:4]] == [3, 3, 3, 2]  # two losses, lr, and AP50 from the second epoch on


def test_epochs_without_a_score_do_not_interrupt_the_curve(shapes: DetectionDataset, tmp_path: Path) -> None:
    record = training(0.1, 0.2, 0.3)
    del record["epochs"][1]["val"]
    detections = imperfect(shapes)
    write_report(tmp_path / "report.html", shapes, detections, described(shapes, detections), record)
    lines = [(line["points"] or "").split() for line in Page(tmp_path / "report.html").all("polyline")]
    assert [len(points) for points in lines[:4]] == [3, 3, 3, 2]


def test_names_of_files_need_not_be_valid_text(tmp_path: Path) -> None:
    dataset = make_dataset([[(A, 1, False)]])
    dataset._files = np.array([os.fsdecode(b"caf\xe9.jpg")])
    write_report(tmp_path / "report.html", dataset, {}, described(dataset, {}))
    assert "caf?.jpg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    folder = make_synthetic(tmp_path / "shapes", train=1, val=2, progress=False)
    annotations = folder / "annotations/instances_val.json"
    content = json.loads(annotations.read_text())
    evil = "<script>alert('x')</script>"
    content["categories"][0]["name"] = evil
    file = 'a"><b>&amp;.jpg'
    (folder / "val" / content["images"][1]["file_name"]).rename(folder / "val" / file)
    content["images"][1]["file_name"] = file
    annotations.write_text(json.dumps(content))
    dataset = open_dataset(folder, "val")
    write_report(tmp_path / "report.html", dataset, {}, described(dataset, {}, data="<q>", split='"'))
    page = Page(tmp_path / "report.html")
    assert not page.all("script") and not page.all("q")
    assert evil in [row[0] for row in page.sections["classes"]]
    assert f"annotated objects in {file}" in [image["alt"] for image in page.all("img")]


def test_a_report_without_objects_or_training_is_written(tmp_path: Path) -> None:
    dataset = make_dataset([[]])
    write_report(tmp_path / "report.html", dataset, {}, described(dataset, {}))
    page = Page(tmp_path / "report.html")
    assert "training" not in page.sections and not page.all("img")
    assert page.source.count("<p>None.</p>") == 2


def test_an_image_that_cannot_be_read_has_no_picture(tmp_path: Path) -> None:
    dataset = make_dataset([[(A, 1, False)]])  # its image file is gone
    write_report(tmp_path / "report.html", dataset, {}, described(dataset, {}))
    page = Page(tmp_path / "report.html")
    assert not page.all("img") and "The image cannot be read." in page.source


def test_pictures_do_not_change_the_transform(shapes: DetectionDataset, tmp_path: Path) -> None:
    shapes.transform = marker = lambda image, target: (image, target)
    write_report(tmp_path / "report.html", shapes, {}, described(shapes, {}))
    assert shapes.transform is marker
    shapes.transform = None


def test_tag_escapes_all_text_but_html() -> None:
    assert tag("p", "<b>", Html("<i>"), 1, ["&", tag("b")]) == "<p>&lt;b&gt;<i>1&amp;<b></b></p>"
    assert tag("img", alt='"<', class_="a", data_x=1, title=None) == '<img alt="&quot;&lt;" class="a" data-x="1">'


def test_a_line_is_interrupted_where_it_has_no_value() -> None:
    chart = line_chart("t", [Series("a", [0, 1, 2, 3], [0.0, 1.0, None, 0.5])], "x", "y", y_range=(0, 1))
    assert chart.count("<polyline") == 1 and chart.count("<circle") == 1
    points = re.search(r'points="([^"]*)"', chart)
    assert points is not None and points[1].split() == ["60.0,192.0", "156.0,12.0"]  # the left end of the axes, up
    assert "<svg" in line_chart("t", [Series("a", [1], [None])], "x", "y")  # an axis without any value
