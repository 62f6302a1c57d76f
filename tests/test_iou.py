import pytest
import torch
import torchvision
from conftest import Path
from helpers import random_boxes

from ssdcore.kernels import box_iou


# One box, a block of rows and of columns, and one more than each.
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (32, 128), (33, 129)])
def test_equals_torchvision(path: Path, shape: tuple[int, int]) -> None:
    boxes1, boxes2 = random_boxes(shape[0], seed=1), random_boxes(shape[1], seed=2)
    iou = box_iou(boxes1.to(path.device), boxes2.to(path.device)).cpu()
    assert torch.equal(iou, torchvision.ops.box_iou(boxes1, boxes2))


def test_a_pair_without_area_is_nan(path: Path) -> None:
    point = torch.tensor([[5.0, 5, 5, 5]], device=path.device)
    assert box_iou(point, point).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16])
def test_other_dtypes_are_taken_as_fp32(path: Path, dtype: torch.dtype) -> None:
    boxes = random_boxes(20, size=100).to(dtype)
    expected = torchvision.ops.box_iou(boxes.float(), boxes.float())
    iou = box_iou(boxes.to(path.device), boxes.to(path.device)).cpu()
    assert iou.dtype == torch.float32
    assert torch.equal(iou.nan_to_num(-1), expected.nan_to_num(-1))


def test_fp64_stays_on_the_cpu() -> None:
    boxes = random_boxes(5).double()
    assert torch.equal(box_iou(boxes, boxes), torchvision.ops.box_iou(boxes, boxes))
