"""Object-detection ops: exact, batched, deterministic; Triton on the GPU, plain PyTorch on the CPU."""

if __name__ != "ssdcore.kernels":
    # Under a second name the ops would be registered twice, and the second registration silently wins.
    raise ImportError(f"import this package as ssdcore.kernels (pip install -e .), not as {__name__!r}")

from ssdcore.kernels.functional import (
    Detections,
    MultiBoxLoss,
    batched_nms,
    batched_nms_padded,
    box_iou,
    decode_boxes,
    encode_boxes,
    match_anchors,
    multibox_loss,
    nms,
    postprocess_detections,
)

__all__ = [
    "Detections",
    "MultiBoxLoss",
    "batched_nms",
    "batched_nms_padded",
    "box_iou",
    "decode_boxes",
    "encode_boxes",
    "match_anchors",
    "multibox_loss",
    "nms",
    "postprocess_detections",
]
