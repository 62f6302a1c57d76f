"""What holds for every op: opcheck, compilation, determinism, the same decisions on both backends, clear errors."""

from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
from conftest import Backend
from helpers import ragged_truths, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssdcore import kernels
from ssdcore.kernels import levels
from ssdcore.kernels.boxes import eager as boxes_eager
from ssdcore.kernels.matching import eager as matching_eager
from ssdcore.kernels.multibox import eager as multibox_eager
from ssdcore.kernels.nms import eager as nms_eager
from ssdcore.kernels.rules import BOX_WEIGHTS

BATCH, ANCHORS, CLASSES = 2, 37, 4
WEIGHTS = list(BOX_WEIGHTS)


def op(name: str) -> Callable[..., Any]:
    """A registered op."""
    overload: Callable[..., Any] = getattr(torch.ops.ssdcore, name).default
    return overload


def op_arguments(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered op."""
    generator = torch.Generator().manual_seed(0)
    anchors = random_boxes(ANCHORS, seed=1)
    gt_boxes, gt_labels, gt_offsets = ragged_truths([3, 1], CLASSES)
    matched = matching_eager.match_anchors(gt_boxes, gt_offsets, anchors, 0.5)
    logits = torch.randn(BATCH, ANCHORS, CLASSES, generator=generator).to(dtype)
    deltas = torch.randn(BATCH, ANCHORS, 4, generator=generator).to(dtype)
    boxes = torch.stack([random_boxes(ANCHORS, seed=seed) for seed in range(BATCH)]).to(dtype)
    scores = torch.rand(BATCH, ANCHORS, generator=generator).to(dtype)
    idxs = torch.randint(0, 3, (BATCH, ANCHORS), generator=generator)
    truth = (matched, gt_boxes, gt_labels, gt_offsets, anchors)
    # A level of 33 cells with one anchor each, and a level of 2 cells with two.
    head = [[x[:, :33, None].contiguous(), x[:, 33:].unflatten(1, (2, 2)).contiguous()] for x in (logits, deltas)]
    *_, lse, selected, scale = multibox_eager.multibox_loss(*head, *truth, WEIGHTS, 3.0, 1.0, 0, "batch")
    grad = torch.tensor(0.7)
    arguments: dict[str, tuple[Any, ...]] = {
        "box_iou": (boxes[0], boxes[1]),
        "encode_boxes": (boxes, anchors, WEIGHTS),
        "decode_boxes": (deltas, anchors, WEIGHTS),
        "decode_boxes_backward": (torch.ones(BATCH, ANCHORS, 4), deltas, anchors, WEIGHTS),
        "match_anchors": (gt_boxes, gt_offsets, anchors, 0.5),
        "multibox_loss": (*head, *truth, WEIGHTS, 3.0, 1.0, 1, "image"),
        "multibox_loss_backward": (grad, grad, *head, *truth, lse, selected, scale, WEIGHTS, 1.0),
        "nms": (boxes[0], scores[0], idxs[0], 0.5),
        "batched_nms_padded": (boxes, scores, None, 0.5, 9, 0.1),
        "postprocess_detections": (*head, anchors, torch.full((BATCH, 2), 300), WEIGHTS, 0.01, 0.45, 20, 10),
    }
    return {name: tuple(each_tensor(values, lambda x: x.to(device))) for name, values in arguments.items()}


def each_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to its tensors, those in lists too."""
    if isinstance(value, (list, tuple)):
        return [each_tensor(x, function) for x in value]
    return function(value) if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    """The tensors in `value`, one after the other."""
    found: list[Tensor] = []
    each_tensor(value, lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, and NaN where the other is NaN."""

    def equal(a: Tensor, b: Tensor) -> bool:
        nan = a.isnan()
        same_numbers = torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))
        return a.dtype == b.dtype and torch.equal(nan, b.isnan()) and same_numbers

    return all(equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def as_maps(views: list[Tensor], memory_format: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """Levels [B, P, a, C] as the maps [B, a * C, P, 1] that a head's convolutions would leave."""
    return [x.permute(0, 2, 3, 1).flatten(1, 2)[..., None].contiguous(memory_format=memory_format) for x in views]


def test_every_registered_op_is_covered() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ssdcore::")}
    assert registered == {f"ssdcore::{name}" for name in op_arguments("cpu")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", op_arguments("cpu"))
def test_opcheck(backend: Backend, name: str, dtype: torch.dtype) -> None:
    arguments = op_arguments(backend.device, dtype)[name]
    if name in ("decode_boxes", "multibox_loss"):
        differentiable = 1 if name == "decode_boxes" else 2
        leaves = each_tensor(arguments[:differentiable], lambda x: x.detach().requires_grad_())
        arguments = (*leaves, *arguments[differentiable:])
    torch.library.opcheck(op(name), arguments)


@pytest.mark.parametrize("name", op_arguments("cpu"))
def test_two_calls_give_the_same_bits(backend: Backend, name: str) -> None:
    first, second = (op(name)(*op_arguments(backend.device)[name]) for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("name", op_arguments("cpu"))
def test_strided_inputs_are_read_correctly_and_not_modified(backend: Backend, name: str) -> None:
    arguments = op_arguments(backend.device)[name]

    # Every tensor becomes the even entries of a tensor twice as long in each dimension, whose other entries are wrong.
    def spread(value: Tensor) -> Tensor:
        wide = value.new_full([2 * length for length in value.shape], 1 if value.dtype == torch.bool else 99)
        return wide[(slice(None, None, 2),) * value.dim()].copy_(value)

    strided = each_tensor(arguments, spread)
    assert same(op(name)(*strided), op(name)(*arguments))
    assert same(strided, op_arguments(backend.device)[name])


def _public_calls() -> dict[str, Callable[[dict[str, tuple[Any, ...]]], Any]]:
    def truth(a: dict[str, tuple[Any, ...]]) -> tuple[Tensor, ...]:
        return a["multibox_loss"][2:7]

    return {
        "box_iou": lambda a: kernels.box_iou(*a["box_iou"]),
        "encode_boxes": lambda a: kernels.encode_boxes(*a["encode_boxes"]),
        "decode_boxes": lambda a: kernels.decode_boxes(*a["decode_boxes"]),
        "match_anchors": lambda a: kernels.match_anchors(*a["match_anchors"]),
        "multibox_loss": lambda a: kernels.multibox_loss(*map(levels.packed, a["multibox_loss"][:2]), *truth(a)),
        "multibox_loss of maps": lambda a: kernels.multibox_loss(*map(as_maps, a["multibox_loss"][:2]), *truth(a)),
        "nms": lambda a: kernels.nms(*a["nms"][:2], 0.5),
        "batched_nms": lambda a: kernels.batched_nms(*a["nms"]),
        "batched_nms_padded": lambda a: kernels.batched_nms_padded(*a["batched_nms_padded"]),
        "postprocess_detections": lambda a: kernels.postprocess_detections(
            *map(levels.packed, a["postprocess_detections"][:2]), *a["postprocess_detections"][2:4]
        ),
        "postprocess_detections of maps": lambda a: kernels.postprocess_detections(
            *map(as_maps, a["postprocess_detections"][:2]), *a["postprocess_detections"][2:4]
        ),
    }


@pytest.mark.parametrize("name", _public_calls())
# `nms` returns as many indices as it keeps boxes, a number that is not known in advance.
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiles_as_one_graph(backend: Backend, name: str) -> None:
    call, arguments = _public_calls()[name], op_arguments(backend.device)
    torch._dynamo.reset()
    expected, found = call(arguments), torch.compile(call, fullgraph=True, backend="aot_eager")(arguments)
    assert same(found, expected)


@pytest.mark.parametrize("name", ["nms", "batched_nms"])
def test_an_op_that_breaks_the_graph_runs_uncompiled(backend: Backend, name: str) -> None:
    # By default NMS is in no graph, because its result has any length. Dynamo must not go on to compile the op's code.
    arguments, call = op_arguments(backend.device), _public_calls()[name]
    torch._dynamo.reset()
    assert same(torch.compile(call, backend="eager")(arguments), call(arguments))


@pytest.mark.parametrize("name", op_arguments("cpu"))
def test_default_dtype_and_default_device_do_not_matter(backend: Backend, name: str) -> None:
    arguments = op_arguments(backend.device)[name]
    expected = op(name)(*arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = op(name)(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(found, expected)


@pytest.mark.parametrize("name", ["decode_boxes", "multibox_loss"])
def test_a_second_derivative_is_an_error(backend: Backend, name: str) -> None:
    arguments = op_arguments(backend.device)[name]
    leaf = tensors(arguments)[0].requires_grad_()
    (grad,) = torch.autograd.grad(tensors(op(name)(*arguments))[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name} can be differentiated only once"):
        torch.autograd.grad(grad.square().sum(), leaf)


@pytest.mark.parametrize("name", ["encode_boxes", "decode_boxes", "match_anchors", "multibox_loss"])
@pytest.mark.parametrize("wide", ["first", "last"])
def test_float64_and_float32_mix(name: str, wide: str) -> None:
    # The first tensor determines the dtype of the result, or the result is not a float.
    arguments = op_arguments("cpu")[name]
    expected = op(name)(*arguments)
    widened = (
        tensors(arguments[0]) if wide == "first" else [x for x in tensors(arguments) if x.is_floating_point()][-1:]
    )
    mixed = each_tensor(arguments, lambda x: x.double() if any(x is y for y in widened) else x)
    torch.library.opcheck(op(name), mixed, test_utils="test_faketensor")
    for a, b in zip(tensors(op(name)(*mixed)), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("layout", ["packed", "transposed", "planes", "channels_last"])
def test_a_compiled_training_step_has_the_same_gradients(backend: Backend, layout: str) -> None:
    # The gradients must have the strides that the fake implementation promises.
    arguments = op_arguments(backend.device)
    head, truth = arguments["multibox_loss"][:2], arguments["multibox_loss"][2:7]

    def outputs(views: list[Tensor]) -> Any:
        if layout == "packed":
            return levels.packed(views)
        if layout == "transposed":
            return levels.packed(views).transpose(1, 2).contiguous().transpose(1, 2)
        return as_maps(views, torch.channels_last if layout == "channels_last" else torch.contiguous_format)

    def step(logits: list[Tensor], deltas: list[Tensor]) -> Tensor:
        losses = kernels.multibox_loss(outputs(logits), outputs(deltas), *truth)
        boxes = kernels.decode_boxes(deltas[0].flatten(1, 2), truth[-1][:33])
        return losses.classification + losses.bbox_regression + boxes.square().mean()

    torch._dynamo.reset()
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = each_tensor(head, lambda x: x.clone().requires_grad_())
        grads.append(torch.autograd.grad(function(*leaves), tensors(leaves)))
    assert same(*grads)


any_floats = hnp.arrays("float32", st.tuples(st.integers(0, 40), st.just(4)), elements=st.floats(width=32))
plain_floats = hnp.arrays("float32", st.tuples(st.integers(0, 40), st.just(4)), elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("floats", [any_floats, plain_floats], ids=["any", "plain"])
def test_decisions_have_the_same_bits_on_both_backends(backend: Backend, floats: st.SearchStrategy[Any]) -> None:
    @settings(max_examples=backend.max_examples)
    @given(floats, floats, st.floats(0, 1), st.randoms())
    def check(left: Any, right: Any, threshold: float, random: Any) -> None:
        boxes1, boxes2 = torch.from_numpy(left), torch.from_numpy(right)
        found = kernels.box_iou(boxes1.to(backend.device), boxes2.to(backend.device)).cpu()
        expected = boxes_eager.box_iou(boxes1, boxes2)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))

        scores = torch.tensor([random.random() for _ in left], dtype=torch.float32)
        found = kernels.nms(boxes1.to(backend.device), scores.to(backend.device), threshold).cpu()
        assert torch.equal(found, nms_eager.nms(boxes1, scores, None, threshold))

        if threshold > 0:
            half = len(boxes1) // 2
            offsets = torch.tensor([0, half, half, len(boxes1)])
            arguments = [x.to(backend.device) for x in (boxes1, offsets, boxes2)]
            found = kernels.match_anchors(*arguments, threshold).cpu()
            assert torch.equal(found, matching_eager.match_anchors(boxes1, offsets, boxes2, threshold))

    check()


BOXES, SCORES, LOGITS, DELTAS = torch.zeros(7, 4), torch.zeros(7), torch.zeros(2, 7, 3), torch.zeros(2, 7, 4)
MAP = torch.zeros(2, 4, 1, 7)
TRUTH = (
    torch.zeros(2, 7, dtype=torch.int64),
    torch.zeros(1, 4),
    torch.ones(1, dtype=torch.int64),
    torch.tensor([0, 1, 1]),
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.nms(torch.zeros(7, 5), SCORES, 0.5), ValueError, "boxes must have shape [N, 4], got [7, 5]"),
        (lambda: kernels.nms(BOXES, SCORES[:6], 0.5), ValueError, "scores must have shape [7], got [6]"),
        (
            lambda: kernels.nms(BOXES.int(), SCORES, 0.5),
            TypeError,
            "boxes must be float32, float16, bfloat16, float64, got int32",
        ),
        (lambda: kernels.nms(BOXES.tolist(), SCORES, 0.5), TypeError, "boxes must be a tensor, got list"),
        (lambda: kernels.nms(BOXES, SCORES, -0.1), ValueError, "iou_threshold must be finite and 0 or more, got -0.1"),
        (
            lambda: kernels.nms(BOXES, SCORES, torch.nan),
            ValueError,
            "iou_threshold must be finite and 0 or more, got nan",
        ),
        (
            lambda: kernels.nms(BOXES, SCORES.to("meta"), 0.5),
            ValueError,
            "scores must be on cpu, as the first argument, got meta",
        ),
        (lambda: kernels.batched_nms(BOXES, SCORES, SCORES, 0.5), TypeError, "idxs must be int64"),
        (
            lambda: kernels.batched_nms_padded(BOXES, SCORES, None, 0.5, 3),
            ValueError,
            "boxes must have shape [B, N, 4], got [7, 4]",
        ),
        (
            lambda: kernels.batched_nms_padded(BOXES[None], SCORES[None], None, 0.5, -1),
            ValueError,
            "max_output must be 0 or more, got -1",
        ),
        (
            lambda: kernels.batched_nms_padded(BOXES[None], SCORES[None], None, 0.5, 2.5),
            TypeError,
            "max_output must be an int, got float",
        ),
        (
            lambda: kernels.batched_nms_padded(BOXES[None], SCORES[None], None, 0.5, 3, torch.nan),
            ValueError,
            "score_threshold must be a number or None, got nan",
        ),
        (lambda: kernels.box_iou(BOXES, BOXES.half()), TypeError, "boxes2 must be float32, got float16"),
        (lambda: kernels.encode_boxes(BOXES.tolist(), BOXES), TypeError, "boxes must be a tensor, got list"),
        (lambda: kernels.decode_boxes(BOXES, None), TypeError, "anchors must be a tensor, got NoneType"),
        (
            lambda: kernels.encode_boxes(BOXES, BOXES[:3]),
            ValueError,
            "anchors must broadcast with boxes [7, 4], got [3, 4]",
        ),
        (
            lambda: kernels.decode_boxes(torch.zeros(7, 3), BOXES),
            ValueError,
            "deltas must have shape [..., 4], got [7, 3]",
        ),
        (
            lambda: kernels.decode_boxes(BOXES, BOXES, (1, 1, 1)),
            ValueError,
            "weights must be four positive, finite numbers, got (1, 1, 1)",
        ),
        (
            lambda: kernels.decode_boxes(BOXES, BOXES, (1, torch.inf, 1, 1)),
            ValueError,
            "weights must be four positive, finite numbers, got (1, inf, 1, 1)",
        ),
        (
            lambda: kernels.match_anchors(BOXES, TRUTH[3].to("meta"), BOXES),
            ValueError,
            "gt_offsets must be on cpu, as the first argument, got meta",
        ),
        (
            lambda: kernels.match_anchors(BOXES, torch.zeros(2), BOXES),
            TypeError,
            "gt_offsets must be int32, int64, got float32",
        ),
        (
            lambda: kernels.match_anchors(BOXES, TRUTH[3][:0], BOXES),
            ValueError,
            "gt_offsets must have shape [B + 1], got [0]",
        ),
        (
            lambda: kernels.match_anchors(BOXES, TRUTH[3], BOXES, 0.0),
            ValueError,
            "iou_threshold must be in (0, 1], got 0.0",
        ),
        (
            lambda: kernels.multibox_loss(LOGITS, DELTAS[:, :6], *TRUTH, BOXES),
            ValueError,
            "box_deltas must have shape [2, 7, 4], got [2, 6, 4]",
        ),
        (
            lambda: kernels.multibox_loss(LOGITS, DELTAS, *TRUTH, BOXES[:6]),
            ValueError,
            "anchors must have shape [7, 4], got [6, 4]",
        ),
        (
            lambda: kernels.multibox_loss(LOGITS, DELTAS, *TRUTH, BOXES, normalizer="sum"),
            ValueError,
            "normalizer must be 'batch' or 'image', got 'sum'",
        ),
        (
            lambda: kernels.multibox_loss([LOGITS], DELTAS, *TRUTH, BOXES),
            TypeError,
            "both be tensors, or both be sequences",
        ),
        (
            lambda: kernels.multibox_loss([], [], *TRUTH, BOXES),
            ValueError,
            "must each have one map per level, got 0 and 0",
        ),
        (
            lambda: kernels.multibox_loss([MAP, MAP.half()], [MAP, MAP], *TRUTH, BOXES),
            TypeError,
            "cls_logits[1] must be float32, got float16",
        ),
        (
            lambda: kernels.multibox_loss([MAP, MAP[:1]], [MAP, MAP[:1]], *TRUTH, BOXES),
            ValueError,
            "cls_logits[1] must have shape [2, a * C, H, W], got [1, 4, 1, 7]",
        ),
        (
            lambda: kernels.multibox_loss([torch.zeros(2, 7, 1, 7)], [torch.zeros(2, 8, 1, 7)], *TRUTH, BOXES),
            ValueError,
            "got 7 and 8",
        ),
        (
            lambda: kernels.multibox_loss(LOGITS[..., :0], DELTAS, *TRUTH, BOXES),
            ValueError,
            "cls_logits must have at least one class, got [2, 7, 0]",
        ),
        (
            lambda: kernels.multibox_loss(LOGITS, DELTAS, *TRUTH, BOXES, neg_pos_ratio=torch.inf),
            ValueError,
            "neg_pos_ratio must be finite and 0 or more, got inf",
        ),
        (
            lambda: kernels.postprocess_detections(LOGITS, DELTAS, BOXES, torch.zeros(2)),
            ValueError,
            "image_sizes must have shape [2, 2], got [2]",
        ),
        (
            lambda: kernels.postprocess_detections(LOGITS, DELTAS, BOXES, torch.zeros(2, 2), score_threshold=-1),
            ValueError,
            "score_threshold must be finite and 0 or more",
        ),
        (
            lambda: kernels.postprocess_detections(LOGITS, DELTAS, BOXES, torch.zeros(2, 2), topk_candidates=0),
            ValueError,
            "topk_candidates must be 1 or more, got 0",
        ),
    ],
)
def test_errors_name_what_was_expected_and_what_came(call: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (kernels.box_iou, ("boxes1", "boxes2")),
        (kernels.encode_boxes, ("boxes", "anchors")),
        (lambda **x: kernels.decode_boxes(BOXES, **x), ("anchors",)),
        (lambda **x: kernels.multibox_loss(LOGITS, DELTAS, *TRUTH[:1], **x), ("gt_boxes", "anchors")),
    ],
    ids=["box_iou", "encode_boxes", "decode_boxes", "multibox_loss"],
)
def test_a_missing_gradient_is_an_error(call: Callable[..., Any], names: tuple[str, ...]) -> None:
    # If the op detached its input instead, a sum of losses would silently train on its other terms alone.
    given = {name: TRUTH[1].clone() if name == "gt_boxes" else BOXES.clone() for name in names}
    if "gt_boxes" in names:
        given |= {"gt_labels": TRUTH[2], "gt_offsets": TRUTH[3]}
    for name in names:
        wants_gradient = given | {name: given[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"{name} requires a gradient, and .* has none .*pass {name}.detach\(\)"):
            call(**wants_gradient)
        with torch.no_grad():
            expected = call(**given)
            assert same(call(**wants_gradient), expected)
        assert same(call(**wants_gradient | {name: wants_gradient[name].detach()}), expected)


def test_indices_and_detections_carry_no_gradient() -> None:
    # A detector is evaluated with and without `no_grad`.
    boxes, scores = BOXES.clone().requires_grad_(), SCORES.clone().requires_grad_()
    assert not kernels.nms(boxes, scores, 0.5).requires_grad
    assert not kernels.match_anchors(boxes[:1], TRUTH[3][1:], boxes).requires_grad
    logits, deltas = LOGITS.clone().requires_grad_(), DELTAS.clone().requires_grad_()
    detections = kernels.postprocess_detections(logits, deltas, BOXES, torch.full((2, 2), 300))
    assert not any(x.requires_grad for x in detections)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(_public_calls().keys() - {"nms", "batched_nms"}))
def test_never_waits_for_the_gpu_and_can_be_captured(name: str) -> None:
    call, arguments = _public_calls()[name], op_arguments("cuda")
    expected = call(arguments)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(arguments)
    graph.replay()
    assert same(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp64_on_a_gpu_is_an_error() -> None:
    boxes = BOXES.cuda().double()
    with pytest.raises(TypeError, match="boxes1 must be float32, float16 or bfloat16 on cuda, got float64"):
        kernels.box_iou(boxes, boxes)
