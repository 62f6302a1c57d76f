"""What `test_train_distributed.py` runs in several processes: `torchrun ... processes.py DATA OUTPUT [score]`."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toy import CONFIG, toy_model, toy_run

from ssdcore.cli.training import train
from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.train.distributed import joined

# Batch normalisation is frozen and nothing is dropped, because otherwise each process computes with its own share.
EQUAL = CONFIG.changed(batch_size=8, epochs=3, freeze="batchnorm", ema=0.9)
SCORED = EQUAL.changed(checkpoint_seconds=1e9)
KILLED = EQUAL.changed(epochs=40, checkpoint_seconds=0)


def model_without_chance() -> Any:
    model = toy_model()
    model.backbone.second[-1].p = 0.0
    return model


def broken_in_one_process() -> Any:
    model = model_without_chance()
    if dist.get_rank() == 1:
        model.backbone.second[1].register_forward_hook(lambda _layer, _inputs, output: output * torch.nan)
    return model


class Terminating(DetectionDataset):
    """Sends SIGTERM to process 1 when it reads an image for the second score."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if dist.get_rank() == 1 and self.reads > 2:  # two of the five images are its own
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def score(data: Path, output: Path) -> None:
    """A run of which one process is asked to stop while all are scoring."""
    val_set = open_dataset(data, "val")
    val_set.__class__ = Terminating
    toy_run(data, output, SCORED, model=model_without_chance(), val_set=val_set)


class Recorder:
    """Counts how often each image of a dataset is read by this process."""

    def __init__(self, data: Path) -> None:
        self.dataset = open_dataset(data, "val")
        self.read: list[int] = []
        target = self.dataset.target
        self.dataset.target = lambda index: self.read.append(index) or target(index)  # type: ignore[method-assign]


def main(data: Path, output: Path) -> None:
    train(data, "ssd300_tiny", output / "command", epochs=1, batch_size=4, device="cpu", workers=0, limit=4)
    try:
        toy_run(data, output / "sync_bn", EQUAL, sync_bn=True)
    except ValueError as error:
        print(error, flush=True)
    try:
        toy_run(data, output / "nan", EQUAL, model=broken_in_one_process())
    except FloatingPointError as error:
        (output / f"nan-{dist.get_rank()}").write_text(str(error))
    for normalizer in ("batch", "image"):
        for accumulate in (1, 2):
            config = EQUAL.changed(normalizer=normalizer, accumulate=accumulate)
            folder = output / f"{normalizer}-{accumulate}"
            toy_run(data, folder, config, model=model_without_chance(), validate=True)
    rank = dist.get_rank()
    free = model_without_chance()
    toy_run(data, output / "free", replace(EQUAL, freeze=None, epochs=1), model=free, validate=True)
    torch.save(free.state_dict(), output / f"free-{rank}.pt")
    recorder = Recorder(data)
    toy_run(data, output / "read", EQUAL, epochs=1, val_set=recorder.dataset)
    (output / f"read-{rank}.json").write_text(json.dumps(recorder.read))
    (output / f"pid-{rank}").write_text(str(os.getpid()))
    while not (output / "pid-1").exists():
        time.sleep(0.01)
    toy_run(data, output / "killed", KILLED, model=model_without_chance())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        (score if "score" in sys.argv else main)(Path(sys.argv[1]), Path(sys.argv[2]))
