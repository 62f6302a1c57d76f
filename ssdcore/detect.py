"""Run a trained model on images: on a dataset to score the model, or on image files to look at the result."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ssdcore.data import DetectionDataset, read_rgb
from ssdcore.models import SSD
from ssdcore.objects import DetectedObjects, Target
from ssdcore.stopwatch import Stopwatch
from ssdcore.transforms import eval_transform
from ssdcore.views import detect_batch

BATCH_SIZE = 16  # images; a larger batch is no faster on a CPU, and a GPU waits for the image decoding in any case


def detect_dataset(
    models: SSD | Sequence[SSD],
    dataset: DetectionDataset,
    *,
    indices: Sequence[int] | None = None,
    flip: bool = False,
    workers: int = 0,
    quiet: bool = False,
    stopwatch: Stopwatch | None = None,
) -> dict[int, DetectedObjects]:
    """Detect objects in the images of a dataset.

    Images are resized as in training, for each model to its own size. What several models detect, or one model in
    mirror images, is averaged as `ssdcore.views.merge` describes. In an image that cannot be read, nothing is
    detected, unless the dataset is `strict`. Then it is an error.

    Args:
        models: one model, or several with the same classes on the same device. They are switched to eval mode and left
            there.
        dataset: its transform is replaced during the call and restored afterwards, also after an error.
        indices: the images to look at; by default all.
        flip: whether each model also sees the mirror images.
        workers: processes that read the images; 0 reads them in this process.
        quiet: show no progress bar.
        stopwatch: counts the parts `reading` (waiting for images that are decoded and resized), `network` and
            `postprocess`.

    Returns:
        The detected objects by `image_id`, as `evaluate_detections` takes them.

    Raises:
        ValueError: there is no model, or the models have different numbers of classes.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    if len({model.num_classes for model in models}) != 1:
        raise ValueError(
            "models must be at least one and have the same number of classes, "
            f"got {[model.num_classes for model in models]}"
        )
    for model in models:
        model.eval()
    stopwatch = stopwatch or Stopwatch(models[0].anchors.device)
    sampler = range(len(dataset)) if indices is None else indices
    loader = DataLoader(dataset, BATCH_SIZE, sampler=sampler, num_workers=workers, collate_fn=_collate_sizes)
    # Not the position in the loader: if the dataset is not strict, an item may be another image.
    size_of = {image_id: dataset.image_size(i) for i, image_id in enumerate(dataset.image_ids.tolist())}
    detected_by_image_id: dict[int, DetectedObjects] = {}
    transform, dataset.transform = dataset.transform, _AtSizes(model.anchor_config.image_size for model in models)
    try:
        batches = tqdm(loader, desc=f"detecting in {dataset.split}", unit="batch", disable=quiet)
        for images, image_ids in stopwatch.waits("reading", batches):
            sizes = torch.tensor([size_of[image_id] for image_id in image_ids])
            detected_in_batch = detect_batch(models, images, sizes, flip=flip, stopwatch=stopwatch)
            detected_by_image_id |= zip(image_ids, detected_in_batch, strict=True)
    finally:
        dataset.transform = transform
    return detected_by_image_id


def detect_files(
    model: SSD,
    paths: Sequence[Path],
    on_error: Callable[[str], None],
    *,
    quiet: bool = False,
) -> Iterator[tuple[Path, Image.Image, DetectedObjects]]:
    """Detect objects in image files, in the given order.

    Args:
        model: on any device; it is switched to eval mode and left there.
        paths: the image files. A file that cannot be read is skipped.
        on_error: called with one line that names the file and the reason, for each skipped file.
        quiet: show no progress bar.

    Yields:
        For each file its path, the image in RGB turned upright, and the detected objects in pixels of that image.
    """
    transform = eval_transform(model.anchor_config.image_size)
    model.eval()
    with tqdm(total=len(paths), desc="detecting", unit=" images", disable=quiet) as bar:
        for first in range(0, len(paths), BATCH_SIZE):
            photographs = []
            for path in paths[first : first + BATCH_SIZE]:
                bar.update()
                try:
                    photographs.append((path, read_rgb(path)))
                except ValueError as error:
                    on_error(str(error))
            if photographs:
                images = torch.stack([transform(F.to_image(image), {})[0] for _, image in photographs])
                sizes = torch.tensor([(image.height, image.width) for _, image in photographs])
                detected_in_batch = detect_batch([model], {model.anchor_config.image_size: images}, sizes)
                for (path, image), detected in zip(photographs, detected_in_batch, strict=True):
                    yield path, image, detected


class _AtSizes:
    """A transform that gives an image at several sizes, as a dict by size. The target stays in pixels of the image."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.resize = {size: eval_transform(size) for size in sizes}

    def __call__(self, image: Any, target: Target) -> tuple[dict[int, Tensor], Target]:
        return {size: resize(image, {})[0] for size, resize in self.resize.items()}, target


def _collate_sizes(batch: Sequence[tuple[dict[int, Tensor], Target]]) -> tuple[dict[int, Tensor], list[int]]:
    """The images of each size [B, 3, S, S], and the ids of the images."""
    images, targets = zip(*batch, strict=True)
    batches = {size: torch.stack([image[size] for image in images]) for size in images[0]}
    return batches, [target["image_id"] for target in targets]
