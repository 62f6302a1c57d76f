import pytest
import torch
import torchvision
from conftest import Backend
from helpers import random_boxes
from torchvision.models.detection._utils import BoxCoder

from ssdcore.kernels import box_iou, decode_boxes, encode_boxes
from ssdcore.testing import reference
from ssdcore.testing.close import assert_close

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


# One box; one tile of rows and columns; one more than a tile.
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (32, 128), (33, 129)])
def test_iou_equals_torchvision(backend: Backend, shape: tuple[int, int]) -> None:
    boxes1, boxes2 = random_boxes(shape[0], seed=1), random_boxes(shape[1], seed=2)
    iou = box_iou(boxes1.to(backend.device), boxes2.to(backend.device)).cpu()
    assert torch.equal(iou, torchvision.ops.box_iou(boxes1, boxes2))


def test_iou_of_a_pair_without_area_is_nan(backend: Backend) -> None:
    point = torch.tensor([[5.0, 5, 5, 5]], device=backend.device)
    assert box_iou(point, point).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.bfloat16])
def test_iou_converts_other_dtypes_to_fp32(backend: Backend, dtype: torch.dtype) -> None:
    boxes = random_boxes(20, size=100).to(dtype)
    expected = torchvision.ops.box_iou(boxes.float(), boxes.float())
    iou = box_iou(boxes.to(backend.device), boxes.to(backend.device)).cpu()
    assert iou.dtype == torch.float32
    assert torch.equal(iou.nan_to_num(-1), expected.nan_to_num(-1))


def test_iou_of_fp64_boxes_is_fp64() -> None:
    boxes = random_boxes(5).double()
    assert torch.equal(box_iou(boxes, boxes), torchvision.ops.box_iou(boxes, boxes))


def test_encoding_and_decoding_equal_torchvision(backend: Backend) -> None:
    coder = BoxCoder(WEIGHTS)
    boxes, anchors = random_boxes(257, seed=1), random_boxes(257, seed=2)  # one more than a block
    deltas = coder.encode_single(boxes, anchors)
    assert_close(encode_boxes(boxes.to(backend.device), anchors.to(backend.device)), deltas)
    decoded = decode_boxes(deltas.to(backend.device), anchors.to(backend.device))
    assert_close(decoded, coder.decode_single(deltas, anchors), scale=300)
    assert_close(decoded, boxes, scale=300)


def test_decoded_sizes_are_clamped_and_nan_stays(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 1, 1]], device=backend.device)
    boxes = decode_boxes(torch.tensor([[0.0, 0, 1000, float("nan")]], device=backend.device), anchors)
    assert (boxes[0, 2] - boxes[0, 0]).item() == pytest.approx(62.5)
    assert boxes[0, 1::2].isnan().all()


def test_a_box_without_area_encodes_to_minus_infinity(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 2, 2]], device=backend.device)
    deltas = encode_boxes(torch.tensor([[1.0, 1, 1, 0]], device=backend.device), anchors)
    assert deltas[0, 2] == -torch.inf
    assert deltas[0, 3].isnan()


@pytest.mark.parametrize(
    ("boxes", "anchors"),
    [((2, 3, 4), (3, 4)), ((3, 4), (2, 3, 4)), ((2, 1, 4), (3, 4)), ((3, 4), (4,)), ((0, 4), (0, 4))],
)
def test_leading_dimensions_broadcast(backend: Backend, boxes: tuple[int, ...], anchors: tuple[int, ...]) -> None:
    left = random_boxes(6, seed=1)[: torch.Size(boxes).numel() // 4].reshape(boxes)
    right = random_boxes(6, seed=2)[: torch.Size(anchors).numel() // 4].reshape(anchors)
    deltas = encode_boxes(left.to(backend.device), right.to(backend.device))
    assert_close(deltas, reference.encode_boxes(left.numpy(), right.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_16_bit_input_gives_fp32(backend: Backend, dtype: torch.dtype) -> None:
    deltas, anchors = torch.randn(7, 4).to(dtype), random_boxes(7).to(dtype)
    boxes = decode_boxes(deltas.to(backend.device), anchors.to(backend.device))
    assert boxes.dtype == torch.float32
    assert_close(boxes, reference.decode_boxes(deltas.float().numpy(), anchors.float().numpy()), scale=300)


def test_decode_gradient_matches_finite_differences() -> None:
    # No delta is near the clamp at 5 * log(62.5) = 20.7, where the slope jumps. Some are above it.
    deltas = (torch.randn(6, 4, dtype=torch.float64) * 3).index_fill_(0, torch.tensor([0]), 25.0).requires_grad_()
    anchors = random_boxes(6).double()
    assert torch.autograd.gradcheck(lambda x: decode_boxes(x, anchors), (deltas,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_gradient_against_fp64(backend: Backend, dtype: torch.dtype) -> None:
    anchors, cotangent = random_boxes(33), torch.randn(2, 33, 4)
    deltas = (torch.randn(2, 33, 4) * 8).to(dtype)
    exact = deltas.double().requires_grad_()
    (expected,) = torch.autograd.grad(decode_boxes(exact, anchors.double()), exact, cotangent.double())
    given = deltas.to(backend.device).requires_grad_()
    (grad,) = torch.autograd.grad(decode_boxes(given, anchors.to(backend.device)), given, cotangent.to(backend.device))
    assert grad.dtype == dtype
    assert_close(grad, expected, scale=100, stored_ulps=backend.stored_ulps)
