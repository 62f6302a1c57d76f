"""Datasets in the layouts that people have, read into one class, `DetectionDataset`.

`opening` finds the layout. Each layout has its file (`voc`, `coco`, `yolo`) and fills the same `columns`, of which
`dataset` is made. `images` decodes, `split` divides a dataset without splits, `check` lists what is wrong with one.

Opening a dataset reads and checks all annotations of one split. Images are decoded later, one by one, when an item is
read.
"""

from ssdcore.data.dataset import DetectionDataset
from ssdcore.data.images import IMAGE_SUFFIXES, read_rgb
from ssdcore.data.opening import available_splits, make_split, open_dataset
from ssdcore.data.voc import VOC_CLASSES
from ssdcore.objects import Target

__all__ = [
    "IMAGE_SUFFIXES",
    "VOC_CLASSES",
    "DetectionDataset",
    "Target",
    "available_splits",
    "make_split",
    "open_dataset",
    "read_rgb",
]
