"""The eager implementations that the kernels are compared with.

This is the one file of the benchmark that imports them.
"""

from ssdcore.kernels.boxes.eager import box_iou, decode_boxes, decode_boxes_backward, encode_boxes
from ssdcore.kernels.matching.eager import match_anchors
from ssdcore.kernels.multibox.eager import multibox_loss, multibox_loss_backward
from ssdcore.kernels.nms.eager import batched_nms_padded, nms
from ssdcore.kernels.postprocess.eager import postprocess_detections

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
