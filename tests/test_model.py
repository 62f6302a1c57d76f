"""The model gives the numbers of torchvision's `ssd300_vgg16`, and keeps the promises of its docstrings."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdcore.anchors import SSD300_VOC
from ssdcore.kernels import Detections
from ssdcore.models import SSD, ssd300_tiny, ssd300_vgg16

torchvision = pytest.importorskip("torchvision")

NUM_CLASSES = 5
TARGETS = [
    {
        "boxes": torch.tensor([[10.0, 20, 100, 120], [50, 60, 180, 190], [0, 0, 30, 40]]),
        "labels": torch.tensor([1, 3, 4]),
    },
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    {"boxes": torch.tensor([[10.0, 20, 70, 90]]), "labels": torch.tensor([2])},
]


def images(seed: int = 0) -> list[Tensor]:
    """Three images of different sizes; one has the size that the model resizes to."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, h, w, generator=generator) for h, w in ((200, 310), (300, 300), (333, 280))]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, SSD]]:
    """torchvision's model and this project's model with the same random weights."""
    torch.manual_seed(0)
    torchvision_model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES
    )
    with torch.no_grad():
        # Random weights on pixels in 0..255 give logits in the hundreds, so that all scores would be 1 and tie.
        for conv in torchvision_model.head.classification_head.module_list:
            conv.weight.mul_(0.01)
        for conv in torchvision_model.head.regression_head.module_list:
            conv.weight.mul_(0.01)
    model = ssd300_vgg16(NUM_CLASSES)
    model.load_state_dict(torchvision_model.state_dict(), strict=True)
    yield torchvision_model.eval(), model.eval()


@torch.no_grad()
def test_vgg_head_outputs_equal_torchvisions(pair: tuple[Any, SSD]) -> None:
    torchvision_model, model = pair
    batch = model.resize(images())
    expected_batch = torchvision_model.transform(images())[0].tensors
    torch.testing.assert_close(batch, expected_batch, rtol=0, atol=0)

    expected = torchvision_model.head(list(torchvision_model.backbone(expected_batch).values()))
    for maps, columns, name in zip(
        model.predict(batch), (NUM_CLASSES, 4), ("cls_logits", "bbox_regression"), strict=True
    ):
        flat = [m.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        torch.testing.assert_close(torch.cat(flat, dim=1), expected[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_vgg_detected_objects_equal_torchvisions(pair: tuple[Any, SSD]) -> None:
    torchvision_model, model = pair
    for expected, got in zip(torchvision_model(images(1)), model(images(1)), strict=True):
        assert len(got["scores"]) > 50  # otherwise this test would compare almost nothing
        assert got["labels"].tolist() == expected["labels"].tolist()
        torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=1e-5, atol=1e-3)


def test_vgg_losses_and_gradients_equal_torchvisions(pair: tuple[Any, SSD]) -> None:
    gradients = []
    try:
        for model in pair:
            losses = model.train()(images(), TARGETS)
            (losses["classification"] + 2 * losses["bbox_regression"]).backward()
            gradients.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    finally:
        for model in pair:
            model.eval().zero_grad()
    (expected, expected_gradients), (got, got_gradients) = gradients
    for name in ("classification", "bbox_regression"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)
    for name in ("head.classification_head.module_list.2.weight", "backbone.scale_weight"):
        torch.testing.assert_close(got_gradients[name], expected_gradients[name], rtol=1e-3, atol=1e-5)


def test_pretrained_backbone_has_torchvisions_weights_and_a_frozen_conv1(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import VGG16_Weights, vgg16

    pretrained = vgg16().state_dict()
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: pretrained)
    backbone = ssd300_vgg16(2, weights_backbone="IMAGENET1K_FEATURES").backbone
    torch.testing.assert_close(backbone.features[21].weight, pretrained["features.21.weight"])  # conv4_3
    torch.testing.assert_close(backbone.extra[0][5].weight, pretrained["features.28.weight"])  # conv5_3
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen == ["features.0.weight", "features.0.bias", "features.2.weight", "features.2.bias"]


@torch.no_grad()
def test_vgg_from_scratch_keeps_features_at_unit_scale() -> None:
    torch.manual_seed(0)
    model = ssd300_vgg16(2).eval()
    for x in model.backbone(torch.randn(1, 3, 300, 300))[1:]:  # the first map is normalised
        assert 0.2 < x.std() < 5  # with torchvision's initialisation: 0.03 for the second map, 0.002 for the last


def test_tiny_has_the_six_feature_maps_of_ssd300() -> None:
    model = ssd300_tiny(3).eval()
    cls_logits, box_deltas = model.predict(torch.zeros(1, 3, 300, 300))
    assert [m.shape[-1] for m in cls_logits] == [38, 19, 10, 5, 3, 1]
    assert sum(m[0].numel() for m in box_deltas) == 8732 * 4
    assert sum(m[0].numel() for m in cls_logits) == 8732 * 3


def test_losses_give_every_parameter_of_tiny_a_gradient() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(NUM_CLASSES)
    sides = torch.tensor([20.0, 45, 100, 150, 210, 290])  # one object for each feature map
    target = {
        "boxes": torch.cat([torch.full((6, 2), 5.0), 5 + sides[:, None].expand(-1, 2)], dim=1),
        "labels": torch.tensor([1, 2, 3, 4, 1, 2]),
    }
    losses = model(torch.rand(2, 3, 300, 300), [target, target])
    assert set(losses) == {"classification", "bbox_regression"}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_batch_gives_the_same_result_as_a_list_of_its_images() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(NUM_CLASSES).eval()
    batch = torch.rand(2, 3, 300, 300)
    with torch.no_grad():
        for from_batch, from_list in zip(model(batch), model(list(batch)), strict=True):
            assert from_batch["labels"].tolist() == from_list["labels"].tolist()
            torch.testing.assert_close(from_batch["boxes"], from_list["boxes"])


def test_boxes_are_in_pixels_of_the_original_image() -> None:
    """If an image and its annotated box become twice as wide, the loss stays the same."""
    torch.manual_seed(0)
    model = ssd300_tiny(NUM_CLASSES)
    small = torch.rand(3, 1, 150).expand(3, 300, 150).contiguous()
    model.eval()
    with torch.no_grad():
        boxes = model([small])[0]["boxes"]
    assert len(boxes) and boxes[:, 0::2].max() <= 150 < boxes[:, 1::2].max() <= 300

    wide = small.repeat_interleave(2, dim=2)
    boxes = torch.tensor([[30.0, 20, 60, 120]])
    labels = torch.tensor([1])
    model.train()
    narrow_loss = model([small], [{"boxes": boxes, "labels": labels}])["bbox_regression"]
    wide_boxes = boxes * torch.tensor([2.0, 1, 2, 1])
    wide_loss = model([wide], [{"boxes": wide_boxes, "labels": labels}])["bbox_regression"]
    torch.testing.assert_close(narrow_loss, wide_loss, rtol=0.05, atol=0)


def test_images_without_objects_have_zero_loss() -> None:
    model = ssd300_tiny(NUM_CLASSES)
    losses = model(torch.rand(1, 3, 300, 300), TARGETS[1:2])
    assert losses["classification"].item() == 0 and losses["bbox_regression"].item() == 0


@torch.no_grad()
def test_inference_compiles_as_one_graph() -> None:
    model = ssd300_tiny(4).eval()
    batch = torch.rand(2, 3, 300, 300)

    def infer(batch: Tensor) -> Detections:
        return model.postprocess(*model.predict(batch))

    expected = infer(batch)
    assert expected.num_detections.min() > 0
    compiled = torch.compile(infer, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(batch), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_loss_accepts_bf16_feature_maps() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(NUM_CLASSES)
    batch = torch.rand(3, 3, 300, 300)
    full = model(batch, TARGETS)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch, TARGETS)
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full[name], rtol=0.05, atol=0)


def malformed_target(**changes: Tensor) -> list[dict[str, Tensor]]:
    return [TARGETS[0], TARGETS[1], {**TARGETS[2], **changes}]


@pytest.mark.parametrize(
    ("given", "targets", "message"),
    [
        (images(), TARGETS[:2], r"targets must have 3 entries, one per image, got 2"),
        (images(), None, r"targets must be given"),
        ([], [], r"images must contain at least one"),
        (torch.rand(3, 300, 300), TARGETS, r"images must be a list .* got \[3, 300, 300\]"),
        ([torch.rand(1, 20, 20)], TARGETS[:1], r"images\[0\] must have shape \[3, H, W\], got \[1, 20, 20\]"),
        ([torch.zeros(3, 20, 20, dtype=torch.uint8)], TARGETS[:1], r"images\[0\] must be float .* torch.uint8"),
        (images(), malformed_target(boxes=torch.rand(1, 5)), r'targets\[2\]\["boxes"\] must be float \[G, 4\]'),
        (images(), malformed_target(boxes=torch.tensor([[5.0, 5, 5, 9]])), r"targets\[2\].*positive.*\[5.0, 5.0, 5.0"),
        (images(), malformed_target(boxes=torch.full((1, 4), torch.nan)), r"targets\[2\].*positive, finite"),
        (images(), malformed_target(labels=torch.tensor([1, 2])), r'targets\[2\]\["labels"\] must be int64 \[1\]'),
        (images(), malformed_target(labels=torch.tensor([0])), r"targets\[2\].* in 1..4 \(0 is the background\)"),
        (images(), malformed_target(labels=torch.tensor([NUM_CLASSES])), r"targets\[2\].* in 1..4 .* got \[5\]"),
    ],
)
def test_malformed_input_raises_an_error_that_names_it(given: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssd300_tiny(NUM_CLASSES)(given, targets)


def test_saved_weights_are_enough_to_build_the_model_again(tmp_path: Path) -> None:
    from ssdcore.weights import load_model, save_weights

    torch.manual_seed(0)
    anchors = replace(SSD300_VOC, clip="centers")
    model = ssd300_tiny(4, anchors=anchors, image_mean=(0.1, 0.2, 0.3)).eval()
    save_weights(model, tmp_path / "model.safetensors", ["cat", "dog", "çà"])
    again, classes = load_model(tmp_path / "model.safetensors")
    assert classes == ("cat", "dog", "çà")
    assert again.name == "ssd300_tiny" and again.anchor_config == anchors and not again.training
    with torch.no_grad():
        for expected, got in zip(model(images()), again(images()), strict=True):
            for name in ("boxes", "labels", "scores"):
                torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_a_file_keeps_the_postprocess_and_an_old_one_means_the_defaults(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ssdcore.weights import description, load_model, save_weights
    from ssdcore.weights.files import POSTPROCESS_FIELDS

    path = tmp_path / "model.safetensors"
    model = ssd300_tiny(2)
    defaults = {name: getattr(model, name) for name in POSTPROCESS_FIELDS}
    settings: dict[str, float] = {"score_threshold": 0.3, "iou_threshold": 0.6, "topk_candidates": 70}
    settings |= {"max_detections": 9, "clip_before_nms": False}
    for name, value in settings.items():
        setattr(model, name, value)
    save_weights(model, path, ["a"])
    again, _ = load_model(path)
    assert {name: getattr(again, name) for name in POSTPROCESS_FIELDS} == settings

    old = description(model, ["a"], [1])
    del old["postprocess"]
    save_file(model.state_dict(), path, metadata={"ssdcore": json.dumps(old)})
    again, _ = load_model(path)
    assert {name: getattr(again, name) for name in POSTPROCESS_FIELDS} == defaults


def test_an_interrupted_save_leaves_the_old_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssdcore.weights import load_model, save_weights

    path = tmp_path / "model.safetensors"
    save_weights(ssd300_tiny(2), path, ["old"])

    def full_disk(descriptor: int) -> None:
        os.ftruncate(descriptor, 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: cannot write .* to .*model\.safetensors"):
        save_weights(ssd300_tiny(2), path, ["new"])
    assert list(tmp_path.iterdir()) == [path]
    assert load_model(path)[1] == ("old",)


def test_fine_tuning_loads_all_weights_but_the_classification_head(tmp_path: Path) -> None:
    from ssdcore.weights import fine_tuned, save_weights

    model = ssd300_tiny(4, image_mean=(0.1, 0.2, 0.3))
    save_weights(model, tmp_path / "model.safetensors", ["a", "b", "c"])
    other, not_loaded = fine_tuned(tmp_path / "model.safetensors", ["c", "d"])
    assert not_loaded and all(name.startswith("head.classification_head.") for name in not_loaded)
    torch.testing.assert_close(other.image_mean, model.image_mean)
    saved = model.state_dict()
    for name, tensor in other.state_dict().items():
        if name not in not_loaded:
            torch.testing.assert_close(tensor, saved[name], rtol=0, atol=0)
    assert fine_tuned(tmp_path / "model.safetensors", ["a", "b", "c"])[1] == []
    # The same number of classes, but other names: weights that distinguish other classes are not loaded.
    assert fine_tuned(tmp_path / "model.safetensors", ["a", "b", "d"])[1] == not_loaded


def test_files_without_weights_raise_an_error_that_names_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from ssdcore.weights import load_model, save_weights

    with pytest.raises(ValueError, match="no weights at"):
        load_model(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text(json.dumps({"model": "ssd300_tiny"}))
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        load_model(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors was not written by ssdcore"):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="classes must name the 3 classes of the model, got 1"):
        save_weights(ssd300_tiny(4), tmp_path / "x.safetensors", ["cat"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "does not describe a model that this version of ssdcore knows"),
        ([], "does not describe a model that this version of ssdcore knows"),
        ({"model": "ssd1"}, "cannot be loaded: ssdcore.models.MODELS has no builder of 'ssd1'"),
        ({"anchors": {"rotation": 1}}, "does not describe a model that this version of ssdcore knows"),
        ({"postprocess": {"soft": 1}}, "does not describe a model that this version of ssdcore knows"),
        ({"classes": ["cat", "dog"]}, "do not fit the model that its header describes"),
    ],
    ids=["empty", "a list", "another model", "other anchors", "another postprocess", "another number of classes"],
)
def test_a_header_that_does_not_fit_raises_an_error_that_names_the_file(
    tmp_path: Path, header: Any, message: str
) -> None:
    from safetensors.torch import save_file

    from ssdcore.weights import description, fine_tuned, load_model

    model = ssd300_tiny(2)
    whole = description(model, ["cat"], [1])
    changed = whole | header if header else header
    save_file(model.state_dict(), tmp_path / "x.safetensors", metadata={"ssdcore": json.dumps(changed)})
    for load in (load_model, lambda path: fine_tuned(path, changed["classes"] if header else ["cat"])):
        with pytest.raises(ValueError, match=rf"x\.safetensors {message}"):
            load(tmp_path / "x.safetensors")
