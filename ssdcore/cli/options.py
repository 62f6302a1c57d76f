"""What several commands share: options, opening a dataset, choosing a device."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssdcore.cores import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ssdcore.data import DetectionDataset

MAX_PROBLEMS = 3  # problems of a dataset that are printed


def option(help_text: str, **constraints: Any) -> Any:
    """An option without a default value to show, because its help text describes the default."""
    return typer.Option(help=help_text, show_default=False, **constraints)


Data = Annotated[Path, typer.Option(help="Dataset folder: COCO, YOLO, Pascal VOC, or images with XML files.")]
Weights = Annotated[Path, typer.Option(help="Path of a trained model's model.safetensors.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto. auto uses cuda if there is a GPU.")]
Workers = Annotated[
    int | None,
    option("Number of processes that read and augment images. Default: half the CPU cores, at most 8.", min=0),
]


def score_text(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def open_split(
    data: Path, split: str, classes: "Sequence[str] | None" = None, *, split_file: Path | None = None
) -> "DetectionDataset":
    """Open a split, and print the first problems in its annotations."""
    from ssdcore.data import open_dataset

    dataset = open_dataset(data, split, classes, split_file=split_file)
    if dataset.problems:
        count = len(dataset.problems)
        print(f"{count} problem{'s' if count > 1 else ''} in {split} of {data}:")
        print("\n".join(f"  {problem}" for problem in dataset.problems[:MAX_PROBLEMS]))
        if count > MAX_PROBLEMS:
            print(f"  and {count - MAX_PROBLEMS} more: `ssdcore data check {data}` lists all")
    return dataset


def require_model(name: str) -> None:
    from ssdcore.models import MODELS

    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")


def find_device(name: str) -> "torch.device":
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto, got cuda: PyTorch finds no GPU that it can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def share_cores(workers: int | None) -> int:
    """Divide the CPU cores of this process between workers and PyTorch's threads. Return the number of workers.

    PyTorch gets only the cores that the workers leave free. Its threads wait for one another in every layer, so that
    training becomes up to twenty times slower if another process uses the core of one of them.
    """
    import torch

    from ssdcore.train.distributed import local_processes

    cores = max(1, usable_cores() // local_processes())
    if workers is None:
        workers = min(8, cores // 2)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    return workers


def write_json(path: Path, content: object) -> None:
    from ssdcore.weights import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2).encode())
