"""Hypothesis strategies that generate problems for detection ops, with unambiguous correct answers.

A problem is a dict of NumPy arrays and settings, with the names of the arguments of the function in `ssdcore.kernels`.
`conformance.to_tensors` turns the arrays into tensors, so that `function(**to_tensors(problem))` is a valid call.

Coordinates are integers up to 1024 in magnitude and IoU thresholds are multiples of 1/4. With such numbers, areas,
unions and comparisons with a threshold are exact in fp32, so that two correct implementations return *equal* indices.

The problems contain what usually goes wrong: boxes lie close together so that many overlap; some boxes are repeated,
have no area, have swapped corners, or contain NaN or infinity; scores repeat; images have no ground truths; inputs are
empty.
"""

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from ssdcore.testing.reference import Array, decode_boxes, softmax

# Largest coordinate. Unions stay below 2**22, so that fp32 (24 bits) represents them exactly with two bits to spare for
# the product with a quarter.
COORDINATE = 1024
thresholds = st.sampled_from([0.25, 0.5, 0.75])  # for IoU
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def proper_boxes(draw: st.DrawFn, count: int) -> Array:
    """Boxes fp32 [count, 4] xyxy with positive area.

    Their x1, y1 lie within 4, 40 or 512 pixels of the origin on each axis, and no side is longer, so many overlap.
    """
    rng = draw(generators)
    spread = draw(st.sampled_from([4, 40, COORDINATE // 2]))
    corner = rng.integers(-spread, spread + 1, (count, 2))
    size = rng.integers(1, spread + 1, (count, 2))
    return np.concatenate((corner, corner + size), axis=1).astype(np.float32)


@st.composite
def any_boxes(draw: st.DrawFn, count: int) -> Array:
    """Boxes fp32 [count, 4] as in `proper_boxes`, up to six of them changed.

    A changed box repeats another one, has no area, has swapped corners, or has a NaN or infinite coordinate.
    """
    boxes = draw(proper_boxes(count))
    oddities = st.sampled_from(["repeat", "empty", "inverted", "nan", "inf", "-inf"])
    for oddity in draw(st.lists(oddities, max_size=min(count, 6))):
        i, j = draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))
        side = draw(st.integers(0, 3))
        if oddity == "repeat":
            boxes[i] = boxes[j]
        elif oddity == "empty":
            boxes[i, side % 2 + 2] = boxes[i, side % 2]
        elif oddity == "inverted":
            boxes[i] = boxes[i, [2, 1, 0, 3] if side % 2 else [2, 3, 0, 1]]
        else:
            boxes[i, side] = float(oddity)
    return boxes


@st.composite
def any_scores(draw: st.DrawFn, shape: tuple[int, ...]) -> Array:
    """Scores fp32 in 0..1 with ties. In half of the problems, some are 0.0, -0.0, NaN or infinite."""
    rng = draw(generators)
    num_values = draw(st.sampled_from([2, 10, 10**6]))  # few values give many ties
    scores = (rng.integers(0, num_values, shape) / num_values).astype(np.float32)
    if draw(st.booleans()):
        special = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype=np.float32), shape)
        scores = np.where(rng.random(shape) < 0.1, special, scores)
    return scores


@st.composite
def box_iou_problems(draw: st.DrawFn, max_boxes: int = 40) -> dict[str, Any]:
    """For `box_iou`: two lists of `any_boxes`."""
    return {
        "boxes1": draw(st.integers(0, max_boxes).flatmap(any_boxes)),
        "boxes2": draw(st.integers(0, max_boxes).flatmap(any_boxes)),
    }


@st.composite
def nms_problems(draw: st.DrawFn, max_boxes: int = 70, by_class: bool = False) -> dict[str, Any]:
    """For `nms`: `any_boxes` and `any_scores`. With `by_class`, for `batched_nms`.

    The class ids `idxs` are small, negative, or multiples of a million.
    """
    count = draw(st.integers(0, max_boxes))
    problem = {"boxes": draw(any_boxes(count)), "scores": draw(any_scores((count,)))}
    if by_class:
        problem["idxs"] = draw(generators).integers(0, draw(st.integers(1, 5)), count) * draw(
            st.sampled_from([1, -1, 10**6])
        )
    return problem | {"iou_threshold": draw(thresholds)}


@st.composite
def padded_nms_problems(draw: st.DrawFn, max_boxes: int = 40) -> dict[str, Any]:
    """For `batched_nms_padded`: a batch of up to three images, with and without classes and a score threshold.

    `max_output` may be 0, and may exceed the number of boxes.
    """
    batch, count = draw(st.integers(0, 3)), draw(st.integers(0, max_boxes))
    boxes = draw(any_boxes(batch * count)).reshape(batch, count, 4)
    idxs = draw(generators).integers(0, 3, (batch, count)) if draw(st.booleans()) else None
    return {
        "boxes": boxes,
        "scores": draw(any_scores((batch, count))),
        "idxs": idxs,
        "iou_threshold": draw(thresholds),
        "max_output": draw(st.integers(0, 2 * max_boxes)),
        "score_threshold": draw(st.sampled_from([None, 0.0, 0.5])),
    }


@st.composite
def ragged(draw: st.DrawFn, max_images: int = 3, max_truths: int = 6) -> Array:
    """The offsets of a batch's ground truths, int32 or int64 [B + 1]. Images may have none, and B may be 0."""
    counts = draw(st.lists(st.integers(0, max_truths), max_size=max_images))
    return np.cumsum([0, *counts], dtype=draw(st.sampled_from([np.int32, np.int64])))


@st.composite
def match_problems(draw: st.DrawFn, max_anchors: int = 60) -> dict[str, Any]:
    """For `match_anchors`: ground truths and anchors from `any_boxes`. Many ground truths share their best anchor."""
    gt_offsets = draw(ragged())
    return {
        "gt_boxes": draw(any_boxes(int(gt_offsets[-1]))),
        "gt_offsets": gt_offsets,
        "anchors": draw(st.integers(0, max_anchors).flatmap(any_boxes)),
        "iou_threshold": draw(thresholds),
    }


@st.composite
def codec_problems(draw: st.DrawFn) -> dict[str, Any]:
    """For `encode_boxes`: boxes [B, A, 4] and anchors [A, 4], all from `proper_boxes`."""
    batch, num_anchors = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    return {
        "boxes": draw(proper_boxes(batch * num_anchors)).reshape(batch, num_anchors, 4),
        "anchors": draw(proper_boxes(num_anchors)),
    }


@st.composite
def loss_problems(draw: st.DrawFn, max_anchors: int = 40) -> dict[str, Any]:
    """For `multibox_loss`: from no positives to only positives, equal logits of several anchors, invalid labels.

    In up to a fifth of the problems, a label or a match is out of range. If an anchor uses it, both losses are NaN.
    """
    rng = draw(generators)
    gt_offsets = draw(ragged())
    batch, num_gt = len(gt_offsets) - 1, int(gt_offsets[-1])
    num_anchors, num_classes = draw(st.integers(0, max_anchors)), draw(st.integers(2, 6))
    logits = rng.normal(size=(batch, num_anchors, num_classes)) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    if num_anchors and draw(st.booleans()):
        logits = logits[:, rng.integers(0, num_anchors, num_anchors)]
    positive_share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    matched = rng.integers(0, 2**30, (batch, num_anchors)) % np.maximum(np.diff(gt_offsets), 1)[:, None]
    positive = (rng.random((batch, num_anchors)) < positive_share) & (np.diff(gt_offsets) > 0)[:, None]
    labels = rng.integers(1, num_classes, num_gt)
    invalid = draw(st.sampled_from([None] * 8 + ["label", "match"]))
    if invalid == "label" and num_gt:
        labels[draw(st.integers(0, num_gt - 1))] = draw(st.sampled_from([-1, 0, num_classes]))
    elif invalid == "match" and num_anchors and batch:
        matched[0, 0], positive[0, 0] = np.diff(gt_offsets)[0], True  # one past the image's last ground truth
    return {
        "cls_logits": logits.astype(np.float32),
        "box_deltas": rng.normal(size=(batch, num_anchors, 4)).astype(np.float32),
        "matched_idxs": np.where(positive, matched, -1),
        "gt_boxes": draw(proper_boxes(num_gt)),
        "gt_labels": labels,
        "gt_offsets": gt_offsets,
        "anchors": draw(proper_boxes(num_anchors)),
        "neg_pos_ratio": draw(st.sampled_from([0.0, 0.7, 3.0])),
        "beta": draw(st.sampled_from([0.0, 0.11, 1.0])),
        "min_negatives": draw(st.sampled_from([0, 5])),
        "normalizer": draw(st.sampled_from(["batch", "image"])),
    }


@st.composite
def postprocess_problems(draw: st.DrawFn, max_anchors: int = 40) -> dict[str, Any]:
    """For `postprocess_detections`: each decoded box is its anchor, moved by at most its own size.

    On each axis, the move is 0 or exactly one size. Therefore boxes decode to integer coordinates, and NMS and clipping
    are exact. Scores are equal, or differ by more than rounding errors, from one another and from the threshold.
    """
    rng = draw(generators)
    batch, num_anchors = draw(st.integers(0, 2)), draw(st.integers(0, max_anchors))
    num_classes = draw(st.integers(1, 4))
    # Sizes are even, so that half a size is an integer.
    anchors = 2 * np.round(draw(proper_boxes(num_anchors)) / 2)
    anchors[:, 2:] = np.maximum(anchors[:, 2:], anchors[:, :2] + 2)
    deltas = np.zeros((batch, num_anchors, 4), dtype=np.float32)
    deltas[..., :2] = 10 * rng.choice([-1, 0, 0, 0, 1], (batch, num_anchors, 2))
    logits = rng.normal(size=(batch, num_anchors, num_classes)) * draw(st.sampled_from([0.1, 3.0]))
    if num_anchors and draw(st.booleans()):
        logits = logits[:, rng.integers(0, num_anchors, num_anchors)]
    sizes = np.array([[draw(st.integers(1, COORDINATE)), draw(st.integers(1, COORDINATE))] for _ in range(batch)])
    threshold = draw(st.sampled_from([0.0, 0.01, 0.3]))
    for image in logits.astype(np.float32):
        # The order of scores that differ only by rounding errors is not defined, so there must be none.
        values = np.unique(np.append(softmax(image)[:, 1:], threshold))
        assume((np.diff(values) > 1e-6 * values[1:]).all())
    problem = {
        "cls_logits": logits.astype(np.float32),
        "box_deltas": deltas,
        "anchors": anchors.astype(np.float32),
        "image_sizes": sizes.reshape(batch, 2),
        "score_threshold": threshold,
        "iou_threshold": draw(thresholds),
        "topk_candidates": draw(st.sampled_from([1, 7, 400])),
        "max_detections": draw(st.sampled_from([1, 10, 200])),
    }
    assert np.array_equal(decode_boxes(deltas, anchors), np.round(decode_boxes(deltas, anchors)))
    return problem
