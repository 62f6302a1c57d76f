"""The names and ids of COCO's classes, which checkpoints of other projects do not hold."""

# The 80 categories that COCO annotates, by their ids in its annotation files.
COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip


def class_names(num_classes: int) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """The names of the classes and their ids in the dataset, by the number of classes of a published detector.

    Args:
        num_classes: with the background. 21 are Pascal VOC's. 81 are COCO's in the order of their ids. 91 are
            COCO's by id, as torchvision has them: an id that COCO does not use is called "unused 12", for example.

    Returns:
        The names and the ids of labels 1, 2, ...; None for any other number.
    """
    if num_classes == 21:
        from ssdcore.data import VOC_CLASSES  # imported here, because it imports what reads datasets

        return VOC_CLASSES, tuple(range(1, 21))
    if num_classes == 81:
        return tuple(COCO.values()), tuple(COCO)
    if num_classes == 91:
        # Each name differs from the others, because `open_dataset` finds classes by name.
        return tuple(COCO.get(i, f"unused {i}") for i in range(1, 91)), tuple(range(1, 91))
    return None
