"""The whole detector: a training step from images on disk, and inference from images in memory to detections there.

Both clocks start with the data on the host. Published figures of SSD300 often start when the batch has reached the GPU
and stop before decoding and NMS; these figures include both. torchvision's model has the same weights and gets the same
batches.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.models.detection.ssd import SSD as TorchvisionSSD

from ssdcore.cores import usable_cores
from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.models import IMAGENET_MEAN, IMAGENET_STD, MODELS, SSD
from ssdcore.synthetic import make_synthetic
from ssdcore.transforms import collate, train_transform
from ssdperf.cases.training import match_by_torchvision
from ssdperf.differences import NEAR_TIE, same_detections, within
from ssdperf.registry import BATCHES, Shape, Workload, case, star
from ssdperf.ssd300 import IMAGE_SIZE, NUM_CLASSES

IMAGES_ON_DISK = 256
MAX_WORKERS = 8  # bounds the memory of what is fetched ahead: 16 batches of 128 images are 2 GB
CANDIDATES = 50  # anchors of each class that pass the score threshold, about as many as after training
LR = 1e-5  # too small for random weights to diverge: the steps are timed, not meant to learn
MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
Step = Generator[str, None, Any]


def shapes(model: str) -> list[Shape]:
    base = {"model": model, "B": 32, "layout": "channels_last", "dtype": "bfloat16"}
    return star(base, B=BATCHES, layout=("NCHW",), dtype=("float32",))


def quick(**batches: int) -> list[Shape]:
    return [{**shapes(model)[0], "B": B} for model, B in batches.items()]


SHAPES = [shape for pair in zip(shapes("ssd300_vgg16"), shapes("ssd300_tiny"), strict=True) for shape in pair]


@case("training step", shapes=SHAPES, quick=quick(ssd300_tiny=8, ssd300_vgg16=2))
def training_step(device: str, dtype: torch.dtype, model: str, B: int, layout: str) -> Workload:
    """Everything from disk on: data, forward, criterion (matching, loss and its gradient), backward, optimiser."""
    ours, theirs = _models(model, device, layout)
    loaders = [_Batches(B, device)]
    providers: dict[str, Callable[[], Step]] = {
        "ssdcore": _train_ours(ours.train(), loaders[0], _autocast(device, dtype), layout)
    }
    if theirs:
        loaders.append(_Batches(B, device))
        providers["torchvision"] = _train_torchvision(theirs.train(), loaders[1], _autocast(device, dtype), layout)
    return Workload(
        providers,
        reference="torchvision" if theirs else "ssdcore",
        difference=within(NEAR_TIE),
        phased=True,
        ahead=loaders[0].ahead,
        close=lambda: [loader.close() for loader in loaders],
    )


@case("inference", shapes=SHAPES, quick=quick(ssd300_tiny=8, ssd300_vgg16=4))
def inference(device: str, dtype: torch.dtype, model: str, B: int, layout: str) -> Workload:
    """From images on the host to detections on the host: copy, network, postprocess with decoding and NMS, copy."""
    ours, theirs = _models(model, device, layout)
    images = torch.rand(B, 3, IMAGE_SIZE, IMAGE_SIZE)
    if device == "cuda":
        images = images.pin_memory()
    providers: dict[str, Callable[[], Step]] = {
        "ssdcore": _detect_ours(ours.eval(), images, _autocast(device, dtype), layout)
    }
    if theirs:
        providers["torchvision"] = _detect_torchvision(theirs.eval(), images, _autocast(device, dtype), layout)
    return Workload(
        providers, reference="torchvision" if theirs else "ssdcore", difference=same_detections, phased=True
    )


def _models(name: str, device: str, layout: str) -> tuple[SSD, TorchvisionSSD | None]:
    """Return a randomly initialised model, and torchvision's model with the same weights where it has one."""
    torch.backends.cudnn.benchmark = True  # every batch has one shape
    ours, theirs = deepcopy(_initialised(name))
    memory_format = MEMORY_FORMATS[layout]
    return (
        ours.to(device, memory_format=memory_format),
        theirs and theirs.to(device, memory_format=memory_format),
    )


@functools.cache
def _initialised(name: str) -> tuple[SSD, TorchvisionSSD | None]:
    """Return the models on the CPU. They are cached because initialising VGG takes seconds."""
    ours = MODELS[name](NUM_CLASSES, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    _like_trained(ours)
    if name != "ssd300_vgg16":
        return ours, None
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _like_trained(model: SSD) -> None:
    """Raise the background's biases until about `CANDIDATES` anchors of each class pass, as after training."""
    with torch.no_grad():
        maps, _ = model.eval().predict(model.resize(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)))
        logits = torch.cat([x.unflatten(1, (-1, NUM_CLASSES)).movedim(2, -1).flatten(0, -2) for x in maps])  # [A, C]
        lead = (logits[:, 1:] - logits[:, :1]).flatten()
        # Raising the background by r makes a score about exp(lead - r), because the background dominates the sum.
        passing = lead.topk(CANDIDATES * (NUM_CLASSES - 1)).values[-1]
        raised = passing - math.log(model.score_threshold)
        for conv in model.head.classification_head.module_list:
            conv.bias.view(-1, NUM_CLASSES)[:, 0] += raised


def _autocast(device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


@functools.cache
def _dataset() -> tuple[DetectionDataset, tempfile.TemporaryDirectory[str]]:
    """Return a drawn dataset, and the folder that holds it, which is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="ssdcore-perf-")
    root = make_synthetic(f"{folder.name}/shapes", train=IMAGES_ON_DISK, val=0, progress=False)
    dataset = open_dataset(root, "train")
    dataset.transform = train_transform(IMAGE_SIZE)
    return dataset, folder


class _Batches:
    """Endless batches, the same sequence each time they are opened: by the first `next`, and again after `close`."""

    def __init__(self, B: int, device: str) -> None:
        self.batch, self.device = B, device
        # Two cores stay free: one for this process, one for the loader's own thread.
        self.workers = min(MAX_WORKERS, max(0, usable_cores() - 2))
        self.batches: Iterator[Any] | None = None

    @property
    def ahead(self) -> int:
        """How many batches the workers fetch ahead."""
        return 2 * self.workers  # DataLoader's prefetch_factor

    def __next__(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        if self.batches is None:
            self.batches = iter(self._loader())
        return next(self.batches)

    def close(self) -> None:
        self.batches = None

    def _loader(self) -> DataLoader[Any]:
        dataset, _ = _dataset()
        torch.manual_seed(0)  # seeds the augmentation where there are no workers
        torch.multiprocessing.set_sharing_strategy("file_system")  # a batch of 128 exhausts the usual 1024 descriptors
        return DataLoader(
            dataset,
            self.batch,
            sampler=RandomSampler(dataset, replacement=True, num_samples=10**9, generator=_seeded()),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device == "cuda",
            generator=_seeded(),
        )


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)


def _train_ours(
    model: SSD, batches: _Batches, autocast: AbstractContextManager[Any], layout: str
) -> Callable[[], Step]:
    device = model.anchors.device
    optimizer = _sgd(model)

    def step() -> Step:
        yield "data"
        images, targets = next(batches)
        images = images.to(device, non_blocking=True, memory_format=MEMORY_FORMATS[layout])
        yield "forward"
        with autocast:
            maps = [x for outputs in model.predict(model.resize(images)) for x in outputs]
        yield "criterion"
        leaves = [x.detach().requires_grad_() for x in maps]
        half = len(leaves) // 2
        sizes = torch.full((len(images), 4), float(IMAGE_SIZE))
        losses = list(model.loss(leaves[:half], leaves[half:], targets, sizes).values())
        gradients = torch.autograd.grad(sum(losses), leaves)
        yield "backward"
        torch.autograd.backward(maps, gradients)
        yield "optimiser"
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach() for loss in losses]

    return step


def _train_torchvision(
    model: TorchvisionSSD, batches: _Batches, autocast: AbstractContextManager[Any], layout: str
) -> Callable[[], Step]:
    """Return a step that does what the model's `forward` does, in phases that can be told apart."""
    device = next(model.parameters()).device
    optimizer = _sgd(model)

    def step() -> Step:
        yield "data"
        images, targets = next(batches)
        images = images.to(device, non_blocking=True)
        names = ("boxes", "labels")
        targets = [{name: target[name].to(device, non_blocking=True) for name in names} for target in targets]
        yield "forward"
        batch, targets = model.transform(list(images), targets)
        with autocast:
            features = list(model.backbone(batch.tensors.contiguous(memory_format=MEMORY_FORMATS[layout])).values())
            outputs = model.head(features)
        yield "criterion"
        leaves = {name: x.detach().requires_grad_() for name, x in outputs.items()}
        anchors = model.anchor_generator(batch, features)
        # All images have one size, so the first image's anchors are every image's.
        matched = match_by_torchvision([target["boxes"] for target in targets], anchors[0])
        found = model.compute_loss(targets, {name: x.float() for name, x in leaves.items()}, anchors, matched)
        losses = [found["classification"], found["bbox_regression"]]
        gradients = torch.autograd.grad(sum(losses), list(leaves.values()))
        yield "backward"
        torch.autograd.backward(list(outputs.values()), gradients)
        yield "optimiser"
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach() for loss in losses]

    return step


def _detect_ours(model: SSD, images: Tensor, autocast: AbstractContextManager[Any], layout: str) -> Callable[[], Step]:
    device = model.anchors.device
    sizes = torch.full((len(images), 4), float(IMAGE_SIZE))

    @torch.inference_mode()
    def step() -> Step:
        yield "copy in"
        batch = images.to(device, non_blocking=True, memory_format=MEMORY_FORMATS[layout])
        yield "network"
        with autocast:
            maps = model.predict(model.resize(batch))
        yield "postprocess"
        found = model.detections(*maps, sizes)
        yield "copy out"
        return _on_host(found)

    return step


def _detect_torchvision(
    model: TorchvisionSSD, images: Tensor, autocast: AbstractContextManager[Any], layout: str
) -> Callable[[], Step]:
    """Return a step that does what the model's `forward` does, in phases that can be told apart."""
    device = next(model.parameters()).device
    sizes = [(IMAGE_SIZE, IMAGE_SIZE)] * len(images)

    @torch.inference_mode()
    def step() -> Step:
        yield "copy in"
        on_device = list(images.to(device, non_blocking=True))
        yield "network"
        batch, _ = model.transform(on_device)
        with autocast:
            features = list(model.backbone(batch.tensors.contiguous(memory_format=MEMORY_FORMATS[layout])).values())
            outputs = model.head(features)
        yield "postprocess"
        anchors = model.anchor_generator(batch, features)
        outputs = {name: x.float() for name, x in outputs.items()}
        found = model.postprocess_detections(outputs, anchors, batch.image_sizes)
        found = model.transform.postprocess(found, batch.image_sizes, sizes)
        yield "copy out"
        return _on_host(found)

    return step


def _on_host(found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: x.cpu() for name, x in detections.items()} for detections in found]
