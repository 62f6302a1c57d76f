"""torchvision's detectors give the same results with `torchvision_ops` on, and everything else stays as it is."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from helpers import random_boxes
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, nms
from torchvision.tv_tensors import BoundingBoxes

from ssdcore import torchvision_ops

CHANNELS = 32  # FCOS normalises 32 groups of channels
CLASSES = 5
IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((96, 128), (90, 80))]
BOXES = random_boxes(30)
SCORES = torch.linspace(1, 0, 30)


@pytest.fixture(autouse=True)
def nothing_stays_switched() -> Iterator[None]:
    code = {f: f.__code__ for f in (nms, batched_nms, box_iou)}
    yield
    assert {f: f.__code__ for f in code} == code


# --- detectors --------------------------------------------------------------------------------------------


def backbone() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=8, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1))
    layers.out_channels = CHANNELS
    return layers


def anchors(*sizes: int) -> dict[str, Any]:
    return {"anchor_generator": AnchorGenerator((sizes,), ((1.0,),)), "min_size": 96, "max_size": 128}


def roi_align() -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["0"], 3, 2)


def two_stages() -> dict[str, Any]:
    settings = anchors(16, 32, 48)
    settings["rpn_anchor_generator"] = settings.pop("anchor_generator")
    # Up to 1000 boxes, torchvision orders equal scores too. Another order would have other anchors sampled.
    settings |= {"rpn_post_nms_top_n_train": 200, "rpn_post_nms_top_n_test": 200}
    heads = {"box_head": TwoMLPHead(CHANNELS * 9, 32), "box_predictor": FastRCNNPredictor(32, CLASSES)}
    return settings | heads | {"box_roi_pool": roi_align()}


def mask_rcnn() -> MaskRCNN:
    mask = {"mask_head": MaskRCNNHeads(CHANNELS, (8,), 1), "mask_predictor": MaskRCNNPredictor(8, 8, CLASSES)}
    return MaskRCNN(backbone(), **two_stages(), **mask, mask_roi_pool=roi_align())


def keypoint_rcnn() -> KeypointRCNN:
    keypoints = {"keypoint_head": KeypointRCNNHeads(CHANNELS, (512,)), "num_keypoints": 2}
    return KeypointRCNN(backbone(), **two_stages(), **keypoints, keypoint_roi_pool=roi_align())


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "Faster R-CNN": lambda: FasterRCNN(backbone(), **two_stages()),
    "Mask R-CNN": mask_rcnn,
    "Keypoint R-CNN": keypoint_rcnn,
    "RetinaNet": lambda: RetinaNet(backbone(), CLASSES, **anchors(16, 32, 48)),
    "FCOS": lambda: FCOS(backbone(), CLASSES, **anchors(16), nms_thresh=0.3),
}


def detector(name: str) -> nn.Module:
    """A detector with random weights, whose last layers spread the scores and the boxes."""
    torch.manual_seed(0)
    model = DETECTORS[name]()
    with torch.no_grad():
        for layer, parameter in model.named_parameters():
            if layer.endswith(("cls_score.weight", "cls_logits.weight", "bbox_ctrness.weight")):
                parameter.normal_(std=0.2 if name == "FCOS" else 0.6)
            elif layer.endswith(("bbox_pred.weight", "bbox_reg.weight")):
                parameter.normal_(std=0.3)
            elif layer.endswith("cls_logits.bias"):
                parameter.zero_()  # RetinaNet and FCOS begin with scores below their thresholds
    return model


def targets() -> list[dict[str, Tensor]]:
    found = []
    for image, boxes in zip(IMAGES, ([[20.0, 30, 70, 80], [5, 5, 60, 85]], [[10.0, 30, 70, 80]]), strict=True):
        corners = torch.tensor(boxes)
        visible = torch.ones(len(boxes), 2, 1)
        found.append(
            {
                "boxes": corners,
                "labels": torch.arange(1, len(boxes) + 1),
                "masks": torch.ones(len(boxes), *image.shape[1:], dtype=torch.uint8),
                "keypoints": torch.cat((corners.view(-1, 2, 2), visible), dim=2),
            }
        )
    return found


class Calls(TorchDispatchMode):
    """Counts the calls of the ops of both packages, and the boxes that go into NMS and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.boxes = Counter(), Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("ssdcore", "torchvision"):
            name = f"{function.namespace}.{function._opname}"
            self.calls[name] += 1
            if name.endswith("nms"):
                self.boxes.update({"into NMS": len(args[0]), "kept": len(result)})
        return result


def run(model: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], Calls, Calls]:
    """Losses of a training step and detections, and the calls of each."""
    with Calls() as training:
        torch.manual_seed(1)  # the R-CNNs sample the anchors that contribute to the loss
        losses = model.train()(IMAGES, targets())
        sum(losses.values()).backward()
    with Calls() as inference, torch.no_grad():
        found = model.eval()(IMAGES)
    return losses, found, training, inference


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_give_the_same_losses_and_detections(name: str) -> None:
    model = detector(name)  # built before the switch: an RPN has stored the function `box_iou`
    expected_losses, expected, training, inference = run(model)
    assert not {call for counted in (training, inference) for call in counted.calls if call.startswith("ssdcore")}
    expected_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torchvision_ops():
        losses, found, training, inference = run(model)

    # Equal, because IoUs have the same bits and all else is torchvision's own code.
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected_gradients, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    stages = 2 if "R-CNN" in name else 1
    assert inference.calls["ssdcore.nms"] == stages * len(IMAGES)
    assert training.calls["ssdcore.box_iou"] == (0 if name == "FCOS" else stages * len(IMAGES))  # FCOS compares centres
    assert not {"torchvision.nms", "torchvision.box_iou"} & {*training.calls, *inference.calls}
    assert 100 < inference.boxes["kept"] < 0.9 * inference.boxes["into NMS"]
    for detected in found:
        assert len(detected["scores"]) > 20
        assert detected["scores"].unique().numel() > 0.9 * len(detected["scores"])


def test_many_boxes_give_what_torchvision_finds_class_by_class() -> None:
    boxes, scores, classes = random_boxes(1500), torch.linspace(1, 0, 1500), torch.arange(1500) % 3
    expected = batched_nms(boxes, scores, classes, 0.5)
    with torchvision_ops():
        assert torch.equal(batched_nms(boxes, scores, classes, 0.5), expected)
    assert 100 < len(expected) < 1400


def test_ssd_is_switched_too() -> None:
    with torchvision_ops(), Calls() as counted:
        torchvision.models.detection.ssd.box_ops.batched_nms(BOXES, SCORES, torch.zeros(30, dtype=torch.int64), 0.5)
    assert counted.calls == {"ssdcore.nms": 1}


# --- the switch -------------------------------------------------------------------------------------------


def is_on() -> bool:
    with Calls() as counted:
        nms(BOXES, SCORES, 0.5)
        batched_nms(BOXES, SCORES, torch.zeros(30, dtype=torch.int64), 0.5)
        box_iou(BOXES, BOXES)
    assert counted.calls in (Counter({"ssdcore.nms": 2, "ssdcore.box_iou": 1}), Counter({"torchvision.nms": 2}))
    return "ssdcore.nms" in counted.calls


def test_contexts_nest_and_restore_after_exceptions() -> None:
    assert not is_on()
    with torchvision_ops():
        assert is_on()
        with torchvision_ops(False):
            assert not is_on()
            with torchvision_ops():
                assert is_on()
            assert not is_on()
        with torchvision_ops():
            assert is_on()
        assert is_on()
        with pytest.raises(KeyError), torchvision_ops(False):
            raise KeyError
        assert is_on()
    assert not is_on()


def test_a_call_alone_is_a_switch() -> None:
    try:
        torchvision_ops()
        assert is_on()
        torchvision_ops(True)
        assert is_on()
    finally:
        torchvision_ops(False)
    assert not is_on()


def test_a_context_can_be_entered_again() -> None:
    context = torchvision_ops()
    for _ in range(2):
        with context:
            assert is_on()
        assert not is_on()


def test_only_a_bool_switches() -> None:
    with pytest.raises(TypeError, match="enabled must be a bool, got Linear"):
        torchvision_ops(nn.Linear(1, 1))


def test_functions_keep_their_identity_and_signature() -> None:
    # The names of these files' imports are bound before the switch, as users' are.
    before = copy.copy(box_iou.__defaults__), nms.__doc__, nms.__module__
    with torchvision_ops():
        assert torchvision.ops.boxes.nms is torchvision.ops.nms is nms
        assert (box_iou.__defaults__, nms.__doc__, nms.__module__) == before
        assert torch.equal(nms(iou_threshold=0.5, scores=SCORES, boxes=BOXES), nms(BOXES, SCORES, 0.5))
        assert torch.equal(box_iou(boxes2=BOXES, boxes1=BOXES, fmt="xyxy"), box_iou(BOXES, BOXES))


@pytest.mark.parametrize("pickled_on", [False, True])
@pytest.mark.parametrize("built_on", [False, True])
def test_models_are_pickled_without_a_trace(built_on: bool, pickled_on: bool) -> None:
    with torchvision_ops(built_on):
        model = DETECTORS["Faster R-CNN"]()
    with torchvision_ops(pickled_on):
        data = pickle.dumps(copy.deepcopy(model))
    assert b"ssdcore" not in data
    assert pickle.loads(data).rpn.box_similarity is box_iou


# --- what torchvision's own code still does ---------------------------------------------------------------


def same_as_off(call: Callable[[], Any]) -> Counter[str]:
    """Assert that `call` returns or raises the same with the switch on as without, and return what it called then."""
    off = result_of(call)
    with torchvision_ops(), Calls() as counted:
        on = result_of(call)
    if isinstance(off, Tensor):
        torch.testing.assert_close(on, off, rtol=0, atol=0, equal_nan=True)
    else:
        assert on == off
    return counted.calls


def result_of(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


WHOLE = torch.tensor([[0, 0, 10, 10], [2, 2, 12, 12]])
BY_TORCHVISION: dict[str, Callable[[], Any]] = {
    "another format": lambda: box_iou(BOXES, BOXES, fmt="cxcywh"),
    "another format by position": lambda: box_iou(BOXES, BOXES, "xywh"),
    "no format": lambda: box_iou(BOXES, BOXES, "round"),
    "batch dimensions": lambda: box_iou(BOXES.view(3, 10, 4), BOXES.view(3, 10, 4)),
    "integers": lambda: box_iou(WHOLE, WHOLE),
    "mixed dtypes": lambda: box_iou(BOXES, BOXES.double()),
    "a gradient": lambda: box_iou(BOXES.clone().requires_grad_(), BOXES),
    "a subclass": lambda: nms(BoundingBoxes(BOXES, format="XYXY", canvas_size=(300, 300)), SCORES, 0.5),
    "a subclass in box_iou": lambda: box_iou(BoundingBoxes(BOXES, format="XYXY", canvas_size=(9, 9)), BOXES),
    "a meta tensor": lambda: box_iou(BOXES.to("meta"), BOXES.to("meta")).shape,
    "a negative threshold": lambda: nms(BOXES, SCORES, -0.5),
    "no boxes": lambda: nms([[0, 0, 1, 1]], SCORES, 0.5),
    "wrong shape": lambda: nms(BOXES[:, :3], SCORES, 0.5),
    "wrong number of scores": lambda: nms(BOXES, SCORES[1:], 0.5),
    "whole-number boxes": lambda: nms(WHOLE, SCORES[:2], 0.5),
    "float classes": lambda: batched_nms(BOXES, SCORES, torch.arange(30.0) // 10, 0.5),
    "wrong number of classes": lambda: batched_nms(BOXES, SCORES, torch.zeros(29, dtype=torch.int64), 0.5),
}


@pytest.mark.parametrize("name", BY_TORCHVISION)
def test_what_our_ops_do_not_take_is_done_by_torchvision(name: str) -> None:
    calls = same_as_off(BY_TORCHVISION[name])
    # `batched_nms` of float classes calls `nms`, which is ours.
    assert not [call for call in calls if call.startswith("ssdcore")] or name == "float classes"


def test_box_iou_keeps_its_derivatives() -> None:
    def gradient() -> Tensor:
        boxes = BOXES[:3].clone().requires_grad_()
        return torch.autograd.grad(torchvision.ops.distance_box_iou(boxes, BOXES).sum(), boxes)[0]

    def in_dual_level() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(box_iou(forward_ad.make_dual(BOXES[:3], torch.ones(3, 4)), BOXES)).tangent

    def forward_gradient() -> Tensor:
        return torch.func.jvp(lambda boxes: box_iou(boxes, BOXES), (BOXES[:3],), (torch.ones(3, 4),))[1]

    def mapped() -> Tensor:
        return torch.func.vmap(lambda boxes: box_iou(boxes, BOXES))(BOXES.view(3, 10, 4))

    for call in (gradient, in_dual_level, forward_gradient, mapped):
        assert same_as_off(call)["ssdcore.box_iou"] == 0


def test_our_ops_take_what_a_detector_calls_them_with_under_autocast() -> None:
    with torchvision_ops(), Calls() as counted:
        kept = nms(BOXES, SCORES.bfloat16(), 0.5)
        assert torch.equal(kept, nms(BOXES, SCORES.bfloat16().float(), 0.5))
    assert counted.calls == {"ssdcore.nms": 2}


# --- recorded calls ---------------------------------------------------------------------------------------


class Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        overlaps = torchvision.ops.boxes.box_iou(boxes, boxes)
        return torchvision.ops.boxes.nms(boxes, scores, 0.5) + overlaps.sum().to(torch.int64)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("scripted_off_before", [False, True])
def test_torchscript_gets_torchvision_functions(scripted_off_before: bool) -> None:
    expected = Suppress()(BOXES, SCORES)
    if scripted_off_before:
        torch.jit.script(Suppress())
    with torchvision_ops():
        scripted = torch.jit.script(Suppress())
        traced = torch.jit.trace(Suppress(), (BOXES, SCORES))
        of_detector = torch.jit.script(DETECTORS["Faster R-CNN"]())
    for function in (scripted, traced):
        assert torch.equal(function(BOXES, SCORES), expected)
        assert "torchvision::nms" in str(function.inlined_graph) and "ssdcore" not in str(function.inlined_graph)
    assert "ssdcore" not in str(of_detector.inlined_graph)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_torchvision_ops(strict: bool) -> None:
    with torchvision_ops():
        program = torch.export.export(Suppress(), (BOXES, SCORES), strict=strict)
    assert "torchvision.nms" in str(program.graph) and "ssdcore" not in str(program.graph)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)  # NMS in a graph
def test_compiled_functions_follow_the_switch() -> None:
    compiled_ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        compiled_ops.extend(op for op in ("torchvision.nms", "ssdcore.nms.default") if op in called)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(Suppress(), backend=backend, fullgraph=True)
    expected = Suppress()(BOXES, SCORES)
    for enabled in (False, True, False, True):
        with torchvision_ops(enabled):
            assert torch.equal(compiled(BOXES, SCORES), expected)
    assert compiled_ops == ["torchvision.nms", "ssdcore.nms.default"]  # each compiled once, and taken where it belongs


def test_detectors_can_be_compiled() -> None:
    model = detector("RetinaNet").eval()
    expected = model(IMAGES)
    torch._dynamo.reset()
    with torchvision_ops():
        torch.testing.assert_close(torch.compile(model, backend="eager")(IMAGES), expected, rtol=0, atol=0)


# --- where the results differ -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corners", "idxs", "by_torchvision", "by_ssdcore"),
    [
        # The offset of class 1 is the largest coordinate + 1 = -4, which moves its box onto that of class 0.
        pytest.param([[-14, -14, -9, -9], [-10, -10, -5, -5]], [0, 1], [0], [0, 1], id="negative coordinates"),
        # The IoU is 0.5005. The offset of class 90 is 120,060, where floats lie 1/128 apart: 2.002 becomes 2.
        pytest.param([[0, 0, 4, 4], [0, 0, 4, 2.002], [9, 9, 1333, 10]], [90] * 3, [0, 1, 2], [0, 2], id="rounding"),
        pytest.param([[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, torch.inf, 10]], [0] * 3, [0, 1, 2], [0, 2], id="infinity"),
        pytest.param([[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, torch.nan, 10]], [0] * 3, [0, 1, 2], [0, 2], id="NaN"),
    ],
)
def test_where_batched_nms_differs(
    corners: list[list[float]], idxs: list[int], by_torchvision: list[int], by_ssdcore: list[int]
) -> None:
    arguments = torch.tensor(corners, dtype=torch.float32), torch.linspace(1, 0, len(idxs)), torch.tensor(idxs), 0.5
    assert batched_nms(*arguments).tolist() == by_torchvision
    with torchvision_ops():
        assert batched_nms(*arguments).tolist() == by_ssdcore
