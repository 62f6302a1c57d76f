"""What a run writes for people and programs: metrics.json, metrics.jsonl, loss.png and events for TensorBoard."""

import json
import math
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ssdcore.weights import write_atomically

BEST_EPOCH_METRIC = "AP50"  # the epoch with the highest value on the validation split provides the weights of the run
LINES = "metrics.jsonl"


class Journal:
    """metrics.jsonl and TensorBoard's events. A resumed run first removes what it will write again."""

    def __init__(self, output: Path, step: int, epochs: int) -> None:
        self.path = output / LINES
        kept = []
        for text in self.path.read_text().splitlines(keepends=True) if self.path.exists() else []:
            if not text.endswith("\n"):
                break  # the run was killed while it wrote this line
            line = json.loads(text)
            if line["step"] <= step and (line["kind"] != "epoch" or line["epoch"] <= epochs):
                kept.append(text)
        write_atomically(self.path, "".join(kept).encode())
        self.events = SummaryWriter(output, purge_step=step + 1)

    def steps(self, line: dict[str, Any]) -> None:
        """Write the means over some steps."""
        self._write({"kind": "steps", **line})
        for name, value in line.items():
            if name not in ("step", "epoch") and value is not None:
                self.events.add_scalar(f"train/{name}", value, line["step"])

    def epoch(self, line: dict[str, Any]) -> None:
        """Write the record of an epoch."""
        self._write({"kind": "epoch", **line})
        for name, value in line.get("val", {}).items():
            if isinstance(value, float):
                self.events.add_scalar(f"val/{name}", value, line["step"])

    def picture(self, name: str, picture: Tensor, step: int) -> None:
        """Write a picture, uint8 [3, H, W]."""
        self.events.add_image(name, picture, step)

    def close(self) -> None:
        self.events.close()

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Sums:
    """Sums over some steps, from which their means are computed. They are part of the state of a run."""

    def __init__(self, values: dict[str, float] | None = None) -> None:
        names = ("steps", "classification", "bbox_regression", "grad_norm", "seconds", "waited")
        self.values = values or dict.fromkeys(names, 0.0)

    def add(self, **values: float) -> None:
        self.values["steps"] += 1
        for name, value in values.items():
            self.values[name] += value

    def means(self, images: int) -> dict[str, Any]:
        """The mean losses and the speed, where each step has `images` images."""
        values, steps = self.values, max(1.0, self.values["steps"])
        grad_norm = values["grad_norm"] / steps
        return {
            "classification": values["classification"] / steps,
            "bbox_regression": values["bbox_regression"] / steps,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16 overflows now and then
            "images_per_s": round(values["steps"] * images / max(values["seconds"], 1e-9), 2),
            "data_wait": round(values["waited"] / max(values["seconds"], 1e-9), 4),
        }


class Clock:
    """Says whether some seconds have passed since it said so last. The first time they have."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = -math.inf

    def is_due(self) -> bool:
        due = time.monotonic() - self.last >= self.seconds
        if due:
            self.restart()
        return due

    def restart(self) -> None:
        self.last = time.monotonic()


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch with the highest AP50, counted from 1; without a validation split, the last epoch."""
    scored = [epoch_record for epoch_record in history if "val" in epoch_record]
    if not scored:
        return len(history)
    # None without any objects. `max` returns the first of equal ones.
    best = max(scored, key=lambda epoch_record: epoch_record["val"][BEST_EPOCH_METRIC] or 0.0)
    return int(best["epoch"])


def write_record(output: Path, content: dict[str, Any]) -> None:
    """Write metrics.json and loss.png."""
    write_atomically(output / "metrics.json", json.dumps(content, indent=2).encode())
    history = content["epochs"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    epochs = [epoch_record["epoch"] for epoch_record in history]
    for name in ("classification", "bbox_regression"):
        axes.plot(epochs, [epoch_record[name] for epoch_record in history], label=name)
    scored = [epoch_record for epoch_record in history if "val" in epoch_record]
    if scored:
        right = axes.twinx()
        right.set(ylabel=f"{BEST_EPOCH_METRIC} on the validation split", ylim=(0, 1))
        scores = [epoch_record["val"][BEST_EPOCH_METRIC] for epoch_record in scored]
        right.plot([epoch_record["epoch"] for epoch_record in scored], scores, "k--", label=BEST_EPOCH_METRIC)
    axes.legend()
    figure.savefig(output / "loss.png", dpi=120)
