"""Object-detection ops: exact, batched, deterministic. Triton on the GPU, PyTorch and NumPy on the CPU.

Boxes are `xyxy`, in any one coordinate frame. The ground truth of a batch is ragged: image `b` owns the rows
`gt_offsets[b]:gt_offsets[b + 1]` of `gt_boxes` and `gt_labels`, which may be none. Class 0 is the background. Every
function takes float32, float16 and bfloat16 (on the CPU also float64) and computes in float32 (float64). No function
modifies its inputs or checks the values of a tensor. `nms` and `batched_nms` wait for the GPU, because the length of
their result depends on values. No other function waits.
"""

if __name__ != "ssdcore.kernels":
    # Under a second name the ops would be registered twice, and the second registration would win silently.
    raise ImportError(f"import this package as ssdcore.kernels (pip install -e .), not as {__name__!r}")

# The function `nms` hides the package of that name: its modules are reached by `from ssdcore.kernels.nms import eager`.
from ssdcore.kernels.boxes.op import box_iou, decode_boxes, encode_boxes
from ssdcore.kernels.matching.op import match_anchors
from ssdcore.kernels.multibox.op import MultiBoxLosses, multibox_loss
from ssdcore.kernels.nms.op import batched_nms, batched_nms_padded, nms
from ssdcore.kernels.postprocess.op import Detections, postprocess_detections

__all__ = [
    "Detections",
    "MultiBoxLosses",
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
