import pytest
import torch
from conftest import Path
from helpers import random_boxes
from torchvision.models.detection._utils import BoxCoder

from ssdcore.kernels import decode_boxes, encode_boxes
from ssdcore.testing import reference
from ssdcore.testing.close import assert_close

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_equals_torchvision(path: Path) -> None:
    coder = BoxCoder(WEIGHTS)
    boxes, anchors = random_boxes(257, seed=1), random_boxes(257, seed=2)  # one more than a block
    deltas = coder.encode_single(boxes, anchors)
    assert_close(encode_boxes(boxes.to(path.device), anchors.to(path.device)), deltas)
    decoded = decode_boxes(deltas.to(path.device), anchors.to(path.device))
    assert_close(decoded, coder.decode_single(deltas, anchors), scale=300)
    assert_close(decoded, boxes, scale=300)


def test_sizes_are_clamped_and_nan_passes(path: Path) -> None:
    anchors = torch.tensor([[0.0, 0, 1, 1]], device=path.device)
    boxes = decode_boxes(torch.tensor([[0.0, 0, 1000, float("nan")]], device=path.device), anchors)
    assert (boxes[0, 2] - boxes[0, 0]).item() == pytest.approx(62.5)
    assert boxes[0, 1::2].isnan().all()


def test_a_box_without_area_encodes_to_minus_infinity(path: Path) -> None:
    anchors = torch.tensor([[0.0, 0, 2, 2]], device=path.device)
    deltas = encode_boxes(torch.tensor([[1.0, 1, 1, 0]], device=path.device), anchors)
    assert deltas[0, 2] == -torch.inf
    assert deltas[0, 3].isnan()


@pytest.mark.parametrize(
    ("boxes", "anchors"),
    [((2, 3, 4), (3, 4)), ((3, 4), (2, 3, 4)), ((2, 1, 4), (3, 4)), ((3, 4), (4,)), ((0, 4), (0, 4))],
)
def test_leading_dimensions_broadcast(path: Path, boxes: tuple[int, ...], anchors: tuple[int, ...]) -> None:
    left = random_boxes(6, seed=1)[: torch.Size(boxes).numel() // 4].reshape(boxes)
    right = random_boxes(6, seed=2)[: torch.Size(anchors).numel() // 4].reshape(anchors)
    deltas = encode_boxes(left.to(path.device), right.to(path.device))
    assert_close(deltas, reference.encode_boxes(left.numpy(), right.numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_16_bit_input_gives_fp32(path: Path, dtype: torch.dtype) -> None:
    deltas, anchors = torch.randn(7, 4).to(dtype), random_boxes(7).to(dtype)
    boxes = decode_boxes(deltas.to(path.device), anchors.to(path.device))
    assert boxes.dtype == torch.float32
    assert_close(boxes, reference.decode_boxes(deltas.float().numpy(), anchors.float().numpy()), scale=300)


def test_decode_gradient_of_the_formula() -> None:
    # Clear of the clamp at 5 * log(62.5) = 20.7, where the slope jumps; some above it.
    deltas = (torch.randn(6, 4, dtype=torch.float64) * 3).index_fill_(0, torch.tensor([0]), 25.0).requires_grad_()
    anchors = random_boxes(6).double()
    assert torch.autograd.gradcheck(lambda x: decode_boxes(x, anchors), (deltas,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decode_gradient_against_fp64(path: Path, dtype: torch.dtype) -> None:
    anchors, cotangent = random_boxes(33), torch.randn(2, 33, 4)
    deltas = (torch.randn(2, 33, 4) * 8).to(dtype)
    exact = deltas.double().requires_grad_()
    (expected,) = torch.autograd.grad(decode_boxes(exact, anchors.double()), exact, cotangent.double())
    given = deltas.to(path.device).requires_grad_()
    (grad,) = torch.autograd.grad(decode_boxes(given, anchors.to(path.device)), given, cotangent.to(path.device))
    assert grad.dtype == dtype
    assert_close(grad, expected, scale=100, stored_ulps=path.stored_ulps)
