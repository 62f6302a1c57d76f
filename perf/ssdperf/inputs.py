"""The inputs of the problems: boxes, ground truths and head outputs as a detector meets them, the same in every run.

Boxes for NMS lie on whole pixels, so that every implementation computes their areas exactly. Their sides leave 1 when
divided by 3. No IoU is therefore 1/2, or within an approximate division's error of 1/2: otherwise 2 * intersection =
union would make the sum of the two areas a multiple of 3. Scores are distinct. All providers must therefore return the
same indices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssdcore.anchors import SSD300_COCO, make_anchors
from ssdperf.ssd300 import IMAGE_SIZE, LEVELS, last_levels

NMS_IMAGE_SIZE = 1024  # pixels, both sides of the images whose boxes NMS gets
LAYOUTS = ("uniform", "clustered", "chain")
HEADS = ("packed", "channels_last", "planes")


def nms_boxes(layout: str, N: int, device: str) -> tuple[Tensor, Tensor]:
    """Return `boxes` [N, 4] xyxy in pixels and distinct `scores` [N].

    - "uniform": anywhere in the image, sides up to a fifth of the image's.
    - "clustered": as from a detector, about twenty boxes around each of N / 20 objects.
    - "chain": each box suppresses only the next best one, so that each decision depends on all decisions before it.
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
        boxes = torch.cat(((torch.rand(objects, 2) * (NMS_IMAGE_SIZE - size)).int(), size), dim=1)  # x, y, w, h
        boxes = boxes[torch.randint(objects, (N,))]
        jitter = (torch.rand(N, 4) - 0.5) * 0.3 * boxes[:, 2:].repeat(1, 2)
        boxes = (boxes + jitter).round()
        boxes[:, 2:] = boxes[:, :2] + _side(boxes[:, 2:])
    else:
        size = _side(torch.randint(1, NMS_IMAGE_SIZE // 5, (N, 2)))
        corner = (torch.rand(N, 2) * (NMS_IMAGE_SIZE - size)).int()
        boxes = torch.cat((corner, corner + size), dim=1).float()
    return boxes.to(device), scores.to(device)


def _side(pixels: Tensor) -> Tensor:
    """Round down to a number that leaves 1 when divided by 3."""
    return pixels - (pixels - 1) % 3


def random_boxes(*shape: int) -> Tensor:
    """Return boxes [*shape, 4] xyxy in an image of `IMAGE_SIZE`, with sides up to 0.3 of the image's."""
    corner = torch.rand(*shape, 2) * IMAGE_SIZE * 0.7
    return torch.cat((corner, corner + (0.01 + torch.rand(*shape, 2) * 0.3) * IMAGE_SIZE), dim=-1)


def anchors(A: int, device: str) -> Tensor:
    """Return A anchors [A, 4] xyxy: SSD300's 8732, thinned out or repeated evenly."""
    boxes = make_anchors(SSD300_COCO)
    return boxes[torch.arange(A) * len(boxes) // A].to(device)


@dataclass(frozen=True)
class Truth:
    """The ground truth of a batch, ragged: the objects of all images one after the other."""

    counts: list[int]  # objects of each image
    boxes: Tensor  # [T, 4] xyxy
    labels: Tensor  # [T]
    offsets: Tensor  # [B + 1]

    def targets(self) -> list[dict[str, Tensor]]:
        """Return the ground truth in torchvision's form: a dict for each image."""
        pairs = zip(self.boxes.split(self.counts), self.labels.split(self.counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]


def truth(B: int, C: int, G: int, device: str) -> Truth:
    """Return ground truth with G objects per image on average, exponentially distributed: about COCO's for G = 7."""
    counts = [round(-G * math.log(1 - (b + 0.5) / B)) for b in range(B)]
    order = torch.randperm(B).tolist()
    counts = [counts[b] for b in order]
    total = sum(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    labels = torch.randint(1, C, (total,))
    return Truth(counts, random_boxes(total).to(device), labels.to(device), offsets.to(device))


def head_outputs(B: int, A: int, C: int, state: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return `cls_logits` [B, A, C] and `box_deltas` [B, A, 4].

    - "trained": nearly every anchor is background; about 50 anchors of each class pass a score threshold of 0.01.
    - "random": as at random initialisation; every score is about 1 / C, and every anchor passes.
    """
    logits = torch.randn(B, A, C, device=device)
    if state == "trained":
        logits[..., 0] += 8
        logits[:, :: max(1, A // 50), 1:] += 6
    else:
        logits *= 0.05
    return logits.to(dtype), torch.randn(B, A, 4, device=device).to(dtype)


def as_head(packed: Tensor, head: str) -> list[Tensor]:
    """Return `packed` [B, A, C] in the form in which a head of SSD300 leaves its outputs.

    - "packed": one tensor, as it is.
    - "channels_last", "planes": one map [B, a * C, H, W] per level, in channels_last or contiguous. A must be the
      number of anchors of SSD300's last levels, all six for 8732.
    """
    if head == "packed":
        return [packed]
    levels = last_levels(packed.shape[1])
    memory_format = torch.channels_last if head == "channels_last" else torch.contiguous_format
    maps = []
    for level, rows in zip(levels, packed.split([level.num_anchors for level in levels], dim=1), strict=True):
        cells = rows.reshape(len(packed), level.side, level.side, -1)
        maps.append(cells.permute(0, 3, 1, 2).contiguous(memory_format=memory_format))
    return maps


def as_argument(head: list[Tensor]) -> Tensor | list[Tensor]:
    """Return the outputs of `as_head` in the form in which the public ops take them."""
    return head[0] if head[0].dim() == 3 else head


def as_levels(head: list[Tensor]) -> list[Tensor]:
    """Return the outputs of `as_head` as views [B, P, a, C], the form in which the eager ops take them.

    A level has P cells with a anchors each. A packed tensor counts as one level with one anchor per cell.
    """
    if head[0].dim() == 3:
        return [head[0].unsqueeze(2)]
    pairs = zip(head, LEVELS[-len(head) :], strict=True)
    return [x.unflatten(1, (level.anchors_per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2) for x, level in pairs]


def repacked(head: list[Tensor]) -> Tensor:
    """Return the outputs of `as_head` as [B, A, C], permuted and concatenated as torchvision's own head does."""
    return head[0] if head[0].dim() == 3 else torch.cat([x.flatten(1, 2) for x in as_levels(head)], dim=1)
