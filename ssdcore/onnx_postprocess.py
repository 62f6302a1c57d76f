"""`postprocess_detections` in ONNX's standard operators, for `torch.onnx.export`.

NonMaxSuppression gets every class of every image as an image of its own, with the `topk_candidates` best boxes of that
class. TopK and NonMaxSuppression prefer the lower index among equal scores, and both suppress and select by "greater",
so the result has the order of `postprocess_detections`. Scores and boxes may differ from it in their last bits.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnxscript import opset18 as op

MAX_LOG_SCALE = math.log(1000.0 / 16)  # the limit of dw and dh in `decode_boxes`


def onnx_postprocess_detections(
    cls_logits: Sequence[Any],
    box_deltas: Sequence[Any],
    anchors: Any,
    image_sizes: Any,
    weights: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> tuple[Any, Any, Any, Any, Any]:
    """The translation of the op `ssdcore::postprocess_detections`, whose arguments it has.

    The number of images may be dynamic. Those of anchors and classes are constants.
    """
    num_anchors, num_classes = anchors.shape[0], cls_logits[0].shape[3]
    foreground, k = num_classes - 1, min(topk_candidates, num_anchors)
    num_candidates = foreground * k  # N, of one image

    scores = op.Softmax(_rows(cls_logits, num_classes), axis=2)  # [B, A, C]
    scores = op.Transpose(op.Slice(scores, _ints(1), _ints(num_classes), _ints(2)), perm=[0, 2, 1])  # [B, C - 1, A]
    scores, anchor = op.TopK(scores, _ints(k), axis=2)  # [B, C - 1, k]
    boxes = _clipped(_decoded(_rows(box_deltas, 4), anchors, weights), image_sizes)  # [B, A, 4]
    anchor = op.Reshape(anchor, _ints(-1, num_candidates))  # [B, N]
    boxes = _take(boxes, anchor)  # [B, N, 4]

    chosen = op.NonMaxSuppression(
        op.Reshape(boxes, _ints(-1, k, 4)),
        op.Reshape(scores, _ints(-1, 1, k)),
        _ints(min(k, max_detections)),
        _floats(_rounded_down(iou_threshold)),
        _floats(score_threshold),
    )  # [S, 3] image * (C - 1) + class - 1, 0, candidate of the class
    chosen = op.Gather(chosen, _ints(0, 2), axis=1)
    scores = op.Reshape(scores, _ints(-1, k))
    kept = op.ScatterND(op.ConstantOfShape(op.Shape(scores)), chosen, op.GatherND(scores, chosen))  # 0 if suppressed
    kept = op.Reshape(kept, _ints(-1, num_candidates))
    if num_candidates < max_detections:
        kept = op.Pad(kept, _ints(0, 0, 0, max_detections - num_candidates))
    scores, best = op.TopK(kept, _ints(max_detections), axis=1)  # [B, D]
    best = op.Min(best, _ints(num_candidates - 1))
    found = op.Greater(scores, _floats(0.0))
    labels = op.Where(found, op.Add(op.Div(best, _ints(k)), _ints(1)), _ints(-1))
    boxes = op.Where(op.Unsqueeze(found, _ints(2)), _take(boxes, best), _floats(0.0))
    num_detections = op.ReduceSum(op.Cast(found, to=onnx.TensorProto.INT32), _ints(1), keepdims=0)
    anchor_idxs = op.Where(found, op.GatherElements(anchor, best, axis=1), _ints(-1))
    return boxes, scores, labels, num_detections, anchor_idxs


def _rows(levels: Sequence[Any], columns: int) -> Any:
    """Levels [B, P, a, columns] as [B, A, columns]."""
    return op.Concat(*(op.Reshape(level, _ints(0, -1, columns)) for level in levels), axis=1)


def _decoded(deltas: Any, anchors: Any, weights: Sequence[float]) -> Any:
    """Boxes xyxy [B, A, 4] of `deltas` [B, A, 4] and `anchors` [A, 4] xyxy."""
    corner, opposite = op.Split(anchors, num_outputs=2, axis=1)  # [A, 2]
    size = op.Sub(opposite, corner)
    centre = op.Add(corner, op.Mul(_floats(0.5), size))
    shift, log_scale = op.Split(op.Div(deltas, _floats(*weights)), num_outputs=2, axis=2)  # [B, A, 2]
    centre = op.Add(op.Mul(shift, size), centre)
    half = op.Mul(_floats(0.5), op.Mul(op.Exp(op.Min(log_scale, _floats(MAX_LOG_SCALE))), size))
    return op.Concat(op.Sub(centre, half), op.Add(centre, half), axis=2)


def _clipped(boxes: Any, image_sizes: Any) -> Any:
    """`boxes` [B, A, 4] limited to `image_sizes` [B, 2] height and width."""
    limits = op.Gather(op.Cast(image_sizes, to=onnx.TensorProto.FLOAT), _ints(1, 0, 1, 0), axis=1)  # [B, 4]
    return op.Min(op.Max(boxes, _floats(0.0)), op.Unsqueeze(limits, _ints(1)))


def _take(rows: Any, index: Any) -> Any:
    """Of `rows` [B, N, 4] those at `index` [B, M], [B, M, 4]."""
    return op.GatherND(rows, op.Unsqueeze(index, _ints(2)), batch_dims=1)


def _rounded_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`: an fp32 IoU exceeds both or none."""
    nearest = np.float32(threshold)
    return float(np.nextafter(nearest, np.float32(0)) if float(nearest) > threshold else nearest)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _floats(*values: float) -> Any:
    return op.Constant(value_floats=values)
