"""The criterion as a module: the losses of the ops, in every layout, with targets as people have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdcore.criterion import MultiBoxLoss
from ssdcore.kernels import match_anchors, multibox_loss
from ssdcore.models import ssd300_tiny
from ssdcore.objects import Target, ragged
from ssdcore.testing.close import assert_close

GRIDS, PER_CELL, NUM_CLASSES = (3, 1), (2, 4), 5
NUM_ANCHORS = 3 * 3 * 2 + 4
TARGETS: list[Target] = [
    {"boxes": torch.tensor([[10.0, 20, 60, 90], [0, 0, 30, 30]], dtype=torch.float64), "labels": torch.tensor([1, 4])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    {"boxes": torch.tensor([[40.0, 40, 100, 100]]), "labels": torch.tensor([2])},
]


def anchors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(NUM_ANCHORS, 2, generator=generator) * 60
    return torch.cat([corner, corner + 10 + torch.rand(NUM_ANCHORS, 2, generator=generator) * 50], dim=1)


def maps(columns: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, per_cell * columns, size, size, generator=generator)
        for size, per_cell in zip(GRIDS, PER_CELL, strict=True)
    ]


def packed(levels: list[Tensor], columns: int) -> Tensor:
    rows = [x.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels]
    return torch.cat(rows, dim=1)


LAYOUTS: dict[str, Callable[[list[Tensor], int], Any]] = {
    "packed": packed,
    "maps": lambda levels, columns: levels,
    "channels_last": lambda levels, columns: [x.contiguous(memory_format=torch.channels_last) for x in levels],
    "NVIDIA's [B, C, A]": lambda levels, columns: [packed(levels, columns).mT.contiguous()[..., None]],
}


@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_the_ops(layout: str, normalizer: Any) -> None:
    logits, deltas = maps(NUM_CLASSES, 1), maps(4, 2)
    rows = packed(logits, NUM_CLASSES).requires_grad_(), packed(deltas, 4).requires_grad_()
    gt_boxes, gt_labels, gt_offsets = ragged(TARGETS, torch.device("cpu"))
    assert gt_boxes.dtype == torch.float32 and gt_offsets.tolist() == [0, 2, 2, 3]
    matched = match_anchors(gt_boxes, gt_offsets, anchors(), 0.4)
    assert (matched >= 0).any()
    expected = multibox_loss(
        *rows, matched, gt_boxes, gt_labels, gt_offsets, anchors(), normalizer=normalizer, min_negatives=3, beta=0.5
    )
    (expected.classification + 0.3 * expected.bbox_regression).backward()

    criterion = MultiBoxLoss(anchors(), iou_threshold=0.4, normalizer=normalizer, min_negatives=3, beta=0.5)
    leaves = [[x.clone().requires_grad_() for x in group] for group in (logits, deltas)]
    found = criterion(LAYOUTS[layout](leaves[0], NUM_CLASSES), LAYOUTS[layout](leaves[1], 4), TARGETS)
    (found.classification + 0.3 * found.bbox_regression).backward()
    for got, wanted in zip(found, expected, strict=True):
        assert_close(got.detach(), wanted.detach())
    for group, columns, of_rows in zip(leaves, (NUM_CLASSES, 4), rows, strict=True):
        assert_close(packed([x.grad for x in group if x.grad is not None], columns), of_rows.grad)


def test_nvidias_outputs_are_read_where_they_lie() -> None:
    head = pytest.importorskip("ssdcore.kernels.device.head")
    from ssdcore.kernels.levels import view_as_levels

    logits, deltas = torch.randn(2, NUM_CLASSES, 9), torch.randn(2, 4, 9)
    levels, shape = head.levels_of(*view_as_levels([logits[..., None]], [deltas[..., None]])[:2])
    assert shape.planes
    assert [x.data_ptr() for x in levels.logits + levels.deltas] == [logits.data_ptr(), deltas.data_ptr()]


def test_the_module_moves_its_anchors_and_saves_nothing() -> None:
    criterion = MultiBoxLoss(anchors())
    assert not criterion.state_dict() and not list(criterion.parameters())
    assert criterion.to(torch.float64).anchors.dtype == torch.float64


def test_it_computes_the_losses_of_the_detector() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(NUM_CLASSES)
    images = torch.rand(3, 3, 300, 300)
    expected = model(images, TARGETS)
    found = MultiBoxLoss(model.anchors)(*model.predict(model.resize(images)), TARGETS)
    for name, loss in found._asdict().items():
        assert_close(loss.detach(), expected[name].detach())
