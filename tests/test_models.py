"""Every model: its size, its feature maps, its weights, and a step of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssdcore.anchors import SSD512_COCO, SSD512_VOC, make_anchors
from ssdcore.models import (
    IMAGENET_MEAN,
    MODELS,
    SSD,
    VGG_MEAN,
    Backbone,
    ssd300_resnet,
    ssd300_resnet50,
    ssd300_tiny,
    ssd300_vgg16,
    ssd512_vgg16,
)
from ssdcore.models.facts import PUBLISHED, facts
from ssdcore.models.vgg import VGG16
from ssdcore.train import own_recipe
from ssdcore.weights import load_model, save_weights

torchvision = pytest.importorskip("torchvision")

TARGET = {"boxes": torch.tensor([[20.0, 30, 150, 180]]), "labels": torch.tensor([1])}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_size(name: str) -> None:
    counted = facts(name)
    published = PUBLISHED[name]
    assert counted.parameters == published.parameters
    assert round(counted.gmacs, 2) == published.gmacs


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_fit_the_anchors_and_every_parameter_gets_a_gradient(name: str) -> None:
    with torch.device("meta"):  # computes shapes only, so that the largest model takes no time
        model = MODELS[name](4)
        size = model.anchor_config.image_size
        images = torch.empty(2, 3, size, size)
        targets = [{"boxes": torch.empty(3, 4), "labels": torch.empty(3, dtype=torch.int64)}] * 2
    cls_logits, box_deltas = model.predict(images)
    assert tuple(x.shape[-1] for x in cls_logits) == model.anchor_config.grid_sizes
    assert sum(x[0].numel() for x in cls_logits) == 4 * len(model.anchors)
    assert sum(x[0].numel() for x in box_deltas) == 4 * len(model.anchors)
    sum(model(images, targets).values()).backward()
    assert [parameter for parameter, p in model.named_parameters() if p.grad is None] == []
    assert own_recipe(name).model == name


@pytest.mark.parametrize(("build", "num_images"), [(ssd512_vgg16, 1), (lambda n: ssd300_resnet(18, n), 2)])
def test_a_model_trains_a_step_and_comes_back_from_its_file(build: Any, num_images: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(3)
    images = torch.rand(num_images, 3, 200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    sum(model(images, [TARGET] * num_images).values()).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.grad.any())
    model.eval()
    save_weights(model, tmp_path / "model.safetensors", ["a", "b"])
    again, _ = load_model(tmp_path / "model.safetensors")
    assert again.name == model.name
    with torch.no_grad():
        for got, expected in zip(again(images[:1]), model(images[:1]), strict=True):
            assert len(expected["scores"]) and torch.equal(got["scores"], expected["scores"])
            assert torch.equal(got["boxes"], expected["boxes"])


def test_ssd512_has_the_paper_s_sizes() -> None:
    """The smallest and the largest squares of Caffe's `ssd_coco.py` and `ssd_pascal.py` for 512 x 512."""
    for config, smallest, largest in ((SSD512_COCO, 20.48, 460.8), (SSD512_VOC, 35.84, 460.8)):
        anchors = make_anchors(config)
        assert len(anchors) == 24564
        sizes = anchors[:, 2:] - anchors[:, :2]
        torch.testing.assert_close(sizes[0], torch.tensor([smallest, smallest]))
        torch.testing.assert_close(sizes[-4], torch.tensor([largest, largest]))


def test_a_resnet_keeps_torchvisions_weights_and_resolution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    pretrained = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: pretrained)
    torch.save(pretrained, tmp_path / "resnet18.pth")
    for weights in ("DEFAULT", ResNet18_Weights.IMAGENET1K_V1, tmp_path / "resnet18.pth"):
        backbone = ssd300_resnet(18, 2, weights).backbone
        torch.testing.assert_close(backbone.features.layer3[1].conv2.weight, pretrained["layer3.1.conv2.weight"])
        torch.testing.assert_close(backbone.features.bn1.running_var, pretrained["bn1.running_var"])
    strides = [layer.stride for layer in backbone.features.layer3.modules() if isinstance(layer, nn.Conv2d)]
    assert set(strides) == {(1, 1)}


def test_vgg_loads_a_file_with_fc6_and_fc7(tmp_path: Path) -> None:
    source = VGG16()
    state = {
        f"{number}.{part}": getattr(layer, part) for number, layer in convs_of(source) for part in ("weight", "bias")
    }
    torch.save(state, tmp_path / "vgg16_reducedfc.pth")
    backbone = ssd300_vgg16(2, tmp_path / "vgg16_reducedfc.pth").backbone
    for (_, expected), (_, got) in zip(convs_of(source), convs_of(backbone), strict=True):
        torch.testing.assert_close(got.weight, expected.weight, rtol=0, atol=0)
    assert not backbone.features[0].weight.requires_grad and backbone.features[5].weight.requires_grad


def convs_of(backbone: VGG16) -> list[tuple[int, nn.Conv2d]]:
    """conv1_1 to conv5_3, fc6 and fc7, with their numbers in `vgg16_reducedfc.pth`."""
    numbers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    layers = [x for part in (backbone.features, backbone.extra[0]) for x in part.modules() if isinstance(x, nn.Conv2d)]
    return list(zip(numbers, layers, strict=True))


def test_vgg_normalises_images_as_its_weights_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import VGG16_Weights, vgg16

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: vgg16().state_dict())
    for weights, mean in (("DEFAULT", IMAGENET_MEAN), ("IMAGENET1K_FEATURES", VGG_MEAN), (None, VGG_MEAN)):
        torch.testing.assert_close(ssd300_vgg16(2, weights).image_mean.flatten(), torch.tensor(mean))
    assert ssd300_vgg16(2, "DEFAULT", image_mean=(0.0, 0.0, 0.0)).image_mean.abs().max() == 0


@pytest.mark.parametrize(
    ("build", "content", "message"),
    [
        (ssd300_resnet50, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "must be those of ResNet-50, which has bn1"),
        (ssd300_resnet50, "resnet18", "must be those of ResNet-50"),
        (
            ssd300_vgg16,
            {"features.0.weight": torch.zeros(1)},
            r"must be VGG-16's, with features.0.weight \[64, 3, 3, 3\]",
        ),
        (ssd300_vgg16, {}, "must be VGG-16's, with features.0.weight .* got nothing"),
        (ssd300_vgg16, [1, 2], "must hold a state dict, tensors by name, got list"),
        (ssd300_vgg16, b"not a file of weights", "not a file of weights that can be read safely"),
    ],
)
def test_weights_of_another_backbone_raise_an_error(build: Any, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "resnet18":
        content = torchvision.models.resnet18().state_dict()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        build(2, path)


def test_malformed_arguments_raise_an_error() -> None:
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, 152, got 20"):
        ssd300_resnet(20)
    with pytest.raises(ValueError, match=r"weights_backbone must be IMAGENET1K_V1, .* got 'IMAGENET'"):
        ssd300_resnet50(2, "IMAGENET")
    with pytest.raises(ValueError, match=r"no weights at absent\.pth"):
        ssd300_resnet50(2, "absent.pth")
    with pytest.raises(ValueError, match="backbone must have 7 feature maps, as the anchors have, got 6"):
        SSD(ssd300_tiny(2).backbone, 2, SSD512_COCO)


def test_a_model_of_one_s_own_comes_back_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int, **settings: Any) -> SSD:
        backbone: Backbone = ssd300_tiny(2).backbone
        return SSD(backbone, num_classes, **settings, name="mine")

    save_weights(build(3), tmp_path / "model.safetensors", ["a", "b"])
    with pytest.raises(ValueError, match=r"ssdcore.models.MODELS has no builder of 'mine'"):
        load_model(tmp_path / "model.safetensors")
    monkeypatch.setitem(MODELS, "mine", build)
    assert load_model(tmp_path / "model.safetensors")[0].name == "mine"
