"""The images of one split with their objects, as a dataset for PyTorch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from ssdcore.data.columns import Annotations
from ssdcore.data.images import Inspection, inspect_image, read_rgb
from ssdcore.objects import Target


class DetectionDataset(Dataset[tuple[Any, Target]]):
    """The images of one split with their annotated objects. `open_dataset` creates it.

    Item `i` is the pair `(image, target)`, passed through `transform` if one is set. `image` is a `tv_tensors.Image`
    uint8 [3, H, W] in RGB, whichever mode the file has (see `ssdcore.data.images`). `target` is a dict of

    - `boxes`: `tv_tensors.BoundingBoxes` float32 [G, 4] xyxy in pixels of the image, with canvas_size (H, W);
    - `labels`: int64 [G]; label k is `classes[k - 1]`. Label 0 is the background and never occurs;
    - `ignore`: bool [G]; VOC's "difficult", COCO's "iscrowd";
    - `image_id`: int; COCO's own id, or elsewhere the index of the image in the split.

    Images without objects are included, with G = 0. Box coordinates are those of the annotation file. Pascal VOC counts
    pixels from 1 and includes both ends. As in torchvision, nothing is subtracted, so VOC boxes lie half a pixel off
    centre and are one pixel too small.

    An image that cannot be read, or whose size is not the annotated one, is an error if `strict` is set. Otherwise the
    next readable image takes its place, with its own target: item i + 1, i + 2, ..., and after the last item the first.
    So every run reads the same items. A warning names each such file once, and `unreadable` lists them.

    The annotations are stored in a few flat tensors rather than in one Python object per image, so that DataLoader
    workers share their memory. Python objects would be copied page by page, because reading them changes their
    reference counts.

    Attributes:
        root: the folder that contains the images and annotations.
        split: the name of the split.
        classes: class names in the order of their labels.
        category_ids: the id of each class in the annotation file: COCO's category ids, YOLO's class numbers, or 1..n in
            VOC. Classes that the file does not define get the ids after its largest one.
        image_ids: int64 [N], the `image_id` of every image.
        strict: whether an image that cannot be read is an error. It may be set at any time.
        transform: None, or a callable `(image, target) -> (image, target)`. It may be set at any time.
    """

    def __init__(self, split: str, annotations: Annotations) -> None:
        columns = annotations.columns
        self.root = annotations.root
        self.split = split
        self.classes = tuple(annotations.classes)
        self.category_ids = tuple(annotations.category_ids)
        self.strict = True
        self.transform: Callable[[Any, Target], tuple[Any, Target]] | None = None
        self.image_ids = torch.tensor(columns.image_ids, dtype=torch.int64)
        self._upright = annotations.upright
        self._problems = columns.problems
        self._files = np.array(columns.files, dtype=np.str_)  # [N], relative to root
        self._sizes = torch.tensor(columns.sizes, dtype=torch.int64).reshape(-1, 2)  # [N, 2] h, w
        self._offsets = torch.tensor(np.cumsum([0, *columns.counts]), dtype=torch.int64)  # [N + 1]
        self._boxes = torch.tensor(columns.boxes, dtype=torch.float32).reshape(-1, 4)  # [T, 4] xyxy
        self._labels = torch.tensor(columns.labels, dtype=torch.int64)
        self._ignore = torch.tensor(columns.ignore, dtype=torch.bool)
        self._areas = torch.tensor(columns.areas, dtype=torch.float64)
        # Images that could not be read so far, [N]. Shared with the DataLoader's workers, because they find them.
        self._unreadable = torch.zeros(len(columns.files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, Target]:
        """Read image `index` and its target.

        The image is turned as its EXIF orientation says, unless it already has the annotated size. (In YOLO's layout it
        is always turned, because its boxes are fractions of the upright image.)

        Raises:
            ValueError: the image cannot be decoded, or its size is not the annotated size, and `strict` is set or no
                other image can be read either. The message names the file.
        """
        image, target = self._read(index) if self.strict else self._read_next(index)
        if self.transform is not None:
            return self.transform(image, target)
        return image, target

    @property
    def files(self) -> list[str]:
        """The image files relative to `root`, with "/" between folders."""
        return self._files.tolist()

    @property
    def problems(self) -> list[str]:
        """One line for each problem in the annotations, which names the file and what was done about it."""
        return [text for _, text in self._problems]

    def add_problem(self, text: str) -> None:
        """Report a problem that concerns the whole split."""
        self._problems = [*self._problems, (None, text)]

    @property
    def unreadable(self) -> list[str]:
        """The image files that could not be read so far, relative to `root`, also if workers read them."""
        return self._files[self._unreadable.numpy()].tolist()

    def subset(self, indices: Sequence[int]) -> DetectionDataset:
        """Return a dataset of the images `indices`, in this order, without the problems of other images.

        The images keep their `image_id`. `strict` and `transform` are those of this dataset.
        """
        kept = torch.tensor(list(indices), dtype=torch.int64)
        num_objects = self._offsets.diff()[kept]
        offsets = torch.tensor([0, *num_objects.cumsum(0).tolist()])
        shifts = (self._offsets[kept] - offsets[:-1]).repeat_interleave(num_objects)  # from new to old rows
        rows = torch.arange(len(shifts)) + shifts
        new_index = {index: number for number, index in enumerate(kept.tolist())}
        subset = copy.copy(self)
        subset.image_ids = self.image_ids[kept]
        subset._files = self._files[kept.numpy()]
        subset._sizes = self._sizes[kept]
        subset._offsets = offsets
        for name in ("_boxes", "_labels", "_ignore", "_areas"):
            setattr(subset, name, getattr(self, name)[rows])
        subset._problems = [
            (None if index is None else new_index[index], text)
            for index, text in self._problems
            if index is None or index in new_index
        ]
        subset._unreadable = self._unreadable[kept].share_memory_()
        return subset

    def indices_to_train_on(self, keep_empty: bool = False) -> list[int]:
        """Return the indices of the images that teach a detector something.

        These are the images with objects, as in the SSD paper, whose loss leaves out an image without objects: the
        number of mined negatives is a multiple of the number of positives. With `keep_empty` also the images in which
        nothing is annotated. They need a model whose `min_negatives` is not 0. An image whose objects are all ignored
        (crowds, difficult objects) is never included: its negatives would be mined among these objects.
        """
        num_objects = self._offsets.diff()
        image_of_object = torch.arange(len(self)).repeat_interleave(num_objects)
        num_trained = torch.zeros_like(num_objects).index_add_(0, image_of_object, (~self._ignore).long())
        included = (num_trained > 0) | (num_objects == 0) if keep_empty else num_trained > 0
        return included.nonzero().flatten().tolist()

    def image_path(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.root / str(self._files[index])

    def image_size(self, index: int) -> tuple[int, int]:
        """Return the annotated (height, width) of image `index` in pixels, without reading the image."""
        height, width = self._sizes[index].tolist()
        return height, width

    def target(self, index: int) -> Target:
        """Return a copy of the target of image `index` before any transform, without reading the image."""
        objects = self._objects(index)
        boxes = self._boxes[objects].clone()
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.image_size(index)),
            "labels": self._labels[objects].clone(),
            "ignore": self._ignore[objects].clone(),
            "image_id": int(self.image_ids[index]),
        }

    def areas(self, index: int) -> Tensor:
        """Return the areas of the objects of image `index` in square pixels, float64 [G].

        COCO's metrics call an object small, medium or large by this area. It is the `area` of the annotation (in COCO,
        the area of the object's mask), or the area of the box if the annotation has none.
        """
        return self._areas[self._objects(index)].clone()

    def _objects(self, index: int) -> slice:
        index = range(len(self))[index]  # accepts negative indices, and raises IndexError past the end
        return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

    def inspect(self, index: int) -> Inspection:
        """Decode image `index` and return what is known of its file.

        Raises:
            ValueError: as in `dataset[index]` with `strict`.
        """
        path = self.image_path(index)
        inspection = inspect_image(path, self._size_not_to_turn(index))
        self._require_annotated_size(index, inspection.size)
        return inspection

    def _read(self, index: int) -> tuple[Any, Target]:
        target = self.target(index)
        image = read_rgb(self.image_path(index), self._size_not_to_turn(index))
        self._require_annotated_size(index, (image.height, image.width))
        return F.to_image(image), target

    def _read_next(self, index: int) -> tuple[Any, Target]:
        """The first item from `index` on that can be read."""
        index = range(len(self))[index]
        first_error = None
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            try:
                return self._read(candidate)
            except ValueError as error:
                first_error = first_error or error
                if not self._unreadable[candidate]:
                    self._unreadable[candidate] = True
                    warnings.warn(f"{error}; the next readable image takes its place", stacklevel=3)
        raise ValueError(f"no image of {self.split} can be read; the first: {first_error}")

    def _size_not_to_turn(self, index: int) -> tuple[int, int] | None:
        """The stored size of a file that is not turned upright."""
        return None if self._upright else self.image_size(index)

    def _require_annotated_size(self, index: int, size: tuple[int, int]) -> None:
        height, width = self.image_size(index)
        if size != (height, width):
            raise ValueError(
                f"{self.image_path(index)}: annotated as {width} x {height} pixels, but has {size[1]} x {size[0]}"
            )
