"""The page of a report: one section per function, from the matches and the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssdcore.data import DetectionDataset
from ssdcore.report.charts import Series, line_chart
from ssdcore.report.html import Html, number, table, tag
from ssdcore.report.matches import (
    MIN_IOU,
    RECALLS,
    THRESHOLDS,
    Counts,
    Matches,
    best_threshold,
    confusion_matrix,
    counts,
    precision_at_recalls,
)
from ssdcore.report.mistakes import Mistake, pictures, worst_false_alarms, worst_misses
from ssdcore.report.style import STYLE

MOST_MISTAKES = 12  # pictures of each kind; a pair has about 40 kB
SHOWN_MISTAKES = 4  # the others are folded away, because a phone shows one below the other
# The page loads nothing: a browser would refuse it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
METRICS = {  # what COCO's metrics mean, for readers who do not know them
    "AP": "mean over the classes and the IoU thresholds 0.50, 0.55, ..., 0.95",
    "AP50": "at an IoU of 0.50",
    "AP75": "at an IoU of 0.75",
    "APs": "objects of less than 32 x 32 pixels",
    "APm": "objects of 32 x 32 to 96 x 96 pixels",
    "APl": "larger objects",
    "AR1": "recall with 1 detected object per image and class",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "with 100, small objects",
    "ARm": "with 100, medium objects",
    "ARl": "with 100, large objects",
    "VOC07": "Pascal VOC 2007: 11-point mean at an IoU of 0.5",
    "VOC12": "Pascal VOC 2012: area under the curve at an IoU of 0.5",
}


def page(
    dataset: DetectionDataset, matches: Matches, metrics: Mapping[str, Any], training: Mapping[str, Any] | None
) -> Html:
    """Return the whole page. `write_report` describes the arguments; `matches` are those of its detections."""
    threshold = best_threshold(matches)
    models = " + ".join(dict.fromkeys(model["model"] for model in metrics["settings"]["models"]))
    title = f"{models} on {metrics['split']}"
    sections = {
        "Metrics": _metrics(metrics),
        "Classes": _classes(dataset, matches, metrics, threshold),
        "Training": _training(training) if training else None,
        "Precision and recall": _precision_recall(dataset, matches, metrics),
        "Score thresholds": _thresholds(matches, threshold),
        "Confusions": _confusions(dataset, matches, threshold),
        "Worst misses": _mistakes(
            dataset,
            matches,
            threshold,
            worst_misses(matches, dataset.classes, threshold, MOST_MISTAKES),
            f"Annotated objects that no object with a score above {threshold:g} matches. The first were found with the "
            "lowest score or not at all; among these, the largest come first.",
        ),
        "Worst false alarms": _mistakes(
            dataset,
            matches,
            threshold,
            worst_false_alarms(matches, dataset.classes, threshold, MOST_MISTAKES),
            f"Detected objects with a score above {threshold:g} that match no annotated object, by descending score.",
        ),
        "Speed": _speed(metrics),
        "Settings": _settings(metrics, training),
    }
    shown = {name: content for name, content in sections.items() if content is not None}
    links = (tag("a", name, href=f"#{_identifier(name)}") for name in shown)
    body = tag(
        "body",
        tag("h1", title),
        tag("p", f"{len(dataset)} images of {metrics['data']}"),
        _cards(matches, metrics, threshold),
        tag("nav", links),
        (tag("section", tag("h2", name), content, id=_identifier(name)) for name, content in shown.items()),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return Html(f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n")


def _cards(matches: Matches, metrics: Mapping[str, Any], threshold: float) -> Html:
    overall = counts(matches, threshold)
    cards = {
        "AP (COCO)": number(metrics["AP"]),
        "AP50": number(metrics["AP50"]),
        "annotated objects": str(int((~matches.gt_ignore).sum())),
        f"found at score > {threshold:g}": str(overall.true_positives),
        "missed": str(overall.missed),
        "false alarms": str(overall.false_positives),
        "images per second": number(metrics["speed"]["images_per_second"], 1),
    }
    return tag("div", (tag("div", tag("b", value), tag("span", name)) for name, value in cards.items()), class_="cards")


def _metrics(metrics: Mapping[str, Any]) -> Html:
    rows = ((name, number(metrics[name]), meaning) for name, meaning in METRICS.items())
    return table(("metric", "value", "meaning"), rows, class_="settings")


def _classes(dataset: DetectionDataset, matches: Matches, metrics: Mapping[str, Any], threshold: float) -> Html:
    rows = []
    for label, name in enumerate(dataset.classes, start=1):
        at_threshold = counts(matches, threshold, label)
        annotated = at_threshold.true_positives + at_threshold.missed
        average = (number(metrics[f"{metric}_per_class"][name]) for metric in ("AP", "AP50", "VOC07", "VOC12"))
        best = f"{best_threshold(matches, label):g}" if annotated else number(None)
        rows.append((name, annotated, *average, *_rates(at_threshold), best))
    return tag(
        "div",
        tag(
            "p",
            f"Precision, recall and F1 are those at a score above {threshold:g}. The last column has the threshold "
            "with the highest F1 of the class. Objects that the dataset marks as difficult or crowds do not count.",
        ),
        table(
            ("class", "objects", "AP", "AP50", "VOC07", "VOC12", "precision", "recall", "F1", "best threshold"), rows
        ),
    )


def _training(training: Mapping[str, Any]) -> Html:
    epochs = training["epochs"]
    scored = [epoch for epoch in epochs if "val" in epoch]

    def line(name: str) -> Series:
        return Series(name, [epoch["epoch"] for epoch in epochs], [epoch[name] for epoch in epochs])

    charts = [
        line_chart("Loss", [line("classification"), line("bbox_regression")], "epoch", "loss"),
        line_chart("Learning rate at each epoch's end", [line("lr")], "epoch", "lr"),
    ]
    if scored:
        scores = Series("AP50", [epoch["epoch"] for epoch in scored], [epoch["val"]["AP50"] for epoch in scored])
        charts.append(line_chart("AP50 on the validation split", [scores], "epoch", "AP50", y_range=(0, 1)))
    text = f"{len(epochs)} epochs. The weights are those of epoch {training['best']}."
    return tag("div", tag("p", text), tag("div", charts, class_="charts"))


def _precision_recall(dataset: DetectionDataset, matches: Matches, metrics: Mapping[str, Any]) -> Html:
    charts = []
    for label, name in enumerate(dataset.classes, start=1):
        precision = precision_at_recalls(matches, label)
        if precision is None:
            continue
        reached = int(np.count_nonzero(precision))  # a precision of 0 marks a recall that is never reached
        line = Series(name, RECALLS[:reached].tolist(), precision[:reached].tolist())
        title = f"{name}, AP50 {number(metrics['AP50_per_class'][name])}"
        charts.append(line_chart(title, [line], "recall", "precision", (0, 1), (0, 1)))
    text = (
        f"At an IoU of {MIN_IOU:g}, one chart per class with annotated objects. As in COCO's metrics, the precision at "
        "a recall is the highest at that recall or a higher one, and AP50 is the mean over 101 recalls."
    )
    return tag("div", tag("p", text), tag("div", charts, class_="charts"))


def _thresholds(matches: Matches, threshold: float) -> Html:
    at = {value: counts(matches, value) for value in THRESHOLDS}
    lines = [
        Series("precision", THRESHOLDS, [at[value].precision for value in THRESHOLDS]),
        Series("recall", THRESHOLDS, [at[value].recall for value in THRESHOLDS]),
        Series("F1", THRESHOLDS, [at[value].f1 for value in THRESHOLDS]),
    ]
    header = ("score above", "found", "false alarms", "missed", "precision", "recall", "F1")
    rows = [(f"{value:g}", c.true_positives, c.false_positives, c.missed, *_rates(c)) for value, c in at.items()]
    text = (
        f"What counts if only objects with a score above a threshold are kept, over all classes, at an IoU of "
        f"{MIN_IOU:g}. F1, the harmonic mean of precision and recall, is highest at {threshold:g}. The other sections "
        "use this threshold."
    )
    chart = line_chart("All classes", lines, "score threshold", "share", (0, 1), (0, 1))
    return tag("div", tag("p", text), tag("div", chart, class_="charts"), table(header, rows, current=f"{threshold:g}"))


def _confusions(dataset: DetectionDataset, matches: Matches, threshold: float) -> Html:
    matrix = confusion_matrix(matches, len(dataset.classes), threshold)
    names = (*dataset.classes, "nothing")
    rows = []
    for name, row in zip(names, matrix.tolist(), strict=True):
        total = max(1, sum(row))
        cells = (tag("td", value, style=f"--share: {value / total:.2f}") for value in row)
        rows.append(tag("tr", tag("th", name, scope="row"), cells))
    header = tag(
        "tr", tag("th", "annotated \\ detected", scope="col"), (tag("th", name, scope="col") for name in names)
    )
    text = (
        f"Rows are annotated, columns detected classes, at a score above {threshold:g} and an IoU of at least "
        f"{MIN_IOU:g}. The last column counts missed objects, the last row what was detected where nothing is "
        "annotated. Of several boxes on one object, all but one are in the last row. The shade of a cell is its share "
        "of the row."
    )
    matrix_table = tag("table", tag("thead", header), tag("tbody", rows), class_="confusion")
    return tag("div", tag("p", text), tag("div", matrix_table, class_="scroll", tabindex=0))


def _mistakes(
    dataset: DetectionDataset, matches: Matches, threshold: float, mistakes: Sequence[Mistake], text: str
) -> Html:
    figures = []
    for mistake in mistakes:
        name = dataset.classes[mistake.label - 1]
        score = "" if mistake.score is None else f" {mistake.score:.2f}"
        width, height = mistake.box[2:] - mistake.box[:2]
        file = dataset.image_path(mistake.image).name
        place = f"{file}, {width:.0f} x {height:.0f} pixels at ({mistake.box[0]:.0f}, {mistake.box[1]:.0f})"
        caption = tag("figcaption", tag("b", f"{name}{score}"), f": {mistake.text}", tag("span", place))
        pair = pictures(dataset, matches, mistake, threshold)
        if pair is None:
            content = tag("p", "The image cannot be read.")
        else:
            content = tag(
                "div",
                (
                    tag("div", tag("img", src=source, alt=f"{kind} objects in {file}"), kind)
                    for kind, source in zip(("annotated", "detected"), pair, strict=True)
                ),
                class_="pair",
            )
        figures.append(tag("figure", caption, content, class_="mistake"))
    if not figures:
        return tag("p", "None.")
    first, more = (tag("div", part, class_="mistakes") for part in (figures[:SHOWN_MISTAKES], figures[SHOWN_MISTAKES:]))
    folded = tag("details", tag("summary", f"{len(figures) - SHOWN_MISTAKES} more"), more)
    return tag("div", tag("p", text), first, folded if len(figures) > SHOWN_MISTAKES else ())


def _speed(metrics: Mapping[str, Any]) -> Html:
    seconds = metrics["speed"]["seconds"]
    total = sum(seconds.values()) or 1.0
    rows = [
        (
            name,
            f"{value:.2f}",
            f"{1000 * value / max(1, metrics['images']):.2f}",
            f"{100 * value / total:.0f} %",
            tag("span", class_="bar", style=f"width: {100 * value / total:.1f}%"),
        )
        for name, value in seconds.items()
    ]
    text = (
        "Reading is the time spent waiting for images that are decoded and resized, by other processes if there are "
        "workers. Scoring is pycocotools and Pascal VOC's metrics. The first batch, which is slower than the others, "
        f"is included. Images per second, {number(metrics['speed']['images_per_second'], 1)}, leave the scoring out."
    )
    return tag("div", tag("p", text), table(("part", "seconds", "ms per image", "share", ""), rows, class_="speed"))


def _settings(metrics: Mapping[str, Any], training: Mapping[str, Any] | None) -> Html:
    rows = [("dataset", metrics["data"]), ("split", metrics["split"]), ("images", metrics["images"])]
    for weights, model in zip(metrics["weights"], metrics["settings"]["models"], strict=True):
        rows += [("weights", weights), *model.items()]
    rows += [(name, value) for name, value in metrics["settings"].items() if name != "models"]
    rows += metrics["environment"].items()
    if training:
        rows += [
            (f"training: {name}", value)
            for name, value in training["settings"].items()
            if isinstance(value, str | int | float)
        ]
    return table(("setting", "value"), ((name.replace("_", " "), value) for name, value in rows), class_="settings")


def _rates(at: Counts) -> tuple[str, str, str]:
    return number(at.precision), number(at.recall), number(at.f1)


def _identifier(name: str) -> str:
    return name.lower().replace(" ", "-")
