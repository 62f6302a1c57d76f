"""Properties that a detection op must have, to be pointed at any implementation.

Each `check_*` draws problems from `strategies`, runs the given function, and compares it with the oracle of
`reference`: indices, labels and counts must be equal, numbers within `close.assert_close`. It raises AssertionError
with the smallest problem it found that goes wrong. A function takes the arguments of its namesake in `ssdcore.kernels`.

    check_nms(torchvision.ops.nms)
    check_nms(my_nms, device="cuda", max_examples=1000)
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

COTANGENT = 1.3  # of each loss; with 1, a backward that ignores it would pass


def to_tensors(problem: Problem, device: torch.device | str = "cpu") -> Problem:
    """The problem with its arrays as tensors on `device`."""
    return {
        name: torch.from_numpy(value.copy()).to(device) if isinstance(value, np.ndarray) else value
        for name, value in problem.items()
    }


def _run(
    problems: SearchStrategy[Problem],
    compare: Callable[[Problem, Problem], None],
    device: torch.device | str,
    max_examples: int,
) -> None:
    @settings(max_examples=max_examples, deadline=None, report_multiple_bugs=False)
    @given(problems)
    def check(problem: Problem) -> None:
        note(f"problem = {problem}")
        compare(problem, to_tensors(problem, device))

    check()


def _assert_equal(actual: Tensor, expected: Any, dtype: torch.dtype, name: str = "result") -> None:
    assert actual.dtype == dtype, f"{name} must be {dtype}, got {actual.dtype}"
    np.testing.assert_array_equal(actual.cpu().numpy(), expected, err_msg=name)


def check_box_iou(box_iou: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Values within rounding of the true quotient; NaN where that is 0/0."""

    def compare(problem: Problem, tensors: Problem) -> None:
        assert_close(box_iou(**tensors), reference.box_iou(**problem))

    _run(strategies.box_iou_problems(), compare, device, max_examples)


def check_nms(nms: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """The very indices, in the very order, that greedy NMS keeps."""

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(nms(*tensors.values()), reference.nms(*problem.values()), torch.int64)

    _run(strategies.nms_problems(), compare, device, max_examples)


def check_batched_nms(batched_nms: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """The same within each class, whatever the coordinates and class numbers."""

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(batched_nms(*tensors.values()), reference.batched_nms(*problem.values()), torch.int64)

    _run(strategies.nms_problems(by_class=True), compare, device, max_examples)


def check_batched_nms_padded(
    batched_nms_padded: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """The same for a batch, cut off and padded."""

    def compare(problem: Problem, tensors: Problem) -> None:
        kept, count = batched_nms_padded(**tensors)
        expected_kept, expected_count = reference.batched_nms_padded(**problem)
        _assert_equal(kept, expected_kept, torch.int64, "kept")
        _assert_equal(count, expected_count, torch.int32, "count")

    _run(strategies.padded_nms_problems(), compare, device, max_examples)


def check_encode_boxes(encode_boxes: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """Offsets of boxes from anchors."""

    def compare(problem: Problem, tensors: Problem) -> None:
        # Offsets reach weight * distance / size: 10 * 1024 / 1.
        assert_close(encode_boxes(**tensors), reference.encode_boxes(**problem))

    _run(strategies.codec_problems(), compare, device, max_examples)


def check_decode_boxes(decode_boxes: Function, *, device: torch.device | str = "cpu", max_examples: int = 100) -> None:
    """The inverse of encoding, with the sizes clamped."""

    def compare(problem: Problem, tensors: Problem) -> None:
        deltas = reference.encode_boxes(problem["boxes"], problem["anchors"]).astype(np.float32)
        expected = reference.decode_boxes(deltas, problem["anchors"])
        actual = decode_boxes(torch.from_numpy(deltas).to(device), tensors["anchors"])
        # A corner is a difference of a centre and half a size, each rounded in pixels.
        assert_close(actual, expected, scale=1 + float(np.abs(expected).max(initial=0)))

    _run(strategies.codec_problems(), compare, device, max_examples)


def check_match_anchors(
    match_anchors: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """The very assignment: thresholds, ties, claims, and ground truths that claim nothing."""

    def compare(problem: Problem, tensors: Problem) -> None:
        _assert_equal(match_anchors(**tensors), reference.match_anchors(**problem), torch.int64)

    _run(strategies.match_problems(), compare, device, max_examples)


def check_multibox_loss(
    multibox_loss: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Both losses, and their gradients against a float64 finite difference along a random direction."""

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


def _check_slope(problem: Problem, name: str, index: int, grad: Tensor) -> None:
    """`grad` of loss `index` in `name`, along a random direction, against the oracle's central difference."""
    direction = np.random.default_rng(0).normal(size=problem[name].shape)
    step = 1e-7
    ends = [
        reference.multibox_loss(**problem | {name: np.float64(problem[name]) + sign * step * direction})[index]
        for sign in (-1, 1)
    ]
    slope = float((grad.cpu().double().numpy() * direction).sum()) / COTANGENT
    # A step may cross a kink of smooth L1 or change which of two equal negatives is mined: both move the slope,
    # which is then not the point of the comparison; the middle of the interval tells.
    middle = reference.multibox_loss(**problem)[index]
    if abs(ends[0] + ends[1] - 2 * middle) > step * 1e-4 or _has_near_ties(problem["cls_logits"]):
        return
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=1e-4, atol=1e-4, err_msg=name)


def _has_near_ties(cls_logits: np.ndarray) -> bool:
    """Whether two negatives differ by so little that rounding may decide which is mined."""
    for image in cls_logits:
        hardness = np.sort([reference.cross_entropy(logits, 0) for logits in image])
        gaps = np.diff(hardness[hardness > 1e-5])  # the gradients of the rest are no larger than that
        if ((gaps > 0) & (gaps < 1e-5)).any():
            return True
    return False


def check_postprocess_detections(
    postprocess_detections: Function, *, device: torch.device | str = "cpu", max_examples: int = 100
) -> None:
    """Detections, their order and their padding."""

    def compare(problem: Problem, tensors: Problem) -> None:
        boxes, scores, labels, count = postprocess_detections(**tensors)
        expected = reference.postprocess_detections(**problem)
        _assert_equal(count, expected[3], torch.int32, "num_detections")
        _assert_equal(labels, expected[2], torch.int64, "labels")
        assert_close(scores, expected[1], name="scores")
        assert_close(boxes, expected[0], scale=strategies.COORDINATE, name="boxes")

    _run(strategies.postprocess_problems(), compare, device, max_examples)
