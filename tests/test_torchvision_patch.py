"""torchvision's SSD gives the same numbers before and after `accelerate`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection.ssd import SSD

from ssdcore.testing.close import assert_close
from ssdcore.torchvision_patch import accelerate

IMAGES = [torch.rand(3, 200, 300), torch.rand(3, 90, 80)]
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


def test_an_accelerated_model_is_still_a_torchvision_model(model: SSD) -> None:
    accelerated = accelerate(copy.deepcopy(model))
    assert isinstance(accelerated, SSD)
    accelerated.load_state_dict(model.state_dict())
    assert list(pickle.loads(pickle.dumps(accelerated)).state_dict()) == list(model.state_dict())


def test_settings_changed_afterwards_take_effect(model: SSD) -> None:
    accelerated = accelerate(copy.deepcopy(model)).eval()
    accelerated.detections_per_img = 3
    assert [len(detected["labels"]) for detected in accelerated(IMAGES)] == [3, 3]


def test_other_models_raise_type_error() -> None:
    with pytest.raises(TypeError, match="model must be a torchvision SSD, got Linear"):
        accelerate(torch.nn.Linear(1, 1))


def test_a_subclass_is_refused_and_keeps_its_methods(model: SSD) -> None:
    class Doubled(SSD):
        def compute_loss(self, *arguments: Any) -> dict[str, torch.Tensor]:
            return {name: 2 * loss for name, loss in super().compute_loss(*arguments).items()}

    subclassed = copy.deepcopy(model)
    subclassed.__class__ = Doubled
    with pytest.raises(TypeError, match="got Doubled, a subclass, which would lose its methods"):
        accelerate(subclassed)
    assert type(subclassed) is Doubled


def test_a_model_can_be_accelerated_twice(model: SSD) -> None:
    once = accelerate(copy.deepcopy(model))
    assert accelerate(once) is once


def test_ssd300_vgg16_can_be_accelerated() -> None:
    accelerated = accelerate(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)).train()
    assert accelerated(IMAGES, TARGETS)["classification"].isfinite()
