"""Pictures of what a model detects beside what is annotated."""

from collections.abc import Mapping

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssdcore.data import DetectionDataset
from ssdcore.draw import contact_sheet, draw_detections
from ssdcore.objects import DetectedObjects

COUNT = 4  # images
SIDE = 320  # pixels of the longer side of a picture
MIN_SCORE = 0.3  # of the drawn objects


def sample_picture(dataset: DetectionDataset, detected: Mapping[int, DetectedObjects]) -> Tensor:
    """Draw the first images of a dataset: on the left with their annotations, on the right with detected objects.

    The dataset's own transform is not applied.

    Returns:
        uint8 [3, H, W].
    """
    pictures = []
    transform, dataset.transform = dataset.transform, None
    try:
        items = [dataset[index] for index in range(min(COUNT, len(dataset)))]
    finally:
        dataset.transform = transform
    for pixels, target in items:
        full = F.to_pil_image(pixels)
        scale = SIDE / max(full.size)
        image = full.resize((max(1, round(full.width * scale)), max(1, round(full.height * scale))))
        boxes = target["boxes"].as_subclass(Tensor) * scale
        pictures.append(draw_detections(image, boxes, target["labels"], None, dataset.classes))
        found = detected[target["image_id"]]
        shown = found["scores"] > MIN_SCORE
        pictures.append(
            draw_detections(
                image, found["boxes"][shown] * scale, found["labels"][shown], found["scores"][shown], dataset.classes
            )
        )
    picture: Tensor = F.pil_to_tensor(contact_sheet(pictures, columns=2))
    return picture
