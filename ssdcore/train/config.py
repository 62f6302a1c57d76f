"""`TrainConfig`: every value that decides how a model is trained, checked, and stored with the run as JSON."""

import json
import math
import types
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

POSITIVE = (
    "epochs", "steps", "batch_size", "lr", "lr_batch", "accumulate", "limit", "validate_every", "log_steps", "keep",
)  # fmt: skip
NOT_NEGATIVE = (
    "min_steps", "momentum", "weight_decay", "bias_lr", "warmup_steps", "warmup_start", "clip_norm", "seed",
    "checkpoint_seconds",
)  # fmt: skip
# Values that may change when a run is resumed. Its result does not depend on them, except that `accumulate`, like the
# number of processes, decides which images batch normalisation sees together.
NOT_COMPARED = frozenset(
    {"recipe", "min_steps", "lr_batch", "compile", "accumulate", "log_steps", "checkpoint_seconds", "keep"}
)


def _value(default: Any, help_text: str) -> Any:
    """A field with a default and a description, which the command line shows."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class TrainConfig:
    """How to train a model. `RECIPES` has published configurations, and `own_recipe` the one of each model.

    A batch is what one optimiser step sees: the images of all processes and of all accumulated parts together. The same
    configuration therefore gives the same steps with any number of processes.

    Raises:
        TypeError: a value has another type than its field.
        ValueError: a value is out of range or not among those to choose from; or `epochs` and `steps` are both given or
            both missing.
    """

    recipe: str = _value("own", "where the values come from")
    model: str = _value("ssd300_tiny", "name in `MODELS`")
    anchors: Literal["voc", "coco", "nvidia"] | None = _value(
        None, "default boxes that the model must have; by default its own"
    )
    normalizer: Literal["batch", "image"] = _value(
        "batch", "what divides the loss: the positives of the batch, or those of each image"
    )
    augmentation: Literal["ssd", "caffe", "torchvision", "nvidia", "none"] = _value(
        "ssd", "one of `ssdcore.augmentations`"
    )

    epochs: int | None = _value(None, "passes over the images")
    steps: int | None = _value(None, "optimiser steps of the run, instead of epochs")
    min_steps: int = _value(0, "with epochs: a small dataset gets as many more epochs as these steps need")
    batch_size: int = _value(32, "images of one optimiser step, of all processes together")

    optimizer: Literal["sgd", "adamw", "lars", "lamb"] = _value("sgd", "LARS and LAMB need timm")
    lr: float = _value(1e-3, "highest learning rate of the run")
    lr_batch: int | None = _value(None, "batch size that lr is meant for: lr then grows with the batch")
    momentum: float = _value(0.9, "momentum of SGD and LARS")
    weight_decay: float = _value(5e-4, "weight decay")
    decay: Literal["all", "weights", "not-biases"] = _value(
        "weights", "what decays; weights: no biases and no scales of normalisations"
    )
    bias_lr: float = _value(1.0, "factor of the learning rate of biases")
    schedule: Literal["one-cycle", "drops"] = _value("drops", "one-cycle: a rise and a fall along a cosine")
    drops: tuple[float, ...] = _value((), "parts of the run after which the learning rate falls to a tenth")
    warmup_steps: int = _value(0, "steps over which the learning rate rises, at most a tenth of the run; for drops")
    warmup_start: float = _value(0.0, "factor of the learning rate at the first step of the warm-up")
    clip_norm: float = _value(0.0, "highest norm of the gradient of all parameters; 0 does not clip")
    ema: float = _value(0.0, "decay, such as 0.999, of an average of the weights to score and save; 0: none")
    freeze: str | None = _value(None, "how many first layers of the backbone, or names: backbone.features,batchnorm")

    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = _value(
        "auto", "auto: bf16 on a GPU that computes in it, otherwise fp32"
    )
    channels_last: bool = _value(True, "lay tensors out by pixels, which GPUs compute fastest")
    accumulate: int = _value(1, "parts that a process computes one after the other for one step")
    sync_bn: bool = _value(False, "batch normalisation with the statistics of all processes; GPUs only")
    compile: bool = _value(False, "compile the model with torch.compile")

    seed: int = _value(0, "seed of the initial weights, the order of the images and the augmentation")
    limit: int | None = _value(None, "train on this many images, chosen by the seed")
    validate_every: int | None = _value(
        None, "epochs between two scores; by default 1, or more if that gave over 120 scores"
    )
    log_steps: int = _value(20, "steps between two lines of metrics.jsonl")
    checkpoint_seconds: float = _value(60.0, "time between two states from which the run can be resumed")
    keep: int = _value(2, "states that are kept")

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"exactly one of epochs and steps must be given, got {self.epochs} and {self.steps}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in 0..1 and below 1, got {self.ema}")
        if not all(0 < part < 1 for part in self.drops) or list(self.drops) != sorted(self.drops):
            raise ValueError(f"drops must be parts of the run between 0 and 1 in rising order, got {self.drops}")

    def changed(self, **values: Any) -> "TrainConfig":
        """Return a copy with other values. None keeps a value.

        `epochs` replaces `steps` and the other way round, and neither is lengthened by `min_steps` then. An `lr` that
        is given is used as it stands, whatever the batch size.
        """
        values = {name: value for name, value in values.items() if value is not None}
        unknown = values.keys() - {value.name for value in fields(self)}
        if unknown:
            raise TypeError(f"TrainConfig has no {', '.join(sorted(unknown))}")
        if "epochs" in values or "steps" in values:
            values = {"epochs": None, "steps": None, "min_steps": 0} | values
        if "lr" in values:
            values = {"lr_batch": None} | values
        return replace(self, **values)

    @property
    def scaled_lr(self) -> float:
        """The highest learning rate for this batch size."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch

    def total_steps(self, images: int) -> int:
        """The number of optimiser steps for a dataset of this many images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        per_epoch = self.steps_per_epoch(images)
        return max(self.epochs, math.ceil(self.min_steps / per_epoch)) * per_epoch

    def steps_per_epoch(self, images: int) -> int:
        """The number of whole batches. The images that are left over wait for another epoch, in another order."""
        return max(1, images // self.batch_size)

    def to_json(self) -> dict[str, Any]:
        """The values as JSON has them, with lists instead of tuples."""
        as_read_back: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return as_read_back


def load_config(path: str | Path) -> TrainConfig:
    """Read a run's config.json, or a file written by hand. What it lacks has its default.

    Raises:
        ValueError: the file is missing, is not JSON, or has a name or a value that no configuration has.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no configuration at {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a configuration: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: expected names with values, got {str(content)[:80]}")
    unknown = content.keys() - {value.name for value in fields(TrainConfig)}
    if unknown:
        raise ValueError(f"{path} has {', '.join(sorted(unknown))}, which no configuration has")
    try:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def differences(past: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a resumed run would do otherwise than the run before: name -> (past, now)."""
    return {k: (past.get(k), v) for k, v in now.items() if k not in NOT_COMPARED and past.get(k) != v}


def choices_of(hint: Any) -> list[str]:
    """The texts that a field of `TrainConfig` with this type may have, or an empty list if any may be given."""
    return [choice for option in (hint, *get_args(hint)) for choice in get_args(option) if isinstance(choice, str)]


def _check_type(name: str, value: object, hint: Any) -> None:
    if _fits(value, hint):
        return
    choices = choices_of(hint)
    if choices and isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise TypeError(f"{name} must be {expected}, got {value!r}")


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
