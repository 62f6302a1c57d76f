"""Configurations by name: those that others published, one for small datasets, and one of its own for each model."""

from ssdcore.anchors import (
    SSD300_COCO,
    SSD300_NVIDIA,
    SSD300_VOC,
    SSD512_COCO,
    SSD512_VOC,
    AnchorConfig,
)
from ssdcore.train.config import TrainConfig

# Steps of a run on 50 to 500 photographs. On 50 and 100 of BCCD, 1,000 steps give an AP of 0.541 and 0.567, and 2,000
# of 0.549 and 0.581.
SMALL_STEPS = 2000
# Norm of the gradient of all parameters. Rarely, the gradient of a batch has a hundred times the usual norm. Without
# normalisation layers, a step of that size ends a run.
CLIP_NORM = 10.0

TINY = TrainConfig(
    model="ssd300_tiny", epochs=40, min_steps=SMALL_STEPS, batch_size=16, optimizer="adamw", lr=2e-3,
    weight_decay=1e-2, schedule="one-cycle", clip_norm=CLIP_NORM,
)  # fmt: skip
# Without normalisation layers, the model needs some thousand steps before it detects anything. Therefore a dataset
# of a few hundred images needs as many steps as a large one.
VGG = TrainConfig(
    model="ssd300_vgg16", epochs=120, min_steps=5000, lr=1e-3, drops=(2 / 3, 5 / 6), warmup_steps=500,
    warmup_start=1 / 500, clip_norm=CLIP_NORM,
)  # fmt: skip
# NVIDIA's SSD300 v1.1: 65 epochs, drops after 43 and 54.
RESNET = TrainConfig(
    model="ssd300_resnet50", epochs=65, min_steps=5000, lr=2.6e-3, drops=(2 / 3, 5 / 6), warmup_steps=500,
    warmup_start=1 / 500, clip_norm=CLIP_NORM,
)  # fmt: skip
OWN = {
    "ssd300_tiny": TINY,
    "ssd300_vgg16": VGG,
    "ssd512_vgg16": VGG,
    **{f"ssd300_resnet{depth}": RESNET for depth in (18, 34, 50, 101, 152)},
}

RECIPES = {
    # The authors' Caffe code, branch ssd, examples/ssd/ssd_pascal.py, and python/caffe/model_libs.py, by which biases
    # learn twice as fast and do not decay.
    "vgg-voc": TrainConfig(
        recipe="vgg-voc", model="ssd300_vgg16", anchors="voc", augmentation="caffe", steps=120_000, lr=1e-3,
        decay="not-biases", bias_lr=2.0, drops=(80 / 120, 100 / 120),
    ),
    # The same for COCO, examples/ssd/ssd_coco.py.
    "vgg-coco": TrainConfig(
        recipe="vgg-coco", model="ssd300_vgg16", anchors="coco", augmentation="caffe", steps=400_000, lr=1e-3,
        decay="not-biases", bias_lr=2.0, drops=(280 / 400, 360 / 400),
    ),
    # NVIDIA/DeepLearningExamples, PyTorch/Detection/SSD, main.py and ssd/train.py: the learning rate grows with the
    # images of one step on all GPUs, and neither biases nor batch normalisation decay.
    "nvidia-r50": TrainConfig(
        recipe="nvidia-r50", model="ssd300_resnet50", anchors="nvidia", normalizer="image", augmentation="nvidia",
        epochs=65, lr=2.6e-3, lr_batch=32, drops=(43 / 65, 54 / 65), warmup_steps=300,
    ),
    # pytorch/vision, references/detection, ssd300_vgg16: 8 GPUs with 4 images each. The learning rate is meant to grow
    # with the number of GPUs, as the head of its train.py says.
    "torchvision": TrainConfig(
        recipe="torchvision", model="ssd300_vgg16", anchors="coco", augmentation="torchvision", epochs=120, lr=2e-3,
        lr_batch=32, decay="all", drops=(80 / 120, 110 / 120), warmup_steps=1000, warmup_start=1e-3,
    ),
}  # fmt: skip
NAMES = (*RECIPES, "small")

# By the side of the model's images in pixels.
ANCHORS: dict[str, dict[int, AnchorConfig]] = {
    "voc": {300: SSD300_VOC, 512: SSD512_VOC},
    "coco": {300: SSD300_COCO, 512: SSD512_COCO},
    "nvidia": {300: SSD300_NVIDIA},
}


def own_recipe(model: str) -> TrainConfig:
    """Return the configuration that a model of `MODELS` is trained with unless another is chosen.

    Raises:
        ValueError: the model has none.
    """
    if model not in OWN:
        raise ValueError(f"recipe must be given for the model {model!r}: only {', '.join(OWN)} have one of their own")
    return OWN[model].changed(model=model)


def recipe(name: str | None, model: str | None = None) -> TrainConfig:
    """Return a configuration by name, for a model.

    Args:
        name: one of `NAMES`; or None for the model's own. "small" is the model's own with a length in steps, for 50 to
            500 photographs.
        model: a name of `MODELS`. By default the model that the recipe was published for, otherwise ssd300_tiny.

    Raises:
        ValueError: there is no such recipe.
    """
    if name is None:
        return own_recipe(model or "ssd300_tiny")
    if name == "small":
        return own_recipe(model or "ssd300_tiny").changed(recipe="small", steps=SMALL_STEPS)
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(NAMES)}, got {name!r}")
    return RECIPES[name].changed(model=model)


def anchors_for(name: str, image_size: int) -> AnchorConfig:
    """Return the default boxes called `name` for a model with this image size.

    Raises:
        ValueError: there are none for this size.
    """
    if image_size not in ANCHORS[name]:
        sizes = " and ".join(map(str, ANCHORS[name]))
        raise ValueError(f"anchors {name!r} are for images of {sizes} pixels, but the model's have {image_size}")
    return ANCHORS[name][image_size]
