"""The order of the images and their augmentation, which depend only on the seed and on the number of the step."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssdcore.data import DetectionDataset
from ssdcore.objects import Target
from ssdcore.train.config import TrainConfig
from ssdcore.train.signals import leave_process_group
from ssdcore.transforms import collate

SEED_MULTIPLIER = 0x9E3779B1  # a prime near 2**32 / golden ratio, from Knuth's multiplicative hashing
LIMIT_SALT = 0x51ED2701  # any number; separates the seed of `limited` from those of the epochs


def limited(dataset: DetectionDataset, limit: int | None, seed: int) -> DetectionDataset:
    """The images to train on: all, or `limit` that the seed chooses, in the order of the dataset."""
    if limit is None or limit >= len(dataset):
        return dataset
    generator = torch.Generator().manual_seed(mixed_seed(seed, LIMIT_SALT))
    return dataset.subset(sorted(torch.randperm(len(dataset), generator=generator)[:limit].tolist()))


def mixed_seed(seed: int, number: int) -> int:
    """Combine the seed of a run and the number of an epoch, item or step into one 32-bit seed."""
    return (seed * SEED_MULTIPLIER + number) & 0xFFFFFFFF


class Stream(Dataset[tuple[Any, Target]]):
    """The images of all epochs in one sequence. Item n is image n % N of epoch n // N, in that epoch's random order.

    Order and augmentation depend only on the seed and n. Therefore a resumed run continues exactly where the
    interrupted one stopped, the number of workers and of processes does not change the result, and workers can read
    images of the next epoch while the current one is scored.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = -1
        self.order: list[int] = []

    def __getitem__(self, n: int) -> tuple[Any, Target]:
        epoch, index = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self.order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self.epoch = epoch
        torch.default_generator.manual_seed(mixed_seed(self.seed, n))  # the augmentation uses this generator
        return self.dataset[self.order[index]]


class Shares(Sampler[list[int]]):
    """The item numbers of a `Stream` for one process, step by step: its equal share of each batch.

    Images that do not fill a batch are left out of their epoch.
    """

    def __init__(self, images: int, batch_size: int, steps: range, rank: int = 0, processes: int = 1) -> None:
        self.images, self.batch_size, self.steps = images, batch_size, steps
        self.share = batch_size // processes
        self.first_of_share = rank * self.share

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.images // self.batch_size
        for step in self.steps:
            epoch, batch = divmod(step, per_epoch)
            first = epoch * self.images + batch * self.batch_size + self.first_of_share
            yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return len(self.steps)


def batches(
    dataset: DetectionDataset,
    config: TrainConfig,
    steps: range,
    rank: int,
    processes: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, list[Target]]]:
    """This process's share of the batch of each of `steps`."""
    return iter(
        DataLoader(
            Stream(dataset, config.seed),
            batch_sampler=Shares(len(dataset), config.batch_size, steps, rank, processes),
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            worker_init_fn=leave_process_group,
        )
    )


def file_names(dataset: DetectionDataset, targets: Sequence[Target]) -> list[str]:
    """The names of the image files of a batch."""
    index_of = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    return [dataset.image_path(index_of[int(target["image_id"])]).name for target in targets]
