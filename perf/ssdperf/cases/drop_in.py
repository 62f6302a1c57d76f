"""torchvision's detectors, as they are and with ssdcore's ops: whole models, from images to detections or gradients."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.ssd import SSD

from ssdcore import accelerate, torchvision_ops
from ssdperf.differences import NEAR_TIE, same_detections, within
from ssdperf.registry import Shape, Workload, case

IMAGE_SIZE = 320  # pixels; both models are made for it, so that nothing is resized
NUM_CLASSES = 91
OBJECTS = 7  # per image, as in COCO
CANDIDATES = 50  # boxes of each class that pass the score threshold in a batch, about as many as after training
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "ssdlite320": detection.ssdlite320_mobilenet_v3_large,
    "fasterrcnn_320": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}
# A small batch, because a training step of Faster R-CNN takes seconds on a CPU.
SHAPES: list[Shape] = [{"model": model, "B": 4, "dtype": "float32"} for model in DETECTORS]


@case("drop-in inference", shapes=SHAPES, quick=SHAPES[:1])
def drop_in_inference(device: str, dtype: torch.dtype, model: str, B: int) -> Workload:
    images = list(torch.rand(B, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))

    @torch.inference_mode()
    def detect(variant: nn.Module) -> Any:
        return variant(images)

    return _workload(_like_trained(model, images).eval(), detect, same_detections)


@case("drop-in training", shapes=SHAPES, quick=SHAPES[:1])
def drop_in_training(device: str, dtype: torch.dtype, model: str, B: int) -> Workload:
    images = list(torch.rand(B, 3, IMAGE_SIZE, IMAGE_SIZE, device=device))
    targets = [_target(device) for _ in images]

    def train(variant: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)  # Faster R-CNN draws the anchors that contribute to the loss
        variant.zero_grad()
        losses = variant(images, targets)
        sum(losses.values()).backward()
        return [loss.detach() for loss in losses.values()]

    return _workload(_like_trained(model, images).train(), train, within(NEAR_TIE))


def _workload(model: nn.Module, run: Callable[[nn.Module], Any], difference: Callable[[Any, Any], str]) -> Workload:
    """Time `run` of two copies of the model: with ssdcore's ops, and as torchvision made it."""
    ours = deepcopy(model)
    is_ssd = isinstance(ours, SSD)
    if is_ssd:
        accelerate(ours)

    def run_ours() -> Any:
        with nullcontext() if is_ssd else torchvision_ops():
            return run(ours)

    providers = {"ssdcore": run_ours, "torchvision": lambda: run(model)}
    return Workload(providers, reference="torchvision", difference=difference)


def _target(device: str) -> dict[str, Tensor]:
    corner = torch.rand(OBJECTS, 2) * 0.6 * IMAGE_SIZE
    boxes = torch.cat((corner, corner + (0.05 + 0.35 * torch.rand(OBJECTS, 2)) * IMAGE_SIZE), dim=1)
    return {"boxes": boxes.to(device), "labels": torch.randint(1, NUM_CLASSES, (OBJECTS,), device=device)}


def _like_trained(name: str, images: list[Tensor]) -> nn.Module:
    """Return a model with random weights, of whose boxes about as many pass the score threshold as after training."""
    torch.manual_seed(0)
    model = DETECTORS[name](weights=None, weights_backbone=None, num_classes=NUM_CLASSES).to(images[0].device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets the statistics, without which all scores tie
    with torch.no_grad():
        model.train()(images, [_target(images[0].device) for _ in images])
        if isinstance(model, SSD):
            layer, threshold = model.head.classification_head, model.score_thresh
            last = [block[-1] for block in layer.module_list]
        else:
            layer, threshold = model.roi_heads.box_predictor.cls_score, model.roi_heads.score_thresh
            last = [layer]
            layer.weight.normal_(std=0.3)  # torchvision's initial weights give almost equal scores
        outputs: list[Tensor] = []
        hook = layer.register_forward_hook(lambda layer, inputs, logits: outputs.append(logits.flatten(0, -2)))
        model.eval()(images)
        hook.remove()
        # Raising the background by r makes a score about exp(lead - r), because the background dominates the sum.
        lead = (outputs[0][:, 1:] - outputs[0][:, :1]).flatten()
        raised = lead.topk(CANDIDATES * (NUM_CLASSES - 1)).values[-1] - math.log(threshold)
        for convolution in last:
            convolution.bias.view(-1, NUM_CLASSES)[:, 0] += raised
    return model
