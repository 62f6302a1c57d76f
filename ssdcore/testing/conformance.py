"""Checks that a detection op conforms to its contract. They can test any implementation.

    from ssdcore.testing import conformance

    conformance.check_nms(torchvision.ops.nms)
    conformance.check_nms(my_nms, device="cuda", max_examples=1000)

There is one `check_<name>` for every function in `ssdcore.kernels`. Its first argument is the function to test, which
is called with the arguments of the function of that name in `ssdcore.kernels`: `check_nms`, for example, calls
`my_nms(boxes, scores, iou_threshold)` with tensors. The docstring of a check says how it passes the arguments, because
a function of your own may name them differently. The contract, ties and NaN included, is in the docstring of the
function in `ssdcore.kernels`.

Every check draws `max_examples` problems from `ssdcore.testing.strategies`, whose docstrings describe the problems. It
moves them to `device`, calls the function and compares the result with the oracle in `ssdcore.testing.reference`.
Indices, labels and counts must be equal and have the documented dtype. Floating-point results must be within the
tolerance of `ssdcore.testing.close.assert_close`.

A check returns None if the function conforms. Otherwise it raises AssertionError with the simplest failing problem that
Hypothesis found, in a note that begins with "problem =". If the function raises an exception, the check raises it.

A check uses the active Hypothesis profile for everything but the number of examples and the deadline, which is off.
Load a profile with `derandomize=True` to get the same problems in every run.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given, note, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ssdcore.testing import reference, strategies
from ssdcore.testing.close import assert_close

Function = Callable[..., Any]
Problem = dict[str, Any]

COTANGENT = 1.3  # gradient of each loss in the backward pass; with 1, a backward that ignores it would pass


def to_tensors(problem: Problem, device: torch.device | str = "cpu") -> Problem:
    """Return a copy of the problem whose arrays are tensors on `device`. Other values are unchanged."""
    return {
        name: torch.from_numpy(value.copy()).to(device) if isinstance(value, np.ndarray) else value
        for name, value in problem.items()
    }


def check_box_iou(box_iou: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Assert that `box_iou(boxes1=, boxes2=)` returns the IoU of every pair of boxes, within rounding errors.

    An IoU of 0/0 must be NaN. The boxes include repeated, empty, inverted, NaN and infinite ones.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        assert_close(box_iou(**tensors), reference.box_iou(**problem))

    _run(strategies.box_iou_problems(), compare, device, max_examples)


def check_nms(nms: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Assert that `nms(boxes, scores, iou_threshold)` returns exactly the indices that greedy NMS keeps, in int64.

    They must be in descending order of score, with ties in order of index and NaN scores first. A box is suppressed
    only if its IoU with a kept box is strictly greater than the threshold.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(nms(*tensors.values()), reference.nms(*problem.values()), torch.int64)

    _run(strategies.nms_problems(), compare, device, max_examples)


def check_batched_nms(batched_nms: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Assert that `batched_nms(boxes, scores, idxs, iou_threshold)` is exactly `nms` within each class.

    The indices of all classes must be in descending order of score. Boxes of different classes must not suppress one
    another, also with negative coordinates and with negative or huge class ids.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(batched_nms(*tensors.values()), reference.batched_nms(*problem.values()), torch.int64)

    _run(strategies.nms_problems(by_class=True), compare, device, max_examples)


def check_batched_nms_padded(
    batched_nms_padded: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Assert that `batched_nms_padded` returns exactly the first `max_output` indices of `batched_nms` per image.

    The function is called with keyword arguments: `boxes`, `scores`, `idxs` (may be None), `iou_threshold`,
    `max_output` and `score_threshold` (may be None). It must return the indices, int64 padded with -1, and their
    number, int32. A score equal to `score_threshold` does not pass, nor does a NaN score.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        kept, count = batched_nms_padded(**tensors)
        expected_kept, expected_count = reference.batched_nms_padded(**problem)
        _assert_equal(kept, expected_kept, torch.int64, "kept")
        _assert_equal(count, expected_count, torch.int32, "count")

    _run(strategies.padded_nms_problems(), compare, device, max_examples)


def check_encode_boxes(encode_boxes: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Assert that `encode_boxes(boxes=, anchors=)` returns the deltas for the default weights.

    `boxes` are [B, A, 4] and `anchors` [A, 4], so the function must broadcast.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        # Deltas can be as large as weight * distance / size = 10 * 1024 / 1, which the relative tolerance covers.
        assert_close(encode_boxes(**tensors), reference.encode_boxes(**problem))

    _run(strategies.codec_problems(), compare, device, max_examples)


def check_decode_boxes(decode_boxes: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Assert that `decode_boxes(deltas, anchors)` returns the boxes for the default weights.

    `deltas` are [B, A, 4] and `anchors` [A, 4], so the function must broadcast. Sizes must be limited to 1000 / 16
    times the size of the anchor.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        deltas = reference.encode_boxes(problem["boxes"], problem["anchors"]).astype(np.float32)
        expected = reference.decode_boxes(deltas, problem["anchors"])
        actual = decode_boxes(torch.from_numpy(deltas).to(device), tensors["anchors"])
        # A coordinate is the difference of a centre and half a size, each of which has a rounding error in pixels.
        assert_close(actual, expected, scale=1 + float(np.abs(expected).max(initial=0)))

    _run(strategies.codec_problems(), compare, device, max_examples)


def check_match_anchors(
    match_anchors: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Assert that `match_anchors(gt_boxes=, gt_offsets=, anchors=, iou_threshold=)` returns exactly the right matches.

    The result must be int64 [B, A]: the index of a ground truth within the anchor's image, or -1. This checks the
    threshold (inclusive), ties, ground truths that claim their best anchor, several claims on one anchor, and ground
    truths that claim none because they overlap no anchor, have no area or are NaN.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(match_anchors(**tensors), reference.match_anchors(**problem), torch.int64)

    _run(strategies.match_problems(), compare, device, max_examples)


def check_multibox_loss(
    multibox_loss: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Assert that `multibox_loss` returns the right losses, and that their gradients are right.

    The function is called with keyword arguments named as in `ssdcore.kernels.multibox_loss`, without `weights`, and
    must return the classification loss and the box regression loss, in this order. `cls_logits` and `box_deltas` are
    packed, [B, A, C] and [B, A, 4].

    The slope of each loss along a random direction of its input must equal the central difference of the oracle in
    float64: the classification loss for `cls_logits`, the box regression loss for `box_deltas`. Problems in which the
    slope is not well defined, because of a kink of smooth L1 or because rounding decides which negatives are mined, are
    left out of this comparison.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        logits = tensors["cls_logits"].requires_grad_()
        deltas = tensors["box_deltas"].requires_grad_()
        losses = multibox_loss(**tensors)
        expected = reference.multibox_loss(**problem)
        assert_close(losses[0], expected[0], scale=1 + float(np.abs(problem["cls_logits"]).max(initial=0)))
        assert_close(losses[1], expected[1])
        cotangents = [torch.full_like(loss, COTANGENT) for loss in losses]
        grads = (
            torch.autograd.grad(losses[0], logits, cotangents[0], retain_graph=True),
            torch.autograd.grad(losses[1], deltas, cotangents[1]),
        )
        for index, (name, (grad,)) in enumerate(zip(("cls_logits", "box_deltas"), grads, strict=True)):
            _check_slope(problem, name, index, grad)

    _run(strategies.loss_problems(), compare, device, max_examples)


def check_postprocess_detections(
    postprocess_detections: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Assert that `postprocess_detections` returns the right detections in the right order, and pads correctly.

    The function is called with keyword arguments named as in `ssdcore.kernels.postprocess_detections`, without
    `weights`, and must return boxes, scores, labels (int64) and the number of detections (int32), in this order. It may
    also return, fifth, the anchors that the detections came from (int64). `cls_logits` and `box_deltas` are packed,
    [B, A, C] and [B, A, 4]. Labels, numbers and anchors must be equal to the oracle's; scores and boxes must be close.
    """

    def compare(problem: Problem, tensors: Problem) -> None:
        boxes, scores, labels, count, *anchor_idxs = postprocess_detections(**tensors)
        expected = reference.postprocess_detections(**problem)
        _assert_equal(count, expected[3], torch.int32, "num_detections")
        _assert_equal(labels, expected[2], torch.int64, "labels")
        if anchor_idxs:
            _assert_equal(anchor_idxs[0], expected[4], torch.int64, "anchor_idxs")
        assert_close(scores, expected[1], name="scores")
        assert_close(boxes, expected[0], scale=strategies.COORDINATE, name="boxes")

    _run(strategies.postprocess_problems(), compare, device, max_examples)


def _run(
    problems: SearchStrategy[Problem],
    compare: Callable[[Problem, Problem], None],
    device: torch.device | str,
    max_examples: int,
) -> None:
    """Call `compare` with each problem, as arrays and as tensors on `device`."""

    @settings(max_examples=max_examples, deadline=None, report_multiple_bugs=False)
    @given(problems)
    def check(problem: Problem) -> None:
        note(f"problem = {problem}")
        compare(problem, to_tensors(problem, device))

    check()


def _assert_equal(actual: Tensor, expected: Any, dtype: torch.dtype, name: str = "result") -> None:
    assert actual.dtype == dtype, f"{name} must be {dtype}, got {actual.dtype}"
    np.testing.assert_array_equal(actual.cpu().numpy(), expected, err_msg=name)


def _check_slope(problem: Problem, name: str, index: int, grad: Tensor) -> None:
    """Compare `grad`, of loss `index` for input `name`, with the oracle's central difference in a random direction."""
    direction = np.random.default_rng(0).normal(size=problem[name].shape)
    step = 1e-7
    ends = [
        reference.multibox_loss(**problem | {name: np.float64(problem[name]) + sign * step * direction})[index]
        for sign in (-1, 1)
    ]
    slope = float((grad.cpu().double().numpy() * direction).sum()) / COTANGENT
    # The step may cross a kink of smooth L1, or change which of two equal negatives is mined. Then the slope differs on
    # the two sides, which shows as a curvature, and the central difference is not the gradient.
    middle = reference.multibox_loss(**problem)[index]
    if abs(ends[0] + ends[1] - 2 * middle) > step * 1e-4 or _has_near_ties(problem["cls_logits"]):
        return
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=1e-4, atol=1e-4, err_msg=name)


def _has_near_ties(cls_logits: np.ndarray) -> bool:
    """Whether two negatives of an image are so close that rounding may decide which of them is mined."""
    for image in cls_logits:
        hardness = np.sort([reference.cross_entropy(logits, 0) for logits in image])
        gaps = np.diff(hardness[hardness > 1e-5])  # the gradients of easier negatives are at most 1e-5
        if ((gaps > 0) & (gaps < 1e-5)).any():
            return True
    return False
