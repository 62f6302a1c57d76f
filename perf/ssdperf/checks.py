"""The problems of perf/check.py: every op against eager, at full size on a GPU and small in Triton's interpreter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ssdcore import kernels
from ssdperf import eager, inputs
from ssdperf.cases.postprocess import SETTINGS
from ssdperf.differences import NEAR_TIE, ROUNDING, same_detections, tensors, within
from ssdperf.registry import REGISTRY, Shape, Workload, grid
from ssdperf.results import shape_text
from ssdperf.ssd300 import BOX_WEIGHTS, IMAGE_SIZE, NUM_ANCHORS, NUM_CLASSES

FLOATS = ("float32", "bfloat16")
BATCHES = (1, 8, 32, 128)
CLASSES = NUM_CLASSES - 1  # classes of NMS, without the background
SMALL_MAPS = 40  # anchors of SSD300's last two levels
CPU_LIMIT_S = 300.0  # for a subject in the interpreter, whose speed depends on what else the machine does


class CheckProblem(NamedTuple):
    case: str
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.case} {shape_text(self.shape)}"


class Subject(NamedTuple):
    """Problems that are solved in one process, which is killed when its time is up."""

    name: str
    limit_s: float  # on a GPU: several times what the problems are expected to take, compiling the kernels included
    full: Sequence[CheckProblem]
    small: Sequence[CheckProblem]  # a program takes the interpreter milliseconds

    def problems(self, device: str) -> Sequence[CheckProblem]:
        return self.small if device == "cpu" else self.full

    def limit_on(self, device: str) -> float:
        return CPU_LIMIT_S if device == "cpu" else self.limit_s


def solve(name: str, device: str) -> str:
    """Solve the problem `name` with ssdcore and with eager; return what is wrong with ssdcore's result, or ""."""
    problem = next(problem for subject in SUBJECTS for problem in subject.problems(device) if problem.name == name)
    torch.manual_seed(0)
    sizes = dict(problem.shape)
    dtype = getattr(torch, sizes.pop("dtype"))
    build = BUILDERS.get(problem.case) or REGISTRY[problem.case].build
    workload = build(device, dtype, **sizes)
    difference = STRICTER.get(problem.case, workload.difference)
    # The interpreter runs one program after the other, so that a second run cannot differ.
    return compare(workload.providers, difference, twice=device == "cuda")


def compare(providers: Mapping[str, Callable[[], Any]], difference: Callable[[Any, Any], str], *, twice: bool) -> str:
    """Return what is wrong with ssdcore's result, or "".

    With `twice`, a second run must give the same bits: programs that do not wait for one another as they should give
    other results from run to run.
    """
    expected = providers["eager"]()
    found = providers["ssdcore"]()
    if note := difference(found, expected):
        return note
    if twice:
        again = providers["ssdcore"]()
        if not all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(again), strict=True)):
            return "a second run of ssdcore gives another result"
    return ""


def same_losses(found: Any, expected: Any) -> str:
    """Compare two losses to a rounding, and the gradients up to which of nearly equal anchors are mined."""
    return within(10 * ROUNDING)(found[:2], expected[:2]) or within(NEAR_TIE)(found[2:], expected[2:])


# Where a case tolerates what torchvision does otherwise, eager and the kernels must agree.
STRICTER: dict[str, Callable[[Any, Any], str]] = {
    "match_anchors": within(0),
    "multibox_loss": same_losses,
    "criterion": same_losses,
}


# --- problems that no case has ----------------------------------------------------------------------------


def decode_gradient(device: str, dtype: torch.dtype, B: int, A: int) -> Workload:
    """The gradient of `decode_boxes`."""
    deltas, anchors = torch.randn(B, A, 4).to(device, dtype).requires_grad_(), inputs.anchors(A, device)
    cotangent = torch.randn(B, A, 4, device=device)

    def by_eager() -> torch.Tensor:
        with torch.no_grad():
            return eager.decode_boxes_backward(cotangent, deltas, anchors, BOX_WEIGHTS)

    return Workload(
        {
            "ssdcore": lambda: torch.autograd.grad(kernels.decode_boxes(deltas, anchors), deltas, cotangent)[0],
            "eager": by_eager,
        },
        # The gradient has the dtype of the deltas: bf16 has 8 bits of mantissa, and the interpreter truncates to them.
        difference=within(ROUNDING if dtype == torch.float32 else 2**-7),
    )


def crowded_postprocess(device: str, dtype: torch.dtype, B: int, A: int, C: int) -> Workload:
    """All anchors in one place, so that NMS leaves one box per class, and the kernel must look below its cutoff."""
    anchors = inputs.anchors(1, device).repeat(A, 1)
    logits, deltas = inputs.head_outputs(B, A, C, "random", dtype, device)
    deltas = torch.zeros_like(deltas)
    image_sizes = torch.full((B, 2), IMAGE_SIZE, device=device)
    levels = [inputs.as_levels([x]) for x in (logits, deltas)]
    return Workload(
        {
            "ssdcore": lambda: kernels.postprocess_detections(logits, deltas, anchors, image_sizes),
            "eager": lambda: eager.postprocess_detections(*levels, anchors, image_sizes, BOX_WEIGHTS, *SETTINGS),
        },
        difference=same_detections,
    )


BUILDERS: dict[str, Callable[..., Workload]] = {
    "decode_boxes gradient": decode_gradient,
    "postprocess crowded": crowded_postprocess,
}


# --- the subjects, the kernels that may hang first --------------------------------------------------------


def problems(case: str, *shapes: Shape, dtypes: Sequence[str] = ("float32",)) -> list[CheckProblem]:
    return [CheckProblem(case, shape | {"dtype": dtype}) for shape in shapes for dtype in dtypes]


def ssd(**sizes: Any) -> Shape:
    return {"B": 8, "A": NUM_ANCHORS, "C": NUM_CLASSES, **sizes}


def heads(**sizes: Any) -> list[Shape]:
    return [ssd(**sizes, head=head) for head in inputs.HEADS]


NMS = Subject(
    "nms",
    100,
    # In each subject the small problems come first, because a kernel that hangs on them is simpler to look at.
    problems("nms", *grid(N=(100, 1000, NUM_ANCHORS, 30_000, 100_000), boxes=inputs.LAYOUTS)),
    problems("nms", *grid(N=(150,), boxes=inputs.LAYOUTS)),  # two blocks, so that one waits for the other
)
BATCHED_NMS = Subject(
    "batched_nms",
    80,
    problems(
        "batched_nms",
        *grid(N=(1000, NUM_ANCHORS), K=(1, CLASSES), boxes=inputs.LAYOUTS),
        *grid(N=(100_000,), K=(CLASSES, 1200), boxes=inputs.LAYOUTS),
    ),
    problems("batched_nms", *grid(N=(150,), K=(3,), boxes=("uniform",))),
)
BATCHED_NMS_PADDED = Subject(
    "batched_nms_padded",
    80,
    problems(
        "batched_nms_padded",
        *grid(B=BATCHES, N=(1000,), K=(CLASSES,), boxes=inputs.LAYOUTS),
        *grid(B=(8,), N=(4000, NUM_ANCHORS), K=(1, CLASSES), boxes=inputs.LAYOUTS),
    ),
    problems("batched_nms_padded", *grid(B=(2,), N=(150,), K=(2,), boxes=("chain",))),
)
POSTPROCESS = Subject(
    "postprocess",
    100,
    [
        *problems("postprocess", *heads(outputs="trained"), *heads(outputs="random"), dtypes=FLOATS),
        *problems("postprocess crowded", ssd(), dtypes=FLOATS),
        *problems(
            "postprocess",
            *(ssd(B=B, head="packed", outputs=outputs) for B in (1, 32, 128) for outputs in ("trained", "random")),
            ssd(C=21, head="packed", outputs="trained"),
            dtypes=("bfloat16",),
        ),
    ],
    [
        *problems(
            "postprocess",
            {"B": 1, "A": SMALL_MAPS, "C": 4, "head": "planes", "outputs": "trained"},
            {"B": 1, "A": SMALL_MAPS, "C": 4, "head": "channels_last", "outputs": "random"},
        ),
        *problems("postprocess crowded", {"B": 1, "A": 300, "C": 3}, dtypes=("bfloat16",)),
    ],
)
LOSS = Subject(
    "matching and loss",
    80,
    [
        *problems(
            "match_anchors",
            *grid(B=BATCHES, A=(NUM_ANCHORS,), G=(7,)),
            {"B": 32, "A": NUM_ANCHORS, "G": 100},
            {"B": 8, "A": 24_564, "G": 7},  # SSD512
        ),
        *problems("multibox_loss", *heads(G=7), dtypes=FLOATS),
        *problems(
            "multibox_loss",
            *(ssd(B=B, G=7, head="packed") for B in (1, 32, 128)),
            ssd(C=21, G=7, head="packed"),
            dtypes=("bfloat16",),
        ),
        *problems("criterion", ssd(B=32, G=7, head="channels_last"), dtypes=("bfloat16",)),
    ],
    [
        *problems("match_anchors", {"B": 2, "A": 300, "G": 3}),
        *problems("multibox_loss", {"B": 2, "A": SMALL_MAPS, "C": 4, "G": 3, "head": "planes"}, dtypes=("bfloat16",)),
        *problems("criterion", {"B": 1, "A": 300, "C": 4, "G": 3, "head": "packed"}),
    ],
)
BOXES = Subject(
    "boxes",
    60,
    [
        *problems("box_iou", *grid(N=(100, 4000), M=(NUM_ANCHORS,)), dtypes=FLOATS),
        *(
            problem
            for case in ("encode_boxes", "decode_boxes", "decode_boxes gradient")
            for problem in problems(case, *grid(B=BATCHES, A=(NUM_ANCHORS,)), dtypes=FLOATS)
        ),
    ],
    [
        *problems("box_iou", {"N": 20, "M": 300}, dtypes=("bfloat16",)),
        *(
            problem
            for case in ("encode_boxes", "decode_boxes", "decode_boxes gradient")
            for problem in problems(case, {"B": 2, "A": 300}, dtypes=("bfloat16",))
        ),
    ],
)
SUBJECTS = (NMS, BATCHED_NMS, BATCHED_NMS_PADDED, POSTPROCESS, LOSS, BOXES)
