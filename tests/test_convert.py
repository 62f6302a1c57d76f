"""Checkpoints of other projects, converted, detect what these projects' code detects.

The forward passes, default boxes and postprocesses here follow each project's code, in PyTorch's functions and plain
loops, and share nothing with the package. No published weights are used. Random weights are scaled so that scores
spread and differ.
"""

import functools
import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("typer")

import torchvision
from typer.testing import CliRunner

from ssdcore import cli
from ssdcore.anchors import SSD300_COCO, SSD300_VOC, AnchorConfig, make_anchors
from ssdcore.data import VOC_CLASSES
from ssdcore.models import MODELS, ssd300_tiny
from ssdcore.objects import DetectedObjects
from ssdcore.weights import Converted, convert, convert_file, load_model, save_weights
from ssdcore.weights.class_names import COCO, class_names
from ssdcore.weights.files import POSTPROCESS_FIELDS
from ssdcore.weights.sources import SOURCES, Source

State = dict[str, Tensor]
VOC, COCO_CLASSES = 21, 81  # classes with the background


# --- networks ---------------------------------------------------------------------------------------------


CONV1_TO_4 = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
              17: (256, 512), 19: (512, 512), 21: (512, 512)}  # fmt: skip
CONV5 = {24: (512, 512), 26: (512, 512), 28: (512, 512)}
EXTRA = {  # in, out, kernel, stride and padding of the convolutions behind fc7
    300: [(1024, 256, 1, 1, 0), (256, 512, 3, 2, 1), (512, 128, 1, 1, 0), (128, 256, 3, 2, 1),
          (256, 128, 1, 1, 0), (128, 256, 3, 1, 0), (256, 128, 1, 1, 0), (128, 256, 3, 1, 0)],
    512: [(1024, 256, 1, 1, 0), (256, 512, 3, 2, 1), (512, 128, 1, 1, 0), (128, 256, 3, 2, 1),
          (256, 128, 1, 1, 0), (128, 256, 3, 2, 1), (256, 128, 1, 1, 0), (128, 256, 3, 2, 1),
          (256, 128, 1, 1, 0), (128, 256, 4, 1, 1)],
}  # fmt: skip
PER_CELL = {300: (4, 6, 6, 6, 4, 4), 512: (4, 6, 6, 6, 6, 4, 4)}


class Vgg(NamedTuple):
    """Weights and biases of SSD on VGG-16, by the number of a layer, without any project's names."""

    trunk: dict[int, tuple[Tensor, Tensor]]  # numbers as in vgg16_reducedfc.pth
    scale: Tensor  # [512]
    extra: list[tuple[Tensor, Tensor]]


def random_conv(generator: torch.Generator, inputs: int, outputs: int, kernel: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    return weight * math.sqrt(2 / (inputs * kernel**2)), torch.zeros(outputs)


def random_vgg(size: int) -> Vgg:
    generator = torch.Generator().manual_seed(size)
    trunk = {n: random_conv(generator, *channels, 3) for n, channels in (CONV1_TO_4 | CONV5).items()}
    trunk[31] = random_conv(generator, 512, 1024, 3)
    trunk[33] = random_conv(generator, 1024, 1024, 1)
    scale = 20 + torch.randn(512, generator=generator)
    return Vgg(trunk, scale, [random_conv(generator, *layer[:3]) for layer in EXTRA[size]])


def vgg_maps(net: Vgg, x: Tensor) -> list[Tensor]:
    """The feature maps, with `norm + 1e-10` as in the code of amdegroot, lufficc and MMDetection."""
    extra = EXTRA[300 if len(net.extra) == 8 else 512]
    for number in CONV1_TO_4:
        if number in (5, 10, 17):
            x = F.max_pool2d(x, 2, 2, ceil_mode=number == 17)
        x = F.conv2d(x, *net.trunk[number], padding=1).relu()
    maps = [net.scale.view(1, -1, 1, 1) * x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)]
    x = F.max_pool2d(x, 2, 2)
    for number in CONV5:
        x = F.conv2d(x, *net.trunk[number], padding=1).relu()
    x = F.max_pool2d(x, 3, 1, padding=1)
    x = F.conv2d(x, *net.trunk[31], padding=6, dilation=6).relu()
    x = F.conv2d(x, *net.trunk[33]).relu()
    maps.append(x)
    for i, ((_, _, _, stride, padding), conv) in enumerate(zip(extra, net.extra, strict=True)):
        x = F.conv2d(x, *conv, stride=stride, padding=padding).relu()
        if i % 2 == 1:
            maps.append(x)
    return maps


BOTTLENECKS = {4: (3, 64, 1), 5: (4, 128, 2), 6: (6, 256, 1)}  # child of ResNet-50: blocks, width, stride of the first
FEATURES = "feature_extractor.feature_extractor."
NVIDIA_EXTRA = [(1024, 256, 512, 2, 1), (512, 256, 512, 2, 1), (512, 128, 256, 2, 1), (256, 128, 256, 1, 0),
                (256, 128, 256, 1, 0)]  # fmt: skip


def random_batch_norm(generator: torch.Generator, name: str, channels: int) -> State:
    random = [torch.rand(channels, generator=generator) for _ in range(4)]
    return {
        f"{name}.weight": 0.5 + random[0],
        f"{name}.bias": random[1] - 0.5,
        f"{name}.running_mean": random[2] - 0.5,
        f"{name}.running_var": 0.5 + random[3],
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def random_resnet50() -> State:
    """NVIDIA's SSD300 v1.1 without its head, under its own names."""
    generator = torch.Generator().manual_seed(50)
    state: State = {}

    def add(conv: str, norm: str, inputs: int, outputs: int, kernel: int) -> None:
        state[f"{conv}.weight"] = random_conv(generator, inputs, outputs, kernel)[0]
        state.update(random_batch_norm(generator, norm, outputs))

    add(f"{FEATURES}0", f"{FEATURES}1", 3, 64, 7)
    inputs = 64
    for child, (blocks, width, _) in BOTTLENECKS.items():
        for block in range(blocks):
            name = f"{FEATURES}{child}.{block}"
            add(f"{name}.conv1", f"{name}.bn1", inputs, width, 1)
            add(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            add(f"{name}.conv3", f"{name}.bn3", width, 4 * width, 1)
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", inputs, 4 * width, 1)
            inputs = 4 * width
    for i, (inputs, width, outputs, _, _) in enumerate(NVIDIA_EXTRA):
        add(f"additional_blocks.{i}.0", f"additional_blocks.{i}.1", inputs, width, 1)
        add(f"additional_blocks.{i}.3", f"additional_blocks.{i}.4", width, outputs, 3)
    return state


def resnet50_maps(state: State, x: Tensor) -> list[Tensor]:
    def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        moments = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return F.batch_norm(x, *moments, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = conv_norm(x, f"{FEATURES}0", f"{FEATURES}1", stride=2, padding=3).relu()
    x = F.max_pool2d(x, 3, 2, padding=1)
    for child, (blocks, _, first_stride) in BOTTLENECKS.items():
        for block in range(blocks):
            name, stride = f"{FEATURES}{child}.{block}", first_stride if block == 0 else 1
            y = conv_norm(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", stride, padding=1).relu()
            y = conv_norm(y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).relu()
    maps = [x]
    for i, (_, _, _, stride, padding) in enumerate(NVIDIA_EXTRA):
        x = conv_norm(x, f"additional_blocks.{i}.0", f"additional_blocks.{i}.1").relu()
        x = conv_norm(x, f"additional_blocks.{i}.3", f"additional_blocks.{i}.4", stride, padding).relu()
        maps.append(x)
    return maps


class Heads(NamedTuple):
    """Weight and bias of the head of each feature map, ordered by anchor, then by class, background first."""

    cls: list[tuple[Tensor, Tensor]]
    reg: list[tuple[Tensor, Tensor]]


def spread_heads(maps: Sequence[Tensor], per_cell: Sequence[int], num_classes: int) -> Heads:
    """Random heads whose logits have a standard deviation of 2 and whose deltas have one of 1 on `maps`.

    The background's logits have the mean 9. Those of class 1 have the mean 3 in SSD300, so that class 1 has more
    candidates than amdegroot's and NVIDIA's code look at.
    """
    generator = torch.Generator().manual_seed(1)

    def conv(x: Tensor, channels: int, spread: float, mean: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.randn(channels, x.shape[1], 3, 3, generator=generator)
        outputs = F.conv2d(x, weight, padding=1)[0].flatten(1)
        centred = outputs - outputs.mean(dim=1, keepdim=True)
        scale = centred.std() if centred.shape[1] > 1 else outputs.std()
        return weight * (spread / scale), mean - outputs.mean(dim=1) * (spread / scale)

    means = torch.zeros(num_classes)
    means[0], means[1] = 9, 3 if len(maps) == 6 else 0
    cls = [conv(x, a * num_classes, 2, means.repeat(a)) for x, a in zip(maps, per_cell, strict=True)]
    reg = [conv(x, a * 4, 1, torch.zeros(a * 4)) for x, a in zip(maps, per_cell, strict=True)]
    return Heads(cls, reg)


def picture(size: int) -> Tensor:
    """An image [1, 3, size, size] in 0..1 with large and small structure."""
    generator = torch.Generator().manual_seed(2)
    x = sum(F.interpolate(torch.rand(1, 3, n, n, generator=generator), (size, size), mode="bilinear") for n in (9, 70))
    return x / 2


# --- default boxes and postprocesses ----------------------------------------------------------------------


STEPS = {300: (8, 16, 32, 64, 100, 300), 512: (8, 16, 32, 64, 128, 256, 512)}
CELLS = {300: (38, 19, 10, 5, 3, 1), 512: (64, 32, 16, 8, 4, 2, 1)}
RATIOS = {300: ([2], [2, 3], [2, 3], [2, 3], [2], [2]), 512: ([2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2])}
SIZES = {  # pixels, from the projects' configurations; the last size is that of the last map's second square
    "voc300": (30, 60, 111, 162, 213, 264, 315),
    "coco300": (21, 45, 99, 153, 207, 261, 315),
    "lufficc voc512": (35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.65),
    "coco512": (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
}


def clamped_priors(size: int, sizes: Sequence[float], by_anchor: bool = False) -> Tensor:
    """cxcywh in 0..1, as amdegroot and lufficc make them; with `by_anchor` as NVIDIA orders them."""
    priors = []
    for k, cells in enumerate(CELLS[size]):
        per_side = size / STEPS[size][k]
        small, large = sizes[k] / size, math.sqrt(sizes[k] / size * (sizes[k + 1] / size))
        shapes = [(small, small), (large, large)]
        for ratio in RATIOS[size][k]:
            shapes += [(small * math.sqrt(ratio), small / math.sqrt(ratio))]
            shapes += [(small / math.sqrt(ratio), small * math.sqrt(ratio))]
        grid = list(itertools.product(range(cells), repeat=2))
        order = [(i, j, s) for s in shapes for i, j in grid] if by_anchor else [(*ij, s) for ij in grid for s in shapes]
        priors += [((j + 0.5) / per_side, (i + 0.5) / per_side, *shape) for i, j, shape in order]
    return torch.tensor(priors).clamp(0, 1)


def mmdetection_priors(size: int, lowest_ratio: int) -> Tensor:
    """xyxy in pixels, from `basesize_ratio_range=(lowest_ratio / 100, 0.9)`."""
    maps = len(CELLS[size])
    step = (90 - lowest_ratio) // (maps - 2)
    first = {(300, 15): (7, 15), (300, 20): (10, 20), (512, 10): (4, 10), (512, 15): (7, 15)}[size, lowest_ratio]
    percents = [first, *((ratio, ratio + step) for ratio in range(lowest_ratio, 91, step))]
    priors = []
    for k, cells in enumerate(CELLS[size]):
        small, large = (int(size * percent / 100) for percent in percents[k])
        shapes = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in RATIOS[size][k]:
            shapes += [(small * math.sqrt(ratio), small / math.sqrt(ratio))]
            shapes += [(small / math.sqrt(ratio), small * math.sqrt(ratio))]
        step_px = STEPS[size][k]
        for i, j in itertools.product(range(cells), repeat=2):
            x, y = step_px / 2 + j * step_px, step_px / 2 + i * step_px
            priors += [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for w, h in shapes]
    return torch.tensor(priors)


def decode(deltas: Tensor, priors: Tensor) -> Tensor:
    """xyxy [A, 4] from deltas and cxcywh."""
    centers = priors[:, :2] + deltas[:, :2] * 0.1 * priors[:, 2:]
    sizes = priors[:, 2:] * torch.exp(deltas[:, 2:] * 0.2)
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)


def iou(box: Tensor, boxes: Tensor) -> Tensor:
    overlap = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return overlap / ((box[2:] - box[:2]).prod() + areas - overlap)


class Rules(NamedTuple):
    """What a project does behind the softmax."""

    score: float  # scores must be greater
    overlap: float
    keep_equal: bool  # whether a box of exactly this IoU is kept
    of_class: int  # candidates of a class
    of_image: int  # detections


TORCHVISION = Rules(0.01, 0.45, True, 400, 200)
AMDEGROOT = Rules(0.01, 0.45, True, 200, 10**6)
LUFFICC = Rules(0.01, 0.45, True, 10**6, 100)
MMDETECTION = Rules(0.02, 0.45, True, 10**6, 200)
NVIDIA = Rules(0.05, 0.5, False, 200, 200)


Detection = tuple[int, float, list[float]]  # label, score, box


def detect(scores: Tensor, boxes: Tensor, rules: Rules) -> list[Detection]:
    """The detections, best first, from scores [A, K] with the background first and boxes [A, 4]."""
    found = []
    for label in range(1, scores.shape[1]):
        candidates = (scores[:, label] > rules.score).nonzero().flatten()
        order = candidates[scores[candidates, label].argsort(descending=True)][: rules.of_class]
        while len(order):
            best, rest = order[0], order[1:]
            found.append((label, scores[best, label].item(), boxes[best].tolist()))
            overlaps = iou(boxes[best], boxes[rest])
            order = rest[~(overlaps > rules.overlap if rules.keep_equal else overlaps >= rules.overlap)]
    return sorted(found, key=lambda item: -item[1])[: rules.of_image]


# --- what each project saves and detects ------------------------------------------------------------------


class Theirs(NamedTuple):
    """A project's checkpoint, and what its code makes of `picture`."""

    checkpoint: dict[str, Any]
    size: int
    num_classes: int
    logits: Tensor  # [A, K], in our order of anchors and classes
    deltas: Tensor  # [A, 4], in our order
    scores: Tensor  # [A, K], in the project's order of anchors, background first
    boxes: Tensor  # [A, 4] xyxy in pixels, in the project's order
    rules: Rules


def named(name: str, conv: tuple[Tensor, Tensor]) -> State:
    return {f"{name}.weight": conv[0], f"{name}.bias": conv[1]}


def joined(parts: Sequence[State]) -> State:
    return {name: tensor for part in parts for name, tensor in part.items()}


def flat(maps: Sequence[Tensor], columns: int) -> Tensor:
    """[A, columns] from maps [1, a * columns, H, W]."""
    return torch.cat([x[0].permute(1, 2, 0).reshape(-1, columns) for x in maps])


def outputs(maps: Sequence[Tensor], convs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [F.conv2d(x, *conv, padding=1) for x, conv in zip(maps, convs, strict=True)]


class Detector(NamedTuple):
    """A random SSD on VGG-16, and its feature maps of `picture` with Caffe's mean subtracted."""

    size: int
    net: Vgg
    heads: Heads
    maps: list[Tensor]


@functools.cache
def random_detector(size: int) -> Detector:
    net = random_vgg(size)
    maps = vgg_maps(net, picture(size) * 255 - torch.tensor([123.0, 117, 104]).view(3, 1, 1))
    return Detector(size, net, spread_heads(maps, PER_CELL[size], VOC), maps)


def amdegroot(detector: Detector) -> Theirs:
    _, net, heads, _ = detector
    checkpoint = joined(
        [
            *(named(f"vgg.{n}", conv) for n, conv in net.trunk.items()),
            *(named(f"extras.{n}", conv) for n, conv in enumerate(net.extra)),
            *(named(f"conf.{n}", conv) for n, conv in enumerate(heads.cls)),
            *(named(f"loc.{n}", conv) for n, conv in enumerate(heads.reg)),
            {"L2Norm.weight": net.scale},
        ]
    )
    return of_caffe_family(checkpoint, detector, SIZES["voc300"], AMDEGROOT)


def lufficc(detector: Detector) -> Theirs:
    size, net, heads, _ = detector
    state = joined(
        [
            *(named(f"backbone.vgg.{n}", conv) for n, conv in net.trunk.items()),
            *(named(f"backbone.extras.{n}", conv) for n, conv in enumerate(net.extra)),
            *(named(f"box_head.predictor.cls_headers.{n}", conv) for n, conv in enumerate(heads.cls)),
            *(named(f"box_head.predictor.reg_headers.{n}", conv) for n, conv in enumerate(heads.reg)),
            {"backbone.l2_norm.weight": net.scale},
        ]
    )
    sizes = SIZES["voc300" if size == 300 else "lufficc voc512"]
    return of_caffe_family({"model": state, "iteration": 120000}, detector, sizes, LUFFICC)


def of_caffe_family(checkpoint: dict[str, Any], detector: Detector, sizes: Sequence[float], rules: Rules) -> Theirs:
    size, _, heads, maps = detector
    logits, deltas = flat(outputs(maps, heads.cls), VOC), flat(outputs(maps, heads.reg), 4)
    boxes = decode(deltas, clamped_priors(size, sizes)) * size
    return Theirs(checkpoint, size, VOC, logits, deltas, logits.softmax(dim=1), boxes, rules)


def mmdetection(detector: Detector) -> Theirs:
    size, net, heads, _ = detector
    # Its code takes the 1000 best scores of each map, ours the best of each class. Few enough scores make these equal.
    shift = torch.zeros(VOC)
    shift[0], shift[1] = 3 if size == 300 else 5, -3
    heads = Heads([(weight, bias + shift.repeat(len(bias) // VOC)) for weight, bias in heads.cls], heads.reg)

    def background_last(conv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows = [part.reshape(-1, VOC, *part.shape[1:]) for part in conv]
        weight, bias = (torch.cat([part[:, 1:], part[:, :1]], dim=1).flatten(0, 1) for part in rows)
        return weight, bias

    cls = [background_last(conv) for conv in heads.cls]
    state = joined(
        [
            *(named(f"backbone.features.{n}", conv) for n, conv in net.trunk.items()),
            *(named(f"neck.extra_layers.{n // 2}.{n % 2}.conv", conv) for n, conv in enumerate(net.extra)),
            *(named(f"bbox_head.cls_convs.{n}.0", conv) for n, conv in enumerate(cls)),
            *(named(f"bbox_head.reg_convs.{n}.0", conv) for n, conv in enumerate(heads.reg)),
            {"neck.l2_norm.weight": net.scale},
        ]
    )
    pixels = picture(size) * 255 - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    maps = vgg_maps(net, pixels)
    logits, deltas = flat(outputs(maps, cls), VOC), flat(outputs(maps, heads.reg), 4)
    scores = logits.softmax(dim=1).roll(1, dims=1)
    ends = [0, *itertools.accumulate(a * n**2 for a, n in zip(PER_CELL[size], CELLS[size], strict=True))]
    for first, end in itertools.pairwise(ends):
        assert (scores[first:end, 1:] > MMDETECTION.score).sum() <= 1000
    priors = mmdetection_priors(size, 20 if size == 300 else 15)
    priors = torch.cat([(priors[:, :2] + priors[:, 2:]) / 2, priors[:, 2:] - priors[:, :2]], dim=1)
    boxes = decode(deltas, priors)
    return Theirs(
        {"state_dict": state, "meta": {"epoch": 24}},
        size,
        VOC,
        logits.roll(1, dims=1),
        deltas,
        scores,
        boxes,
        MMDETECTION,
    )


def nvidia() -> Theirs:
    state = random_resnet50()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = resnet50_maps(state, (picture(300) - mean) / std)
    heads = spread_heads(maps, PER_CELL[300], COCO_CLASSES)

    def by_class(conv: tuple[Tensor, Tensor], anchors: int) -> tuple[Tensor, Tensor]:
        """From channel a * K + k to channel k * A + a."""
        weight, bias = (part.reshape(anchors, -1, *part.shape[1:]).transpose(0, 1).flatten(0, 1) for part in conv)
        return weight, bias

    heads = Heads(*([by_class(conv, a) for conv, a in zip(part, PER_CELL[300], strict=True)] for part in heads))
    state |= joined([named(f"conf.{n}", conv) for n, conv in enumerate(heads.cls)])
    state |= joined([named(f"loc.{n}", conv) for n, conv in enumerate(heads.reg)])
    cls, reg = outputs(maps, heads.cls), outputs(maps, heads.reg)
    logits = torch.cat([x.reshape(COCO_CLASSES, -1) for x in cls], dim=1).T  # [A, K], by anchor, row and column
    deltas = torch.cat([x.reshape(4, -1) for x in reg], dim=1).T
    boxes = decode(deltas, clamped_priors(300, SIZES["coco300"], by_anchor=True)) * 300
    # Where the row of an anchor, grid row and grid column lies among ours, by map.
    ours, first = [], 0
    for a, n in zip(PER_CELL[300], CELLS[300], strict=True):
        ours.append(first + torch.arange(a * n * n).view(a, n * n).T.flatten())
        first += a * n * n
    order = torch.cat(ours)
    checkpoint = {
        "model": {f"module.{name}": tensor for name, tensor in state.items()},
        "epoch": 65,
        "label_map": {0: "background"},
    }
    scores = logits.softmax(dim=1)
    return Theirs(checkpoint, 300, COCO_CLASSES, logits[order], deltas[order], scores, boxes, NVIDIA)


MAKERS = {"amdegroot": amdegroot, "lufficc": lufficc, "mmdetection": mmdetection}
CASES = ["amdegroot 300", "lufficc 300", "lufficc 512", "mmdetection 300", "mmdetection 512", "nvidia 300"]


@functools.cache
@torch.no_grad()
def theirs_of(case: str) -> Theirs:
    project, size = case.split()
    return nvidia() if project == "nvidia" else MAKERS[project](random_detector(int(size)))


class Case(NamedTuple):
    theirs: Theirs
    converted: Converted
    outputs: tuple[list[Tensor], list[Tensor]]  # of the converted model's head for `picture`


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    theirs = theirs_of(request.param)
    converted = convert(theirs.checkpoint)
    with torch.no_grad():
        return Case(theirs, converted, converted.model.predict(converted.model.resize(picture(theirs.size))))


# --- tests ------------------------------------------------------------------------------------------------


def test_head_outputs_equal_theirs(case: Case) -> None:
    theirs, _, (cls_logits, box_deltas) = case
    # The convolutions add up in another order. The difference was 2e-5 at most, with logits of a spread of 2 to 3.
    torch.testing.assert_close(flat(cls_logits, theirs.num_classes), theirs.logits, rtol=0, atol=2e-4)
    torch.testing.assert_close(flat(box_deltas, 4), theirs.deltas, rtol=0, atol=2e-4)


def share_found(theirs: list[Detection], ours: DetectedObjects, size: int) -> float:
    """The share of the project's detections that are among ours, with corners and scores as close as the heads are."""
    labels, scores, boxes = (torch.tensor(column) for column in zip(*theirs, strict=True))
    boxes = boxes.clamp(0, size)
    same = (
        (labels[:, None] == ours["labels"])
        & ((scores[:, None] - ours["scores"]).abs() < 1e-4)
        & ((boxes[:, None] - ours["boxes"]).abs().amax(dim=2) < 0.01)
    )
    return same.any(dim=1).float().mean().item()


def test_detections_equal_theirs(case: Case) -> None:
    theirs, converted, head_outputs = case
    (ours,) = converted.model.detections(*head_outputs, torch.full((1, 4), float(theirs.size)))
    assert converted.model.score_threshold == theirs.rules.score  # most have too many detections for this to matter
    boxes = theirs.boxes
    if theirs.rules is MMDETECTION:  # the code of the others does not clip before NMS
        boxes = boxes.clamp(0, theirs.size)
    expected = detect(theirs.scores, boxes, theirs.rules)
    assert len(expected) == len(ours["scores"]) >= 100
    assert share_found(expected, ours, theirs.size) == 1
    # A fifth to a third of these random boxes extend beyond the image, so that the rule makes a difference.
    converted.model.clip_before_nms ^= True
    (otherwise,) = converted.model.detections(*head_outputs, torch.full((1, 4), float(theirs.size)))
    converted.model.clip_before_nms ^= True
    assert 0.9 < share_found(expected, otherwise, theirs.size) < 1


@torch.no_grad()
def test_torchvision_s_detections_are_equal() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=5).eval()
    for conv in (*theirs.head.classification_head.module_list, *theirs.head.regression_head.module_list):
        conv.weight.mul_(0.01)  # random weights on pixels in 0..255 give scores that are all 1
    converted = convert({"model": theirs.state_dict(), "epoch": 3}, classes=["a", "b", "c", "d"])
    assert converted.project == "torchvision" and converted.not_loaded == []
    image = F.interpolate(picture(300), (200, 310))
    (expected,), (got,) = theirs(list(image)), converted.model(image)
    assert len(expected["scores"]) > 50 and got["labels"].tolist() == expected["labels"].tolist()
    # The tolerances are those of the same comparison in test_model.py.
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=1e-5, atol=1e-3)


ANCHORS = [
    ("amdegroot/ssd.pytorch", "ssd300_vgg16", "voc", lambda: clamped_priors(300, SIZES["voc300"])),
    ("amdegroot/ssd.pytorch", "ssd300_vgg16", "coco", lambda: clamped_priors(300, SIZES["coco300"])),
    ("lufficc/SSD", "ssd300_vgg16", "voc", lambda: clamped_priors(300, SIZES["voc300"])),
    ("lufficc/SSD", "ssd300_vgg16", "coco", lambda: clamped_priors(300, SIZES["coco300"])),
    ("lufficc/SSD", "ssd512_vgg16", "voc", lambda: clamped_priors(512, SIZES["lufficc voc512"])),
    ("lufficc/SSD", "ssd512_vgg16", "coco", lambda: clamped_priors(512, SIZES["coco512"])),
    ("MMDetection", "ssd300_vgg16", "voc", lambda: mmdetection_priors(300, 20)),
    ("MMDetection", "ssd300_vgg16", "coco", lambda: mmdetection_priors(300, 15)),
    ("MMDetection", "ssd512_vgg16", "voc", lambda: mmdetection_priors(512, 15)),
    ("MMDetection", "ssd512_vgg16", "coco", lambda: mmdetection_priors(512, 10)),
    ("NVIDIA SSD300 v1.1", "ssd300_resnet50", "coco", lambda: clamped_priors(300, SIZES["coco300"])),
]


@pytest.mark.parametrize(("project", "model", "dataset", "make"), ANCHORS, ids=[" ".join(x[:3]) for x in ANCHORS])
def test_default_boxes_equal_theirs(project: str, model: str, dataset: str, make: Callable[[], Tensor]) -> None:
    source = next(source for source in SOURCES if (source.project, source.model) == (project, model))
    ours, theirs = make_anchors(source.anchors[dataset]), make()
    if project != "MMDetection":
        center, half = theirs[:, :2], theirs[:, 2:] / 2
        theirs = torch.cat([center - half, center + half], dim=1) * source.anchors[dataset].image_size
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # pixels; a few units of the last place of fp32
    if project == "lufficc/SSD":  # every box takes part in NMS
        assert source.topk_candidates == len(theirs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{source.project} {source.model}")
def test_every_layout_is_recognised(source: Source) -> None:
    with torch.device("meta"):
        names = source.their_names(MODELS[source.model](2).state_dict())
    state = {name: torch.zeros(1) for name in names.values()} | {"ema.weight": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=rf"incomplete {source.model} of {source.project}: missing .*: none; .* 1: ema.w"
    ):
        convert(state)


def test_classes_and_ids_follow_the_number_of_classes() -> None:
    assert class_names(81) == (tuple(COCO.values()), tuple(COCO))
    names, ids = class_names(91) or ((), ())
    assert ids == tuple(range(1, 91)) and names[:2] == ("person", "bicycle") and names[11] == "unused 12"
    assert names[89] == "toothbrush" and len(set(names)) == 90
    assert class_names(7) is None
    converted = convert(theirs_of("amdegroot 300").checkpoint)
    assert converted.classes == VOC_CLASSES and converted.category_ids == tuple(range(1, 21))
    assert convert(theirs_of("nvidia 300").checkpoint).category_ids == tuple(COCO)


def test_other_classes_leave_the_classification_head_random() -> None:
    checkpoint = theirs_of("lufficc 300").checkpoint
    converted = convert(checkpoint, classes=["cat", "dog"])
    assert converted.classes == ("cat", "dog") and converted.model.num_classes == 3
    assert len(converted.not_loaded) == 12
    assert all(name.startswith("head.classification_head.") for name in converted.not_loaded)
    conv = converted.model.backbone.extra[1][0]  # type: ignore[index]
    assert torch.equal(conv.weight, checkpoint["model"]["backbone.extras.0.weight"])
    # As many names: the weights are kept, because the names may be another language's.
    renamed = convert(checkpoint, classes=[f"class {i}" for i in range(20)])
    assert renamed.not_loaded == [] and renamed.category_ids == tuple(range(1, 21))


@pytest.mark.parametrize(
    ("meta", "anchors"),
    [
        ({"CLASSES": ("a", "b"), "config": "anchor_generator=dict(basesize_ratio_range=(0.15, 0.9))"}, SSD300_COCO),
        ({"dataset_meta": {"classes": ["a", "b"]}, "cfg": "x=dict(basesize_ratio_range=(\n 0.2,\n 0.9))"}, SSD300_VOC),
    ],
    ids=["version 2", "version 3"],
)
def test_mmdetection_s_notes_tell_classes_and_default_boxes(meta: dict[str, Any], anchors: AnchorConfig) -> None:
    checkpoint = with_classes(theirs_of("mmdetection 300").checkpoint["state_dict"], "bbox_head.cls_convs", 3)
    converted = convert({"state_dict": checkpoint, "meta": meta})
    assert converted.classes == ("a", "b")
    assert converted.model.anchor_config == replace(anchors, clip="none")


def with_classes(state: State, head: str, num_classes: int) -> State:
    """A checkpoint of VOC's classes with only the first `num_classes` channels of each anchor."""
    return {
        name: x.unflatten(0, (-1, VOC))[:, :num_classes].flatten(0, 1) if name.startswith(head) else x
        for name, x in state.items()
    }


def test_default_boxes_that_nothing_tells_must_be_given() -> None:
    state = with_classes(theirs_of("lufficc 300").checkpoint["model"], "box_head.predictor.cls_headers", 3)
    with pytest.raises(ValueError, match="classes must be given, because nothing names the 2"):
        convert(state)
    with pytest.raises(ValueError, match="anchors must be given, voc or coco, because 2 classes do not tell"):
        convert(state, ["a", "b"])
    with pytest.raises(ValueError, match="anchors must be voc or coco for lufficc/SSD, got 'kitti'"):
        convert(state, ["a", "b"], "kitti")
    assert convert(state, ["a", "b"], "voc").model.anchor_config == replace(SSD300_VOC, clip="centers")
    # amdegroot's code takes COCO's for any other number than VOC's.
    state = with_classes(theirs_of("amdegroot 300").checkpoint, "conf", 3)
    assert convert(state, ["a", "b"]).model.anchor_config == replace(SSD300_COCO, clip="centers")


def changed(**changes: Tensor | None) -> State:
    state = {**theirs_of("amdegroot 300").checkpoint, **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: changed(**{"vgg.0.bias": None}),
            r"incomplete ssd300_vgg16 of amdegroot.*: missing tensors: 1: vgg.0.bias; .*",
        ),
        (
            lambda: changed(**{"vgg.9.bias": torch.zeros(1)}),
            r"missing tensors: none; unexpected tensors: 1: vgg.9.bias",
        ),
        (lambda: changed(**{"vgg.0.bias": torch.zeros(3)}), r"1: vgg.0.bias \[3\], expected \[64\]"),
        (lambda: changed(**{"conf.1.bias": torch.zeros(9)}), r"1: conf.1.bias \[9\], expected \[126\]"),
        (lambda: {"fc.weight": torch.zeros(1)}, r"no known project saves such tensors: found 1: fc.weight; the known"),
        (
            lambda: {"epoch": 3},
            r"no known project saves such tensors: found none; the known ones: torchvision's ssd300_vgg16,",
        ),
    ],
    ids=["missing", "unexpected", "shape", "classes differ", "unknown", "no tensors"],
)
def test_unknown_and_damaged_checkpoints_raise_an_error(make: Callable[[], State], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(make())


class Malicious:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_run_no_code_and_are_named_in_errors(tmp_path: Path) -> None:
    evidence, path, output = tmp_path / "evidence", tmp_path / "x.pth", tmp_path / "y.safetensors"
    torch.save({"model": Malicious(evidence)}, path)
    with pytest.raises(ValueError, match=r"x\.pth is not a file of weights that can be read safely"):
        convert_file(path, output)
    assert not evidence.exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert evidence.exists()

    torch.save(theirs_of("amdegroot 300").checkpoint["L2Norm.weight"], path)
    with pytest.raises(ValueError, match=r"x\.pth must hold tensors by name, got Tensor"):
        convert_file(path, output)
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"x\.pth: no known project"):
        convert_file(path, output)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"x\.pth is not a file of weights that can be read safely"):
        convert_file(path, output)
    with pytest.raises(ValueError, match=r"no weights at .*absent\.pth"):
        convert_file(tmp_path / "absent.pth", output)
    save_weights(ssd300_tiny(2), tmp_path / "own.safetensors", ["a"])
    with pytest.raises(ValueError, match=r"own\.safetensors needs no conversion: ssdcore wrote it"):
        convert_file(tmp_path / "own.safetensors", output)
    torch.save({"model": {}, "trained": [], "settings": {}}, path)
    with pytest.raises(ValueError, match=r"x\.pth is the state of a run of ssdcore"):
        convert_file(path, output)
    assert not output.exists()


@torch.no_grad()
def test_the_command_writes_a_file_that_load_model_reads(tmp_path: Path) -> None:
    """The checkpoint has what wrappers and scripts add: `module.`, and the arguments of the command line."""
    theirs = theirs_of("nvidia 300")
    state = {name.replace("module.", "module.1."): x for name, x in theirs.checkpoint["model"].items()}
    state = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}  # older PyTorch has none
    torch.save({"model": state, "args": Namespace(lr=0.1)}, tmp_path / "epoch_64.pt")
    output = tmp_path / "new folder" / "nvidia.safetensors"
    result = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "epoch_64.pt"), str(output)])
    assert result.exit_code == 0, result.output
    assert "NVIDIA SSD300 v1.1" in result.output
    model, classes = load_model(output)
    assert classes == model.classes == tuple(COCO.values()) and model.category_ids == tuple(COCO)
    expected: Any = convert(theirs.checkpoint).model
    assert (expected.classes, expected.category_ids) == (model.classes, model.category_ids)
    for name in POSTPROCESS_FIELDS:
        assert getattr(model, name) == getattr(expected, name)
    assert model.iou_threshold < 0.5 == torch.tensor(model.iou_threshold).nextafter(torch.tensor(1.0))
    ours = model(picture(300))[0]  # type: ignore[index]
    for name, tensor in expected(picture(300))[0].items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_the_command_takes_names_from_a_file(tmp_path: Path) -> None:
    torch.save(theirs_of("amdegroot 300").checkpoint, tmp_path / "ssd.pth")
    (tmp_path / "names.txt").write_text(
        "chat\nchien\n\n", encoding="utf-8-sig"
    )  # with a byte order mark, as on Windows
    arguments = ["convert", str(tmp_path / "ssd.pth"), str(tmp_path / "x.safetensors"), "--classes"]
    result = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "names.txt")])
    assert result.exit_code == 0, result.output
    assert "12 tensors keep random weights" in result.output and "module_list.5.bias" in result.output
    assert load_model(tmp_path / "x.safetensors")[1] == ("chat", "chien")
    (tmp_path / "names.txt").write_text("chat\nchat\n")
    result = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "names.txt")])
    assert isinstance(result.exception, ValueError) and "must not contain duplicates" in str(result.exception)
