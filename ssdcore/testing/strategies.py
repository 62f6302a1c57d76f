"""Hypothesis strategies: problems for detection ops on which the right answer is beyond dispute.

Coordinates are integers up to 1024 and IoU thresholds multiples of 1/4, so that areas, unions and comparisons with a
threshold are exact in fp32 and two right implementations give *equal* indices. Boxes crowd together, so that many
overlap; some repeat, have no area, are inverted, or hold NaN and infinity; scores repeat. Every problem is a dict of
NumPy arrays and settings, named as the arguments of the function in `ssdcore.kernels`.
"""

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from ssdcore.testing.reference import Array, decode_boxes, softmax

COORDINATE = 1024  # largest coordinate: unions stay below 2**22, exact in fp32 with two bits to spare for a quarter
thresholds = st.sampled_from([0.25, 0.5, 0.75])
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def proper_boxes(draw: st.DrawFn, count: int) -> Array:
    """fp32 [count, 4] xyxy with positive area, in a crowd of random tightness, negative coordinates included."""
    rng = draw(generators)
    spread = draw(st.sampled_from([4, 40, COORDINATE // 2]))
    corner = rng.integers(-spread, spread + 1, (count, 2))
    size = rng.integers(1, spread + 1, (count, 2))
    return np.concatenate((corner, corner + size), axis=1).astype(np.float32)


@st.composite
def any_boxes(draw: st.DrawFn, count: int) -> Array:
    """`proper_boxes`, among them repeated, empty, inverted, NaN and infinite ones."""
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
    """fp32 scores in 0..1 with ties, now and then both zeros, NaN and infinity."""
    rng = draw(generators)
    levels = draw(st.sampled_from([2, 10, 10**6]))
    scores = (rng.integers(0, levels, shape) / levels).astype(np.float32)
    if draw(st.booleans()):
        odd = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], dtype=np.float32), shape)
        scores = np.where(rng.random(shape) < 0.1, odd, scores)
    return scores


@st.composite
def box_iou_problems(draw: st.DrawFn, max_boxes: int = 40) -> dict[str, Any]:
    return {
        "boxes1": draw(st.integers(0, max_boxes).flatmap(any_boxes)),
        "boxes2": draw(st.integers(0, max_boxes).flatmap(any_boxes)),
    }


@st.composite
def nms_problems(draw: st.DrawFn, max_boxes: int = 70, by_class: bool = False) -> dict[str, Any]:
    """For `nms`, or with `by_class` for `batched_nms`."""
    count = draw(st.integers(0, max_boxes))
    problem = {"boxes": draw(any_boxes(count)), "scores": draw(any_scores((count,)))}
    if by_class:
        problem["idxs"] = draw(generators).integers(0, draw(st.integers(1, 5)), count) * draw(
            st.sampled_from([1, -1, 10**6])
        )
    return problem | {"iou_threshold": draw(thresholds)}


@st.composite
def padded_nms_problems(draw: st.DrawFn, max_boxes: int = 40) -> dict[str, Any]:
    """For `batched_nms_padded`."""
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
    """int32 or int64 [B + 1] offsets of a batch's ground truths; images without any among them."""
    counts = draw(st.lists(st.integers(0, max_truths), max_size=max_images))
    return np.cumsum([0, *counts], dtype=draw(st.sampled_from([np.int32, np.int64])))


@st.composite
def match_problems(draw: st.DrawFn, max_anchors: int = 60) -> dict[str, Any]:
    """For `match_anchors`: ground truths and anchors of every kind, many sharing their best anchor."""
    gt_offsets = draw(ragged())
    return {
        "gt_boxes": draw(any_boxes(int(gt_offsets[-1]))),
        "gt_offsets": gt_offsets,
        "anchors": draw(st.integers(0, max_anchors).flatmap(any_boxes)),
        "iou_threshold": draw(thresholds),
    }


@st.composite
def codec_problems(draw: st.DrawFn) -> dict[str, Any]:
    """Boxes [B, A, 4] and anchors [A, 4], all with area."""
    batch, num_anchors = draw(st.integers(0, 3)), draw(st.integers(0, 40))
    return {
        "boxes": draw(proper_boxes(batch * num_anchors)).reshape(batch, num_anchors, 4),
        "anchors": draw(proper_boxes(num_anchors)),
    }


@st.composite
def loss_problems(draw: st.DrawFn, max_anchors: int = 40) -> dict[str, Any]:
    """For `multibox_loss`: from no positive at all to nothing but positives, equal rows of logits, wrong labels."""
    rng = draw(generators)
    gt_offsets = draw(ragged())
    batch, num_truths = len(gt_offsets) - 1, int(gt_offsets[-1])
    num_anchors, num_classes = draw(st.integers(0, max_anchors)), draw(st.integers(2, 6))
    logits = rng.normal(size=(batch, num_anchors, num_classes)) * draw(st.sampled_from([0.1, 3.0, 30.0]))
    if num_anchors and draw(st.booleans()):
        logits = logits[:, rng.integers(0, num_anchors, num_anchors)]
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))  # of positives
    matched = rng.integers(0, 2**30, (batch, num_anchors)) % np.maximum(np.diff(gt_offsets), 1)[:, None]
    positive = (rng.random((batch, num_anchors)) < share) & (np.diff(gt_offsets) > 0)[:, None]
    labels = rng.integers(1, num_classes, num_truths)
    wrong = draw(st.sampled_from([None] * 8 + ["label", "match"]))
    if wrong == "label" and num_truths:
        labels[draw(st.integers(0, num_truths - 1))] = draw(st.sampled_from([-1, 0, num_classes]))
    elif wrong == "match" and num_anchors and batch:
        matched[0, 0], positive[0, 0] = np.diff(gt_offsets)[0], True  # one past the image's last
    return {
        "cls_logits": logits.astype(np.float32),
        "box_deltas": rng.normal(size=(batch, num_anchors, 4)).astype(np.float32),
        "matched_idxs": np.where(positive, matched, -1),
        "gt_boxes": draw(proper_boxes(num_truths)),
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
    """For `postprocess_detections`: boxes are the anchors themselves, moved by whole anchor sizes at the most.

    Zero and whole-size offsets decode to integers, so that NMS and clipping are exact.
    """
    rng = draw(generators)
    batch, num_anchors = draw(st.integers(0, 2)), draw(st.integers(0, max_anchors))
    num_classes = draw(st.integers(1, 4))
    # Even sizes: half of one is an integer.
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
        # Scores are equal, or further apart than rounding: the order of near ties is nobody's to judge.
        steps = np.unique(np.append(softmax(image)[:, 1:], threshold))
        assume((np.diff(steps) > 1e-6 * steps[1:]).all())
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
