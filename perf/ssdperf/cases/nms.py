"""Non-maximum suppression: one image, one image in classes, and a batch."""

import importlib.util
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

from ssdcore import kernels
from ssdperf import eager, inputs
from ssdperf.differences import same_kept
from ssdperf.registry import BATCHES, BOX_SWEEP, SSD_SWEEP, Workload, case, grid, star

IOU_THRESHOLD = 0.5
MAX_OUTPUT = 200  # kept boxes per image that the padded result has room for
CONCH_MAX_BOXES = 10_000  # conch takes 4 N^2 bytes and suppresses one box at a time: beyond this it takes seconds


def conch_nms() -> Callable[..., Tensor] | None:
    """Return the NMS of conch-triton-kernels, where that is installed."""
    if importlib.util.find_spec("conch") is None:
        return None
    from conch.ops.vision.nms import nms

    return nms


@case(
    "nms",
    shapes=[
        {"N": 8732, "boxes": "uniform", "dtype": "float32"},
        *grid(N=(100, 1000, 4000, 10_000, 30_000, 100_000), boxes=inputs.LAYOUTS, dtype=["float32"]),
    ],
    quick=[{"N": 8732, "boxes": layout, "dtype": "float32"} for layout in inputs.LAYOUTS],
    sweep=BOX_SWEEP,
)
def nms(device: str, dtype: torch.dtype, N: int, boxes: str) -> Workload:
    corners, scores = inputs.nms_boxes(boxes, N, device)
    providers = {
        "ssdcore": lambda: kernels.nms(corners, scores, IOU_THRESHOLD),
        "torchvision": lambda: torchvision.ops.nms(corners, scores, IOU_THRESHOLD),
        "eager": lambda: eager.nms(corners, scores, None, IOU_THRESHOLD),
    }
    conch = conch_nms()
    if conch and device == "cuda" and N <= CONCH_MAX_BOXES:
        providers["conch"] = lambda: conch(corners, scores, IOU_THRESHOLD)
    return Workload(providers, reads=(corners, scores))


@case(
    "batched_nms",
    shapes=[
        {"N": 8732, "K": 80, "dtype": "float32"},
        *grid(N=[10_000], K=(1, 20, 80, 1200), dtype=["float32"]),
        {"N": 100_000, "K": 80, "dtype": "float32"},
    ],
    quick=[{"N": 8732, "K": 80, "dtype": "float32"}],
    sweep=BOX_SWEEP,
)
def batched_nms(device: str, dtype: torch.dtype, N: int, K: int, boxes: str = "clustered") -> Workload:
    corners, scores = inputs.nms_boxes(boxes, N, device)
    idxs = torch.randint(K, (N,), device=device)
    return Workload(
        {
            "ssdcore": lambda: kernels.batched_nms(corners, scores, idxs, IOU_THRESHOLD),
            "torchvision": lambda: torchvision.ops.batched_nms(corners, scores, idxs, IOU_THRESHOLD),
            "eager": lambda: eager.nms(corners, scores, idxs, IOU_THRESHOLD),
        },
        reads=(corners, scores, idxs),
    )


@case(
    "batched_nms_padded",
    shapes=star({"B": 32, "N": 1000, "K": 80, "dtype": "float32"}, B=BATCHES, N=(4000,)),
    quick=[{"B": 4, "N": 1000, "K": 80, "dtype": "float32"}],
    sweep={"B": SSD_SWEEP["B"], "N": (100, 300, 1000, 3000)},
)
def batched_nms_padded(device: str, dtype: torch.dtype, B: int, N: int, K: int, boxes: str = "clustered") -> Workload:
    pairs = [inputs.nms_boxes(boxes, N, device) for _ in range(B)]
    corners, scores = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    idxs = torch.randint(K, (B, N), device=device)
    return Workload(
        {
            "ssdcore": lambda: kernels.batched_nms_padded(corners, scores, idxs, IOU_THRESHOLD, MAX_OUTPUT),
            "torchvision": lambda: [
                torchvision.ops.batched_nms(*image, IOU_THRESHOLD) for image in zip(corners, scores, idxs, strict=True)
            ],
            "eager": lambda: eager.batched_nms_padded(corners, scores, idxs, IOU_THRESHOLD, MAX_OUTPUT, None),
        },
        reads=(corners, scores, idxs),
        difference=same_kept,
    )
