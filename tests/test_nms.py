import warnings

import pytest
import torch
import torchvision
from conftest import Backend
from helpers import random_boxes
from torch import Tensor

from ssdcore.kernels import batched_nms, batched_nms_padded, nms
from ssdcore.kernels.nms import eager
from ssdcore.testing import reference


def run_nms(backend: Backend, boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return nms(boxes.to(backend.device), scores.to(backend.device), threshold).cpu()


# Around one word of bits, two words, a block of rows, and several blocks.
@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025])
def test_equals_torchvision(backend: Backend, count: int) -> None:
    boxes, scores = random_boxes(count, seed=count), torch.rand(count, generator=torch.Generator().manual_seed(count))
    kept = run_nms(backend, boxes, scores, 0.45)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.45))


def test_5000_clustered_boxes(backend: Backend) -> None:
    boxes = random_boxes(5000, size=100, spread=0.9)
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    kept = run_nms(backend, boxes, scores, 0.5)
    assert len(kept) < 1000
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.5))


def test_every_second_box_of_a_chain_is_kept(backend: Backend) -> None:
    # A box is kept only because the box before it is not. This is the worst case for deciding in parallel.
    start = torch.arange(200.0)
    boxes = torch.stack((start, torch.zeros(200), start + 3, torch.ones(200)), dim=1)  # neighbours: IoU 2/4
    assert run_nms(backend, boxes, -start, 0.4).tolist() == list(range(0, 200, 2))


# Sizes of classes, which lie among blocks of 128 rows: one class in six blocks; classes that begin and end with blocks;
# classes that begin and end inside blocks, adjacent ones and distant ones; only classes within a block.
@pytest.mark.parametrize(
    "sizes", [[700], [128, 128, 256, 130], [60, 500, 140], [100, 200, 200, 200], [127, 258, 1, 300], [20] * 30], ids=str
)
def test_classes_that_span_blocks(backend: Backend, sizes: list[int]) -> None:
    total, images = sum(sizes), 2
    generator = torch.Generator().manual_seed(len(sizes))
    idxs = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) - 2  # classes may be negative
    idxs = torch.stack([idxs[torch.randperm(total, generator=generator)] for _ in range(images)])
    start = torch.rand(images, total, generator=generator) * total
    # In one image boxes suppress their neighbours, in the other a good part of their class.
    length = torch.tensor([[1.0], [40.0]]) * len(sizes)
    end = start + length * (0.5 + torch.rand(images, total, generator=generator))
    boxes = torch.stack((start, torch.zeros_like(start), end, torch.ones_like(start)), dim=2)
    scores = torch.rand(images, total, generator=generator)
    padded, count = (
        x.cpu()
        for x in batched_nms_padded(*(x.to(backend.device) for x in (boxes, scores, idxs)), 0.3, max_output=total)
    )
    for image in range(images):
        expected = torchvision.ops.boxes._batched_nms_vanilla(boxes[image], scores[image], idxs[image], 0.3)
        assert len(expected) < total
        assert padded[image].tolist() == expected.tolist() + [-1] * (total - len(expected))
        assert count[image] == len(expected)


def test_a_chain_of_decisions_spans_blocks(backend: Backend) -> None:
    # Each box suppresses the next one. The chain of the middle class begins inside a block and spans three more.
    start = torch.arange(570.0)
    boxes = torch.stack((start, torch.zeros(570), start + 3, torch.ones(570)), dim=1)
    idxs = torch.tensor([5] * 61 + [6] * 450 + [7] * 59)
    kept = batched_nms(*(x.to(backend.device) for x in (boxes, -start, idxs)), 0.4).cpu()
    assert kept.tolist() == [*range(0, 61, 2), *range(61, 511, 2), *range(511, 570, 2)]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_box_as_far_away_as_the_threshold_allows(backend: Backend, threshold: float, side: str) -> None:
    # A block lies between a row and the box that suppresses it, so that the row finds it in a list. Each place has four
    # rows. The list begins with two other boxes, so that its places do not begin at multiples of four.
    width = 100.0
    place = torch.arange(128) // 4 * (2 * width * (1 - threshold) / threshold)
    height = torch.arange(128.0) * 10  # no row overlaps another
    rows = torch.stack((place, height, place + width, height + 1), dim=1)
    listed = rows.clone()
    listed[:, 0] = listed[:, 2] - width * (0.9999 / threshold if side == "before" else 1.0001 * threshold)
    listed = torch.cat((torch.tensor([[-1e4, 0, -9e3, 1], [-1e4, 10, -9e3, 11]]), listed[:126]))
    boxes = torch.cat((listed, rows + 1e5, rows))
    kept = run_nms(backend, boxes, -torch.arange(384.0), threshold)
    assert kept.tolist() == [*range(256), 382, 383]  # the list has no box for the last two rows


# Around the ends of the first, the second and a later block.
@pytest.mark.parametrize("max_output", [1, 50, 127, 128, 129, 255, 256, 257, 400, 499, 500, 501, 600])
def test_max_output_limits_what_is_returned(backend: Backend, max_output: int) -> None:
    # All boxes of the better class are kept, and every second box of the other class.
    place = torch.cat((torch.arange(500.0), 600 + (torch.arange(100) // 2).float()))
    boxes = torch.stack((place * 10, torch.zeros(600), place * 10 + 5, torch.ones(600)), dim=1)
    idxs = torch.tensor([1] * 500 + [0] * 100)
    arguments = [x[None].to(backend.device) for x in (boxes, -torch.arange(600.0), idxs)]
    kept, count = batched_nms_padded(*arguments, 0.5, max_output)
    expected = [*range(500), *range(500, 600, 2)][:max_output]
    assert kept[0].tolist() == expected + [-1] * (max_output - len(expected))
    assert count.tolist() == [len(expected)]


@pytest.mark.parametrize("max_output", [1, 64, 65, 120, 192, 193, 250, 300])
def test_max_output_ends_a_chain_of_decisions(backend: Backend, max_output: int) -> None:
    # Every second box of 600 is kept, 64 per block. `max_output` is reached in different blocks.
    start = torch.arange(600.0)
    boxes = torch.stack((start, torch.zeros(600), start + 3, torch.ones(600)), dim=1)
    arguments = [x[None].to(backend.device) for x in (boxes, -start, torch.zeros(600, dtype=torch.int64))]
    for idxs in (None, arguments[2]):
        kept, count = batched_nms_padded(*arguments[:2], idxs, 0.4, max_output)
        assert kept[0].tolist() == list(range(0, 600, 2))[:max_output]
        assert count.tolist() == [max_output]


@pytest.mark.parametrize("candidates", [0, 1, 90, 127, 128, 129, 300])  # of each class, around the blocks' edges
@pytest.mark.parametrize("with_classes", [False, True])
def test_a_chain_ends_at_the_score_threshold(backend: Backend, candidates: int, with_classes: bool) -> None:
    boxes = torch.stack([random_boxes(310, seed=seed, spread=0.2) for seed in range(2)]).repeat(1, 2, 1)
    idxs = torch.tensor([3] * 310 + [4] * 310).repeat(2, 1)
    scores = torch.rand(2, 620, generator=torch.Generator().manual_seed(1)) * 0.5
    better = torch.arange(620) % 310 < candidates
    scores = torch.where(better, scores + 0.5 + 2**-20, scores)
    scores[:, 305:310] = torch.nan
    classes = idxs if with_classes else None
    arguments = [None if x is None else x.to(backend.device) for x in (boxes, scores, classes)]
    kept, count = batched_nms_padded(*arguments, 0.3, 620, 0.5)
    expected = reference.batched_nms_padded(
        boxes.numpy(), scores.numpy(), idxs.numpy() if with_classes else None, 0.3, 620, 0.5
    )
    assert kept.tolist() == expected[0].tolist()
    assert count.tolist() == expected[1].tolist()


@pytest.mark.parametrize("threshold", [0.0, 1e-45, 0.25, 0.3, 0.5, 1.0, 2.0])
def test_any_floats_give_the_result_of_eager_code(backend: Backend, threshold: float) -> None:
    # Widths and areas overflow, underflow, or are negative, zero, infinite or NaN, in every combination.
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([-inf, -3e38, -1e19, -3, -1e-20, -0.0, 0, 1e-45, 1e-30, 1e-20, 1, 2, 3, 1e19, 3e38, inf, nan])
    generator = torch.Generator().manual_seed(0)
    corners = values[torch.randint(len(values), (200, 2, 2), generator=generator)]
    straight = torch.rand(200, 1, 1, generator=generator) < 0.8
    boxes = torch.where(straight, corners.sort(dim=1).values, corners).reshape(200, 4)
    scores = torch.arange(200, 0, -1.0)
    expected = eager.nms(boxes, scores, None, threshold)
    assert len(expected) < 200 or threshold >= 1
    assert run_nms(backend, boxes, scores, threshold).tolist() == expected.tolist()


def test_an_iou_one_bit_from_the_threshold(backend: Backend) -> None:
    # The IoU is the threshold itself, then the next smaller float, then the next larger one.
    inner = torch.tensor([0.5, 0.5 - 2**-25, 0.5 + 2**-24])
    for width, kept in zip(inner, ([0, 1], [0, 1], [0]), strict=True):
        boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, width, 1]])
        assert run_nms(backend, boxes, torch.tensor([1.0, 0.5]), 0.5).tolist() == kept


def test_more_images_than_one_axis_of_a_grid_takes(backend: Backend) -> None:
    if not backend.full_size:
        pytest.skip("70,000 programs take the interpreter minutes")
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]).repeat(70_000, 1, 1)  # past 65,535
    scores = torch.tensor([0.5, 0.75]).repeat(70_000, 1)
    kept, count = batched_nms_padded(boxes.to(backend.device), scores.to(backend.device), None, 0.5, 2)
    assert kept.unique(dim=0).tolist() == [[1, -1]]
    assert count.unique().tolist() == [1]


# Classes of equal and of different sizes.
@pytest.mark.parametrize(
    "sizes", [[5] * 70, [1, 2, 3, 40, 300], [1] * 300, [16] * 20, [17] * 20, [130] * 30 + [600], [300]]
)
def test_each_class_gives_the_result_of_nms_alone(backend: Backend, sizes: list[int]) -> None:
    if not backend.full_size:
        sizes = [min(size, 70) for size in sizes[:10]]
    idxs = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    idxs = idxs[torch.randperm(len(idxs), generator=torch.Generator().manual_seed(0))]
    # In each class neighbours suppress each other in places, and later decisions depend on that.
    start = torch.arange(float(len(idxs)))
    boxes = torch.stack((start, torch.zeros(len(idxs)), start + 4.0 * len(sizes), torch.ones(len(idxs))), dim=1)
    scores = torch.rand(len(idxs), generator=torch.Generator().manual_seed(1))
    kept = batched_nms(boxes.to(backend.device), scores.to(backend.device), idxs.to(backend.device), 0.5).cpu()
    alone = []
    for label in range(len(sizes)):
        own = (idxs == label).nonzero()[:, 0]
        alone.append(own[torchvision.ops.nms(boxes[own], scores[own], 0.5)])
    expected = torch.cat(alone)
    assert len(expected) < len(idxs) or max(sizes) == 1
    assert torch.equal(kept, expected[scores[expected].argsort(descending=True, stable=True)])
    twice = [torch.stack((x, x)).to(backend.device) for x in (boxes, scores, idxs)]
    padded, count = (x.cpu() for x in batched_nms_padded(*twice, 0.5, max_output=len(idxs)))
    for image in range(2):
        assert torch.equal(padded[image, : count[image]], kept)


def test_only_the_last_two_boxes_of_each_class_overlap(backend: Backend) -> None:
    classes, size = 20, 16
    place = torch.arange(size - 1.0).repeat(classes, 1)
    place = torch.cat((place, place[:, -1:]), dim=1).flatten()  # in each class only the last two overlap
    boxes = torch.stack((place * 10, torch.zeros_like(place), place * 10 + 5, torch.ones_like(place)), dim=1)
    idxs = torch.arange(classes).repeat_interleave(size)
    kept = batched_nms(
        boxes.to(backend.device), -torch.arange(320.0).to(backend.device), idxs.to(backend.device), 0.5
    ).cpu()
    assert kept.tolist() == [box for box in range(320) if box % size != size - 1]


def test_equal_scores_keep_the_lower_index(backend: Backend) -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    assert run_nms(backend, box.repeat(5, 1), torch.ones(5), 0.5).tolist() == [0]
    apart = torch.arange(5.0)[:, None] * 100 + box
    scores = torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0])  # both zeros are one number
    assert run_nms(backend, apart, scores, 0.5).tolist() == [2, 0, 1, 3, 4]


def test_nan_scores_come_first(backend: Backend) -> None:
    boxes = random_boxes(40)
    scores = torch.rand(40)
    scores[[3, 20, 21]] = torch.nan
    kept = run_nms(backend, boxes, scores, 0.3)
    assert kept[0] == 3
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, 0.3))


def test_nan_infinite_and_empty_boxes_suppress_nothing(backend: Backend) -> None:
    nan, inf = torch.nan, torch.inf
    odd = [[0, 0, nan, 10], [0, 0, inf, 10], [-inf, -inf, inf, inf], [5, 0, 5, 10], [10, 10, 0, 0], [10, 0, 0, 10]]
    boxes = torch.tensor([box for box in odd for _ in range(2)] + [[0.0, 0, 10, 10]] * 2)
    kept = run_nms(backend, boxes, torch.arange(14, 0, -1.0), 0.0)
    assert kept.tolist() == [*range(13)]
    assert torch.equal(kept, torchvision.ops.nms(boxes, torch.arange(14, 0, -1.0), 0.0))


def test_inverted_boxes_suppress_nothing(backend: Backend) -> None:
    # For two equal ones, area and intersection are negative, and the quotient is 1.
    boxes = torch.tensor([[0.0, 10, 10, 0]] * 2 + [[10.0, 0, 0, 10]] * 2 + [[10.0, 10, 0, 0]] * 2)
    assert run_nms(backend, boxes, -torch.arange(6.0), 0.5).tolist() == [*range(6)]


def test_odd_boxes_cause_no_warning() -> None:
    boxes = torch.tensor([[5.0, 0, 5, 10], [0, 0, torch.inf, 10], [-1e308, -1e308, 1e308, 1e308]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(nms(boxes.repeat(2, 1), torch.ones(6, dtype=torch.float64), 0.5)) == 6


@pytest.mark.parametrize(("inner", "threshold"), [(1, 0.1), (3, 0.3), (6, 0.6), (5, 0.5), (9, 0.9)])
def test_the_threshold_is_the_real_number_written(backend: Backend, inner: int, threshold: float) -> None:
    # The IoU is inner / 10 rounded to fp32. It is above 0.1, 0.3 and 0.6, and not above 0.5 and 0.9.
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, inner, 1]])
    scores = torch.tensor([1.0, 0.5])
    suppressed = torch.tensor(inner / 10, dtype=torch.float32).item() > threshold
    assert run_nms(backend, boxes, scores, threshold).tolist() == ([0] if suppressed else [0, 1])
    assert torch.equal(run_nms(backend, boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))
    # The same with more boxes than are settled in one step: 200 such pairs, far apart.
    boxes = (boxes + torch.tensor([0, 100, 0, 100]) * torch.arange(200)[:, None, None]).flatten(0, 1)
    kept = run_nms(backend, boxes, -torch.arange(400.0), threshold)
    assert kept.tolist() == list(range(0, 400, 2 if suppressed else 1))


def test_boxes_of_different_classes_do_not_suppress_each_other(backend: Backend) -> None:
    boxes, scores = random_boxes(300), torch.rand(300, generator=torch.Generator().manual_seed(1))
    idxs = torch.randint(0, 7, (300,), generator=torch.Generator().manual_seed(2))
    kept = batched_nms(*(x.to(backend.device) for x in (boxes, scores, idxs)), 0.3).cpu()
    assert torch.equal(kept, torchvision.ops.boxes._batched_nms_vanilla(boxes, scores, idxs, 0.3))


def test_negative_coordinates_keep_classes_apart(backend: Backend) -> None:
    boxes = torch.tensor([[-11.0, -11, -1, -1]] * 2)
    scores, idxs = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    kept = batched_nms(*(x.to(backend.device) for x in (boxes, scores, idxs)), 0.5)
    assert kept.tolist() == [0, 1]
    # torchvision moves class 1 by the largest coordinate plus one. That is 0 here, so class 1 stays on class 0.
    assert torchvision.ops.boxes._batched_nms_coordinate_trick(boxes, scores, idxs, 0.5).tolist() == [0]


@pytest.mark.parametrize("with_classes", [False, True])
@pytest.mark.parametrize("score_threshold", [None, 0.5])
def test_a_batch_gives_the_results_of_its_images(
    backend: Backend, with_classes: bool, score_threshold: float | None
) -> None:
    boxes = torch.stack([random_boxes(70, seed=seed) for seed in range(3)])
    scores = torch.rand(3, 70, generator=torch.Generator().manual_seed(3))
    scores[1] = 0.4  # none above the threshold
    idxs = torch.arange(210).reshape(3, 70) % 4 if with_classes else None
    arguments = [None if x is None else x.to(backend.device) for x in (boxes, scores, idxs)]
    for max_output in (5, 100):
        kept, count = batched_nms_padded(*arguments, 0.3, max_output, score_threshold)
        expected = reference.batched_nms_padded(
            boxes.numpy(), scores.numpy(), None if idxs is None else idxs.numpy(), 0.3, max_output, score_threshold
        )
        assert kept.tolist() == expected[0].tolist()
        assert count.tolist() == expected[1].tolist()


def test_infinite_score_thresholds(backend: Backend) -> None:
    boxes = random_boxes(3)[None].to(backend.device)
    scores = torch.tensor([[-torch.inf, 0.0, torch.inf]], device=backend.device)
    assert batched_nms_padded(boxes, scores, None, 0.99, 3, -torch.inf)[0].tolist() == [[2, 1, -1]]
    assert batched_nms_padded(boxes, scores, None, 0.99, 3, torch.inf)[1].tolist() == [0]


def test_a_score_threshold_drops_nan_and_its_own_value(backend: Backend) -> None:
    boxes = random_boxes(4)[None].to(backend.device)
    scores = torch.tensor([[0.5, torch.nan, 0.75, 0.25]], device=backend.device)
    kept, count = batched_nms_padded(boxes, scores, None, 0.99, 4, 0.25)
    assert kept.tolist() == [[2, 0, -1, -1]]
    assert count.tolist() == [2]
    # 0.3 in bf16 is 0.30078125, and greater than 0.3.
    rounded = torch.tensor([[0.3] * 4], dtype=torch.bfloat16, device=backend.device)
    assert batched_nms_padded(boxes, rounded, None, 0.99, 4, 0.3)[1].tolist() == [4]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(backend: Backend, shape: tuple[int, int]) -> None:
    kept, count = batched_nms_padded(
        torch.zeros(*shape, 4, device=backend.device), torch.zeros(shape, device=backend.device), None, 0.5, 3
    )
    assert kept.tolist() == [[-1] * 3] * shape[0]
    assert count.tolist() == [0] * shape[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_is_converted_to_fp32(backend: Backend, dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(100, size=100).to(dtype), torch.rand(100).to(dtype)
    expected = torchvision.ops.nms(boxes.float(), scores.float(), 0.4)
    assert torch.equal(run_nms(backend, boxes, scores, 0.4), expected)


def test_fp64_boxes_are_compared_in_fp64() -> None:
    # In fp32, the two boxes would be equal at this distance from the origin.
    boxes = torch.tensor([[1e8, 0, 1e8 + 1, 1], [1e8 + 1, 0, 1e8 + 2, 1]], dtype=torch.float64)
    assert nms(boxes, torch.tensor([1.0, 0.5], dtype=torch.float64), 0.1).tolist() == [0, 1]
    # The IoU is the threshold, which fp32 would round up.
    boxes = torch.tensor([[0.0, 0, 3, 1], [0, 0, 1, 1]], dtype=torch.float64)
    assert nms(boxes, torch.tensor([1.0, 0.5]), 1 / 3).tolist() == [0, 1]
    assert batched_nms_padded(boxes[None], torch.tensor([[1.0, 0.5]]), None, 1 / 3, 2)[1].tolist() == [2]
    assert nms(boxes.float(), torch.tensor([1.0, 0.5]), 1 / 3).tolist() == [0]
