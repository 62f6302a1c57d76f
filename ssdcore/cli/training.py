"""`ssdcore train`. Its options besides those written here are the values of `TrainConfig`."""

import contextlib
import inspect
import io
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ssdcore.cli.options import (
    Data,
    Device,
    Workers,
    find_device,
    open_split,
    option,
    require_model,
    score_text,
    share_cores,
)
from ssdcore.train import TrainConfig, load_config
from ssdcore.train.config import choices_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ssdcore.anchors import AnchorConfig
    from ssdcore.data import DetectionDataset
    from ssdcore.models import SSD

# With --keep-empty, negatives that are mined at least in each image. An image with a positive has 3 in any case,
# because three negatives are mined for each positive. So this changes the loss of images without objects alone.
MIN_NEGATIVES = 3
TO_CONTINUE = "To continue, repeat the command; for `ssdcore train`, add --resume"  # the demo continues by itself
NOT_OPTIONS = {"recipe", "model"}  # values of TrainConfig that have options of their own
TUPLES = {"drops"}  # values that are written as numbers with commas between them

InitialWeights = Annotated[
    str | None,
    option(
        "Weights of a whole detector to start from: a model.safetensors, whose classes may differ. "
        "Default: random weights."
    ),
]
BackboneWeights = Annotated[
    str | None,
    option(
        "Weights of the backbone to start from: torchvision's by name, such as DEFAULT, or IMAGENET1K_FEATURES for "
        "VGG-16; or a .pth or .safetensors file. Default: random weights."
    ),
]
ValSplit = Annotated[
    str | None,
    option(
        "Split that chooses the epoch to save, by AP50. none: save the last epoch. Default: val, valid or "
        "validation if the dataset has it and the training split is not trainval; otherwise none."
    ),
]


def train(
    data: Data,
    model: Annotated[
        str | None, option("One of those that `ssdcore models` lists. Default: ssd300_tiny, or the recipe's.")
    ] = None,
    output: Annotated[Path | None, option("Folder for the run. Default: runs/DATASET-MODEL.")] = None,
    recipe: Annotated[
        str | None,
        option("vgg-voc, vgg-coco, nvidia-r50 or torchvision, as published; or small. Default: the model's own."),
    ] = None,
    config: Annotated[Path | None, option("A run's config.json, whose values replace the recipe's.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration as JSON, and do not train.")
    ] = False,
    weights: InitialWeights = None,
    weights_backbone: BackboneWeights = None,
    train_split: Annotated[str | None, option("Default: trainval if the dataset has it, otherwise train.")] = None,
    val_split: ValSplit = None,
    split: Annotated[
        float | None,
        option(
            "Fraction of the images to train on, such as 0.8, if the dataset has no splits. The others become the "
            "split val. The division is written to ssdcore-split.json in the dataset's folder, or in the run's if the "
            "first is not writable, and stays the same."
        ),
    ] = None,
    keep_empty: Annotated[
        bool,
        typer.Option(
            "--keep-empty", help="Train on images without objects too. Without this option, they are left out."
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at an image that cannot be read. Without this option, another one takes its place."
        ),
    ] = False,
    device: Device = "auto",
    workers: Workers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    **values: Any,
) -> dict[str, Any]:
    """Train a detector.

    To continue an interrupted run, repeat the command with --resume. The result is the same as without interruption.

    To train on several GPUs: torchrun --nproc-per-node N -m ssdcore train ...
    """
    from ssdcore.data import make_split
    from ssdcore.train import Terminated, fit
    from ssdcore.train.distributed import group, joined, leads

    # One process speaks for all. Errors of any process are printed. With --print-config, stdout gets JSON alone.
    stdout = sys.stdout
    listener = io.StringIO() if not leads() else sys.stderr if print_config else stdout
    with contextlib.redirect_stdout(listener), joined(find_device(device)) as torch_device:
        chosen = _configuration(recipe, config, model, values)
        output = output or Path("runs") / f"{data.resolve().name}-{chosen.model}"
        if split is not None:
            division = group().shared(make_split(data, split, fallback=output) if leads() else None)
            print(f"{data} is divided as {division} says")
        train_set, val_set = _open_train_and_val(data, train_split, val_split, output)
        train_set = _with_objects(train_set, keep_empty)
        train_set.strict = strict
        if val_set is not None:
            val_set.strict = strict
        if print_config:
            if leads():
                print(json.dumps(chosen.to_json(), indent=2), file=stdout)
            _print_consequences(chosen, len(train_set), val_set)
            raise typer.Exit
        net = _model_to_train(chosen, weights, weights_backbone, train_set.classes, output if resume else None)
        if weights is not None:
            chosen = replace(chosen, anchors=None)  # the file says what they are
        if keep_empty and chosen.normalizer == "image":
            raise ValueError("keep-empty needs normalizer batch, because image gives images without objects no weight")
        if keep_empty:
            net.min_negatives = MIN_NEGATIVES
        _announce(chosen, torch_device.type, train_set, val_set)
        try:
            record = fit(
                net,
                train_set,
                output,
                config=chosen,
                val_set=val_set,
                workers=share_cores(workers),
                device=torch_device,
                resume=resume,
            )
        except KeyboardInterrupt:
            if (output / "last.pt").exists():
                print(f"\ninterrupted; {output} contains the run so far. {TO_CONTINUE}")
            raise typer.Exit(130) from None
        except Terminated as stopped:
            print(f"\n{stopped.message}. {TO_CONTINUE}")
            raise
        best = record["epochs"][record["best"] - 1]
        which = f"best AP50 on {val_set.split}, {score_text(best['val']['AP50'])}" if val_set else "the last"
        if record["unreadable"]:
            count = len(record["unreadable"])
            print(f"images that could not be read, whose place others took: {count}; metrics.json lists them")
        print(f"wrote {output / 'model.safetensors'} (epoch {best['epoch']}: {which}), metrics.json and loss.png")
        return record


def _add_values() -> None:
    """Give `train` an option for each value of `TrainConfig`."""
    signature = inspect.signature(train)
    hints = get_type_hints(TrainConfig)
    options = []
    for value in fields(TrainConfig):
        if value.name in NOT_OPTIONS:
            continue
        kinds = [kind for kind in (hints[value.name], *get_args(hints[value.name])) if kind in (bool, int, float)]
        kind = kinds[0] if kinds and value.name not in TUPLES else str
        choices = choices_of(hints[value.name])
        text = value.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        described = option(text[0].upper() + text[1:] + ".", rich_help_panel="Values that replace the recipe's")
        options.append(
            inspect.Parameter(
                value.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, described]
            )
        )
    given = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    train.__signature__ = signature.replace(parameters=[*given, *options])  # type: ignore[attr-defined]


def _configuration(
    recipe_name: str | None, file: Path | None, model: str | None, values: dict[str, Any]
) -> TrainConfig:
    """The recipe or the file, with the values that are given."""
    from ssdcore.train import recipe

    if recipe_name is not None and file is not None:
        raise ValueError("recipe and config must not be given together: config holds all values of a recipe")
    if model is not None:
        require_model(model)
    base = recipe(recipe_name, model) if file is None else load_config(file).changed(model=model)
    for name in TUPLES:
        if isinstance(values.get(name), str):
            try:
                values = {**values, name: tuple(float(part) for part in values[name].split(","))}
            except ValueError as error:
                raise ValueError(f"{name} must be numbers with commas between them, got {values[name]!r}") from error
    return base.changed(**values)


def _print_consequences(config: TrainConfig, images: int, val_set: "DetectionDataset | None") -> None:
    """Print what follows from a configuration for a dataset."""
    from ssdcore.train.distributed import group
    from ssdcore.train.loop import with_whole_batches

    images = min(images, config.limit or images)
    config = with_whole_batches(config, images, group())
    steps, per_epoch = config.total_steps(images), config.steps_per_epoch(images)
    scored = "no validation split" if val_set is None else f"scored on {len(val_set)} images of {val_set.split}"
    print(
        f"{images} images: {steps} steps of {config.batch_size} images, {steps / per_epoch:g} epochs; "
        f"highest learning rate {config.scaled_lr:g}; {scored}"
    )


def _announce(
    config: TrainConfig, device: str, train_set: "DetectionDataset", val_set: "DetectionDataset | None"
) -> None:
    """Print what is trained on what."""
    images = min(len(train_set), config.limit or len(train_set))
    saved_epoch = f"the epoch with the best AP50 on {val_set.split}" if val_set else "the last epoch"
    print(f"training {config.model} on {device} with {images} images of {train_set.split}")
    print(f"classes: {', '.join(train_set.classes)}; saving the weights of {saved_epoch}")


def _open_train_and_val(
    data: Path, train_split: str | None, val_split: str | None, run: Path
) -> "tuple[DetectionDataset, DetectionDataset | None]":
    """Open the splits to train and to validate on. They must not share an image.

    A split file in the folder of the run is used before one in the dataset's folder.
    """
    from ssdcore.data import available_splits
    from ssdcore.data.opening import existing_split_file

    split_file = existing_split_file(data, run)
    train_split, val_split = _choose_splits(available_splits(data, split_file=split_file), train_split, val_split)
    train_set = open_split(data, train_split, split_file=split_file)
    if val_split is None:
        return train_set, None
    val_set = open_split(data, val_split, train_set.classes, split_file=split_file)
    if shared := _image_paths(train_set) & _image_paths(val_set):
        raise ValueError(
            f"val-split must share no image with train-split, but {len(shared)} images of {val_split} "
            f"are also in {train_split}"
        )
    return train_set, val_set


def _choose_splits(splits: list[str], train_split: str | None, val_split: str | None) -> tuple[str, str | None]:
    """The splits to train and to validate on, with the defaults where None is given. "none" means no validation."""
    train_split = train_split or ("trainval" if "trainval" in splits else "train")
    if len(splits) == 1 and train_split not in splits:
        raise ValueError(
            f"train-split must be given, because the only split is {splits[0]}; or divide the images with --split 0.8"
        )
    if val_split is None and train_split != "trainval":
        val_split = next((name for name in ("val", "valid", "validation") if name in splits), None)
    if val_split == "none":
        val_split = None
    if val_split is not None and val_split.lower().startswith("test"):
        raise ValueError(
            f"val-split must not be a test split, got {val_split}: the score on a split that chose the weights "
            "says nothing about other images"
        )
    return train_split, val_split


def _image_paths(dataset: "DetectionDataset") -> set[Path]:
    return {dataset.image_path(i) for i in range(len(dataset))}


def _with_objects(dataset: "DetectionDataset", keep_empty: bool) -> "DetectionDataset":
    """The images to train on. Prints how many are left out."""
    indices = dataset.indices_to_train_on(keep_empty)
    if len(indices) < len(dataset):
        hint = "" if keep_empty else "; --keep-empty trains on those in which nothing is annotated"
        print(f"{len(dataset) - len(indices)} images of {dataset.split} have no object to train on: left out{hint}")
    return dataset.subset(indices)


def _model_to_train(
    config: TrainConfig,
    weights: str | None,
    weights_backbone: str | None,
    classes: "Sequence[str]",
    resumed_run: Path | None,
) -> "SSD":
    """The model to train: of a resumed run, from a file, with a pretrained backbone, or with random weights."""
    import torch

    from ssdcore.models import IMAGENET_MEAN, IMAGENET_STD, MODELS
    from ssdcore.train import RECIPES
    from ssdcore.weights import fine_tuned, load_model

    if resumed_run is not None and (resumed_run / "model.safetensors").exists():
        # `weights` is not read again: the file may be gone, and the run's own file describes the same model.
        return load_model(resumed_run / "model.safetensors")[0]
    name = config.model
    require_model(name)
    torch.manual_seed(config.seed)
    num_classes = len(classes) + 1
    if weights is not None and weights_backbone is not None:
        raise ValueError("weights and weights-backbone must not be given together: weights hold a backbone's too")
    if weights_backbone is not None:
        if name == "ssd300_tiny":
            raise ValueError(
                "weights-backbone must not be given for ssd300_tiny: its backbone has no weights elsewhere"
            )
        return MODELS[name](num_classes, weights_backbone, anchors=_anchors(config))
    if weights is None:
        if config.recipe in RECIPES:
            print(f"the published {config.recipe} starts from a backbone trained on ImageNet: --weights-backbone")
        return MODELS[name](num_classes, anchors=_anchors(config), image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    model, not_loaded = fine_tuned(weights, classes)
    if model.name != name:
        raise ValueError(f"model must be {model.name}, the model in {weights}, got {name}")
    if not_loaded:
        print(f"{weights} has other classes: {len(not_loaded)} tensors of the classification head start at random")
    return model


def _anchors(config: TrainConfig) -> "AnchorConfig":
    """The default boxes of a new model."""
    from ssdcore.models import MODELS
    from ssdcore.train.recipes import anchors_for

    own: AnchorConfig = inspect.signature(MODELS[config.model]).parameters["anchors"].default
    return own if config.anchors is None else anchors_for(config.anchors, own.image_size)


_add_values()
