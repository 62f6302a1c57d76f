"""Give torchvision's `nms`, `batched_nms` and `box_iou` the ops of `ssdcore.kernels`: `torchvision_ops()`.

The three function objects stay, and only their `__code__` is exchanged. Replacing names in `torchvision.ops` would miss
every function that is already stored somewhere: an RPN keeps `box_iou` as an attribute, `torchvision.transforms.v2` and
users write `from torchvision.ops import ...`. It would also make such a model impossible to pickle. torch.compile
looks at the code of the functions that it has compiled, so that it compiles again after a switch.
"""

import importlib.util
import math
from types import FunctionType, TracebackType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torchvision.ops import boxes as torchvision_boxes

from ssdcore import kernels

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_FLOATS: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
if importlib.util.find_spec("triton") is not None:
    _FLOATS["cuda"] = (torch.float32, torch.float16, torch.bfloat16)


class torchvision_ops:  # named and used as `torch.set_grad_enabled` is
    """Put our `nms`, `batched_nms` and `box_iou` in the place of torchvision's, or take them out again.

    The call takes effect at once. As a context manager it restores the state before the call, also after an exception:

        with ssdcore.torchvision_ops():
            detections = model(images)  # with our ops
        ssdcore.torchvision_ops()  # from here on, in the whole process
        ssdcore.torchvision_ops(False)  # torchvision's ops again

    Contexts can be nested. All threads see the switch. So do all models, whether they were built before or after it,
    and all code that calls `torchvision.ops`: Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD, and your own.
    Models, their weights and pickled files do not change.

    torchvision's own code still runs where our ops do not apply: for other devices than CPUs and CUDA GPUs; for
    quantized tensors and subclasses of `Tensor`; for a `box_iou` that is differentiated or transformed by torch.func,
    or that has batch dimensions, integers, mixed dtypes or a format other than "xyxy"; and for invalid arguments, so
    that errors are torchvision's. It also runs in everything that is scripted, traced or exported, which then works
    without ssdcore.

    Where results can differ from torchvision's:

    - `batched_nms` of up to 1000 boxes on a CPU (25,000 on a GPU). torchvision separates the classes by an offset. The
      sum is rounded, by up to 1/256 pixel for class 90 in an image of 1333 pixels, so that an overlap near the
      threshold may be decided otherwise. Boxes with negative coordinates may suppress boxes of another class. One NaN
      or +inf among the coordinates makes torchvision keep every box. ssdcore compares the boxes as they are, and no two
      classes. A box with a NaN or an infinity concerns no other box.
    - `batched_nms` of more boxes. torchvision goes through the classes one by one and decides as ssdcore does, but
      leaves the order of equal scores open. ssdcore orders them by index.
    - The IoU threshold. On CUDA, torchvision rounds it to float32.
    - 16-bit boxes. ssdcore computes in float32. In `box_iou`, torchvision subtracts in 16 bits. Its `nms` takes no
      bf16, and no fp16 on a CPU, except under autocast.

    Args:
        enabled: True for our ops, False for torchvision's.

    Raises:
        TypeError: `enabled` is not a bool.
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be a bool, got {type(enabled).__name__}")
        self._enabled, self._before = enabled, _are_ours()
        _switch(enabled)

    def __enter__(self) -> None:
        _switch(self._enabled)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _switch(self._before)


def _leaves_process() -> bool:
    """Whether a call is being recorded for use elsewhere, by tracing or export, where no op of ours may be known."""
    # The flag behind `is_exporting()`, because torch.compile takes the call for true in PyTorch 2.11.
    return torch.jit.is_tracing() or torch.compiler._is_exporting_flag


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    if _nms_takes(boxes, scores, iou_threshold):
        return kernels.nms(boxes, scores, iou_threshold)
    return _TORCHVISION["nms"](boxes, scores, iou_threshold)


def _batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    if (
        _nms_takes(boxes, scores, iou_threshold)
        and type(idxs) is Tensor
        and (idxs.shape, idxs.device) == (scores.shape, boxes.device)
        and idxs.dtype in _INTEGERS
    ):
        return kernels.batched_nms(boxes, scores, idxs, iou_threshold)
    return _TORCHVISION["batched_nms"](boxes, scores, idxs, iou_threshold)


def _box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str) -> Tensor:
    if (
        not _leaves_process()
        and fmt == "xyxy"
        and _are_boxes(boxes1)
        and _are_boxes(boxes2)
        and (boxes1.dtype, boxes1.device) == (boxes2.dtype, boxes2.device)
        and not _is_differentiated(boxes1, boxes2)
    ):
        return kernels.box_iou(boxes1, boxes2)
    return _TORCHVISION["box_iou"](boxes1, boxes2, fmt)


def _nms_takes(boxes: Tensor, scores: Tensor, iou_threshold: float) -> bool:
    return (
        not _leaves_process()
        and _are_boxes(boxes)
        and type(scores) is Tensor
        and (scores.shape, scores.device) == (boxes.shape[:1], boxes.device)
        and scores.dtype in _FLOATS[boxes.device.type]
        and 0 <= iou_threshold < math.inf
    )


def _are_boxes(boxes: Tensor) -> bool:
    """Whether our ops take these boxes. A subclass may mean something else by the same methods."""
    return (
        type(boxes) is Tensor
        and boxes.dim() == 2
        and boxes.shape[1] == 4
        and boxes.dtype in _FLOATS.get(boxes.device.type, ())
    )


def _is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative may be wanted. Our `box_iou` has none, and torch.func would take it as zero."""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


# --- the exchange -----------------------------------------------------------------------------------------


# The code of these functions runs as torchvision's, with torchvision's globals and defaults. So the parameters have
# torchvision's names, and what they need is imported.


def _nms_code(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    from ssdcore.torchvision_functions import _nms

    return _nms(boxes, scores, iou_threshold)


def _batched_nms_code(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    from ssdcore.torchvision_functions import _batched_nms

    return _batched_nms(boxes, scores, idxs, iou_threshold)


def _box_iou_code(boxes1: Tensor, boxes2: Tensor, fmt: str) -> Tensor:
    from ssdcore.torchvision_functions import _box_iou

    return _box_iou(boxes1, boxes2, fmt)


def _copied(function: FunctionType) -> FunctionType:
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__  # the types of TorchScript
    return copy


_OURS = {"nms": _nms_code, "batched_nms": _batched_nms_code, "box_iou": _box_iou_code}
_TORCHVISION = {name: _copied(getattr(torchvision_boxes, name)) for name in _OURS}


def _are_ours() -> bool:
    return torchvision_boxes.nms.__code__ is _nms_code.__code__


def _switch(enabled: bool) -> None:
    for name, original in _TORCHVISION.items():
        function = getattr(torchvision_boxes, name)
        function.__code__ = _OURS[name].__code__ if enabled else original.__code__
        if enabled:  # torch.jit.script compiles what this hook returns
            function.__prepare_scriptable__ = lambda original=original: original
        else:
            vars(function).pop("__prepare_scriptable__", None)
