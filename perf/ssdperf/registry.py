"""What a case of the benchmark is, the registry of all cases, and helpers to list the shapes of a case.

Sizes have the letters of the ops' contracts: B images, A anchors, C classes with the background, G objects per image
on average, N boxes (M of the second kind), K classes of NMS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import Tensor

from ssdperf import inputs
from ssdperf.differences import rounded
from ssdperf.ssd300 import NUM_ANCHORS, NUM_CLASSES

CPU_LIMITS = {"B": 8, "N": 30_000}  # the largest sizes that a CPU is given, so that a run takes minutes
Shape = dict[str, Any]  # the sizes of a problem, and "dtype"


@dataclass(frozen=True)
class Workload:
    """One problem with its inputs, and the calls that solve it."""

    providers: Mapping[str, Callable[[], Any]]
    reads: Sequence[Tensor] = ()  # what every provider must read once; what it must write is the result
    reference: str = "eager"  # the provider whose result is right
    difference: Callable[[Any, Any], str] = rounded  # (result, right result) -> what is wrong, or ""
    phased: bool = False  # whether the providers are generators that yield the names of their phases
    ahead: int = 0  # steps that the data of a provider with phases is fetched ahead
    close: Callable[[], object] = lambda: None  # releases what a provider with phases holds while it runs


@dataclass(frozen=True)
class Case:
    """A kind of problem. The first of `shapes` is the headline: it is measured first and shown in tables."""

    name: str
    build: Callable[..., Workload]  # (device, dtype, **sizes)
    shapes: Sequence[Shape]
    quick: Sequence[Shape]  # one to three, for --quick
    sweep: Mapping[str, Sequence[int]] = field(default_factory=dict)  # values of one size at a time, for sweep.py
    compiles: bool = False  # whether torch.compile of eager, in one graph or several, is a provider at the headline

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


# --- lists of shapes --------------------------------------------------------------------------------------


def grid(**sizes: Sequence[Any]) -> list[Shape]:
    """Return every combination of the sizes."""
    return [dict(zip(sizes, values, strict=True)) for values in product(*sizes.values())]


def star(base: Shape, **sizes: Sequence[Any]) -> list[Shape]:
    """Return `base`, and `base` with one size at a time changed to each of the given values."""
    return unique([base, *({**base, name: value} for name, values in sizes.items() for value in values)])


def unique(shapes: Iterable[Shape]) -> list[Shape]:
    """Return the shapes without repetitions, in the order of their first occurrence."""
    return [dict(items) for items in dict.fromkeys(tuple(shape.items()) for shape in shapes)]


def without(*names: str, shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes without the sizes `names`."""
    return unique({name: value for name, value in shape.items() if name not in names} for shape in shapes)


def on_cpu(shape: Shape) -> Shape:
    """Return the shape that a CPU is given in place of `shape`: sizes up to `CPU_LIMITS`, in fp32."""
    small = {name: min(shape[name], limit) for name, limit in CPU_LIMITS.items() if name in shape}
    return {**shape, **small, "dtype": "float32"}


def ssd(**changes: Any) -> Shape:
    """Return the shape of SSD300 on COCO."""
    base = {"B": 32, "A": NUM_ANCHORS, "C": NUM_CLASSES, "G": 7, "head": "packed", "dtype": "bfloat16"}
    return base | changes


BATCHES = (1, 8, 32, 128)
# 24,564 anchors are SSD512's; 21 and 91 classes are Pascal VOC's and torchvision's COCO's.
SSD_STAR = star(ssd(), B=BATCHES, A=(24_564,), C=(21, 91), head=inputs.HEADS, dtype=("float32",))
SSD_QUICK = [ssd(B=4)]
SSD_SWEEP = {"B": (1, 2, 4, 8, 16, 32, 64), "A": (500, 2000, 8732, 24_564, 65_536), "C": (5, 21, 81, 320)}
BOX_SWEEP = {"N": (100, 300, 1000, 3000, 10_000, 30_000, 100_000)}
