"""What is measured: one registry entry a case, with its shapes, and everyone who solves it on the same inputs.

Sizes have the letters of the ops' contracts: B images, A anchors, C classes with the background, G objects an image in
the mean, N boxes (M of the other kind), K classes of NMS.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import inputs
import torch
import torchvision
from torch import Tensor
from torch.nn.functional import pad
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD

from ssdcore import kernels
from ssdcore.kernels.boxes import eager as boxes_eager
from ssdcore.kernels.matching import eager as matching_eager
from ssdcore.kernels.multibox import eager as multibox_eager
from ssdcore.kernels.nms import eager as nms_eager
from ssdcore.kernels.postprocess import eager as postprocess_eager

WEIGHTS = [10.0, 10.0, 5.0, 5.0]
IMAGE = 300  # pixels
ROUNDING = 1e-5  # |a - b| / |b|: fp32, in another order
NEAR_TIE = 0.05  # of the norm: the last bit of a loss decides which of two anchors is mined, a row in hundreds
CLAIMED_TWICE = 0.02  # of the matches: torchvision, on a GPU, lets any of two objects have the anchor that both want
SAME_BOX = 0.5  # pixels; torchvision's NMS on a GPU moves classes apart by adding to coordinates, which rounds them
SAME_DETECTIONS = 0.95  # of an image's: what follows from such a rounding is another box here and there
CPU_BATCH = 8  # largest on a CPU
Shape = dict[str, Any]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def within(tolerance: float) -> Callable[[Any, Any], str]:
    """Compares tensors: floats by the norm of their difference over that of the expected, integers by equality."""

    def difference(found: Any, expected: Any) -> str:
        for number, (a, b) in enumerate(zip(tensors(found), tensors(expected), strict=True)):
            if a.shape != b.shape:
                return f"result {number} has shape {list(a.shape)}, expected {list(b.shape)}"
            if not b.is_floating_point():
                if not torch.equal(a, b):
                    return f"result {number} differs in {int((a != b).sum())} of {b.numel()} integers"
                continue
            a, b = a.double(), b.double()
            distance, size = (a - b).norm().item(), b.norm().item()
            if not distance <= tolerance * size:  # a NaN is wrong too
                return f"result {number} is off by {distance / size if size else distance:.2g} of its norm"
        return ""

    return difference


ROUNDED = within(ROUNDING)


def same_matches(found: Tensor, expected: Tensor) -> str:
    wrong, matches = int((found != expected).sum()), int((expected >= 0).sum())
    return "" if wrong <= CLAIMED_TWICE * matches else f"{wrong} anchors differ, of {matches} matched"


def same_kept(found: Any, expected: Any) -> str:
    """Compares padded NMS with another, or with a list of what each image kept."""
    if isinstance(found, list):
        most = expected[0].shape[1]
        rows = torch.stack([pad(own[:most], (0, max(0, most - len(own))), value=-1) for own in found])
        found = rows, torch.tensor([min(len(own), most) for own in found], device=rows.device)
    return within(0)(found, expected)


def same_detections(found: Any, expected: Any) -> str:
    """Compares what each image has: the scores in order, and how many boxes and labels are found in the other's."""
    for image, (ours, theirs) in enumerate(zip(_per_image(found), _per_image(expected), strict=True)):
        if note := within(NEAR_TIE)(ours["scores"], theirs["scores"]):
            return f"image {image}: scores: {note}"
        # Boxes of another label are far away.
        places = [torch.cat((x["boxes"], x["labels"][:, None] * 1e4), dim=1) for x in (ours, theirs)]
        if len(places[0]):
            share = (torch.cdist(*places, p=torch.inf).amin(dim=1) < SAME_BOX).float().mean().item()
            if share < SAME_DETECTIONS:
                return f"image {image}: only {share:.0%} of the detections are the other's"
    return ""


def _per_image(result: Any) -> list[dict[str, Tensor]]:
    """`result` is that already, or padded tensors of a batch."""
    if isinstance(result, list):
        return result
    names = ("boxes", "scores", "labels")
    return [
        {name: x[image, :count] for name, x in zip(names, result[:3], strict=True)}
        for image, count in enumerate(result[3].tolist())
    ]


@dataclass(frozen=True)
class Workload:
    """A problem, and the calls that solve it."""

    providers: Mapping[str, Callable[[], Any]]
    reads: Sequence[Tensor] = ()  # what any provider must read once; what it must write is the result
    reference: str = "eager"  # whose result is right
    difference: Callable[[Any, Any], str] = ROUNDED  # of a result and the reference's: what is wrong, or ""
    staged: bool = False  # providers are generators that name their stages
    ahead: int = 0  # steps that their data is fetched ahead
    close: Callable[[], None] = lambda: None  # what a provider holds while it runs


@dataclass(frozen=True)
class Case:
    """A kind of problem. The first of `shapes` is its headline: measured first, shown in tables."""

    name: str
    build: Callable[..., Workload]  # of a shape and the device
    shapes: Sequence[Shape]
    quick: Sequence[Shape]
    sweep: Mapping[str, Sequence[int]] = field(default_factory=dict)  # sizes for perf/sweep.py, others as in shapes[0]
    compiles: bool = False  # as one graph: then `torch.compile` of eager is a provider, at the headline

    def shapes_for(self, device: str, quick: bool) -> list[Shape]:
        shapes = self.quick if quick else self.shapes
        return unique(on_cpu(shape) for shape in shapes) if device == "cpu" else list(shapes)


REGISTRY: dict[str, Case] = {}


def case(name: str, **description: Any) -> Callable[[Callable[..., Workload]], Callable[..., Workload]]:
    """Register a function that builds the workload of a shape; its keyword arguments are the shape's sizes."""

    def register(build: Callable[..., Workload]) -> Callable[..., Workload]:
        REGISTRY[name] = Case(name, build, **description)
        return build

    return register


def grid(**sizes: Sequence[Any]) -> list[Shape]:
    """Every combination."""
    return [dict(zip(sizes, values, strict=True)) for values in product(*sizes.values())]


def star(base: Shape, **sizes: Sequence[Any]) -> list[Shape]:
    """`base`, and `base` with one size at a time changed to each of those given."""
    return unique([base, *({**base, name: value} for name, values in sizes.items() for value in values)])


def unique(shapes: Any) -> list[Shape]:
    return [dict(items) for items in dict.fromkeys(tuple(shape.items()) for shape in shapes)]


def on_cpu(shape: Shape) -> Shape:
    """As much of it as a CPU does in reasonable time: small batches, fp32."""
    limits = {"B": CPU_BATCH, "N": 30_000}
    small = {name: min(value, limits.get(name, value)) for name, value in shape.items() if isinstance(value, int)}
    return {**shape, **small, "dtype": "float32"}


def ssd(**changes: Any) -> Shape:
    """SSD300 on COCO."""
    return {"B": 32, "A": 8732, "C": 81, "G": 7, "head": "packed", "dtype": "bfloat16"} | changes


def without(*names: str, shapes: Sequence[Shape]) -> list[Shape]:
    return unique({name: value for name, value in shape.items() if name not in names} for shape in shapes)


BATCHES = (1, 8, 32, 128)
SSD_STAR = star(ssd(), B=BATCHES, A=(24_564,), C=(21, 91), head=inputs.HEADS, dtype=("float32",))
SSD_QUICK = [ssd(B=4)]
SSD_SWEEP = {"B": (1, 2, 4, 8, 16, 32, 64), "A": (500, 2000, 8732, 24_564, 65_536), "C": (5, 21, 81, 320)}
CODEC = {
    "compiles": True,
    "shapes": without("C", "G", "head", shapes=star(ssd(dtype="float32"), B=BATCHES, A=(24_564,))),
    "quick": without("C", "G", "head", shapes=SSD_QUICK),
    "sweep": {"B": SSD_SWEEP["B"]},
}
BOX_SWEEP = {"N": (100, 300, 1000, 3000, 10_000, 30_000, 100_000)}


# --- boxes ------------------------------------------------------------------------------------------------


@case(
    "box_iou",
    compiles=True,
    shapes=[{"N": 100, "M": 8732, "dtype": "float32"}, {"N": 4000, "M": 8732, "dtype": "float32"}],
    quick=[{"N": 100, "M": 8732, "dtype": "float32"}],
    sweep={"N": (10, 30, 100, 300, 1000, 3000)},
)
def box_iou(device: str, dtype: torch.dtype, N: int, M: int) -> Workload:
    boxes, anchors = inputs.random_boxes(N).to(device, dtype), inputs.anchors(M, device).to(dtype)
    return Workload(
        {
            "ssdcore": lambda: kernels.box_iou(boxes, anchors),
            "torchvision": lambda: torchvision.ops.box_iou(boxes, anchors),
            "eager": lambda: boxes_eager.box_iou(boxes, anchors),
        },
        reads=(boxes, anchors),
    )


@case("encode_boxes", **CODEC)
def encode_boxes(device: str, dtype: torch.dtype, B: int, A: int) -> Workload:
    boxes, anchors = inputs.random_boxes(B, A).to(device, dtype), inputs.anchors(A, device)
    coder = BoxCoder(tuple(WEIGHTS))
    flat_boxes, flat_anchors = boxes.flatten(0, 1), anchors.repeat(B, 1)
    return Workload(
        {
            "ssdcore": lambda: kernels.encode_boxes(boxes, anchors),
            "torchvision": lambda: coder.encode_single(flat_boxes, flat_anchors).view(B, A, 4),
            "eager": lambda: boxes_eager.encode_boxes(boxes, anchors, WEIGHTS),
        },
        reads=(boxes, anchors),
    )


@case("decode_boxes", **CODEC)
def decode_boxes(device: str, dtype: torch.dtype, B: int, A: int) -> Workload:
    deltas, anchors = torch.randn(B, A, 4).to(device, dtype), inputs.anchors(A, device)
    coder = BoxCoder(tuple(WEIGHTS))
    flat_deltas, flat_anchors = deltas.flatten(0, 1), anchors.repeat(B, 1)
    return Workload(
        {
            "ssdcore": lambda: kernels.decode_boxes(deltas, anchors),
            "torchvision": lambda: coder.decode_single(flat_deltas, flat_anchors).view(B, A, 4),
            "eager": lambda: boxes_eager.decode_boxes(deltas, anchors, WEIGHTS),
        },
        reads=(deltas, anchors),
    )


# --- NMS --------------------------------------------------------------------------------------------------


def conch_nms() -> Callable[..., Tensor] | None:
    """conch-triton-kernels' NMS, where it is installed."""
    if importlib.util.find_spec("conch") is None:
        return None
    from conch.ops.vision.nms import nms

    return nms


@case(
    "nms",
    shapes=[
        {"N": 8732, "boxes": "uniform", "dtype": "float32"},
        *grid(N=(100, 1000, 4000, 10_000, 30_000, 100_000), boxes=inputs.LAYOUTS, dtype=["float32"]),
    ],
    quick=[{"N": 8732, "boxes": layout, "dtype": "float32"} for layout in inputs.LAYOUTS],
    sweep=BOX_SWEEP,
)
def nms(device: str, dtype: torch.dtype, N: int, boxes: str) -> Workload:
    corners, scores = inputs.nms_boxes(boxes, N, device)
    providers = {
        "ssdcore": lambda: kernels.nms(corners, scores, 0.5),
        "torchvision": lambda: torchvision.ops.nms(corners, scores, 0.5),
        "eager": lambda: nms_eager.nms(corners, scores, None, 0.5),
    }
    conch = conch_nms()
    # Its memory is 4 N^2 bytes, and it suppresses one box at a time: beyond 10,000 boxes it takes seconds.
    if conch and device == "cuda" and N <= 10_000:
        providers["conch"] = lambda: conch(corners, scores, 0.5)
    return Workload(providers, reads=(corners, scores))


@case(
    "batched_nms",
    shapes=[
        {"N": 8732, "K": 80, "dtype": "float32"},
        *grid(N=[10_000], K=(1, 20, 80, 1200), dtype=["float32"]),
        {"N": 100_000, "K": 80, "dtype": "float32"},
    ],
    quick=[{"N": 8732, "K": 80, "dtype": "float32"}],
    sweep=BOX_SWEEP,
)
def batched_nms(device: str, dtype: torch.dtype, N: int, K: int) -> Workload:
    boxes, scores = inputs.nms_boxes("clustered", N, device)
    idxs = torch.randint(K, (N,), device=device)
    return Workload(
        {
            "ssdcore": lambda: kernels.batched_nms(boxes, scores, idxs, 0.5),
            "torchvision": lambda: torchvision.ops.batched_nms(boxes, scores, idxs, 0.5),
            "eager": lambda: nms_eager.nms(boxes, scores, idxs, 0.5),
        },
        reads=(boxes, scores, idxs),
    )


@case(
    "batched_nms_padded",
    shapes=star({"B": 32, "N": 1000, "K": 80, "dtype": "float32"}, B=BATCHES, N=(4000,)),
    quick=[{"B": 4, "N": 1000, "K": 80, "dtype": "float32"}],
    sweep={"B": SSD_SWEEP["B"], "N": (100, 300, 1000, 3000)},
)
def batched_nms_padded(device: str, dtype: torch.dtype, B: int, N: int, K: int) -> Workload:
    pairs = [inputs.nms_boxes("clustered", N, device) for _ in range(B)]
    boxes, scores = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    idxs = torch.randint(K, (B, N), device=device)
    most = 200

    return Workload(
        {
            "ssdcore": lambda: kernels.batched_nms_padded(boxes, scores, idxs, 0.5, most),
            "torchvision": lambda: [
                torchvision.ops.batched_nms(*image, 0.5) for image in zip(boxes, scores, idxs, strict=True)
            ],
            "eager": lambda: nms_eager.batched_nms_padded(boxes, scores, idxs, 0.5, most, None),
        },
        reads=(boxes, scores, idxs),
        difference=same_kept,
    )


# --- training ---------------------------------------------------------------------------------------------


def match_by_torchvision(images: Sequence[Tensor], anchors: Tensor) -> list[Tensor]:
    """As `SSD.forward` does before `compute_loss`, with its default threshold, given each image's boxes."""
    matcher = SSDMatcher(0.5)
    none = torch.full((len(anchors),), -1, device=anchors.device)
    return [matcher(torchvision.ops.box_iou(boxes, anchors)) if len(boxes) else none for boxes in images]


@case(
    "match_anchors",
    shapes=without("C", "head", shapes=star(ssd(dtype="float32"), B=BATCHES, A=(24_564,), G=(1, 100))),
    quick=without("C", "head", shapes=SSD_QUICK),
    sweep={"B": SSD_SWEEP["B"], "A": SSD_SWEEP["A"], "G": (1, 3, 10, 30, 100)},
)
def match_anchors(device: str, dtype: torch.dtype, B: int, A: int, G: int) -> Workload:
    truth, anchors = inputs.truth(B, 81, G, device), inputs.anchors(A, device)
    images = truth.boxes.split(truth.counts)
    return Workload(
        {
            "ssdcore": lambda: kernels.match_anchors(truth.boxes, truth.offsets, anchors),
            "torchvision": lambda: torch.stack(match_by_torchvision(images, anchors)),
            "eager": lambda: matching_eager.match_anchors(truth.boxes, truth.offsets, anchors, 0.5),
        },
        reads=(truth.boxes, anchors),
        difference=same_matches,
    )


def as_given(head: list[Tensor]) -> Tensor | list[Tensor]:
    """The head's outputs as the public functions take them."""
    return head[0] if len(head) == 1 else head


class _Loss:
    """Losses and the gradients of the head's outputs, by each provider."""

    def __init__(self, device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> None:
        self.truth, self.anchors = inputs.truth(B, C, G, device), inputs.anchors(A, device)
        self.targets = self.truth.targets()
        outputs = inputs.head_outputs(B, A, C, "trained", dtype, device)
        self.logits, self.deltas = ([x.requires_grad_() for x in inputs.as_head(packed, head)] for packed in outputs)
        self.one = torch.ones((), device=device)

    def match_by_ssdcore(self) -> Tensor:
        return kernels.match_anchors(self.truth.boxes, self.truth.offsets, self.anchors)

    def match_by_eager(self) -> Tensor:
        return matching_eager.match_anchors(self.truth.boxes, self.truth.offsets, self.anchors, 0.5)

    def ssdcore(self, matched: Tensor) -> list[Tensor]:
        truth = (self.truth.boxes, self.truth.labels, self.truth.offsets, self.anchors)
        losses = kernels.multibox_loss(*map(as_given, (self.logits, self.deltas)), matched, *truth)
        return [*losses, *torch.autograd.grad(losses.classification + losses.bbox_regression, self.leaves)]

    def eager(self, matched: Tensor) -> list[Tensor]:
        truth = (matched, self.truth.boxes, self.truth.labels, self.truth.offsets, self.anchors)
        head = [inputs.levels(x) for x in (self.logits, self.deltas)]
        with torch.no_grad():
            *losses, lse, selected, scale = multibox_eager.multibox_loss(*head, *truth, WEIGHTS, 3.0, 1.0, 0, "batch")
            gradients = multibox_eager.multibox_loss_backward(
                self.one, self.one, *head, *truth, lse, selected, scale, WEIGHTS, 1.0
            )
        pairs = zip(gradients, self.leaves, strict=True)
        return [*losses, *(x.permute(0, 2, 3, 1).reshape(y.shape) if y.dim() == 4 else x.squeeze(2) for x, y in pairs)]

    def torchvision(self, matched: list[Tensor]) -> list[Tensor]:
        logits, deltas = inputs.repacked(self.logits), inputs.repacked(self.deltas)
        outputs = {"cls_logits": logits.float(), "bbox_regression": deltas.float()}
        losses = torchvision_ssd().compute_loss(self.targets, outputs, [self.anchors] * len(matched), matched)
        found = [losses["classification"], losses["bbox_regression"]]
        return [*found, *torch.autograd.grad(found[0] + found[1], self.leaves)]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.logits, *self.deltas]

    def workload(self, providers: Mapping[str, Callable[[], Any]], *also_read: Tensor) -> Workload:
        # Of the deltas and anchors only the positives' are needed, about one in a hundred: not counted.
        return Workload(providers, reads=(*self.logits, *also_read), difference=within(NEAR_TIE))


@functools.cache
def torchvision_ssd() -> SSD:
    """torchvision's detector, whose loss and postprocess depend neither on its weights nor on its classes."""
    return torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2)


@case("multibox_loss", compiles=True, shapes=SSD_STAR, quick=SSD_QUICK, sweep=SSD_SWEEP)
def multibox_loss(device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> Workload:
    """Forward and backward."""
    loss = _Loss(device, dtype, B, A, C, G, head)
    matched = loss.match_by_eager()
    images = list(matched)
    return loss.workload(
        {
            "ssdcore": lambda: loss.ssdcore(matched),
            "torchvision": lambda: loss.torchvision(images),
            "eager": lambda: loss.eager(matched),
        },
        matched,
    )


@case(
    "criterion",
    compiles=True,
    shapes=SSD_STAR,
    quick=SSD_QUICK,
    sweep={**SSD_SWEEP, "G": (1, 3, 10, 30, 100)},
)
def criterion(device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> Workload:
    """Matching and the loss, forward and backward."""
    loss = _Loss(device, dtype, B, A, C, G, head)
    images = loss.truth.boxes.split(loss.truth.counts)
    return loss.workload(
        {
            "ssdcore": lambda: loss.ssdcore(loss.match_by_ssdcore()),
            "torchvision": lambda: loss.torchvision(match_by_torchvision(images, loss.anchors)),
            "eager": lambda: loss.eager(loss.match_by_eager()),
        }
    )


# --- detection --------------------------------------------------------------------------------------------


@case(
    "postprocess",
    shapes=without(
        "G",
        shapes=star(ssd(outputs="trained"), B=BATCHES, A=(24_564,), C=(21, 91), head=inputs.HEADS, dtype=("float32",)),
    )
    + without("G", shapes=star(ssd(outputs="random"), B=BATCHES, dtype=("float32",))),
    quick=without("G", shapes=[ssd(B=4, outputs="trained"), ssd(B=4, outputs="random")]),
    sweep=SSD_SWEEP,
)
def postprocess(device: str, dtype: torch.dtype, B: int, A: int, C: int, head: str, outputs: str) -> Workload:
    """From the head's outputs to detections: trained, with few candidates, or at random initialisation."""
    anchors = inputs.anchors(A, device)
    head_outputs = [inputs.as_head(packed, head) for packed in inputs.head_outputs(B, A, C, outputs, dtype, device)]
    given, levels = [as_given(x) for x in head_outputs], [inputs.levels(x) for x in head_outputs]
    image_sizes = torch.full((B, 2), IMAGE, device=device)
    model = torchvision_ssd()

    def by_torchvision() -> list[dict[str, Tensor]]:
        logits, deltas = (inputs.repacked(x).float() for x in head_outputs)
        raw = {"cls_logits": logits, "bbox_regression": deltas}
        return model.postprocess_detections(raw, [anchors] * B, [(IMAGE, IMAGE)] * B)

    settings = (WEIGHTS, 0.01, 0.45, 400, 200)
    return Workload(
        {
            "ssdcore": lambda: kernels.postprocess_detections(*given, anchors, image_sizes),
            "torchvision": by_torchvision,
            "eager": lambda: postprocess_eager.postprocess_detections(*levels, anchors, image_sizes, *settings),
        },
        reads=head_outputs[0],  # and the candidates' deltas, one in a hundred after training
        difference=same_detections,
    )
