"""The ops as PyTorch knows them: `torch.ops.ssdcore.*`, their CPU and CUDA kernels, fakes and gradients.

CUDA tensors run Triton, CPU tensors plain PyTorch. With TRITON_INTERPRET=1 in the environment, CPU tensors run the
Triton kernels in Triton's interpreter instead, so that the kernels are tested where there is no GPU; fp64, which
the kernels do not take, stays eager. Arguments have been checked by `functional`, the public face.
"""

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import Library, infer_schema, register_autograd, register_fake

from ssdcore.kernels import eager

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIBRARY = Library("ssdcore", "DEF")  # not `custom_op`, whose every call takes 10 µs more


def _define(name: str, module: str) -> OpOverload:
    """`ssdcore::<name>`: `eager.<name>` on the CPU, `<module>.<name>_triton` on CUDA, one schema for both."""
    eager_kernel = getattr(eager, name)

    def triton_kernel(*args: Any) -> Any:
        # Imported on first use, so that the package imports where there is no Triton.
        return getattr(importlib.import_module(f"ssdcore.kernels.{module}"), f"{name}_triton")(*args)

    def on_cuda(*args: Any) -> Any:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(_tensors(args)[0].device):
            return triton_kernel(*args)

    def on_cpu(*args: Any) -> Any:
        if INTERPRETED and not any(x.dtype == torch.float64 for x in _tensors(args)):
            return triton_kernel(*args)
        return eager_kernel(*args)

    LIBRARY.define(name + infer_schema(eager_kernel, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, on_cuda, "CUDA")
    LIBRARY.impl(name, on_cpu, "CPU")
    overload: OpOverload = getattr(torch.ops.ssdcore, name).default
    return overload


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among `args`, those in lists too."""
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [x for x in flat if isinstance(x, Tensor)]


def _computed(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- boxes ------------------------------------------------------------------------------------------------

box_iou = _define("box_iou", "triton_iou")
encode_boxes = _define("encode_boxes", "triton_codec")
decode_boxes = _define("decode_boxes", "triton_codec")
decode_boxes_backward = _define("decode_boxes_backward", "triton_codec")


@register_fake("ssdcore::box_iou", lib=LIBRARY)
def _(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0], dtype=_computed(boxes1))


@register_fake("ssdcore::encode_boxes", lib=LIBRARY)
@register_fake("ssdcore::decode_boxes", lib=LIBRARY)
def _(boxes: Tensor, *_: Any) -> Tensor:
    return boxes.new_empty(boxes.shape, dtype=_computed(boxes))


@register_fake("ssdcore::decode_boxes_backward", lib=LIBRARY)
def _(grad: Tensor, deltas: Tensor, *_: Any) -> Tensor:
    return deltas.new_empty(deltas.shape)


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    deltas, anchors, ctx.weights = inputs
    ctx.save_for_backward(deltas, anchors)


def _differentiate_decode(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return decode_boxes_backward(grad, *ctx.saved_tensors, ctx.weights), None, None


register_autograd("ssdcore::decode_boxes", _differentiate_decode, setup_context=_save_decode, lib=LIBRARY)


# --- matching and loss ------------------------------------------------------------------------------------

match_anchors = _define("match_anchors", "triton_match")
multibox_loss = _define("multibox_loss", "triton_multibox")
multibox_loss_backward = _define("multibox_loss_backward", "triton_multibox")


@register_fake("ssdcore::match_anchors", lib=LIBRARY)
def _(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    return anchors.new_empty(gt_offsets.shape[0] - 1, anchors.shape[0], dtype=torch.int64)


@register_fake("ssdcore::multibox_loss", lib=LIBRARY)
def _(
    cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor], matched_idxs: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, dtype = cls_logits[0], _computed(cls_logits[0])
    return (
        like.new_empty((), dtype=dtype),
        like.new_empty((), dtype=dtype),
        like.new_empty(matched_idxs.shape, dtype=dtype),
        like.new_empty(matched_idxs.shape, dtype=torch.bool),
        like.new_empty(matched_idxs.shape[0], dtype=dtype),
    )


@register_fake("ssdcore::multibox_loss_backward", lib=LIBRARY)
def _(
    grad_cls: Tensor, grad_bbox: Tensor, cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return eager.empty_gradients(cls_logits, box_deltas)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cls_logits, box_deltas, *truth, ctx.weights, _ratio, ctx.beta, _min_negatives, _normalizer = inputs
    _classification, _bbox_regression, *saved = output
    ctx.levels = len(cls_logits)
    ctx.set_materialize_grads(False)  # of what only the backward needs there are none: no zeros in their place
    ctx.save_for_backward(*cls_logits, *box_deltas, *truth, *saved)


def _differentiate_loss(ctx: Any, grad_cls: Tensor | None, grad_bbox: Tensor | None, *_: None) -> tuple[Any, ...]:
    levels, (*tensors,) = ctx.levels, ctx.saved_tensors
    logits, deltas, rest = tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]
    # One of the losses may not have been used.
    grad_cls, grad_bbox = (rest[-1].new_zeros(()) if grad is None else grad for grad in (grad_cls, grad_bbox))
    grads = multibox_loss_backward(grad_cls, grad_bbox, logits, deltas, *rest, ctx.weights, ctx.beta)
    return grads[:levels], grads[levels:], *(None,) * 10  # the ground truth, the anchors and the settings have none


register_autograd("ssdcore::multibox_loss", _differentiate_loss, setup_context=_save_loss, lib=LIBRARY)


# --- NMS and postprocess ----------------------------------------------------------------------------------

nms = _define("nms", "triton_nms")
batched_nms_padded = _define("batched_nms_padded", "triton_nms")
postprocess_detections = _define("postprocess_detections", "triton_postprocess")


@register_fake("ssdcore::nms", lib=LIBRARY)
def _(boxes: Tensor, *_: Any) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@register_fake("ssdcore::batched_nms_padded", lib=LIBRARY)
def _(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou: float, max_output: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return (
        boxes.new_empty(boxes.shape[0], max_output, dtype=torch.int64),
        boxes.new_empty(boxes.shape[0], dtype=torch.int32),
    )


@register_fake("ssdcore::postprocess_detections", lib=LIBRARY)
def _(cls_logits: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like, batch, max_detections = cls_logits[0], cls_logits[0].shape[0], args[-1]
    return (
        like.new_empty(batch, max_detections, 4, dtype=torch.float32),
        like.new_empty(batch, max_detections, dtype=torch.float32),
        like.new_empty(batch, max_detections, dtype=torch.int64),
        like.new_empty(batch, dtype=torch.int32),
    )
