"""A report of an evaluation: one HTML file that needs no other file.

`matches` holds the numbers, `mistakes` the pictures, and `page` the sections of the page. `html`, `charts` and `style`
know nothing of detection.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdcore.data import DetectionDataset
from ssdcore.objects import DetectedObjects
from ssdcore.report.matches import match_objects
from ssdcore.report.page import page
from ssdcore.weights import write_atomically

__all__ = ["write_report"]


def write_report(
    path: str | Path,
    dataset: DetectionDataset,
    detections: Mapping[int, DetectedObjects],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a report of what was detected in a dataset.

    The report has the metrics, the curves of the training, precision and recall of each class, the effect of a score
    threshold, the confusions between classes, the worst mistakes with their pictures, the speed and the settings. It
    is one HTML file that loads nothing else. Texts from the dataset, such as the names of classes, are escaped.

    Args:
        path: the file; its folder must exist.
        dataset, detections: as in `evaluate_detections`.
        metrics: the content of the metrics.json that `ssdcore evaluate` writes.
        training: the record that `fit` returns, or None.

    Raises:
        ValueError: as in `evaluate_detections`.
    """
    matches = match_objects(dataset, detections)
    # Names of files need not be valid text.
    write_atomically(path, page(dataset, matches, metrics, training).encode(errors="replace"))
