"""How two results of one problem are compared. Each comparison returns what is wrong, or "" where they agree."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

ROUNDING = 1e-5  # |a - b| / |b|; fp32 sums in another order differ by less
NEAR_TIE = 0.05  # |a - b| / |b|; the last bit of a loss decides which of two anchors is mined: one row in hundreds
CLAIMED_TWICE = 0.02  # of the matches; where two objects claim one anchor, torchvision on a GPU lets either have it
# torchvision's NMS on a GPU separates the classes by adding to the coordinates, which rounds them.
SAME_BOX = 0.5  # pixels; boxes that are closer count as the same
SAME_DETECTIONS = 0.95  # of an image's detections; after such a rounding a few boxes are others


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result: one tensor or a sequence of tensors."""
    return [result] if isinstance(result, Tensor) else list(result)


def within(tolerance: float) -> Callable[[Any, Any], str]:
    """Return a comparison of tensors.

    Integers must be equal. For floats, the norm of the difference must be at most `tolerance` times the norm of the
    expected tensor. A NaN is always wrong.
    """

    def difference(found: Any, expected: Any) -> str:
        for number, (a, b) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
            if a.shape != b.shape:
                return f"result {number} has shape {list(a.shape)}, expected {list(b.shape)}"
            if not b.is_floating_point():
                if not torch.equal(a, b):
                    return f"result {number} differs in {int((a != b).sum())} of {b.numel()} integers"
                continue
            a, b = a.double(), b.double()
            distance, size = (a - b).norm().item(), b.norm().item()
            if not distance <= tolerance * size:  # not `>`, because comparisons with NaN are false
                return f"result {number} is off by {distance / size if size else distance:.2g} of its norm"
        return ""

    return difference


rounded = within(ROUNDING)


def same_matches(found: Tensor, expected: Tensor) -> str:
    """Compare matches; a few may differ, where torchvision resolves two claims on one anchor otherwise."""
    wrong, matches = int((found != expected).sum()), int((expected >= 0).sum())
    return "" if wrong <= CLAIMED_TWICE * matches else f"{wrong} anchors differ, of {matches} matched"


def same_kept(found: Any, expected: Any) -> str:
    """Compare padded NMS with another padded result, or with a list of the indices that each image kept."""
    if isinstance(found, list):
        max_output = expected[0].shape[1]
        rows = torch.stack(
            [pad(kept[:max_output], (0, max(0, max_output - len(kept))), value=-1) for kept in found]
        )  # [B, max_output]
        found = rows, torch.tensor([min(len(kept), max_output) for kept in found], device=rows.device)
    return within(0)(found, expected)


def same_detections(found: Any, expected: Any) -> str:
    """Compare the detections of each image.

    The sorted scores must agree within `NEAR_TIE`. At least `SAME_DETECTIONS` of the boxes, with their labels, must be
    among the expected ones.
    """
    for image, (ours, theirs) in enumerate(zip(_per_image(found), _per_image(expected), strict=True)):
        if note := within(NEAR_TIE)(ours["scores"], theirs["scores"]):
            return f"image {image}: scores: {note}"
        # The label as a fifth coordinate, scaled up so that boxes with different labels are far apart.
        points = [torch.cat((x["boxes"], x["labels"][:, None] * 1e4), dim=1) for x in (ours, theirs)]
        if len(points[0]):
            share = (torch.cdist(*points, p=torch.inf).amin(dim=1) < SAME_BOX).float().mean().item()
            if share < SAME_DETECTIONS:
                return f"image {image}: only {share:.0%} of the detections are among the expected ones"
    return ""


def _per_image(result: Any) -> list[dict[str, Tensor]]:
    """Return the detections of each image, from a list that holds them already or from a batch's padded tensors."""
    if isinstance(result, list):
        return result
    names = ("boxes", "scores", "labels")
    return [
        {name: x[image, :count] for name, x in zip(names, result[:3], strict=True)}
        for image, count in enumerate(result[3].tolist())
    ]
