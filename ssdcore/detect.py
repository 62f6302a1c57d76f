"""Run a trained model on images: on a dataset to score the model, or on image files to look at the result."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ssdcore.data import DetectionDataset, read_rgb
from ssdcore.models import SSD
from ssdcore.objects import DetectedObjects
from ssdcore.transforms import collate, eval_transform

BATCH_SIZE = 16  # images; a larger batch is no faster on a CPU, and a GPU waits for the image decoding in any case


@torch.inference_mode()
def detect_batch(model: SSD, images: Tensor, sizes: Tensor) -> list[DetectedObjects]:
    """Detect objects in a batch that `eval_transform` resized.

    Args:
        model: in eval mode.
        images: float [B, 3, S, S], RGB in 0..1, on any device.
        sizes: [B, 2] height and width of the original images in pixels, on the CPU.

    Returns:
        For each image a dict of `boxes` [K, 4] xyxy in pixels of the original image, `labels` [K] and `scores` [K],
        sorted by descending score, on the CPU.
    """
    device = model.anchors.device
    detected_in_batch = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
    scales = sizes[:, [1, 0, 1, 0]] / model.anchor_config.image_size  # [B, 4]
    return [
        {name: tensor.cpu() for name, tensor in detected.items()} | {"boxes": detected["boxes"].cpu() * scale}
        for detected, scale in zip(detected_in_batch, scales, strict=True)
    ]


def detect_dataset(
    model: SSD, dataset: DetectionDataset, *, workers: int = 0, quiet: bool = False
) -> dict[int, DetectedObjects]:
    """Detect objects in every image of a dataset.

    In an image that cannot be read, nothing is detected, unless the dataset is `strict`. Then it is an error.

    Args:
        model: on any device; it is switched to eval mode and left there.
        dataset: its transform is replaced by `eval_transform` during the call and restored afterwards, also
            after an error.
        workers: processes that read the images; 0 reads them in this process.
        quiet: show no progress bar.

    Returns:
        The detected objects by `image_id`, as `evaluate_detections` takes them.
    """
    model.eval()
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=workers, collate_fn=collate)
    detected_by_image_id: dict[int, DetectedObjects] = {}
    # Not the position in the loader: if the dataset is not strict, an item may be another image.
    size_of = {image_id: dataset.image_size(i) for i, image_id in enumerate(dataset.image_ids.tolist())}
    transform, dataset.transform = dataset.transform, eval_transform(model.anchor_config.image_size)
    try:
        for images, targets in tqdm(loader, desc=f"detecting in {dataset.split}", unit="batch", disable=quiet):
            sizes = torch.tensor([size_of[target["image_id"]] for target in targets])
            for target, detected in zip(targets, detect_batch(model, images, sizes), strict=True):
                detected_by_image_id[target["image_id"]] = detected
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
                detected_in_batch = detect_batch(model, images, sizes)
                for (path, image), detected in zip(photographs, detected_in_batch, strict=True):
                    yield path, image, detected
