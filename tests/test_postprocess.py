import pytest
import torch
from conftest import Backend
from helpers import random_boxes, ssd300_anchors, torchvision_ssd
from torch import Tensor

from ssdcore.kernels import Detections, postprocess_detections
from ssdcore.testing.close import assert_close


def head(batch: int, num_anchors: int, num_classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(batch, num_anchors, num_classes, generator=generator)
    deltas = torch.randn(batch, num_anchors, 4, generator=generator)
    return logits.to(dtype), deltas.to(dtype)


def run(backend: Backend, *tensors: Tensor, **settings: float) -> Detections:
    return Detections(*(x.cpu() for x in postprocess_detections(*(x.to(backend.device) for x in tensors), **settings)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchvision(backend: Backend, dtype: torch.dtype) -> None:
    num_classes = 21 if backend.full_size else 4
    logits, deltas = head(2, 8732, num_classes, dtype)
    sizes = [(300, 300), (200, 250)]
    detections = run(backend, logits, deltas, ssd300_anchors(), torch.tensor(sizes))
    outputs = {"cls_logits": logits.float(), "bbox_regression": deltas.float()}
    expected_detections = torchvision_ssd().postprocess_detections(outputs, [ssd300_anchors()] * 2, sizes)
    for image, expected in enumerate(expected_detections):
        assert detections.num_detections[image] == len(expected["boxes"]) == 200
        assert_close(detections.scores[image], expected["scores"])
        # Scores that differ in their last bits alone may change places: compare as sets of (label, box).
        found, wanted = (
            sorted(zip(labels.tolist(), boxes.round(decimals=1).tolist(), strict=True))
            for labels, boxes in (
                (detections.labels[image], detections.boxes[image]),
                (expected["labels"], expected["boxes"]),
            )
        )
        assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 198


def test_equal_scores_are_ordered_by_class_then_anchor(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    logits = torch.zeros(1, 3, 3)
    found = run(backend, logits, torch.zeros(1, 3, 4), anchors, torch.tensor([[100, 100]]), max_detections=5)
    assert found.labels.tolist() == [[1, 1, 1, 2, 2]]
    assert found.boxes[0, :, 0].tolist() == [0, 20, 40, 0, 20]


@pytest.mark.parametrize("num_between", [0, 40])  # 40: the kernel takes 32 candidates at once
def test_an_iou_equal_to_the_threshold_does_not_suppress(backend: Backend, num_between: int) -> None:
    anchors = torch.tensor([0.0, 0, 10, 10]).repeat(num_between + 2, 1)
    anchors[1:-1] += 20.0 * torch.arange(1, num_between + 1)[:, None]  # apart from all others
    anchors[-1, 3] = 5.0  # its IoU with the first is a half
    logits = torch.zeros(1, len(anchors), 2)
    logits[0, :, 1] = torch.linspace(1, 0.5, len(anchors))
    sizes = torch.tensor([[1000, 1000]])
    for threshold, suppressed in ((0.5, 0), (0.5 - 1e-9, 1)):
        found = run(backend, logits, torch.zeros(1, len(anchors), 4), anchors, sizes, iou_threshold=threshold)
        assert found.num_detections.tolist() == [len(anchors) - suppressed]


@pytest.mark.parametrize(("num_apart", "wanted"), [(3, 20), (40, 20), (40, 3)])
def test_worse_candidates_replace_suppressed_ones(backend: Backend, num_apart: int, wanted: int) -> None:
    # The best anchors of both classes lie on one another, so that few are kept. The worst anchors lie apart.
    num_anchors = 600 if backend.full_size else 100
    anchors = torch.tensor([0.0, 0, 10, 10]).repeat(num_anchors, 1)
    anchors[-num_apart:] += 12.0 * torch.arange(num_apart)[:, None]
    logits = torch.zeros(1, num_anchors, 3)
    logits[0, :, 1] = torch.linspace(1, 0.5, num_anchors)
    logits[0, :, 2] = logits[0, :, 1] - 0.001
    sizes = torch.tensor([[1000, 1000]])
    settings = {"topk_candidates": num_anchors, "max_detections": wanted}
    found = run(backend, logits, torch.zeros(1, num_anchors, 4), anchors, sizes, **settings)
    kept = [
        0,
        *range(num_anchors - num_apart + 1, num_anchors),
    ]  # the first one apart equals the best
    scores = logits[0].softmax(dim=-1)
    expected = sorted((-scores[anchor, label].item(), label, anchor) for anchor in kept for label in (1, 2))[:wanted]
    assert found.num_detections.tolist() == [len(expected)]
    assert found.labels[0, : len(expected)].tolist() == [label for _, label, _ in expected]
    assert torch.equal(found.boxes[0, : len(expected)], anchors[[anchor for *_, anchor in expected]])
    assert found.anchor_idxs[0].tolist() == [anchor for *_, anchor in expected] + [-1] * (wanted - len(expected))


@pytest.mark.parametrize("settings", [{"max_detections": 10}, {"max_detections": 60, "topk_candidates": 5}])
def test_nan_rows_do_not_affect_other_rows(backend: Backend, settings: dict[str, int]) -> None:
    logits, deltas = head(1, 100, 3)
    anchors, sizes = random_boxes(100), torch.tensor([[300, 300]])
    clean = run(backend, logits[:, 50:], deltas[:, 50:], anchors[50:], sizes, **settings)
    logits[:, :50] = float("nan")
    found = run(backend, logits, deltas, anchors, sizes, **settings)
    assert torch.equal(found.boxes, clean.boxes) and torch.equal(found.labels, clean.labels)


def test_a_score_must_exceed_the_threshold(backend: Backend) -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    half = torch.zeros(1, 1, 2)  # softmax: a half, exactly
    sizes = torch.tensor([[100, 100]])
    below, at = (run(backend, half, torch.zeros(1, 1, 4), anchors, sizes, score_threshold=t) for t in (0.499, 0.5))
    assert below.num_detections.tolist() == [1]
    assert at.num_detections.tolist() == [0]


def test_top_k_takes_the_lowest_of_equal_anchors(backend: Backend) -> None:
    anchors = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(9)])
    logits = torch.zeros(1, 9, 2)
    found = run(backend, logits, torch.zeros(1, 9, 4), anchors, torch.tensor([[200, 200]]), topk_candidates=4)
    assert found.num_detections.tolist() == [4]
    assert found.boxes[0, :4, 0].tolist() == [0, 20, 40, 60]


def test_padding_and_an_image_without_candidates(backend: Backend) -> None:
    logits = torch.tensor([[[20.0, 0.0]], [[0.0, 20.0]]])
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    found = run(backend, logits, torch.zeros(2, 1, 4), anchors, torch.tensor([[5, 100]] * 2), max_detections=3)
    assert found.num_detections.tolist() == [0, 1]
    assert found.labels.tolist() == [[-1] * 3, [1, -1, -1]]
    assert found.anchor_idxs.tolist() == [[-1] * 3, [0, -1, -1]]
    assert found.boxes[0].abs().sum() == 0
    assert found.boxes[1, 0].tolist() == [0, 0, 10, 5]  # clipped to height 5
    assert found.boxes[1, 1:].abs().sum() == 0
    assert found.scores[1, 1:].tolist() == [0, 0]
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64, torch.int32, torch.int64]


def test_nan_and_infinite_logits_give_no_candidates_and_nan_boxes_stay(backend: Backend) -> None:
    anchors = random_boxes(3)
    logits = torch.tensor([[[0.0, torch.nan], [0.0, torch.inf], [0.0, 1.0]]])
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 2, 0] = torch.nan
    found = run(backend, logits, deltas, anchors, torch.tensor([[300, 300]]))
    assert found.num_detections.tolist() == [1]
    assert found.boxes[0, 0, 0].isnan()
    assert found.boxes[0, 0, 1].isfinite()


@pytest.mark.parametrize(("batch", "num_anchors", "num_classes"), [(0, 3, 3), (2, 0, 3), (2, 3, 1)])
def test_empty_batch_no_anchors_and_no_foreground_class(
    backend: Backend, batch: int, num_anchors: int, num_classes: int
) -> None:
    logits, deltas = head(batch, num_anchors, num_classes)
    found = run(backend, logits, deltas, random_boxes(num_anchors), torch.full((batch, 2), 300), max_detections=4)
    assert found.num_detections.tolist() == [0] * batch
    assert found.labels.tolist() == [[-1] * 4] * batch


# Around one, two and four words of 32 candidates.
@pytest.mark.parametrize("topk", [1, 31, 32, 33, 64, 65, 128, 129])
def test_numbers_of_candidates_around_a_word(backend: Backend, topk: int) -> None:
    logits, deltas = head(1, 150, 3)
    sizes = torch.tensor([[300, 300]])
    found = run(backend, logits, deltas, random_boxes(150), sizes, topk_candidates=topk)
    expected = run(
        Backend("eager", "cpu", 0), logits.double(), deltas.double(), random_boxes(150), sizes, topk_candidates=topk
    )
    assert torch.equal(found.num_detections, expected.num_detections)
    assert torch.equal(found.labels, expected.labels)
    assert_close(found.boxes, expected.boxes, scale=300)


def test_maps_give_the_results_of_packed_outputs(backend: Backend) -> None:
    logits, deltas = head(2, 30, 4)
    anchors, sizes = random_boxes(30), torch.tensor([[300, 300]] * 2)
    maps = [
        [
            packed[:, :24].unflatten(1, (3, 4, 2)).permute(0, 3, 4, 1, 2).flatten(1, 2),
            packed[:, 24:].unflatten(1, (1, 2, 3)).permute(0, 3, 4, 1, 2).flatten(1, 2),
        ]
        for packed in (logits, deltas)
    ]
    maps = [[x.to(backend.device) for x in levels] for levels in maps]
    found = postprocess_detections(*maps, anchors.to(backend.device), sizes.to(backend.device))
    for got, expected in zip(found, run(backend, logits, deltas, anchors, sizes), strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(
    ("settings", "memory_format"),
    [
        ({}, torch.contiguous_format),
        ({"topk_candidates": 7}, torch.channels_last),
        ({"topk_candidates": 40, "max_detections": 50}, torch.channels_last),
    ],
)
@pytest.mark.parametrize("problem", ["random", "alike", "suppressed", "few", "one class"])
def test_images_that_need_candidates_below_the_cutoff(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
    settings: dict[str, int],
    memory_format: torch.memory_format,
) -> None:
    # With the usual sizes, no candidate of a small problem would be below the cutoff, and no list would be full.
    triton_postprocess = pytest.importorskip("ssdcore.kernels.postprocess.triton")
    monkeypatch.setattr(triton_postprocess, "CUTOFF_ANCHORS", 1)
    monkeypatch.setattr(triton_postprocess, "REST_ANCHORS", 32)
    settings = {"max_detections": 10, "iou_threshold": 0.3, **settings}
    num_classes = 2 if problem == "one class" else 4
    generator = torch.Generator().manual_seed(3)
    # Two levels, of 4 anchors on 6 x 5 cells and 3 anchors on 2 x 3.
    logits, deltas = (
        [torch.randn(2, a * width, h, w, generator=generator) for a, h, w in ((4, 6, 5), (3, 2, 3))]
        for width in (num_classes, 4)
    )
    anchors = random_boxes(138, size=100)
    if problem == "alike":  # equal scores straddle the cutoff
        logits = [torch.zeros_like(x) for x in logits]
    elif problem == "few":  # a dozen candidates
        logits = [torch.where(x > 2.5, x, -20.0) for x in logits]
    elif problem in ("suppressed", "one class"):  # all boxes alike but the worst anchor's
        anchors = torch.tensor([[0.0, 0, 50, 50]]).repeat(138, 1)
        anchors[4] = torch.tensor([60.0, 60, 90, 90])
        deltas = [torch.zeros_like(x) for x in deltas]
        logits[0][:, :num_classes, 0, 1] = 0.0
        logits[0][:, 0, 0, 1] = 3.0
    sizes = torch.tensor([[100, 100], [80, 90]])
    maps = [
        [x.contiguous(memory_format=memory_format).to(backend.device) for x in levels] for levels in (logits, deltas)
    ]
    found = postprocess_detections(*maps, anchors.to(backend.device), sizes.to(backend.device), **settings)
    wide = [[x.double() for x in levels] for levels in (logits, deltas)]
    expected = postprocess_detections(*wide, anchors, sizes, **settings)
    assert torch.equal(found.num_detections.cpu(), expected.num_detections)
    assert torch.equal(found.labels.cpu(), expected.labels)
    assert_close(found.scores.cpu(), expected.scores)
    assert_close(found.boxes.cpu(), expected.boxes, scale=100)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_candidates_above_the_cutoff_settle_an_image(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the last launch. The best few hundred candidates settle an image, although all anchors have candidates.
    triton_postprocess = pytest.importorskip("ssdcore.kernels.postprocess.triton")

    class Nothing:
        def __getitem__(self, grid: object) -> object:
            return lambda *_, **__: None

    monkeypatch.setattr(triton_postprocess, "_rest_kernel", Nothing())
    monkeypatch.setattr(triton_postprocess, "REST_ANCHORS", 32)
    logits, deltas = head(2, 600, 5)
    logits[..., 0] += 6  # the background is likeliest, as after training
    anchors, sizes = random_boxes(600), torch.tensor([[300, 300]] * 2)
    settings = {"max_detections": 20, "topk_candidates": 30}
    found = run(backend, logits, deltas, anchors, sizes, **settings)
    expected = postprocess_detections(logits, deltas, anchors, sizes, **settings)
    assert found.num_detections.tolist() == [20, 20]
    assert torch.equal(found.labels, expected.labels)
    assert_close(found.boxes, expected.boxes, scale=300)


def test_scores_equal_to_the_cutoff_are_settled_together(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_postprocess = pytest.importorskip("ssdcore.kernels.postprocess.triton")
    monkeypatch.setattr(triton_postprocess, "CUTOFF_ANCHORS", 1)
    monkeypatch.setattr(triton_postprocess, "REST_ANCHORS", 32)
    # The first 36 anchors are equal and have the best scores of class 1. The other anchors lie apart, and their score
    # of class 1 equals the score of class 2 of the first 36.
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(140, 1)
    anchors[36:] += 20.0 * torch.arange(1, 105)[:, None]
    logits = torch.tensor([[-torch.inf, 1, 0]]).repeat(140, 1)
    logits[36:] = torch.tensor([1, 0, -torch.inf])
    sizes = torch.tensor([[9999, 9999]])
    settings = {"max_detections": 2, "topk_candidates": 60}
    found = run(backend, logits[None], torch.zeros(1, 140, 4), anchors, sizes, **settings)
    assert found.labels.tolist() == [[1, 1]]
    assert torch.equal(found.boxes[0], anchors[[0, 36]])


@pytest.mark.parametrize("with_cutoff", [False, True])
def test_a_score_equal_to_the_threshold_is_no_candidate(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, with_cutoff: bool
) -> None:
    if with_cutoff:  # some candidates lie below it, and the image is settled again
        triton_postprocess = pytest.importorskip("ssdcore.kernels.postprocess.triton")
        monkeypatch.setattr(triton_postprocess, "CUTOFF_ANCHORS", 1)
        monkeypatch.setattr(triton_postprocess, "REST_ANCHORS", 32)
    # All boxes are equal, so that one per class is kept. The score of class 2 is below that of class 1 everywhere.
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(140, 1)
    logits = torch.tensor([[[-torch.inf, 1, 0]]]).repeat(1, 140, 1)
    arguments = (logits, torch.zeros(1, 140, 4), anchors, torch.tensor([[10, 10]]))
    settings = {"max_detections": 5, "topk_candidates": 10}
    scores = run(backend, *arguments, score_threshold=0.0, **settings).scores[0]
    assert scores[0] > scores[1] > scores[2] == 0
    found = run(backend, *arguments, score_threshold=scores[1].item(), **settings)
    assert found.labels.tolist() == [[1, -1, -1, -1, -1]]
