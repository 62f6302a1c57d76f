"""Training: from a dataset to `model.safetensors`, with a record of the run and a place to resume it from."""

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ssdcore.data import DetectionDataset
from ssdcore.detect import detect_dataset
from ssdcore.evaluate import evaluate_detections
from ssdcore.model import SSD
from ssdcore.objects import Target
from ssdcore.transforms import collate, train_transform
from ssdcore.weights import description, save_weights, write_atomically

MAX_GRADIENT_NORM = 10.0  # a rare batch has a hundred times the usual gradient; without norms it ends a run
SELECTED_BY = "AP50"  # the metric on the validation split that chooses the weights to keep
SAVE_EVERY_S = 20.0  # at most this much work is lost; on a small set an epoch takes a GPU less than writing its state


def one_cycle(step: int, steps: int) -> float:
    """Rise over the first 30 % of the run, fall to nothing over the rest, along cosines.

    Source: Smith and Topin, "Super-Convergence" (2018), in the shape of torch's OneCycleLR.
    """
    peak = 0.3 * steps
    if step < peak:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * (step - peak) / (steps - peak))) / 2


def two_drops(step: int, steps: int) -> float:
    """The paper's schedule: a tenth from 2/3 of the run, a hundredth from 5/6 (80k and 100k of 120k steps).

    Section 3.1 of it; before that a linear warm-up of 500 steps, or a tenth of the run, as in lufficc's and
    MMDetection's recipes.
    """
    warm_up = min(1.0, (step + 1) / min(500, max(1, steps // 10)))
    return warm_up * 0.1 ** ((3 * step >= 2 * steps) + (6 * step >= 5 * steps))


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the command line may change the first three."""

    epochs: int  # at least; more where a small set would give fewer than `steps`
    batch_size: int
    lr: float  # the highest of the run
    weight_decay: float
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[int, int], float]  # (step, steps) -> factor of lr
    steps: int = 0

    def epochs_for(self, images: int, batch_size: int) -> int:
        return max(self.epochs, math.ceil(self.steps / max(1, images // batch_size)))


RECIPES = {
    "ssd300_tiny": Recipe(40, 16, 2e-3, 1e-2, torch.optim.AdamW, one_cycle),
    # Without normalisation, some thousand steps are spent before anything is found: a few hundred images want them too.
    "ssd300_vgg16": Recipe(
        120, 32, 1e-3, 5e-4, lambda groups: torch.optim.SGD(groups, momentum=0.9), two_drops, steps=5000
    ),
}


def fit(
    model: SSD,
    train_set: DetectionDataset,
    output: str | Path,
    *,
    val_set: DetectionDataset | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train `model` and record the run in the folder `output`.

    - `model.safetensors`: the weights of the epoch with the highest AP50 on `val_set`, the first of equals;
      without `val_set` those of the last epoch.
    - `metrics.json`: what this function returns; `loss.png`; events for TensorBoard.
    - `last.pt`: the state after a whole epoch, to resume from.

    They are written after the first and the last epoch, and after others once `SAVE_EVERY_S` seconds have passed;
    each is replaced whole, so an interruption leaves them valid. A resumed run ends with the weights of an
    uninterrupted one, to the last bit on a CPU with as many threads.

    Objects with `ignore` set are not trained on. On a GPU the convolutions run in bf16.

    Args:
        model: any of `MODELS`; it is moved to `device` and left with the last epoch's weights.
        train_set: its transform is replaced by `train_transform`.
        output: a folder without a run, or with `resume` that of an interrupted run with the same settings.
        val_set: detected in and scored after every epoch.
        epochs, batch_size, lr: by default those of the model's `Recipe`.
        seed: of order and augmentation.
        workers: processes that decode and augment; 0 does it in this one.
        device: to train on.
        resume: continue from `last.pt`.
        quiet: no progress bars.

    Returns:
        A dict that JSON can hold: `settings`, `epochs` (for each the mean losses, the last learning rate,
        seconds, and with `val_set` its metrics) and `best` (the epoch whose weights were kept).

    Raises:
        ValueError: a setting out of range, no images, a run in `output` without `resume`, none with it, or
            one with other settings.
        FloatingPointError: the loss is not finite; names the epoch, the batch and its images.
    """
    output = Path(output)
    recipe = RECIPES[model.name]
    batch_size = min(recipe.batch_size if batch_size is None else batch_size, len(train_set))
    settings: dict[str, Any] = {
        **description(model, train_set.classes, train_set.category_ids),
        "images": len(train_set),
        "val_images": 0 if val_set is None else len(val_set),
        "epochs": recipe.epochs_for(len(train_set), max(1, batch_size)) if epochs is None else epochs,
        "batch_size": batch_size,
        "lr": recipe.lr if lr is None else lr,
        "seed": seed,
    }
    for name in ("images", "epochs", "batch_size", "lr"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")

    model.to(device).to(memory_format=torch.channels_last)
    history: list[dict[str, Any]] = []
    state = _read_state(output / "last.pt", settings) if resume else None
    if state:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in state["trained"])
    optimizer = recipe.optimizer(_parameter_groups(model, recipe.weight_decay))
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    elif (output / "last.pt").exists():
        raise ValueError(f"{output} holds a run already: resume it, or choose another folder")

    train_set.transform = train_transform(model.anchor_config.image_size)
    steps_per_epoch = len(train_set) // settings["batch_size"]
    steps = settings["epochs"] * steps_per_epoch
    step = len(history) * steps_per_epoch
    batches = _batches(train_set, settings, len(history), workers, torch.device(device).type == "cuda")
    torch.backends.cudnn.benchmark = True  # every batch has one shape
    saved = -math.inf
    with SummaryWriter(output, purge_step=len(history) + 1) as events:
        for epoch in range(len(history) + 1, settings["epochs"] + 1):
            started = time.perf_counter()
            model.train()
            total = torch.zeros(2, dtype=torch.float64)  # classification, bbox_regression
            bar = tqdm(
                islice(batches, steps_per_epoch),
                desc=f"epoch {epoch}/{settings['epochs']}",
                total=steps_per_epoch,
                unit="batch",
                disable=quiet,
            )
            for number, (images, targets) in enumerate(bar, start=1):
                lr = settings["lr"] * recipe.schedule(step, steps)
                losses = _train_step(model, optimizer, lr, images, targets)
                if not losses.isfinite().all():
                    raise FloatingPointError(
                        f"the loss is not finite, {losses.tolist()}, in epoch {epoch}, batch {number}, with images "
                        f"{', '.join(_names(train_set, targets))}; the learning rate is {lr:.2g}: lower it, or "
                        "look at these images"
                    )
                total += losses
                step += 1
                bar.set_postfix(loss=f"{total.sum() / number:.3f}", refresh=False)
            classification, bbox_regression = (total / steps_per_epoch).tolist()
            row = {
                "epoch": epoch,
                "classification": classification,
                "bbox_regression": bbox_regression,
                "lr": lr,
                "seconds": round(time.perf_counter() - started, 2),
            }
            if val_set is not None:
                found = detect_dataset(model, val_set, workers=workers, quiet=True)
                row["val"] = evaluate_detections(val_set, found, quiet=True)
                if not quiet:
                    tqdm.write(f"epoch {epoch}: {SELECTED_BY} {row['val'][SELECTED_BY] or 0:.3f} on {val_set.split}")
            history.append(row)
            record = {"settings": settings, "epochs": history, "best": _best_epoch(history)}
            _write_events(events, row)
            due = time.monotonic() - saved >= SAVE_EVERY_S or epoch == settings["epochs"]
            if record["best"] == epoch and (due or val_set is not None):
                save_weights(model, output / "model.safetensors", train_set.classes, train_set.category_ids)
            if due:
                _write_record(output, record)
                # Last: an interruption before this line repeats what came since, and writes the same again.
                _write_state(output / "last.pt", model, optimizer, settings, history)
                saved = time.monotonic()
    return {"settings": settings, "epochs": history, "best": _best_epoch(history)}


def _names(dataset: DetectionDataset, targets: list[Target]) -> list[str]:
    """The files of a batch's images."""
    positions = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    return [dataset.image_path(positions[int(target["image_id"])]).name for target in targets]


def _train_step(
    model: SSD, optimizer: torch.optim.Optimizer, lr: float, images: Tensor, targets: list[Target]
) -> Tensor:
    """One step; the losses before it, [2] on the CPU. Losses that are not finite leave the model as it was."""
    device = model.anchors.device
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    kept = [{name: target[name][~target["ignore"]] for name in ("boxes", "labels")} for target in targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = model(images, kept)
    both = torch.stack([losses["classification"], losses["bbox_regression"]])
    values = both.detach().cpu()
    if values.isfinite().all():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        both.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
    return values


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Convolutions decay; biases and the scales of normalisations do not, for nothing else sets their size."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


class _Stream(Dataset[tuple[Any, Target]]):
    """The images of all epochs, one after the other: item n is number n % N of epoch n // N.

    Order and augmentation hang on the seed and n alone: so a resumed run continues exactly, the number of
    workers changes nothing, and the workers fetch the next epoch while this one is scored.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, n: int) -> tuple[Any, Target]:
        epoch, position = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + epoch & 0xFFFFFFFF)
            self.order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self.epoch = epoch
        torch.default_generator.manual_seed(self.seed * 0x9E3779B1 + n & 0xFFFFFFFF)
        return self.dataset[self.order[position]]


def _batches(
    dataset: DetectionDataset, settings: Mapping[str, Any], epochs_done: int, workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, list[Target]]]:
    """The batches of all epochs to come; what does not fill a batch of its epoch is left out of it."""
    return iter(
        DataLoader(
            _Stream(dataset, settings["seed"]),
            batch_sampler=_Batches(len(dataset), settings["batch_size"], range(epochs_done, settings["epochs"])),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
        )
    )


class _Batches(Sampler[list[int]]):
    """The numbers of a stream's images in whole batches, epoch by epoch."""

    def __init__(self, images: int, size: int, epochs: range) -> None:
        self.images, self.size, self.epochs = images, size, epochs

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in self.epochs:
            for k in range(0, self.images - self.size + 1, self.size):
                first = epoch * self.images + k
                yield list(range(first, first + self.size))

    def __len__(self) -> int:
        return len(self.epochs) * (self.images // self.size)


def _best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch with the highest AP50, counted from 1; without a validation split the last."""
    if "val" not in history[-1]:
        return len(history)
    scores = [row["val"]["AP50"] or 0.0 for row in history]  # None where the split has no objects
    return 1 + scores.index(max(scores))


def _write_state(
    path: Path,
    model: SSD,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    buffer = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "settings": settings,
        "history": history,
    }
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def _read_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a torn file the unpickler says anything
        raise ValueError(f"{path} is not the state of a run: {error}") from error
    changed = {
        name: (state["settings"][name], value) for name, value in settings.items() if state["settings"][name] != value
    }
    if changed:
        differences = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"{path} is of a run with other settings: {differences}")
    return state


def _write_events(events: SummaryWriter, row: dict[str, Any]) -> None:
    for name in ("classification", "bbox_regression", "lr"):
        events.add_scalar(f"train/{name}", row[name], row["epoch"])
    for name, value in row.get("val", {}).items():
        if isinstance(value, float):
            events.add_scalar(f"val/{name}", value, row["epoch"])


def _write_record(output: Path, record: dict[str, Any]) -> None:
    write_atomically(output / "metrics.json", json.dumps(record, indent=2).encode())
    history = record["epochs"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    numbers = [row["epoch"] for row in history]
    for name in ("classification", "bbox_regression"):
        axes.plot(numbers, [row[name] for row in history], label=name)
    if "val" in history[-1]:
        right = axes.twinx()
        right.set(ylabel="AP50 on the validation split", ylim=(0, 1))
        right.plot(numbers, [row["val"]["AP50"] for row in history], "k--", label="AP50")
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120)
