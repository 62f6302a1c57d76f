"""The eager implementations that the kernels are compared with.

This is the one file of the benchmark that imports them.
"""

from ssdcore.kernels.eager import (
    batched_nms_padded,
    box_iou,
    decode_boxes,
    decode_boxes_backward,
    encode_boxes,
    match_anchors,
    multibox_loss,
    multibox_loss_backward,
    nms,
    postprocess_detections,
)

__all__ = [
    "batched_nms_padded",
    "box_iou",
    "decode_boxes",
    "decode_boxes_backward",
    "encode_boxes",
    "match_anchors",
    "multibox_loss",
    "multibox_loss_backward",
    "nms",
    "postprocess_detections",
]
