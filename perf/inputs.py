"""The problems that are timed: boxes, ground truths and head outputs as a detector meets them, alike on every run.

Boxes for NMS lie on whole pixels, so that areas are exact whoever computes them. Their sides leave 1 when divided by 3:
no IoU is then 1/2, or within an approximate division's error of it, for 2 * intersection = union would make the sum of
two areas a multiple of 3. Scores are distinct. So all providers must return the same indices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssdcore.anchors import SSD300_COCO, make_anchors

IMAGE = 1024  # pixels, of the images that NMS works on
LAYOUTS = ("uniform", "clustered", "chain")


def nms_boxes(layout: str, N: int, device: str) -> tuple[Tensor, Tensor]:
    """`boxes` [N, 4] xyxy and distinct `scores` [N].

    - "uniform": anywhere in the image, sides up to a fifth of it.
    - "clustered": a detector's, some twenty boxes about each of N / 20 objects.
    - "chain": each suppresses the next best alone, so that whether a box is kept hangs on all that are better.
    """
    scores = (torch.randperm(N) + 1) / N
    if layout == "chain":
        left = torch.arange(N) * 4.0  # neighbours of 16 x 16 pixels overlap by IoU 0.6, second neighbours by 0.33
        boxes = torch.stack((left, torch.zeros(N), left + 16, torch.full((N,), 16.0)), dim=1)
        scores = scores.sort(descending=True).values
        shuffled = torch.randperm(N)
        boxes, scores = boxes[shuffled], scores[shuffled]
    elif layout == "clustered":
        objects = max(1, N // 20)
        size = torch.randint(16, 256, (objects, 2))
        boxes = torch.cat(((torch.rand(objects, 2) * (IMAGE - size)).int(), size), dim=1)  # x, y, w, h
        boxes = boxes[torch.randint(objects, (N,))]
        jitter = (torch.rand(N, 4) - 0.5) * 0.3 * boxes[:, 2:].repeat(1, 2)
        boxes = (boxes + jitter).round()
        boxes[:, 2:] = boxes[:, :2] + _side(boxes[:, 2:])
    else:
        size = _side(torch.randint(1, IMAGE // 5, (N, 2)))
        corner = (torch.rand(N, 2) * (IMAGE - size)).int()
        boxes = torch.cat((corner, corner + size), dim=1).float()
    return boxes.to(device), scores.to(device)


def _side(pixels: Tensor) -> Tensor:
    """The next smaller number that leaves 1 when divided by 3."""
    return pixels - (pixels - 1) % 3


def random_boxes(*shape: int, size: float = 300.0) -> Tensor:
    """[*shape, 4] xyxy in an image of `size` pixels, sides up to 0.3 of it."""
    corner = torch.rand(*shape, 2) * size * 0.7
    return torch.cat((corner, corner + (0.01 + torch.rand(*shape, 2) * 0.3) * size), dim=-1)


def anchors(A: int, device: str) -> Tensor:
    """SSD300's 8732 default boxes, thinned or repeated evenly to A: [A, 4] xyxy."""
    boxes = make_anchors(SSD300_COCO)
    return boxes[torch.arange(A) * len(boxes) // A].to(device)


@dataclass(frozen=True)
class Truth:
    """The objects of a batch, ragged."""

    counts: list[int]
    boxes: Tensor  # [T, 4] xyxy
    labels: Tensor  # [T]
    offsets: Tensor  # [B + 1]

    def targets(self) -> list[dict[str, Tensor]]:
        """The same, as torchvision takes it."""
        pairs = zip(self.boxes.split(self.counts), self.labels.split(self.counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]


def truth(B: int, C: int, G: int, device: str) -> Truth:
    """G objects an image in the mean, exponentially distributed: COCO's, about, with G = 7."""
    counts = [round(-G * math.log(1 - (b + 0.5) / B)) for b in range(B)]
    order = torch.randperm(B).tolist()
    counts = [counts[b] for b in order]
    total = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    labels = torch.randint(1, C, (total,))
    return Truth(counts, random_boxes(total).to(device), labels.to(device), offsets.to(device))


def head_outputs(B: int, A: int, C: int, state: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """`cls_logits` [B, A, C] and `box_deltas` [B, A, 4].

    - "trained": background nearly everywhere; about 50 anchors of each class pass a threshold of 0.01.
    - "random": every score is about 1 / C, and everything passes.
    """
    logits = torch.randn(B, A, C, device=device)
    if state == "trained":
        logits[..., 0] += 8
        logits[:, :: max(1, A // 50), 1:] += 6
    else:
        logits *= 0.05
    return logits.to(dtype), torch.randn(B, A, 4, device=device).to(dtype)


HEADS = ("packed", "channels_last", "planes")


def as_head(packed: Tensor, head: str) -> list[Tensor]:
    """SSD300's outputs [B, 8732, C] as they are, one tensor, or as the maps [B, a * C, H, W] that convolutions leave,
    in channels_last or, as planes, contiguous."""
    if head == "packed":
        return [packed]
    maps, first = [], 0
    memory_format = torch.channels_last if head == "channels_last" else torch.contiguous_format
    for side, per_cell in zip(SSD300_COCO.grid_sizes, SSD300_COCO.anchors_per_cell, strict=True):
        rows = packed[:, first : first + side * side * per_cell]
        first += side * side * per_cell
        maps.append(
            rows.reshape(len(packed), side, side, -1).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        )
    return maps


def levels(head: list[Tensor]) -> list[Tensor]:
    """The same as views [B, P, a, C], as the implementations of the ops take it."""
    if len(head) == 1:
        return [head[0].unsqueeze(2)]
    pairs = zip(head, SSD300_COCO.anchors_per_cell, strict=True)
    return [x.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2) for x, per_cell in pairs]


def repacked(head: list[Tensor]) -> Tensor:
    """The same as [B, 8732, C], permuted and concatenated as by torchvision's own head."""
    return head[0] if len(head) == 1 else torch.cat([x.flatten(1, 2) for x in levels(head)], dim=1)
