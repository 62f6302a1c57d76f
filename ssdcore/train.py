"""Train a model: from a dataset to `model.safetensors`, a record of the run, and a state from which to resume it."""

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ssdcore.models import SSD
from ssdcore.objects import Target
from ssdcore.transforms import collate, train_transform
from ssdcore.weights import description, save_weights, write_atomically

# Norm of the gradient of all parameters. Rarely, the gradient of a batch has a hundred times the usual norm. Without
# normalisation layers, a step of that size ends a run.
MAX_GRADIENT_NORM = 10.0
BEST_EPOCH_METRIC = "AP50"  # the epoch with the highest value on the validation split provides the weights of the run
SEED_MULTIPLIER = 0x9E3779B1  # a prime near 2**32 / golden ratio, from Knuth's multiplicative hashing
STATE_FIELDS = {"model", "optimizer", "trained", "settings", "history"}  # of last.pt, see `_write_state`
# Seconds that pass at least between two saves after whole epochs. On a small dataset, a GPU needs less time for an
# epoch than saving takes.
SAVE_EVERY_S = 20.0


def one_cycle(step: int, steps: int) -> float:
    """Factor of the learning rate that rises over the first 30 % of the run and then falls to almost 0.

    Both parts follow a cosine. The rise starts at 0.04 (1 / 25, OneCycleLR's default).

    Source: Smith and Topin, "Super-Convergence" (2018), with the shape of torch's OneCycleLR.
    """
    peak = 0.3 * steps
    if step < peak:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * step / peak)) / 2
    return (1 + math.cos(math.pi * (step - peak) / (steps - peak))) / 2


def two_drops(step: int, steps: int) -> float:
    """Factor of the learning rate of the SSD paper: 1, then 0.1 from 2/3 of the run, then 0.01 from 5/6.

    These are steps 80,000 and 100,000 of 120,000. At the start, the factor rises linearly over 500 steps, or over a
    tenth of the run if that is less, as in the recipes of lufficc and MMDetection.

    Source: Liu et al., SSD, section 3.1.
    """
    warm_up = min(1.0, (step + 1) / min(500, max(1, steps // 10)))
    return warm_up * 0.1 ** ((3 * step >= 2 * steps) + (6 * step >= 5 * steps))


@dataclass(frozen=True)
class Recipe:
    """How to train one model. The command line can override `epochs`, `batch_size` and `lr`."""

    epochs: int  # at least; a small dataset gets as many as give `steps` steps
    batch_size: int
    lr: float  # the highest learning rate of the run
    weight_decay: float
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[int, int], float]  # (step, steps) -> factor of lr
    steps: int = 0  # optimiser steps of the whole run, at least

    def epochs_for(self, images: int, batch_size: int) -> int:
        """The number of epochs for a dataset of this many images."""
        return max(self.epochs, math.ceil(self.steps / max(1, images // batch_size)))


def _sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9)


TINY = Recipe(40, 16, 2e-3, 1e-2, torch.optim.AdamW, one_cycle)
# Without normalisation layers, the model needs some thousand steps before it detects anything. Therefore a dataset
# of a few hundred images needs as many steps as a large one.
VGG = Recipe(120, 32, 1e-3, 5e-4, _sgd, two_drops, steps=5000)
# NVIDIA's SSD300 v1.1: 65 epochs, drops after 43 and 54.
RESNET = Recipe(65, 32, 2.6e-3, 5e-4, _sgd, two_drops, steps=5000)
RECIPES = {
    "ssd300_tiny": TINY,
    "ssd300_vgg16": VGG,
    "ssd512_vgg16": VGG,
    **{f"ssd300_resnet{depth}": RESNET for depth in (18, 34, 50, 101, 152)},
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

    The folder contains:

    - `model.safetensors`: the weights of the epoch with the highest AP50 on `val_set`, the first of several equal
      ones. Without `val_set`, the weights of the last epoch.
    - `metrics.json`: the value that this function returns.
    - `loss.png`: a plot of the losses, and events for TensorBoard.
    - `last.pt`: the state after an epoch, from which to resume.

    The files are written after the first and the last epoch, and after any other epoch that ends at least
    `SAVE_EVERY_S` seconds after the previous save. With `val_set`, the weights of a new best epoch are written
    immediately. Each file is replaced as a whole, so that an interruption leaves valid files. A resumed run ends with
    the weights of an uninterrupted run, bit-identical on a CPU with the same number of threads.

    Objects with `ignore` set are not trained on. On a GPU the convolutions run in bf16.

    Args:
        model: any of `MODELS`. It is moved to `device`, and has the weights of the last epoch afterwards.
        train_set: the images to train on. Its transform is replaced by `train_transform`.
        output: a folder without a run; or, with `resume`, the folder of an interrupted run with the same settings.
        val_set: scored after every epoch, if given.
        epochs, batch_size, lr: by default those of the model's `Recipe`.
        seed: seed of the order of the images and of the augmentation.
        workers: processes that decode and augment images; 0 does it in this process.
        device: where to train.
        resume: continue from `last.pt`.
        quiet: show neither progress bars nor the score of each epoch.

    Returns:
        A dict that can be written as JSON: `settings`; `epochs`, with the mean losses, the last learning rate, the
        seconds and, with `val_set`, the metrics of every epoch; `best`, the number of the epoch whose weights are
        in `model.safetensors`, counted from 1; and `unreadable`, the image files that could not be read and were
        replaced by others, because the datasets are not `strict`.

    Raises:
        ValueError: a setting is out of range; there are no images; `output` contains a run but `resume` is not set;
            or `resume` is set, but `output` contains no run or one with other settings.
        FloatingPointError: the loss is not finite. The message names the epoch, the batch and its images.
    """
    output = Path(output)
    recipe = RECIPES[model.name]
    settings = _settings(model, train_set, val_set, epochs, batch_size, lr, seed)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer, history = _start(model, recipe, settings, output, resume)

    train_set.transform = train_transform(model.anchor_config.image_size)
    batches = _batches(train_set, settings, len(history), workers, torch.device(device).type == "cuda")
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    last_save_s = -math.inf
    with SummaryWriter(output, purge_step=len(history) + 1) as events:
        for epoch in range(len(history) + 1, settings["epochs"] + 1):
            lrs = _learning_rates(recipe, settings, epoch)
            epoch_record = _train_epoch(model, optimizer, lrs, batches, train_set, epoch, settings["epochs"], quiet)
            if val_set is not None:
                epoch_record["val"] = _validate(model, val_set, workers, epoch, quiet)
            history.append(epoch_record)
            _write_events(events, epoch_record)

            save_due = time.monotonic() - last_save_s >= SAVE_EVERY_S or epoch == settings["epochs"]
            if _best_epoch(history) == epoch and (save_due or val_set is not None):
                save_weights(model, output / "model.safetensors", train_set.classes, train_set.category_ids)
            if save_due:
                _write_record(output, _record(settings, history, _unreadable(train_set, val_set)))
                # The state is written last. A run that is interrupted before this line resumes from an earlier epoch,
                # and writes the same other files again.
                _write_state(output / "last.pt", model, optimizer, settings, history)
                last_save_s = time.monotonic()
    return _record(settings, history, _unreadable(train_set, val_set))


def _settings(
    model: SSD,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
) -> dict[str, Any]:
    """Everything that the result of a run depends on, with the recipe's values where None is given."""
    recipe = RECIPES[model.name]
    images = len(train_set)
    batch_size = min(recipe.batch_size if batch_size is None else batch_size, images)
    described = description(model, train_set.classes, train_set.category_ids)
    del described["postprocess"]  # it may be changed at any time, and a run that began without it can be resumed
    settings = {
        **described,
        "images": images,
        "val_images": 0 if val_set is None else len(val_set),
        "epochs": recipe.epochs_for(images, max(1, batch_size)) if epochs is None else epochs,
        "batch_size": batch_size,
        "lr": recipe.lr if lr is None else lr,
        "seed": seed,
    }
    for name in ("images", "epochs", "batch_size", "lr"):
        if not settings[name] > 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    return settings


def _start(
    model: SSD, recipe: Recipe, settings: dict[str, Any], output: Path, resume: bool
) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
    """The optimizer and the records of past epochs, of a new run or, with `resume`, of the run in `output`.

    To resume, the weights are loaded into `model`.
    """
    path = output / "last.pt"
    if not resume:
        if path.exists():
            raise ValueError(f"{output} contains a run already: resume it, or choose another folder")
        return recipe.optimizer(_parameter_groups(model, recipe.weight_decay)), []

    state = _read_state(path, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state["trained"])
    optimizer = recipe.optimizer(_parameter_groups(model, recipe.weight_decay))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return optimizer, state["history"]


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups: the weights of convolutions, with weight decay, and all others, without.

    The others are biases and the scales of normalisations. Decay would pull them towards 0, and no other part of the
    network would make up for that.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _learning_rates(recipe: Recipe, settings: Mapping[str, Any], epoch: int) -> list[float]:
    """The learning rate of every step of an epoch."""
    steps_per_epoch = settings["images"] // settings["batch_size"]
    steps = settings["epochs"] * steps_per_epoch
    first = (epoch - 1) * steps_per_epoch
    return [settings["lr"] * recipe.schedule(step, steps) for step in range(first, first + steps_per_epoch)]


def _train_epoch(
    model: SSD,
    optimizer: torch.optim.Optimizer,
    lrs: Sequence[float],
    batches: Iterator[tuple[Tensor, list[Target]]],
    train_set: DetectionDataset,
    epoch: int,
    epochs: int,
    quiet: bool,
) -> dict[str, Any]:
    """Take one step for each learning rate, and return the record of the epoch."""
    started = time.perf_counter()
    model.train()
    total = torch.zeros(2, dtype=torch.float64)  # classification, bbox_regression
    # islice stops before it takes a batch of the next epoch.
    bar = tqdm(islice(batches, len(lrs)), desc=f"epoch {epoch}/{epochs}", total=len(lrs), unit="batch", disable=quiet)
    for number, (lr, (images, targets)) in enumerate(zip(lrs, bar, strict=True), start=1):
        losses = _train_step(model, optimizer, lr, images, targets)
        if not losses.isfinite().all():
            raise FloatingPointError(
                f"the loss must be finite, got {losses.tolist()} in epoch {epoch}, batch {number}, with images "
                f"{', '.join(_file_names(train_set, targets))}; use a learning rate below {lr:.2g}, "
                "or check these images and their annotations"
            )
        total += losses
        bar.set_postfix(loss=f"{total.sum() / number:.3f}", refresh=False)
    classification, bbox_regression = (total / len(lrs)).tolist()
    return {
        "epoch": epoch,
        "classification": classification,
        "bbox_regression": bbox_regression,
        "lr": lrs[-1],
        "seconds": round(time.perf_counter() - started, 2),
    }


def _train_step(
    model: SSD, optimizer: torch.optim.Optimizer, lr: float, images: Tensor, targets: list[Target]
) -> Tensor:
    """Update the weights once. Return the losses before the update, [2] on the CPU.

    If a loss is not finite, the weights are not updated.
    """
    device = model.anchors.device
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    not_ignored = [{name: target[name][~target["ignore"]] for name in ("boxes", "labels")} for target in targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = model(images, not_ignored)
    both_losses = torch.stack([losses["classification"], losses["bbox_regression"]])
    values = both_losses.detach().cpu()
    if values.isfinite().all():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        both_losses.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
    return values


def _file_names(dataset: DetectionDataset, targets: list[Target]) -> list[str]:
    """The names of the image files of a batch."""
    index_of = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    return [dataset.image_path(index_of[int(target["image_id"])]).name for target in targets]


def _validate(model: SSD, val_set: DetectionDataset, workers: int, epoch: int, quiet: bool) -> dict[str, Any]:
    """The metrics of `model` on the validation split."""
    detected = detect_dataset(model, val_set, workers=workers, quiet=True)
    metrics = evaluate_detections(val_set, detected, quiet=True)
    if not quiet:
        tqdm.write(f"epoch {epoch}: {BEST_EPOCH_METRIC} {metrics[BEST_EPOCH_METRIC] or 0:.3f} on {val_set.split}")
    return metrics


class _Stream(Dataset[tuple[Any, Target]]):
    """The images of all epochs in one sequence. Item n is image n % N of epoch n // N, in that epoch's random order.

    Order and augmentation depend only on the seed and n. Therefore a resumed run continues exactly where the
    interrupted one stopped, the number of workers does not change the result, and workers can read images of the next
    epoch while the current one is scored.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, n: int) -> tuple[Any, Target]:
        epoch, index = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(_mixed_seed(self.seed, epoch))
            self.order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self.epoch = epoch
        torch.default_generator.manual_seed(_mixed_seed(self.seed, n))  # the augmentation uses this generator
        return self.dataset[self.order[index]]


def _mixed_seed(seed: int, number: int) -> int:
    """Combine the seed of a run and the number of an epoch or item into one 32-bit seed."""
    return (seed * SEED_MULTIPLIER + number) & 0xFFFFFFFF


class _Batches(Sampler[list[int]]):
    """The item numbers of a `_Stream` in batches, epoch by epoch. Images that do not fill a batch are left out."""

    def __init__(self, images: int, size: int, epochs: range) -> None:
        self.images, self.size, self.epochs = images, size, epochs

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in self.epochs:
            for k in range(0, self.images - self.size + 1, self.size):
                first = epoch * self.images + k
                yield list(range(first, first + self.size))

    def __len__(self) -> int:
        return len(self.epochs) * (self.images // self.size)


def _batches(
    dataset: DetectionDataset, settings: Mapping[str, Any], epochs_done: int, workers: int, pin_memory: bool
) -> Iterator[tuple[Tensor, list[Target]]]:
    """The batches of all remaining epochs, one after the other."""
    return iter(
        DataLoader(
            _Stream(dataset, settings["seed"]),
            batch_sampler=_Batches(len(dataset), settings["batch_size"], range(epochs_done, settings["epochs"])),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
        )
    )


def _record(settings: dict[str, Any], history: list[dict[str, Any]], unreadable: list[str]) -> dict[str, Any]:
    return {"settings": settings, "epochs": history, "best": _best_epoch(history), "unreadable": unreadable}


def _unreadable(train_set: DetectionDataset, val_set: DetectionDataset | None) -> list[str]:
    """The image files that could not be read since the run was started or resumed."""
    return [*train_set.unreadable, *(val_set.unreadable if val_set is not None else [])]


def _best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch with the highest AP50, counted from 1; without a validation split, the last epoch."""
    if "val" not in history[-1]:
        return len(history)
    scores = [epoch_record["val"][BEST_EPOCH_METRIC] or 0.0 for epoch_record in history]  # None without any objects
    return 1 + scores.index(max(scores))


def _write_state(
    path: Path,
    model: SSD,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Write everything that is needed to resume the run."""
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
    """The state that `_write_state` wrote. Raises ValueError unless it is of a run with the same settings."""
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file, the unpickler raises many types of exception
        raise ValueError(f"{path} is not the state of a run: {error}") from error
    if not (isinstance(state, dict) and state.keys() >= STATE_FIELDS):
        raise ValueError(f"{path} is not the state of a run")
    past = state["settings"]
    changed = {name: (past.get(name), value) for name, value in settings.items() if past.get(name) != value}
    if changed:
        differences = ", ".join(f"{name} {old} (now {new})" for name, (old, new) in changed.items())
        raise ValueError(f"{path} is the state of a run with other settings: {differences}")
    return state


def _write_events(events: SummaryWriter, epoch_record: dict[str, Any]) -> None:
    """Write the losses, the learning rate and the metrics of an epoch for TensorBoard."""
    for name in ("classification", "bbox_regression", "lr"):
        events.add_scalar(f"train/{name}", epoch_record[name], epoch_record["epoch"])
    for name, value in epoch_record.get("val", {}).items():
        if isinstance(value, float):
            events.add_scalar(f"val/{name}", value, epoch_record["epoch"])


def _write_record(output: Path, record: dict[str, Any]) -> None:
    """Write metrics.json and loss.png."""
    write_atomically(output / "metrics.json", json.dumps(record, indent=2).encode())
    history = record["epochs"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    epochs = [epoch_record["epoch"] for epoch_record in history]
    for name in ("classification", "bbox_regression"):
        axes.plot(epochs, [epoch_record[name] for epoch_record in history], label=name)
    if "val" in history[-1]:
        right = axes.twinx()
        right.set(ylabel=f"{BEST_EPOCH_METRIC} on the validation split", ylim=(0, 1))
        scores = [epoch_record["val"][BEST_EPOCH_METRIC] for epoch_record in history]
        right.plot(epochs, scores, "k--", label=BEST_EPOCH_METRIC)
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120)
