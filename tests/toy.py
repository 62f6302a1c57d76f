"""A detector so small that a training step takes milliseconds, and a run of it for the tests of training."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdcore.anchors import AnchorConfig
from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.models import SSD, Backbone
from ssdcore.synthetic import make_synthetic
from ssdcore.train.config import TrainConfig
from ssdcore.train.loop import fit

SIZE = 32  # pixels
ANCHORS = AnchorConfig(SIZE, (4, 2), (8, 16), (0.3, 0.6, 0.9), ((2,), (2,)))
CONFIG = TrainConfig(model="custom", epochs=2, batch_size=4, lr=0.01, drops=(0.5,), warmup_steps=1, clip_norm=10.0)


class ToyBackbone(Backbone):
    """Two maps, of 4 and 2 cells per side, from 1 x 1 convolutions on averaged pixels."""

    out_channels = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Dropout(0.1))

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(first)]


def toy_model(num_classes: int = 4, seed: int = 0, **options: Any) -> SSD:
    torch.manual_seed(seed)
    return SSD(ToyBackbone(), num_classes, options.pop("anchors", ANCHORS), **options)


def plain_environment() -> dict[str, str]:
    """The environment of a process that is not a test: one thread, and no interpreter for the kernels."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def toy_data(folder: Path, train: int = 10, val: int = 4) -> Path:
    return make_synthetic(folder, train=train, val=val, size=100, progress=False)


def toy_run(data: Path, output: Path, config: TrainConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    """Train two epochs of two batches of four. Two of the ten images are left out of each epoch."""
    model = changes.pop("model", None) or toy_model()
    train_set: DetectionDataset | None = changes.pop("train_set", None)
    if train_set is None:
        train_set = open_dataset(data, "train")
    if changes.pop("validate", False):
        changes["val_set"] = open_dataset(data, "val")
    return fit(model, train_set, output, config, quiet=True, **changes)
