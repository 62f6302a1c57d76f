"""torchvision's SSD gives the same numbers before and after `accelerate`, and is itself again after `restore`."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from ssdcore import accelerate, restore
from ssdcore.testing.close import assert_close

IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) for size in ((200, 300), (90, 80))]
TARGETS = [
    {"boxes": torch.tensor([[20.0, 30, 150, 180], [5, 5, 60, 90]]), "labels": torch.tensor([2, 3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


@pytest.fixture(scope="module")
def model() -> SSD:
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    # One forward pass sets the statistics of the batch normalisations. Without them, the features of an untrained
    # backbone vanish and all scores tie.
    with torch.no_grad():
        model.train()(IMAGES, TARGETS)
    return model


def test_losses_and_gradients_stay_the_same(model: SSD) -> None:
    results = []
    for variant in (copy.deepcopy(model).train(), accelerate(copy.deepcopy(model)).train()):
        losses = variant(IMAGES, TARGETS)
        (losses["classification"] + 0.7 * losses["bbox_regression"]).backward()
        gradients = torch.cat([p.grad.flatten() for p in variant.head.parameters()])
        results.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
    (expected, expected_gradients), (actual, gradients) = results
    assert set(actual) == set(expected)
    for name, loss in expected.items():
        assert_close(actual[name], loss, scale=10)
    assert_close(gradients, expected_gradients, scale=10)


def test_detected_objects_stay_the_same(model: SSD) -> None:
    expected, actual = model.eval()(IMAGES), accelerate(copy.deepcopy(model)).eval()(IMAGES)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert len(a["labels"]) > 0
        assert_close(a["scores"], b["scores"])
        assert_close(a["boxes"], b["boxes"], scale=300)


# --- what stays as it is ----------------------------------------------------------------------------------


def tiny_ssd() -> SSD:
    """An SSD of 384 anchors in images of 64 pixels, for what does not depend on the network.

    Its scores are spread, and it returns few of them, so that no rounding changes their order.
    """
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
    backbone.out_channels = [8]
    anchors = DefaultBoxGenerator([[2, 3]], steps=[8])
    model = SSD(backbone, anchors, (64, 64), num_classes=4, iou_thresh=0.3, detections_per_img=20)
    nn.init.normal_(model.head.classification_head.module_list[0].weight, std=0.5)
    return model


def results(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Losses and detections: trains and evaluates in turn, so that each follows the other."""
    model.eval()(IMAGES)
    losses = model.train()(IMAGES, TARGETS)
    return losses, model.eval()(IMAGES)


def assert_same_results(actual: Any, expected: Any) -> None:
    # Rounding alone: both sum the same float32 numbers, in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def saved(model: SSD) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def loaded(data: bytes) -> SSD:
    return torch.load(io.BytesIO(data), weights_only=False)


COPIES: dict[str, Callable[[SSD], SSD]] = {
    "itself": lambda model: model,
    "accelerated again": accelerate,
    "copied": copy.deepcopy,
    "saved and loaded": lambda model: loaded(saved(model)),
    "restored and accelerated": lambda model: accelerate(restore(model)),
    "a twin with its weights": lambda model: with_weights(accelerate(tiny_ssd()), model.state_dict()),
}


def with_weights(model: SSD, weights: dict[str, torch.Tensor]) -> SSD:
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", COPIES)
def test_every_copy_is_accelerated_and_gives_the_same_results(name: str) -> None:
    plain = tiny_ssd()
    expected = results(plain)
    model = COPIES[name](accelerate(copy.deepcopy(plain)))
    assert isinstance(model, SSD) and type(model) is not SSD
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same_results(results(model), expected)
    assert list(model.train()(IMAGES, TARGETS)) == list(expected[0])  # also the order of the losses


def test_accelerate_and_restore_return_their_argument() -> None:
    model = tiny_ssd()
    assert accelerate(model) is accelerate(model) is restore(model) is restore(model) is model


def test_restore_leaves_no_trace() -> None:
    plain = tiny_ssd()
    expected = results(plain)
    for restored in (
        restore(accelerate(copy.deepcopy(plain))),
        restore(accelerate(accelerate(copy.deepcopy(plain)))),
        loaded(saved(restore(accelerate(copy.deepcopy(plain))))),
        restore(copy.deepcopy(plain)),  # never accelerated
    ):
        assert type(restored) is SSD
        assert type(restored.proposal_matcher) is SSDMatcher
        assert vars(restored.proposal_matcher) == vars(plain.proposal_matcher)
        assert list(vars(restored)) == list(vars(plain))
        assert b"ssdcore" not in saved(restored)
        torch.testing.assert_close(results(restored), expected, rtol=0, atol=0)


def test_other_models_raise_type_error() -> None:
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="model must be a torchvision SSD, got Linear"):
            function(nn.Linear(1, 1))


class Doubled(SSD):
    def compute_loss(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * loss for name, loss in super().compute_loss(*arguments).items()}


def test_a_subclass_is_refused_and_keeps_its_methods() -> None:
    model = tiny_ssd()
    model.__class__ = Doubled
    with pytest.raises(TypeError, match="got Doubled, a subclass, which would lose its methods"):
        accelerate(model)
    assert type(restore(model)) is Doubled


def test_ssd300_vgg16_can_be_accelerated() -> None:
    accelerated = accelerate(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)).train()
    assert accelerated(IMAGES, TARGETS)["classification"].isfinite()


# --- settings ---------------------------------------------------------------------------------------------


def change_thresholds(model: SSD, high: float, low: float) -> None:
    model.proposal_matcher.high_threshold, model.proposal_matcher.low_threshold = high, low


SETTINGS: dict[str, Callable[[SSD], object]] = {
    "score_thresh": lambda model: setattr(model, "score_thresh", 0.95),
    "nms_thresh": lambda model: setattr(model, "nms_thresh", 0.1),
    "topk_candidates": lambda model: setattr(model, "topk_candidates", 5),
    "detections_per_img": lambda model: setattr(model, "detections_per_img", 3),
    "neg_to_pos_ratio": lambda model: setattr(model, "neg_to_pos_ratio", 1.5),
    "weights": lambda model: setattr(model.box_coder, "weights", (5.0, 4.0, 3.0, 2.0)),
    "lower thresholds": lambda model: change_thresholds(model, 0.2, 0.2),
    "a higher threshold": lambda model: change_thresholds(model, 0.5, 0.3),
    "a higher lower threshold": lambda model: change_thresholds(model, 0.3, 0.5),
    "another matcher": lambda model: setattr(model, "proposal_matcher", SSDMatcher(0.5)),
    "a matcher of one's own": lambda model: setattr(model, "proposal_matcher", Matcher(0.6, 0.6)),
}


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_changed_afterwards_take_effect(name: str, restored: bool) -> None:
    change = SETTINGS[name]
    plain = tiny_ssd()
    usual = results(plain)
    change(plain)
    expected = results(plain)
    with pytest.raises(AssertionError):
        assert_same_results(usual, expected)

    accelerated = accelerate(tiny_ssd())
    change(accelerated)
    assert_same_results(results(restore(accelerated) if restored else accelerated), expected)


class OtherCoder(BoxCoder):
    pass


def test_parts_that_the_ops_do_not_know_are_refused() -> None:
    model = tiny_ssd()
    model.proposal_matcher = Matcher(0.5, 0.5)
    with pytest.raises(TypeError, match=r"model.proposal_matcher must be torchvision's SSDMatcher, got Matcher"):
        accelerate(model)
    model = tiny_ssd()
    model.box_coder = OtherCoder((1.0, 1.0, 1.0, 1.0))
    with pytest.raises(TypeError, match=r"model.box_coder must be torchvision's BoxCoder, got OtherCoder"):
        accelerate(model)
    model.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0), bbox_xform_clip=3.0)
    with pytest.raises(ValueError, match=r"bbox_xform_clip must be log\(1000 / 16\), got 3.0"):
        accelerate(model)
    assert type(model) is SSD


# --- compiled, exported and distributed -------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_gives_the_same_results(training: bool) -> None:
    model = accelerate(tiny_ssd()).train(training)
    arguments = (IMAGES, TARGETS) if training else (IMAGES,)
    torch._dynamo.reset()
    # torchvision's own code breaks the graph in training. In inference, the whole model is one graph.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not training)
    assert_same_results(compiled(*arguments), model(*arguments))


def test_an_exported_model_gives_the_same_results() -> None:
    model = accelerate(tiny_ssd()).eval()
    program = torch.export.export(model, (IMAGES,), strict=False)
    assert_same_results(program.module()(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_gets_torchvision_code() -> None:
    model = accelerate(tiny_ssd()).eval().requires_grad_(False)
    expected = model(IMAGES)
    scripted = torch.jit.script(model)
    assert_same_results(scripted(IMAGES)[1], expected)
    traced = torch.jit.trace(lambda image: tuple(model([image])[0].values()), IMAGES[0])
    assert_same_results(traced(IMAGES[0]), tuple(expected[0].values()))
    for function in (scripted, traced):
        assert "ssdcore" not in str(function.inlined_graph)
    assert type(model) is not SSD and type(model.proposal_matcher) is not SSDMatcher  # still accelerated


def train_distributed(rank: int, folder: str, processes: int) -> None:
    """Assert in each process that gradients of one image per process are averaged as torchvision's are."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{processes}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    try:
        gradients = []
        for model in (tiny_ssd(), accelerate(tiny_ssd())):
            wrapped = DistributedDataParallel(model.train())
            sum(wrapped(IMAGES[rank : rank + 1], TARGETS[rank : rank + 1]).values()).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert_same_results(gradients[1], gradients[0])
        assert all(gradient.abs().sum() > 0 for gradient in gradients[1])  # also where one process has no object
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_averaged_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_distributed(0, str(tmp_path), 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the processes run eager code, as this one does
    torch.multiprocessing.spawn(train_distributed, (str(tmp_path), 2), nprocs=2)
