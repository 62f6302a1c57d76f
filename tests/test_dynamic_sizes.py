"""Sizes may change: a compiled or exported op serves every size of every free dimension.

A fake implementation that calls `len(x)` turns a size into a number, and then each size costs a compilation of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import ragged_truths, random_boxes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ssdcore import kernels

CLASSES = 4
USUAL = {"B": 3, "N": 10, "M": 11, "T": 5, "A": 12, "H": 6}  # distinct, and none is 0 or 1, which torch always bakes in
SIZES = range(7, 27)  # twenty, of one dimension at a time
Problem = dict[str, Tensor | list[Tensor]]  # of one call, by the names of its arguments


def scores(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def boxes(*shape: int) -> Tensor:
    return random_boxes(torch.Size(shape).numel()).reshape(*shape, 4)


def truths(B: int, T: int) -> Problem:
    """T ground truths, all but one of them in the first image."""
    counts = [T - 1, 1, *[0] * B][:B]
    gt_boxes, gt_labels, gt_offsets = ragged_truths(counts, CLASSES)
    return {"gt_boxes": gt_boxes, "gt_labels": gt_labels, "gt_offsets": gt_offsets}


def loss_problem(B: int, A: int, T: int) -> Problem:
    matched = torch.full((B, A), -1)
    matched[0, 0] = 0
    head = {"cls_logits": scores(B, A, CLASSES), "box_deltas": scores(B, A, 4)}
    return {**head, "matched_idxs": matched, **truths(B, T), "anchors": boxes(A)}


def head_maps(B: int, H: int) -> Problem:
    """Two levels, of 2 anchors on H x 3 cells and 3 anchors on 2 x 2."""
    return {
        name: [scores(B, 2 * width, H, 3), scores(B, 3 * width, 2, 2)]
        for name, width in (("cls_logits", CLASSES), ("box_deltas", 4))
    }


def loss_of_maps_problem(B: int, H: int) -> Problem:
    return loss_problem(B, 6 * H + 12, T=4) | head_maps(B, H)


def total_loss(**problem: Tensor) -> Tensor:
    losses = kernels.multibox_loss(**problem)
    return losses.classification + losses.bbox_regression


# Of each public function: what it is called with for given sizes, and the dimensions that are free.
OPS: dict[str, tuple[Callable[..., Any], Callable[..., Problem], str]] = {
    "box_iou": (kernels.box_iou, lambda N, M: {"boxes1": boxes(N), "boxes2": boxes(M)}, "NM"),
    "encode_boxes": (kernels.encode_boxes, lambda B, A: {"boxes": boxes(B, A), "anchors": boxes(A)}, "BA"),
    "decode_boxes": (kernels.decode_boxes, lambda B, A: {"deltas": scores(B, A, 4), "anchors": boxes(A)}, "BA"),
    "nms": (
        lambda boxes, scores: kernels.nms(boxes, scores, 0.5),
        lambda N: {"boxes": boxes(N), "scores": scores(N)},
        "N",
    ),
    "batched_nms": (
        lambda boxes, scores, idxs: kernels.batched_nms(boxes, scores, idxs, 0.5),
        lambda N: {"boxes": boxes(N), "scores": scores(N), "idxs": torch.arange(N) % 3},
        "N",
    ),
    "batched_nms_padded": (
        lambda boxes, scores, idxs: kernels.batched_nms_padded(boxes, scores, idxs, 0.5, max_output=5),
        lambda B, N: {"boxes": boxes(B, N), "scores": scores(B, N), "idxs": (torch.arange(B * N) % 3).reshape(B, N)},
        "BN",
    ),
    "match_anchors": (
        lambda gt_boxes, gt_labels, gt_offsets, anchors: kernels.match_anchors(gt_boxes, gt_offsets, anchors),
        lambda B, T, A: {**truths(B, T), "anchors": boxes(A)},
        "BTA",
    ),
    "multibox_loss": (total_loss, loss_problem, "BAT"),
    "multibox_loss of maps": (total_loss, loss_of_maps_problem, "BH"),
    "postprocess_detections": (
        kernels.postprocess_detections,
        lambda B, A: {
            "cls_logits": scores(B, A, CLASSES),
            "box_deltas": scores(B, A, 4),
            "anchors": boxes(A),
            "image_sizes": torch.full((B, 2), 300),
        },
        "BA",
    ),
    "postprocess_detections of maps": (
        kernels.postprocess_detections,
        lambda B, H: {**head_maps(B, H), "anchors": boxes(6 * H + 12), "image_sizes": torch.full((B, 2), 300)},
        "BH",
    ),
}
FREE_DIMENSIONS = [(name, dimension) for name, (_, _, dimensions) in OPS.items() for dimension in dimensions]


def problem_of(name: str, **sizes: int) -> Problem:
    _, build, dimensions = OPS[name]
    return build(**{dimension: USUAL[dimension] for dimension in dimensions} | sizes)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a result or of a problem, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [value] if isinstance(value, Tensor) else [x for item in value for x in leaves(item)]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert torch.equal(a, b)


def test_every_public_function_is_covered() -> None:
    functions = set(kernels.__all__) - {"Detections", "MultiBoxLosses"}
    assert functions == {name.split()[0] for name in OPS}


@pytest.mark.parametrize(("name", "dimension"), FREE_DIMENSIONS)
# `nms` returns as many indices as it keeps boxes, a number that is not known in advance.
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_twenty_sizes_take_at_most_two_compilations(name: str, dimension: str) -> None:
    function = OPS[name][0]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for size in SIZES:
        problem = problem_of(name, **{dimension: size})
        assert_same(compiled(**problem), function(**problem))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("name", "differentiable"),
    [
        ("decode_boxes", ("deltas",)),
        ("multibox_loss", ("cls_logits", "box_deltas")),
        ("multibox_loss of maps", ("cls_logits", "box_deltas")),
    ],
)
def test_gradients_of_twenty_batch_sizes_take_at_most_two_compilations(
    name: str, differentiable: tuple[str, ...]
) -> None:
    function = OPS[name][0]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for size in SIZES:
        gradients = []
        for call in (compiled, function):
            problem = problem_of(name, B=size)
            inputs = [x.requires_grad_() for key in differentiable for x in leaves(problem[key])]
            output = call(**problem)
            cotangent = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
            gradients.append(torch.autograd.grad(output, inputs, cotangent + 2))
        assert_same(*gradients)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", OPS)
def test_an_exported_program_serves_other_sizes(name: str, strict: bool) -> None:
    function = OPS[name][0]

    class Call(nn.Module):
        def forward(self, problem: Problem) -> Any:
            result = function(**problem)
            return tuple(leaves(result))

    usual = problem_of(name)
    other = problem_of(name, **{dimension: 2 * USUAL[dimension] + 1 for dimension in OPS[name][2]})

    def free(tensor: Tensor, larger: Tensor) -> dict[int, Any]:
        """The dimensions that differ between both problems, which therefore must not be fixed."""
        pairs = zip(tensor.shape, larger.shape, strict=True)
        return {i: torch.export.Dim.DYNAMIC for i, (a, b) in enumerate(pairs) if a != b}

    def free_of_each(value: Any, larger: Any) -> Any:
        if isinstance(value, Tensor):
            return free(value, larger)
        return [free(a, b) for a, b in zip(value, larger, strict=True)]

    dynamic = {key: free_of_each(value, other[key]) for key, value in usual.items()}
    exported = torch.export.export(Call(), (usual,), dynamic_shapes=(dynamic,), strict=strict).module()
    for problem in (usual, other):
        assert_same(exported(problem), function(**problem))
