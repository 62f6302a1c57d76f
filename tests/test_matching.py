import pytest
import torch
import torchvision
from conftest import Backend
from helpers import ragged_truths, random_boxes, ssd300_anchors
from torch import Tensor
from torchvision.models.detection._utils import SSDMatcher

from ssdcore.kernels import match_anchors


def match(backend: Backend, gt_boxes: Tensor, counts: list[int], anchors: Tensor, threshold: float = 0.5) -> Tensor:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return match_anchors(
        gt_boxes.to(backend.device), offsets.to(backend.device), anchors.to(backend.device), threshold
    ).cpu()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_equals_torchvision_image_by_image(backend: Backend, threshold: float) -> None:
    counts, anchors = [3, 0, 1, 20], ssd300_anchors()
    gt_boxes, _, _ = ragged_truths(counts, 5)
    for own, matched in zip(gt_boxes.split(counts), match(backend, gt_boxes, counts, anchors, threshold), strict=True):
        if len(own):
            assert torch.equal(matched, SSDMatcher(threshold)(torchvision.ops.box_iou(own, anchors)))
        else:
            assert (matched == -1).all()


@pytest.mark.parametrize(("height", "threshold"), [(5, 0.5), (3, 0.3), (7, 0.7)])
def test_an_iou_equal_to_the_threshold_matches(backend: Backend, height: int, threshold: float) -> None:
    # The first anchor is claimed. The second has an IoU of height / 10, the threshold in fp32. That of the third is
    # lower.
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, height], [0, 0, 10, height - 1]])
    assert match(backend, anchors[:1], [1], anchors, threshold).tolist() == [[0, 0, -1]]


def test_a_truth_that_overlaps_nothing_claims_nothing(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    lost = torch.tensor([[100.0, 100, 110, 110]])
    assert match(backend, lost, [1], anchors).tolist() == [[-1, -1]]
    # In torchvision it claims anchor 0.
    assert SSDMatcher(0.5)(torchvision.ops.box_iou(lost, anchors)).tolist() == [0, -1]


@pytest.mark.parametrize(
    "odd", [[5, 5, 5, 9], [9, 9, 1, 1], [float("nan"), 0, 10, 10], [0, 0, float("inf"), 10]], ids=str
)
def test_an_odd_truth_does_not_affect_other_truths(backend: Backend, odd: list[float]) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    gt_boxes = torch.tensor([odd, [21.0, 21, 30, 30], odd])
    assert match(backend, gt_boxes, [3], anchors).tolist() == [[-1, 1]]


def test_the_last_claim_on_an_anchor_stands(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    gt_boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 2, 2]])
    assert match(backend, gt_boxes, [3], anchors).tolist() == [[2, -1]]


def test_the_lowest_of_many_equal_truths_matches_and_the_last_claims(backend: Backend) -> None:
    # 70 are more than are compared at once.
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    assert match(backend, anchors[:1].repeat(70, 1), [30, 40], anchors).tolist() == [[29, 0, -1], [39, 0, -1]]


def test_rows_before_the_first_image_belong_to_no_image(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    offsets = torch.tensor([1, 1, 2])
    matched = match_anchors(anchors.to(backend.device), offsets.to(backend.device), anchors.to(backend.device))
    assert matched.tolist() == [[-1, -1], [-1, 0]]


def test_a_threshold_that_rounds_to_zero_is_not_reached_by_an_iou_of_zero(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    assert match(backend, anchors[:1], [1], anchors, threshold=5e-324).tolist() == [[0, -1]]


def test_equal_ious_go_to_the_lowest_index(backend: Backend) -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    # Both truths claim anchor 0, and the second claim stands. Anchors 1 and 2 match the first truth.
    assert match(backend, box.repeat(2, 1), [2], box.repeat(3, 1)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("num_anchors", [0, 1, 255, 256, 257])  # around a block of anchors
def test_numbers_of_anchors_around_a_block(backend: Backend, num_anchors: int) -> None:
    gt_boxes, anchors = random_boxes(5, seed=1), random_boxes(num_anchors, seed=2)
    matched = match(backend, gt_boxes, [5], anchors)
    assert matched.shape == (1, num_anchors)
    if num_anchors:
        assert torch.equal(matched[0], SSDMatcher(0.5)(torchvision.ops.box_iou(gt_boxes, anchors)))


def test_a_thousand_truths(backend: Backend) -> None:
    count = 1000 if backend.full_size else 100
    gt_boxes, anchors = random_boxes(count, seed=1), random_boxes(300, seed=2)
    expected = SSDMatcher(0.5)(torchvision.ops.box_iou(gt_boxes, anchors))
    claims = torchvision.ops.box_iou(gt_boxes, anchors).max(1)
    assert (claims.values > 0).all()
    assert torch.equal(match(backend, gt_boxes, [count], anchors)[0], expected)


# Eight truths are compared at once, and thirty-two claim at once.
@pytest.mark.parametrize("count", [7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_numbers_of_truths_around_what_is_done_at_once(backend: Backend, count: int) -> None:
    gt_boxes, anchors = random_boxes(2 * count, seed=count), random_boxes(260, seed=2)
    matched = match(backend, gt_boxes, [count, count], anchors)
    for own, row in zip(gt_boxes.split(count), matched, strict=True):
        overlap = torchvision.ops.box_iou(own, anchors)
        assert (overlap.max(1).values > 0).all()
        assert torch.equal(row, SSDMatcher(0.5)(overlap))


@pytest.mark.parametrize("count", [8, 9, 31, 32, 33, 64, 65, 97])
def test_the_lowest_of_equal_truths_matches_and_the_last_claims_in_every_chunk(backend: Backend, count: int) -> None:
    # The truths claim the second and the last anchor in turn. The two other anchors overlap them less.
    anchors = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 59], [50, 50, 60, 60]])
    gt_boxes = anchors[[1, 3]].repeat(count, 1)[:count]
    last = [(count - 1) // 2 * 2, (count - 2) // 2 * 2 + 1]
    assert match(backend, gt_boxes, [count], anchors).tolist() == [[0, last[0], 1, last[1]]]


def test_more_blocks_of_anchors_than_are_reduced_at_once(backend: Backend) -> None:
    # There are 66 blocks of 256 anchors. Truth 0 has its best anchor in the last block, truth 1 has equal ones in the
    # first 64 blocks and after them, truth 2 has its only one in an early block.
    box = torch.tensor([[0.0, 0, 10, 10]])
    anchors = (1000 + box).repeat(65 * 256 + 3, 1)
    anchors[-1], anchors[100] = box + 100, box + 100 + torch.tensor([0, 0, 0, 5])
    anchors[[300, 65 * 256]] = box + 200 + torch.tensor([0, 0, 10, 0])
    anchors[700] = box + 300 + torch.tensor([0, 0, 10, 0])
    matched = match(backend, torch.cat((box + 100, box + 200, box + 300)), [3], anchors, threshold=0.6)
    expected = torch.full_like(matched, -1)
    expected[0, [100, 300, 700, len(anchors) - 1]] = torch.tensor([0, 1, 2, 0])
    assert torch.equal(matched, expected)


def test_only_the_second_image_has_truths(backend: Backend) -> None:
    # Rows 0 to 9 and the last row belong to no image. They would match if they did.
    anchors = random_boxes(300, seed=2)
    gt_boxes = torch.cat((anchors[:10], random_boxes(9, seed=1), anchors[:1]))
    offsets = torch.tensor([10, 10, 19])
    matched = match_anchors(*(x.to(backend.device) for x in (gt_boxes, offsets, anchors))).cpu()
    expected = SSDMatcher(0.5)(torchvision.ops.box_iou(gt_boxes[10:19], anchors))
    assert torch.equal(matched, torch.stack((torch.full_like(expected, -1), expected)))


def test_an_empty_batch_and_images_without_truths(backend: Backend) -> None:
    anchors, none = random_boxes(5), torch.zeros(0, 4)
    assert match(backend, none, [], anchors).shape == (0, 5)
    assert match(backend, none, [0, 0], anchors).tolist() == [[-1] * 5] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_16_bit_boxes_and_both_offset_dtypes(backend: Backend, dtype: torch.dtype, offsets_dtype: torch.dtype) -> None:
    gt_boxes, anchors = random_boxes(4, size=100, seed=1).to(dtype), random_boxes(50, size=100, seed=2).to(dtype)
    offsets = torch.tensor([0, 4], dtype=offsets_dtype)
    matched = match_anchors(*(x.to(backend.device) for x in (gt_boxes, offsets, anchors)))
    assert matched.dtype == torch.int64
    assert torch.equal(matched.cpu(), match(backend, gt_boxes.float(), [4], anchors.float()))
