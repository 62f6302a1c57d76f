"""torchvision's SSD before and after `accelerate`: the same numbers."""

import copy
import pickle

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
    # One look at the images: unless normalised, the features of an untrained backbone vanish, and all scores tie.
    with torch.no_grad():
        model.train()(IMAGES, TARGETS)
    return model


def test_the_same_losses_and_gradients(model: SSD) -> None:
    results = []
    for one in (copy.deepcopy(model).train(), accelerate(copy.deepcopy(model)).train()):
        losses = one(IMAGES, TARGETS)
        (losses["classification"] + 0.7 * losses["bbox_regression"]).backward()
        gradients = torch.cat([p.grad.flatten() for p in one.head.parameters()])
        results.append(({name: loss.detach() for name, loss in losses.items()}, gradients))
    (expected, expected_gradients), (found, gradients) = results
    assert set(found) == set(expected)
    for name, loss in expected.items():
        assert_close(found[name], loss, scale=10)
    assert_close(gradients, expected_gradients, scale=10)


def test_the_same_detections(model: SSD) -> None:
    expected, found = model.eval()(IMAGES), accelerate(copy.deepcopy(model)).eval()(IMAGES)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert len(a["labels"]) > 0
        assert_close(a["scores"], b["scores"])
        assert_close(a["boxes"], b["boxes"], scale=300)


def test_it_stays_a_torchvision_model(model: SSD) -> None:
    fast = accelerate(copy.deepcopy(model))
    assert isinstance(fast, SSD)
    fast.load_state_dict(model.state_dict())
    assert list(pickle.loads(pickle.dumps(fast)).state_dict()) == list(model.state_dict())


def test_settings_are_obeyed(model: SSD) -> None:
    fast = accelerate(copy.deepcopy(model)).eval()
    fast.detections_per_img = 3
    assert [len(one["labels"]) for one in fast(IMAGES)] == [3, 3]


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a torchvision SSD, got Linear"):
        accelerate(torch.nn.Linear(1, 1))


def test_vgg_as_well() -> None:
    fast = accelerate(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4)).train()
    assert fast(IMAGES, TARGETS)["classification"].isfinite()
