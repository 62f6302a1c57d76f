"""A trained model on photographs: of a dataset, to score it, or from files, to look at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ssdcore.data import DetectionDataset, read_rgb
from ssdcore.model import SSD
from ssdcore.transforms import collate, eval_transform

BATCH_SIZE = 16  # images; larger ones run no faster on a CPU, and a GPU waits for the decoding anyway


@torch.inference_mode()
def detect_batch(model: SSD, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
    """Detections for images that `eval_transform` resized, on the CPU and in pixels of the originals.

    Args:
        model: in eval mode.
        images: float [B, 3, S, S] in 0..1.
        sizes: [B, 2] height and width of the originals.

    Returns:
        For each image `boxes` [N, 4] xyxy, `labels` and `scores` [N], best first.
    """
    device = model.anchors.device
    found = model(images.to(device, non_blocking=True, memory_format=torch.channels_last))
    scales = sizes[:, [1, 0, 1, 0]] / model.anchor_config.image_size  # [B, 4]
    return [
        {name: value.cpu() for name, value in one.items()} | {"boxes": one["boxes"].cpu() * scale}
        for one, scale in zip(found, scales, strict=True)
    ]


def detect_dataset(
    model: SSD, dataset: DetectionDataset, *, workers: int = 0, quiet: bool = False
) -> dict[int, Mapping[str, Tensor]]:
    """Detections for every image of a dataset, by image_id, as `evaluate_detections` takes them."""
    transform, dataset.transform = dataset.transform, eval_transform(model.anchor_config.image_size)
    model.eval()
    loader = DataLoader(dataset, BATCH_SIZE, num_workers=workers, collate_fn=collate)
    detections: dict[int, Mapping[str, Tensor]] = {}
    index = 0
    for images, targets in tqdm(loader, desc=f"detecting in {dataset.split}", unit="batch", disable=quiet):
        sizes = torch.tensor([dataset.image_size(index + i) for i in range(len(targets))])
        index += len(targets)
        found = detect_batch(model, images, sizes)
        detections |= {target["image_id"]: one for target, one in zip(targets, found, strict=True)}
    dataset.transform = transform
    return detections


def detect_files(
    model: SSD,
    paths: Sequence[Path],
    on_error: Callable[[str], None],
    *,
    quiet: bool = False,
) -> Iterator[tuple[Path, Image.Image, dict[str, Tensor]]]:
    """Detect in photographs: yields path, upright RGB image and detections in its pixels, in the given order.

    A file that cannot be read is left out, and `on_error` is called with a line that names it.
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
                found = detect_batch(model, images, sizes)
                for (path, image), one in zip(photographs, found, strict=True):
                    yield path, image, one
