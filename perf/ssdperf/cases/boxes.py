"""IoU, encoding and decoding of boxes."""

import torch
import torchvision
from torchvision.models.detection._utils import BoxCoder

from ssdcore import kernels
from ssdperf import eager, inputs
from ssdperf.registry import BATCHES, SSD_QUICK, SSD_SWEEP, Workload, case, ssd, star, without
from ssdperf.ssd300 import BOX_WEIGHTS

CODEC = {
    "compiles": True,
    "shapes": without("C", "G", "head", shapes=star(ssd(dtype="float32"), B=BATCHES, A=(24_564,))),
    "quick": without("C", "G", "head", shapes=SSD_QUICK),
    "sweep": {"B": SSD_SWEEP["B"]},
}


@case(
    "box_iou",
    compiles=True,
    shapes=[{"N": 100, "M": 8732, "dtype": "float32"}, {"N": 4000, "M": 8732, "dtype": "float32"}],
    quick=[{"N": 100, "M": 8732, "dtype": "float32"}],
    sweep={"N": (10, 30, 100, 300, 1000, 3000)},
)
def box_iou(device: str, dtype: torch.dtype, N: int, M: int) -> Workload:
    boxes, anchors = inputs.random_boxes(N).to(device, dtype), inputs.anchors(M, device).to(dtype)
    return Workload(
        {
            "ssdcore": lambda: kernels.box_iou(boxes, anchors),
            "torchvision": lambda: torchvision.ops.box_iou(boxes, anchors),
            "eager": lambda: eager.box_iou(boxes, anchors),
        },
        reads=(boxes, anchors),
    )


@case("encode_boxes", **CODEC)
def encode_boxes(device: str, dtype: torch.dtype, B: int, A: int) -> Workload:
    boxes, anchors = inputs.random_boxes(B, A).to(device, dtype), inputs.anchors(A, device)
    coder = BoxCoder(BOX_WEIGHTS)
    flat_boxes, flat_anchors = boxes.flatten(0, 1), anchors.repeat(B, 1)
    return Workload(
        {
            "ssdcore": lambda: kernels.encode_boxes(boxes, anchors),
            "torchvision": lambda: coder.encode_single(flat_boxes, flat_anchors).view(B, A, 4),
            "eager": lambda: eager.encode_boxes(boxes, anchors, BOX_WEIGHTS),
        },
        reads=(boxes, anchors),
    )


@case("decode_boxes", **CODEC)
def decode_boxes(device: str, dtype: torch.dtype, B: int, A: int) -> Workload:
    deltas, anchors = torch.randn(B, A, 4).to(device, dtype), inputs.anchors(A, device)
    coder = BoxCoder(BOX_WEIGHTS)
    flat_deltas, flat_anchors = deltas.flatten(0, 1), anchors.repeat(B, 1)
    return Workload(
        {
            "ssdcore": lambda: kernels.decode_boxes(deltas, anchors),
            "torchvision": lambda: coder.decode_single(flat_deltas, flat_anchors).view(B, A, 4),
            "eager": lambda: eager.decode_boxes(deltas, anchors, BOX_WEIGHTS),
        },
        reads=(deltas, anchors),
    )
