"""Train a model: from a dataset to `model.safetensors`, a record of the run, and states from which to resume it."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdcore.augmentations import AUGMENTATIONS
from ssdcore.data import DetectionDataset
from ssdcore.detect import detect_dataset
from ssdcore.evaluate import evaluate_detections
from ssdcore.models import SSD
from ssdcore.objects import Target
from ssdcore.train.config import TrainConfig
from ssdcore.train.distributed import Group, group
from ssdcore.train.ema import MovingAverage
from ssdcore.train.freeze import freeze
from ssdcore.train.optimizer import make_optimizer
from ssdcore.train.progress import Progress
from ssdcore.train.recipes import anchors_for, own_recipe
from ssdcore.train.record import BEST_EPOCH_METRIC, Clock, Journal, Sums, best_epoch, write_record
from ssdcore.train.samples import sample_picture
from ssdcore.train.schedule import lr_at
from ssdcore.train.signals import StopRequest, Terminated, listening
from ssdcore.train.state import read_state, state_files, write_state
from ssdcore.train.step import NotFiniteError, Stepper, fast_backends, precision_on
from ssdcore.train.stream import batches, file_names, limited
from ssdcore.weights import description, save_weights, write_atomically

# Epochs that are scored at most, unless `validate_every` says otherwise. The longest published recipes have 120.
MAX_SCORED_EPOCHS = 120
# Seconds that pass at least between two times that metrics.json, loss.png and, without a validation split, the weights
# are written. On a small dataset, a GPU needs less time for an epoch than that takes.
WRITE_SECONDS = 20.0


def fit(
    model: SSD,
    train_set: DetectionDataset,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    val_set: DetectionDataset | None = None,
    workers: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Train `model` and record the run in the folder `output`.

    The folder contains:

    - `model.safetensors`: the weights of the epoch with the highest AP50 on `val_set`, the first of several equal
      ones. Without `val_set`, the weights of the last epoch. With `ema`, the averaged weights.
    - `metrics.json`: the value that this function returns, and `loss.png`, a plot of the losses.
    - `metrics.jsonl`: a line for every `log_steps` steps, `"kind": "steps"`, and for every epoch, `"kind": "epoch"`.
    - `config.json`: the configuration, and events for TensorBoard, with sample detections beside the annotations.
    - `last.pt`: the state after a step, from which to resume; `last-1.pt` and so on are the ones before it.

    A state is written after the first step, then whenever `checkpoint_seconds` have passed, with the weights of each
    epoch that scores best so far, and at the end. Each file is replaced as a whole, so that a run that is killed at any
    moment leaves valid files. A resumed run ends with the weights of an uninterrupted run, bit-identical on a CPU with
    the same number of threads and processes.

    If torch.distributed is initialised, its processes train together: each calls this function with the same arguments
    and its own device. Process 0 writes the files. A run may be resumed with another number of processes.

    Objects with `ignore` set are not trained on.

    Args:
        model: any of `MODELS`. It is moved to `device`, and has the weights of the last step afterwards, averaged with
            `ema`.
        train_set: the images to train on. Its transform is replaced by the augmentation.
        output: a folder without a run; or, with `resume`, the folder of an interrupted run with the same settings.
        config: by default the model's own recipe.
        val_set: scored after every `validate_every` epochs and after the last, if given.
        workers: processes that decode and augment images; 0 does it in this process.
        device: where to train.
        resume: continue from `last.pt`, or from the state before it if that file is damaged.
        quiet: show neither a progress bar nor the score of each epoch.
        changes: values of `TrainConfig` that replace those of `config`.

    Returns:
        A dict that can be written as JSON: `settings`; `epochs`, with the mean losses, the last step and its learning
        rate, the seconds, the speed and, where it was scored, the metrics of every epoch; `best`, the number of the
        epoch whose weights are in `model.safetensors`, counted from 1; and `unreadable`, the image files that could not
        be read and were replaced by others, because the datasets are not `strict`. Each process lists its own.

    Raises:
        ValueError: a setting is out of range; there are no images; `output` contains a run but `resume` is not set;
            or `resume` is set, but `output` contains no run or one with other settings.
        FloatingPointError: a loss or a gradient is not finite. The message names the step, its images and the tensor.
            No step after the last state has changed any file.
        Terminated: SIGTERM arrived, and the state has been written. It is a SystemExit with code 143.
        OSError: a file cannot be written. Earlier files remain.
    """
    config = (config or own_recipe(model.name)).changed(**changes)
    device = torch.device(device)
    run = _Run(model, train_set, Path(output), replace(config, model=model.name), val_set, workers, device, quiet)
    precision = precision_on(device, config.precision)
    with listening() as request, fast_backends(tf32=precision != "fp32"):
        run.start(resume)
        try:
            run.train(request)
        finally:
            run.close()
    return run.record()


class _Run:
    """A run and everything that its state consists of."""

    def __init__(
        self,
        model: SSD,
        train_set: DetectionDataset,
        output: Path,
        config: TrainConfig,
        val_set: DetectionDataset | None,
        workers: int,
        device: torch.device,
        quiet: bool,
    ) -> None:
        self.model, self.output, self.val_set = model, output, val_set
        self.workers, self.device = workers, device
        self.processes = group()
        self.quiet = quiet or not self.processes.leads
        self.train_set = limited(train_set, config.limit, config.seed)
        self.config = with_whole_batches(config, len(self.train_set), self.processes)
        self.steps_per_epoch = self.config.steps_per_epoch(len(self.train_set))
        self.steps = self.config.total_steps(len(self.train_set))
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        self.settings = self._settings()
        self.step = 0  # steps that are done
        self.history: list[dict[str, Any]] = []  # the records of the epochs that are done
        self.part = Sums()  # of the epoch that has begun
        self.logged = Sums()  # since the last line of metrics.jsonl

    def _settings(self) -> dict[str, Any]:
        """Everything that the result of a run depends on."""
        described = description(self.model, self.train_set.classes, self.train_set.category_ids)
        del described["postprocess"]  # it may be changed at any time, and a run that began without it can be resumed
        return {
            **self.config.to_json(),
            **described,
            "images": len(self.train_set),
            "val_images": 0 if self.val_set is None else len(self.val_set),
            "epochs": self.epochs,
            "steps": self.steps,
            "lr": self.config.scaled_lr,
            "precision": precision_on(self.device, self.config.precision),
        }

    def start(self, resume: bool) -> None:
        """Prepare the model and everything around it, of a new run or of the one in `output`."""
        config, model, processes = self.config, self.model, self.processes
        state = processes.shared(self._state_to_resume(resume) if processes.leads else None)
        if config.anchors is not None:
            expected = anchors_for(config.anchors, model.anchor_config.image_size)
            if model.anchor_config != expected:
                raise ValueError(f"anchors must be those of the model, {model.anchor_config}, got {config.anchors!r}")
        model.normalizer = config.normalizer
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(self.device).to(memory_format=layout)
        self.frozen_norms = freeze(model, config.freeze)
        if state is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in state["trained"])
            self.frozen_norms = freeze(model, None)
            model.load_state_dict(state["model"])
        if config.sync_bn and processes.size > 1:
            if self.device.type != "cuda":
                raise ValueError("sync-bn must be off on a CPU: PyTorch synchronises batch normalisation on GPUs only")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
            self.frozen_norms = freeze(model, None)
        self.average = MovingAverage(model, config.ema) if config.ema else None
        self.optimizer = make_optimizer(model, config)
        self.stepper = Stepper(model, self.optimizer, config, processes)
        if state is not None:
            self._load(state)
        self.train_set.transform = AUGMENTATIONS[config.augmentation](model.anchor_config.image_size)
        self.checkpoint_clock, self.write_clock = Clock(config.checkpoint_seconds), Clock(WRITE_SECONDS)
        self.journal: Journal | None = None
        if processes.leads:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomically(self.output / "config.json", json.dumps(config.to_json(), indent=2).encode())
            self.journal = Journal(self.output, self.step, len(self.history))
        self.progress = Progress(self.step, self.steps, config.batch_size, self.quiet)

    def _state_to_resume(self, resume: bool) -> dict[str, Any] | None:
        if resume:
            return read_state(self.output, self.settings)
        if state_files(self.output):
            raise ValueError(f"{self.output} contains a run already: resume it, or choose another folder")
        return None

    def state(self) -> dict[str, Any]:
        """Everything that is needed to resume the run."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "trained": [name for name, parameter in self.model.named_parameters() if parameter.requires_grad],
            "settings": self.settings,
            "history": self.history,
            "step": self.step,
            "part": self.part.values,
            "logged": self.logged.values,
        }

    def _load(self, state: dict[str, Any]) -> None:
        """Load what `state` returned, except the model."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.history = state["step"], state["history"]
        self.part, self.logged = Sums(state["part"]), Sums(state["logged"])

    def close(self) -> None:
        self.progress.close()
        if self.journal is not None:
            self.journal.close()

    def train(self, request: StopRequest) -> None:
        """Train from the present step to the last."""
        loader = batches(
            self.train_set,
            self.config,
            range(self.step, self.steps),
            self.processes.rank,
            self.processes.size,
            self.workers,
            self.device.type == "cuda",
        )
        self._enter_training()
        while True:
            # A run may also be resumed where an epoch has been trained and not yet scored.
            if len(self.history) < math.ceil(self.step / self.steps_per_epoch) and self._at_end_of_epoch():
                self._finish_epoch(request)
                self._write_state()
            if self.step == self.steps:
                break
            started = time.perf_counter()
            try:
                images, targets = next(loader)
            except RuntimeError:
                # SIGTERM may also have ended a worker, if it was sent to each process.
                if not request.arrived:
                    raise
                self._stop()
            stop = self._train_step(images, targets, started, request)
            if stop:
                self._stop()  # a resumed run scores the epoch, if this was its last step
            if self._at_end_of_epoch():
                self._finish_epoch(request)
            if self.checkpoint_clock.is_due() or self.step == self.steps:
                self._write_state()
        if self.average is not None:
            self.model.load_state_dict(self.average.model.state_dict())

    def _train_step(self, images: Tensor, targets: list[Target], started: float, request: StopRequest) -> bool:
        """Take one step with a batch, and note what it found. Return whether the run has been asked to stop."""
        waited = time.perf_counter() - started
        lr = lr_at(self.config, self.step, self.steps)
        try:
            result = self.stepper.step(self.step, lr, images, targets, request.arrived)
        except NotFiniteError as error:
            raise FloatingPointError(self._describe(error, targets, lr)) from error
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        seconds = time.perf_counter() - started
        found = {
            "classification": result.classification,
            "bbox_regression": result.bbox_regression,
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "waited": waited,
        }
        self.part.add(**found)
        self.logged.add(**found)
        epoch = math.ceil(self.step / self.steps_per_epoch)
        loss = result.classification + result.bbox_regression
        self.progress.step(self.step, f"{epoch}/{self.epochs}", loss, seconds, waited)
        if self.step % self.config.log_steps == 0:
            if self.journal is not None:
                line = {"step": self.step, "epoch": epoch, "lr": lr, **self.logged.means(self.config.batch_size)}
                self.journal.steps(line)
            self.logged = Sums()
        return result.stop

    def _describe(self, error: NotFiniteError, targets: list[Target], lr: float) -> str:
        """The message for a step that is not finite."""
        found = self.processes.gathered((error.tensor, file_names(self.train_set, targets)))
        tensors = [tensor for tensor, _ in found if tensor is not None] or ["a sum of finite numbers"]
        names = [name for _, share in found for name in share]
        states = state_files(self.output)
        return (
            f"the loss and its gradient must be finite, got the losses {error.losses} in epoch "
            f"{self.step // self.steps_per_epoch + 1}, batch {self.step % self.steps_per_epoch + 1} "
            f"(step {self.step + 1}), with images {', '.join(names)}; the first tensor that is not finite is "
            f"{tensors[0]}; use a learning rate below {lr:.2g}, or check these images and their annotations"
            + (f"; {states[0]} is the state before it" if states else "")
        )

    def _at_end_of_epoch(self) -> bool:
        return self.step % self.steps_per_epoch == 0 or self.step == self.steps

    def _finish_epoch(self, request: StopRequest) -> None:
        """Score the model if it is time, and write the record of the epoch and, if it is the best one, the weights."""
        epoch = len(self.history) + 1
        means = self.part.means(self.config.batch_size)
        epoch_record = {
            "epoch": epoch,
            "step": self.step,
            **means,
            "lr": lr_at(self.config, self.step - 1, self.steps),
            "seconds": round(self.part.values["seconds"], 2),
        }
        every = self.config.validate_every or math.ceil(self.epochs / MAX_SCORED_EPOCHS)
        due = self.val_set is not None and (epoch % every == 0 or epoch == self.epochs)
        if due:
            try:
                with request.at_once():
                    epoch_record["val"] = self._score(epoch)
            except (Terminated, RuntimeError):
                # Another process may have been asked to stop, and be gone. No step is being computed.
                if not request.arrived:
                    self._write_state()
                    raise
                self._stop()
        self.history.append(epoch_record)
        self.part = Sums()
        if self.journal is None:
            return
        self.journal.epoch(epoch_record)
        write_due = self.write_clock.is_due() or epoch == self.epochs
        if best_epoch(self.history) == epoch and (write_due or due):
            saved = self.model if self.average is None else self.average.model
            save_weights(saved, self.output / "model.safetensors", self.train_set.classes, self.train_set.category_ids)
            if due:
                # A run that is resumed from an older state might repeat this epoch with another score.
                self._write_state()
        if write_due:
            write_record(self.output, self.record())

    def record(self) -> dict[str, Any]:
        """The value that `fit` returns."""
        sets = [self.train_set] + ([] if self.val_set is None else [self.val_set])
        shares = [dataset.unreadable for dataset in sets]
        unreadable = list(dict.fromkeys(file for share in shares for file in share))
        return {
            "settings": self.settings,
            "epochs": self.history,
            "best": best_epoch(self.history),
            "unreadable": unreadable,
        }

    def _score(self, epoch: int) -> dict[str, Any]:
        """The metrics on the validation split, of which every process detects objects in its own images."""
        assert self.val_set is not None
        model = self.model if self.average is None else self.average.model
        for buffer in model.buffers():  # statistics of what each process has seen; process 0 saves its own
            self.processes.copy_first(buffer)
        own = range(self.processes.rank, len(self.val_set), self.processes.size)
        shares = self.processes.gathered(
            detect_dataset(model, self.val_set, indices=own, workers=self.workers, quiet=True)
        )
        metrics: dict[str, Any] = {}
        if self.journal is not None:
            found = {image_id: objects for share in shares for image_id, objects in share.items()}
            # In the order of the dataset, however many processes there are. Unreadable images are missing.
            detected = {i: found[i] for i in self.val_set.image_ids.tolist() if i in found}
            metrics = evaluate_detections(self.val_set, detected, quiet=True)
            score = metrics[BEST_EPOCH_METRIC] or 0.0
            self.progress.say(f"epoch {epoch}: {BEST_EPOCH_METRIC} {score:.3f} on {self.val_set.split}")
            self.journal.picture("annotated and detected", sample_picture(self.val_set, detected), self.step)
        self._enter_training()
        return self.processes.shared(metrics)

    def _enter_training(self) -> None:
        self.model.train()
        for layer in self.frozen_norms:
            layer.eval()

    def _write_state(self) -> None:
        if self.processes.leads:
            write_state(self.output, self.state(), self.config.keep)
            self.checkpoint_clock.restart()

    def _stop(self) -> None:
        """Write the state and end the run."""
        self._write_state()
        raise Terminated(f"stopped by SIGTERM after step {self.step} of {self.steps}; {self.output} contains the run")


def with_whole_batches(config: TrainConfig, images: int, processes: Group) -> TrainConfig:
    """The configuration with a batch size that the images fill and that the processes can share."""
    if images == 0:
        raise ValueError("images must be positive, got 0")
    parts = processes.size * config.accumulate
    if images < config.batch_size:
        config = replace(config, batch_size=max(parts, images // parts * parts))
    if config.batch_size % parts or config.batch_size > images:
        raise ValueError(
            f"batch_size must be a multiple of the {parts} parts of a batch ({processes.size} processes times "
            f"accumulate {config.accumulate}) and at most the {images} images, got {config.batch_size}"
        )
    return config
