"""One optimiser step: forward, loss, gradients and update, over all processes and accumulated parts."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssdcore.kernels import match_anchors
from ssdcore.models import SSD
from ssdcore.objects import GroundTruth, Target
from ssdcore.train.config import TrainConfig
from ssdcore.train.diagnosis import first_not_finite, gradient_not_finite
from ssdcore.train.distributed import Group
from ssdcore.train.optimizer import set_lr
from ssdcore.train.stream import mixed_seed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEP_SALT = 0x2545F491  # any number; separates the seeds of the steps from those of the images
MIN_SCALE = 2.0**-10  # of the loss; a gradient that overflows fp16 even so is not finite for another reason


class StepResult(NamedTuple):
    """What one step found, the same on every process."""

    classification: float  # the losses of the whole batch, before the update
    bbox_regression: float
    grad_norm: float  # before it was clipped
    stop: bool  # whether any process was asked to stop


class NotFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite. The weights have not been updated."""

    def __init__(self, losses: Sequence[float], tensor: str | None) -> None:
        super().__init__(tensor)
        self.losses = losses
        self.tensor = tensor  # in words; None if it belongs to another process


class Stepper:
    """Trains `model` step by step.

    The losses are those of the whole batch: each process and each part divides its sums by the number of positives, or
    of images, of the whole batch. The gradient is therefore the same however the batch is divided, as long as batch
    normalisation is frozen or synchronised. The processes add up their positives on the GPU, and the host does not wait
    for that.

    Args:
        model: on its device, with everything frozen that is not trained.
        optimizer: of its parameters.
        config: how to train.
        processes: all of them call `step` the same number of times.
    """

    def __init__(self, model: SSD, optimizer: torch.optim.Optimizer, config: TrainConfig, processes: Group) -> None:
        self.model, self.optimizer, self.config, self.processes = model, optimizer, config, processes
        self.device = model.anchors.device
        self.precision = precision_on(self.device, config.precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.net: nn.Module = model
        if processes.size > 1:
            # The gradients lie in the buffers that are sent, which saves a copy of all of them. `static_graph` would
            # gain nothing: no parameter is ever unused, and nothing is computed twice.
            self.net = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.compute = torch.compile(self.net) if config.compile else self.net

    def step(self, number: int, lr: float, images: Tensor, targets: list[Target], stop: bool) -> StepResult:
        """Update the weights once.

        Args:
            number: of the step, which seeds what is random in the model.
            lr: the learning rate.
            images: float [B, 3, S, S] on the CPU, this process's share of the batch.
            targets: one per image. Objects with `ignore` set are not trained on.
            stop: whether this process was asked to stop after this step.

        Raises:
            NotFiniteError: a loss is not finite; or, except in fp16, a gradient. No weight has been changed.
        """
        config, processes = self.config, self.processes
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        targets = [{name: target[name][~target["ignore"]] for name in ("boxes", "labels")} for target in targets]
        per_part = len(images) // config.accumulate
        parts = [slice(i, i + per_part) for i in range(0, len(images), per_part)]
        truths = [self.model.ground_truth(images[part], targets[part]) for part in parts]
        weights = self._weights(truths)

        torch.manual_seed(mixed_seed(config.seed ^ STEP_SALT, number * processes.size + processes.rank))
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()
        losses = torch.zeros(3, device=self.device)  # classification, bbox_regression, stop
        for part, truth, weight in zip(parts, truths, weights, strict=True):
            last = part is parts[-1]
            waits = isinstance(self.net, DistributedDataParallel) and not last
            with self.net.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    found = self.compute(images[part], truth)
                both = torch.stack([found["classification"], found["bbox_regression"]])
                if weight is not None:
                    both = both * weight
                self.scaler.scale(both.sum()).backward()
                losses[:2] += both.detach() / processes.size
        own = losses[:2].clone()
        if stop:
            losses[2] = 1.0
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # In fp32 and bf16, the only wait for the GPU. Everything up to the update is queued by now, and a loss that is
        # not finite must not reach the weights.
        values = torch.cat([processes.sum(losses), norm.detach().float()[None]]).tolist()
        classification, bbox_regression, stopped, grad_norm = values
        finite = math.isfinite(classification) and math.isfinite(bbox_regression)
        overflow = not math.isfinite(grad_norm)
        tolerated = self.precision == "fp16" and self.scaler.get_scale() > MIN_SCALE
        if not finite or (overflow and not tolerated):
            tensor = None
            if finite:
                tensor = gradient_not_finite(self.model)
            else:
                mine = not own.isfinite().all()
                if mine or config.sync_bn:  # synchronised normalisation waits for all processes
                    first = first_not_finite(self.model, images, self.autocast())
                    tensor = first if mine else None
            raise NotFiniteError([classification, bbox_regression], tensor)
        if config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, config.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepResult(classification, bbox_regression, grad_norm, bool(stopped))

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext()

    def _weights(self, truths: Sequence[GroundTruth]) -> Sequence[Tensor | float | None]:
        """Factors that turn the loss of each part into its share of the loss of the whole batch.

        DistributedDataParallel takes the mean of the processes' gradients, so that each factor contains their number.
        """
        processes = self.processes.size
        if processes * len(truths) == 1:
            return [None]
        if self.config.normalizer == "image":
            return [1 / len(truths)] * len(truths)
        anchors = self.model.anchors
        counts = torch.stack([(match_anchors(truth.boxes, truth.offsets, anchors) >= 0).sum() for truth in truths])
        total = self.processes.sum(counts.sum())
        return list((counts.clamp(min=1) * processes / total.clamp(min=1)).unbind())


def precision_on(device: torch.device, precision: str) -> str:
    """What "auto" means on a device."""
    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


@contextmanager
def fast_backends(tf32: bool) -> Iterator[None]:
    """Let cuDNN try which algorithm is fastest, and the GPU compute in TF32 where tensors are fp32, or forbid that."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    cudnn.benchmark = True  # all batches have the same shape
    cudnn.allow_tf32 = tf32  # PyTorch allows it by default
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before[:2]
        torch.set_float32_matmul_precision(before[2])
