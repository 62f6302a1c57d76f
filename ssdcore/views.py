"""Detect objects in several views of the same images, and average what was found.

A view is an image as one model sees it, or its mirror image. A model sees an image at one size, that of its anchors.
Therefore several sizes need several models, for example an SSD300 and an SSD512.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssdcore.kernels import Detections, batched_nms_padded
from ssdcore.models import SSD
from ssdcore.objects import DetectedObjects
from ssdcore.stopwatch import Stopwatch


@torch.inference_mode()
def detect_batch(
    models: Sequence[SSD],
    images: Mapping[int, Tensor],
    sizes: Tensor,
    *,
    flip: bool = False,
    stopwatch: Stopwatch | None = None,
) -> list[DetectedObjects]:
    """Detect objects in a batch that `eval_transform` resized.

    With one view, the result is what the model detects. `merge` averages those of several views, with the IoU threshold
    of the first model and the largest limit of objects per image of all models.

    Args:
        models: in eval mode, with the same classes, on the same device.
        images: by the size S of a model's anchors, float [B, 3, S, S], RGB in 0..1, on any device.
        sizes: [B, 2] height and width of the original images in pixels, on the CPU.
        flip: whether each model also sees the mirror images.
        stopwatch: counts the parts `network` and `postprocess`.

    Returns:
        For each image a dict of `boxes` [K, 4] xyxy in pixels of the original image, `labels` [K] and `scores` [K],
        sorted by descending score, on the CPU.
    """
    device = models[0].anchors.device
    stopwatch = stopwatch or Stopwatch(device)
    views: list[Detections] = []
    for model in models:
        size = model.anchor_config.image_size
        with stopwatch.part("network"):
            batch = images[size].to(device, non_blocking=True, memory_format=torch.channels_last)
            batch = torch.cat([batch, batch.flip(-1)]) if flip else batch
            outputs = model.predict(model.resize(batch))
        with stopwatch.part("postprocess"):
            found = model.postprocess(*outputs)
            scales = (sizes[:, [1, 0, 1, 0]] / size).to(device, non_blocking=True)  # [B, 4]
            plain, *mirrored = (Detections(*view) for view in zip(*(x.split(len(sizes)) for x in found), strict=True))
            views.append(plain._replace(boxes=plain.boxes * scales[:, None]))
            views += [view._replace(boxes=_mirror(view.boxes, size) * scales[:, None]) for view in mirrored]
    with stopwatch.part("postprocess"):
        limit = max(model.max_detections for model in models)
        merged = merge(views, models[0].iou_threshold, limit) if len(views) > 1 else views[0]
        counts = merged.num_detections.tolist()
        columns = {"boxes": merged.boxes.cpu(), "labels": merged.labels.cpu(), "scores": merged.scores.cpu()}
        return [{name: column[b, :count] for name, column in columns.items()} for b, count in enumerate(counts)]


def merge(views: Sequence[Detections], iou_threshold: float, max_detections: int) -> Detections:
    """Put the detections of several views together, and average those of the same object.

    1. NMS within each class, `ssdcore.kernels.batched_nms_padded`, keeps the best of all views.
    2. Each view has one box for a kept one: of the class's boxes whose IoU with it is greater than `iou_threshold`, the
       one with the highest score. If there is none, the view's score for it is 0.
    3. The new score is the mean of the views' scores, and the new box the mean of their boxes, weighted by score.

    The host does not wait for the GPU.

    Args:
        views: at least one, each of the same B images, with boxes in the same frame and any numbers of detections.
        iou_threshold: 0 or more.
        max_detections: D, the most detections of an image; 1 or more.

    Returns:
        `Detections` of fixed shapes, best first, padded with zeros, label -1 and anchor -1. An anchor index is that of
        the kept box, and counts within the anchors of its own view's model.
    """
    kept = _keep(views, iou_threshold, max_detections)
    total_scores = torch.zeros_like(kept.scores)  # [B, D]
    total_boxes = torch.zeros_like(kept.boxes)  # [B, D, 4], each box times its score
    for view in views:
        same_class = (kept.labels[:, :, None] == view.labels[:, None]) & (view.labels >= 0)[:, None]  # [B, D, N]
        same_object = same_class & (_iou(kept.boxes, view.boxes) > iou_threshold)
        scores, rows = view.scores[:, None].masked_fill(~same_object, 0).max(dim=2)  # each [B, D]
        total_scores += scores
        total_boxes += scores[..., None] * view.boxes.gather(1, rows[..., None].expand(-1, -1, 4))
    # A kept box without area overlaps no box, not even itself.
    found = total_scores > 0
    boxes = torch.where(found[..., None], total_boxes / total_scores[..., None], kept.boxes)
    scores = torch.where(found, total_scores, kept.scores) / len(views)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Detections(
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        scores,
        kept.labels.gather(1, order),
        kept.num_detections,
        kept.anchor_idxs.gather(1, order),
    )


def _keep(views: Sequence[Detections], iou_threshold: float, max_detections: int) -> Detections:
    """What NMS within each class keeps of all views."""
    boxes = torch.cat([view.boxes for view in views], dim=1)  # [B, N, 4] xyxy
    scores, labels, anchor_idxs = (
        torch.cat(column, dim=1) for column in zip(*((v.scores, v.labels, v.anchor_idxs) for v in views), strict=True)
    )  # each [B, N]
    # The threshold of 0 drops the padding of the views, because a detection's score is greater than 0.
    kept, counts = batched_nms_padded(boxes, scores, labels, iou_threshold, max_detections, score_threshold=0.0)
    padded, rows = kept < 0, kept.clamp(min=0)  # each [B, D]
    return Detections(
        boxes.gather(1, rows[..., None].expand(-1, -1, 4)).masked_fill(padded[..., None], 0),
        scores.gather(1, rows).masked_fill(padded, 0),
        labels.gather(1, rows).masked_fill(padded, -1),
        counts,
        anchor_idxs.gather(1, rows).masked_fill(padded, -1),
    )


def _iou(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """The IoU [B, D, N] of boxes [B, D, 4] with others [B, N, 4] of the same image; NaN for two without area."""
    corner = torch.maximum(boxes[:, :, None, :2], other_boxes[:, None, :, :2])  # [B, D, N, 2]
    opposite = torch.minimum(boxes[:, :, None, 2:], other_boxes[:, None, :, 2:])
    overlap = (opposite - corner).clamp(min=0).prod(dim=-1)
    area, other_area = ((b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, other_boxes))
    return overlap / (area[:, :, None] + other_area[:, None] - overlap)


def _mirror(boxes: Tensor, width: float) -> Tensor:
    """The boxes in the mirror image of an image of this width."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)
