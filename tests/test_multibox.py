import math
from typing import Any

import pytest
import torch
from conftest import Backend
from helpers import ragged_truths, random_boxes, ssd300_anchors, torchvision_ssd
from torch import Tensor

from ssdcore.kernels import match_anchors, multibox_loss
from ssdcore.testing.close import assert_close


def problem(
    counts: list[int], anchors: Tensor, num_classes: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments of `multibox_loss` for images with `counts` ground truths."""
    gt_boxes, gt_labels, gt_offsets = ragged_truths(counts, num_classes)
    generator = torch.Generator().manual_seed(1)
    return {
        "cls_logits": (3 * torch.randn(len(counts), len(anchors), num_classes, generator=generator)).to(dtype),
        "box_deltas": (2 * torch.randn(len(counts), len(anchors), 4, generator=generator)).to(dtype),
        "matched_idxs": match_anchors(gt_boxes, gt_offsets, anchors),
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_offsets": gt_offsets,
        "anchors": anchors,
    }


def run(backend: Backend, arguments: dict[str, Tensor], **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Both losses, and the gradients of a random combination of them in the logits and the deltas."""
    given = {name: tensor.to(backend.device) for name, tensor in arguments.items()}
    leaves = [given[name].requires_grad_() for name in ("cls_logits", "box_deltas")]
    losses = multibox_loss(**given, **settings)
    grads = torch.autograd.grad(1.3 * losses.classification + 0.7 * losses.bbox_regression, leaves)
    return [loss.detach().cpu() for loss in losses], [grad.cpu() for grad in grads]


def torchvision_losses(arguments: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [arguments[name].clone().requires_grad_() for name in ("cls_logits", "box_deltas")]
    pieces = list(zip(arguments["gt_offsets"][:-1], arguments["gt_offsets"][1:], strict=True))
    targets = [{"boxes": arguments["gt_boxes"][a:b], "labels": arguments["gt_labels"][a:b]} for a, b in pieces]
    losses = torchvision_ssd().compute_loss(
        targets,
        {"cls_logits": leaves[0], "bbox_regression": leaves[1]},
        [arguments["anchors"]] * len(targets),
        list(arguments["matched_idxs"]),
    )
    grads = torch.autograd.grad(1.3 * losses["classification"] + 0.7 * losses["bbox_regression"], leaves)
    return [losses["classification"].detach(), losses["bbox_regression"].detach()], list(grads)


def test_equals_torchvision(backend: Backend) -> None:
    arguments = problem([3, 0, 9, 1], ssd300_anchors(), num_classes=81 if backend.full_size else 5)
    (losses, grads), (expected_losses, expected_grads) = run(backend, arguments), torchvision_losses(arguments)
    for loss, expected in zip(losses, expected_losses, strict=True):
        assert_close(loss, expected, scale=10)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected)
        assert torch.equal(grad != 0, expected != 0)  # the same anchors


def test_each_anchor_counts_once_where_torchvision_counts_twice(backend: Backend) -> None:
    arguments = problem([1], torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]))
    arguments |= {"matched_idxs": torch.tensor([[0, -1]]), "gt_boxes": torch.tensor([[0.0, 0, 10, 10]])}
    logits = arguments["cls_logits"][0]
    positive = torch.nn.functional.cross_entropy(logits[:1], arguments["gt_labels"])
    negative = torch.nn.functional.cross_entropy(logits[1:], torch.tensor([0]))
    # Mining wants three negatives and there is one. torchvision's ranking then mines the positive as well.
    assert_close(run(backend, arguments)[0][0], positive + negative)
    assert_close(torchvision_losses(arguments)[0][0], 2 * positive + negative)


def test_image_normalizer_averages_the_losses_of_images(backend: Backend) -> None:
    arguments = problem([2, 0, 5], random_boxes(200))
    losses, grads = run(backend, arguments, normalizer="image")
    expected = [0.0, 0.0]
    for image in (0, 2):  # the image in between has weight 0
        first, last = arguments["gt_offsets"][image : image + 2]
        alone = {name: arguments[name][image : image + 1] for name in ("cls_logits", "box_deltas", "matched_idxs")}
        alone |= {name: arguments[name][first:last] for name in ("gt_boxes", "gt_labels")}
        alone |= {"gt_offsets": torch.tensor([0, last - first]), "anchors": arguments["anchors"]}
        for index, loss in enumerate(run(backend, alone)[0]):
            expected[index] += loss.item() / 3
    for loss, value in zip(losses, expected, strict=True):
        assert_close(loss, value)
    assert (grads[0][1] == 0).all()


@pytest.mark.parametrize("normalizer", ["batch", "image"])
def test_a_batch_without_positives_has_no_loss(backend: Backend, normalizer: str) -> None:
    arguments = problem([0, 0], random_boxes(50))
    losses, grads = run(backend, arguments, normalizer=normalizer)
    assert losses == [0, 0]
    assert all((grad == 0).all() for grad in grads)


def test_min_negatives_are_mined_in_an_image_without_objects(backend: Backend) -> None:
    arguments = problem([0], random_boxes(50))
    background = torch.nn.functional.cross_entropy(
        arguments["cls_logits"][0], torch.zeros(50, dtype=torch.int64), reduction="none"
    )
    losses, grads = run(backend, arguments, min_negatives=7)
    assert_close(losses[0], background.topk(7).values.sum())
    assert sorted(grads[0][0].abs().sum(1).nonzero()[:, 0].tolist()) == sorted(background.topk(7).indices.tolist())


@pytest.mark.parametrize(("num_anchors", "wanted"), [(50, 7), (4200, 4100)])  # the latter in three steps
def test_equal_negatives_go_to_the_lowest_anchors(backend: Backend, num_anchors: int, wanted: int) -> None:
    arguments = problem([0], random_boxes(num_anchors))
    arguments["cls_logits"] = torch.zeros_like(arguments["cls_logits"])
    _, grads = run(backend, arguments, min_negatives=wanted)
    assert grads[0][0].abs().sum(1).nonzero()[:, 0].tolist() == list(range(wanted))


def test_ties_in_one_image_mine_nothing_in_another(backend: Backend) -> None:
    arguments = problem([0, 1], random_boxes(50))
    arguments["cls_logits"] = torch.zeros_like(arguments["cls_logits"])
    _, grads = run(backend, arguments)
    assert (grads[0][0] == 0).all()
    positives = int((arguments["matched_idxs"][1] >= 0).sum())
    assert int((grads[0][1] != 0).any(dim=1).sum()) == 4 * positives < 50


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("anchor", ["positive", "negative", "not mined"])
def test_a_nan_or_infinite_logit_gives_a_nan_loss(backend: Backend, value: float, anchor: str) -> None:
    arguments = problem([2, 0], random_boxes(50))
    positive = int((arguments["matched_idxs"][0] >= 0).nonzero()[0])
    negative = int((arguments["matched_idxs"][0] < 0).nonzero()[0])
    # The second image has no positives and mines nothing.
    row = {"positive": (0, positive), "negative": (0, negative), "not mined": (1, 0)}[anchor]
    arguments["cls_logits"][(*row, 2)] = value
    losses, _ = run(backend, arguments)
    assert losses[0].isnan()
    assert losses[1].isfinite()


def test_a_nan_loss_is_mined_before_an_infinite_one(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    arguments = problem([1], anchors) | {"matched_idxs": torch.tensor([[0, -1, -1, -1]])}
    arguments["cls_logits"][0, 1, 0] = -math.inf  # the loss of a negative is infinite
    arguments["cls_logits"][0, 2, 3] = math.nan
    _, (gradient, _) = run(backend, arguments, neg_pos_ratio=1.0)
    assert gradient[0, 2].isnan().all()
    assert (gradient[0, [1, 3]] == 0).all()


def test_an_infinite_background_loss_does_not_affect_a_positive(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    arguments = problem([1], anchors) | {"matched_idxs": torch.tensor([[0, -1]]), "gt_labels": torch.tensor([2])}
    arguments["cls_logits"][0, 0] = torch.tensor([-math.inf, 0.0, math.log(2), 0.0, -math.inf])
    (classification, _), (gradient, _) = run(backend, arguments, neg_pos_ratio=0.0)
    assert_close(classification, math.log(2))
    assert_close(gradient[0, 0], 1.3 * torch.tensor([0, 0.25, -0.5, 0.25, 0], dtype=torch.float64))


@pytest.mark.parametrize("label", [0, -1, 5, 10**6])
def test_a_label_out_of_range_gives_nan_losses(backend: Backend, label: int) -> None:
    arguments = problem([2], random_boxes(50))
    arguments["gt_labels"][int(arguments["matched_idxs"].max())] = label
    assert all(loss.isnan() for loss in run(backend, arguments)[0])


def test_a_match_out_of_range_gives_nan_losses(backend: Backend) -> None:
    arguments = problem([2, 2], random_boxes(50))
    arguments["matched_idxs"][0, 0] = 2  # the second image's first
    assert all(loss.isnan() for loss in run(backend, arguments)[0])


def test_a_nan_delta_gives_a_nan_gradient(backend: Backend) -> None:
    arguments = problem([2], random_boxes(50))
    positive = int((arguments["matched_idxs"][0] >= 0).nonzero()[0])
    arguments["box_deltas"][0, positive, 1] = torch.nan
    for beta in (0.0, 1.0):
        losses, grads = run(backend, arguments, beta=beta)
        assert losses[1].isnan()
        assert grads[1].isnan().nonzero().tolist() == [[0, positive, 1]]


def test_one_anchor(backend: Backend) -> None:
    arguments = problem([1], torch.tensor([[0.0, 0, 10, 10]]))
    arguments["matched_idxs"] = torch.zeros(1, 1, dtype=torch.int64)
    expected = torch.nn.functional.cross_entropy(arguments["cls_logits"][0], arguments["gt_labels"])
    assert_close(run(backend, arguments)[0][0], expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches_and_no_anchors(backend: Backend, shape: tuple[int, int]) -> None:
    losses, grads = run(backend, problem([0] * shape[0], random_boxes(shape[1])))
    assert losses == [0, 0]
    assert grads[0].shape == (*shape, 5)


@pytest.mark.parametrize("num_classes", [2, 16, 17, 300])  # around a tile's least width, and a wide one
def test_numbers_of_classes_around_a_tile(backend: Backend, num_classes: int) -> None:
    arguments = problem([3, 1], random_boxes(70), num_classes)
    losses, _ = run(backend, arguments)
    for loss, expected in zip(losses, torchvision_losses(arguments)[0], strict=True):
        assert_close(loss, expected, scale=10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 3, 4, 21, 34, 81])
def test_logits_of_16_bits_give_the_same_wherever_they_begin(
    backend: Backend, dtype: torch.dtype, num_classes: int
) -> None:
    arguments = problem([3, 0, 1], random_boxes(70), num_classes, dtype)
    wide = arguments | {name: arguments[name].double() for name in ("cls_logits", "box_deltas")}
    expected_losses, expected_grads = run(Backend("eager", "cpu", 0), wide)
    logits = arguments["cls_logits"].to(backend.device)
    for first in (0, 1):  # two numbers of 16 bits are a word only where they begin at an even one
        shifted = torch.cat([logits.flatten()[:first], logits.flatten()])[first:].view_as(logits)
        losses, grads = run(backend, arguments | {"cls_logits": shifted})
        for loss, expected in zip(losses, expected_losses, strict=True):
            assert_close(loss, expected, scale=10)
        for grad, expected in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected, stored_ulps=backend.stored_ulps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_input_gives_fp32_losses(backend: Backend, dtype: torch.dtype) -> None:
    arguments = problem([3, 1], random_boxes(70), dtype=dtype)
    wide = arguments | {name: arguments[name].double() for name in ("cls_logits", "box_deltas")}
    eager = Backend("eager", "cpu", 0)
    (losses, grads), (expected_losses, expected_grads) = run(backend, arguments), run(eager, wide)
    for loss, expected in zip(losses, expected_losses, strict=True):
        assert loss.dtype == torch.float32
        assert_close(loss, expected, scale=10)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, expected, stored_ulps=backend.stored_ulps)


@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_match_finite_differences(normalizer: str, beta: float) -> None:
    arguments = problem([2, 0, 1], random_boxes(12))
    logits, deltas = (arguments.pop(name).double() for name in ("cls_logits", "box_deltas"))
    assert torch.autograd.gradcheck(
        lambda x, y: multibox_loss(x, y, **arguments, normalizer=normalizer, beta=beta, min_negatives=2),
        (logits.requires_grad_(), deltas.requires_grad_()),
    )


@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gradients_against_fp64(backend: Backend, normalizer: str, beta: float) -> None:
    arguments = problem([2, 0, 4], random_boxes(100))
    settings = {"normalizer": normalizer, "beta": beta, "min_negatives": 2, "neg_pos_ratio": 1.7}
    wide = arguments | {name: arguments[name].double() for name in ("cls_logits", "box_deltas")}
    _, grads = run(backend, arguments, **settings)
    _, expected_grads = run(Backend("eager", "cpu", 0), wide, **settings)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected)


# A block of 64 anchors and a rest whose gradients begin and end within one aligned store, in one of the images.
@pytest.mark.parametrize("num_anchors", [65, 66, 129])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_programs_do_not_overwrite_gradients_of_their_neighbours(
    backend: Backend, num_anchors: int, num_classes: int
) -> None:
    arguments = problem([1] * 5, random_boxes(num_anchors), num_classes)
    _, grads = run(backend, arguments, min_negatives=num_anchors)  # every row has a gradient
    assert (grads[0] != 0).all()
    wide = arguments | {name: arguments[name].double() for name in ("cls_logits", "box_deltas")}
    _, expected_grads = run(Backend("eager", "cpu", 0), wide, min_negatives=num_anchors)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_give_the_results_of_packed_outputs(backend: Backend, memory_format: torch.memory_format) -> None:
    # Two levels, of 2 anchors on 3 x 4 cells and 3 anchors on 1 x 2.
    arguments = problem([3, 1], random_boxes(30))
    packed_losses, packed_grads = run(backend, arguments)

    def as_maps(packed: Tensor) -> list[Tensor]:
        levels = [packed[:, :24].unflatten(1, (3, 4, 2)), packed[:, 24:].unflatten(1, (1, 2, 3))]
        maps = [level.permute(0, 3, 4, 1, 2).flatten(1, 2) for level in levels]
        return [x.contiguous(memory_format=memory_format).to(backend.device).requires_grad_() for x in maps]

    logits, deltas = as_maps(arguments.pop("cls_logits")), as_maps(arguments.pop("box_deltas"))
    losses = multibox_loss(logits, deltas, **{name: x.to(backend.device) for name, x in arguments.items()})
    grads = torch.autograd.grad(1.3 * losses[0] + 0.7 * losses[1], logits + deltas)
    for grad in grads:
        assert grad.is_contiguous(memory_format=memory_format)
    expected_grads = as_maps(packed_grads[0]) + as_maps(packed_grads[1])
    if backend.name == "eager" or memory_format == torch.channels_last:
        assert [x.cpu() for x in losses] == packed_losses
        assert all(torch.equal(grad, expected) for grad, expected in zip(grads, expected_grads, strict=True))
    # Where the classes of an anchor lie in planes, a compiled kernel adds them up in another order.
    for loss, expected in zip(losses, packed_losses, strict=True):
        assert_close(loss, expected, scale=10)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected)
