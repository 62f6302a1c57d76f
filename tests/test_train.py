"""Training leaves the promised files, has the documented order of images, and stops with a clear error."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from toy import CONFIG, toy_data, toy_model, toy_run

from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.evaluate import evaluate_detections
from ssdcore.models import MODELS, SSD, ssd300_tiny
from ssdcore.train.config import load_config
from ssdcore.train.loop import fit
from ssdcore.train.record import best_epoch
from ssdcore.train.stream import Stream, limited
from ssdcore.transforms import train_transform
from ssdcore.weights import load_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("data") / "shapes")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_the_documented_files(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "custom", lambda num_classes, **options: toy_model(num_classes, **options))
    run = tmp_path / "run"
    record = toy_run(shapes, run, validate=True, epochs=3, log_steps=2)
    assert json.loads((run / "metrics.json").read_text()) == record
    epochs = record["epochs"]
    assert [(e["epoch"], e["step"]) for e in epochs] == [(1, 2), (2, 4), (3, 6)]
    assert all(math.isfinite(e["classification"] + e["bbox_regression"]) and e["images_per_s"] > 0 for e in epochs)
    scores = [e["val"]["AP50"] for e in epochs]
    assert record["best"] == 1 + scores.index(max(scores))
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(run / "config.json") == CONFIG.changed(epochs=3, log_steps=2)
    assert [(line["kind"], line["step"]) for line in lines(run)] == [
        (kind, step) for step in (2, 4, 6) for kind in ("steps", "epoch")
    ]
    assert [line for line in lines(run) if line["kind"] == "epoch"] == [{"kind": "epoch", **e} for e in epochs]
    assert {path.name for path in run.glob("*.pt")} == {"last.pt", "last-1.pt"}

    # The saved weights are those of the best epoch.
    model, classes = load_model(run / "model.safetensors")
    val_set = open_dataset(shapes, "val")
    assert classes == val_set.classes
    again = evaluate_detections(val_set, detect_dataset(model, val_set, quiet=True), quiet=True)
    assert again["AP50"] == record["epochs"][record["best"] - 1]["val"]["AP50"]


def test_tensorboard_gets_scalars_and_pictures(shapes: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = toy_run(shapes, tmp_path, validate=True, log_steps=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/classification")] == [1, 2, 3, 4]
    # Events store fp32.
    expected = [e["val"]["AP50"] for e in record["epochs"]]
    assert [event.value for event in events.Scalars("val/AP50")] == pytest.approx(expected, rel=1e-6)
    pictures = events.Images("annotated and detected")
    assert [picture.step for picture in pictures] == [2, 4]
    assert pictures[0].width > 600 and pictures[0].height > 1200  # four pairs of pictures of 320 pixels


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_settings(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .*last\.pt does not exist"):
        toy_run(shapes, tmp_path / "run", resume=True)
    toy_run(shapes, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="contains a run already"):
        toy_run(shapes, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"other settings: epochs 1 \(now 2\), steps 2 \(now 4\), seed 0 \(now 5\)"):
        toy_run(shapes, tmp_path / "run", resume=True, seed=5)
    again = toy_run(shapes, tmp_path / "run", epochs=1, resume=True, keep=1)  # what does not matter may change
    assert len(again["epochs"]) == 1


def test_the_transform_of_a_dataset_is_restored_after_an_interruption(shapes: Path) -> None:
    class Interrupting(DetectionDataset):
        def __getitem__(self, index: int) -> Any:
            raise KeyboardInterrupt

    dataset = open_dataset(shapes, "train")
    dataset.transform = transform = train_transform()
    dataset.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        detect_dataset(toy_model(), dataset, quiet=True)
    assert dataset.transform is transform


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr", "steps", "keep"])
def test_settings_must_be_positive(shapes: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        toy_run(shapes, tmp_path, **{name: 0})


def test_a_batch_must_be_divisible_into_its_parts(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size must be a multiple of the 3 parts .* got 4"):
        toy_run(shapes, tmp_path, accumulate=3)
    with pytest.raises(ValueError, match=r"images must be positive, got 0"):
        toy_run(shapes, tmp_path, train_set=open_dataset(shapes, "train").subset([]))
    # A dataset smaller than the batch is one batch.
    record = toy_run(shapes, tmp_path, batch_size=32, accumulate=3, epochs=1)
    assert (record["settings"]["batch_size"], record["settings"]["steps"]) == (9, 1)


def test_a_run_may_end_in_the_middle_of_an_epoch(shapes: Path, tmp_path: Path) -> None:
    record = toy_run(shapes, tmp_path, steps=3, validate=True)
    assert [e["step"] for e in record["epochs"]] == [2, 3] and "val" in record["epochs"][1]


def test_only_some_epochs_of_a_long_run_are_scored(shapes: Path, tmp_path: Path) -> None:
    record = toy_run(shapes, tmp_path, epochs=5, validate=True, validate_every=2)
    assert ["val" in e for e in record["epochs"]] == [False, True, False, True, True]
    assert record["best"] in (2, 4, 5)


@pytest.mark.parametrize("layer", ["backbone.first.1", "backbone.second.1"])  # one is before a normalisation
def test_a_loss_that_is_not_finite_raises_an_error_that_names_the_images_and_the_tensor(
    shapes: Path, tmp_path: Path, layer: str
) -> None:
    class Breaking(SSD):
        def forward(self, *arguments: Any) -> Any:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.get_submodule(layer).register_forward_hook(lambda _layer, _inputs, output: output * torch.nan)
            return super().forward(*arguments)

    model = toy_model()
    model.__class__ = Breaking
    model.steps_left = 4  # the second batch of the second epoch
    message = (
        r"nan.* in epoch 2, batch 2 \(step 4\), with images \d+\.jpg(, \d+\.jpg){3}; the first tensor that is not "
        rf"finite is the output of {layer};.*last\.pt is the state before it"
    )
    with pytest.raises(FloatingPointError, match=message):
        toy_run(shapes, tmp_path, model=model, checkpoint_seconds=0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("name", ["backbone.first.1.weight", "backbone.second.1.bias"])
@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_is_named(shapes: Path, tmp_path: Path, name: str, factor: float) -> None:
    model = toy_model()
    model.get_parameter(name).register_hook(lambda gradient: gradient * factor)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=rf"step 1\).* is the gradient of {name}; use a"):
        toy_run(shapes, tmp_path, model=model)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_every_epoch_has_every_image_in_another_order_and_with_another_augmentation(shapes: Path) -> None:
    dataset = open_dataset(shapes, "train")
    dataset.transform = train_transform()
    epochs = [[Stream(dataset, 0)[n] for n in range(k * 10, k * 10 + 10)] for k in (0, 1)]
    ids = [[target["image_id"] for _, target in epoch] for epoch in epochs]
    assert sorted(ids[0]) == sorted(ids[1]) == sorted(dataset.image_ids.tolist())
    assert ids[0] != ids[1]
    first, second = ({target["image_id"]: image for image, target in epoch} for epoch in epochs)
    assert not any(torch.equal(first[i], second[i]) for i in first)

    # An item depends only on the seed and its number, not on the items that were read before it.
    assert torch.equal(Stream(dataset, 0)[7][0], epochs[0][7][0])
    assert not torch.equal(Stream(dataset, 1)[7][0], epochs[0][7][0])


def test_a_limit_chooses_images_by_the_seed(shapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset(shapes, "train")
    chosen = [limited(dataset, 5, seed).image_ids.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 5
    assert limited(dataset, 50, 0) is dataset
    assert toy_run(shapes, tmp_path, limit=5, epochs=1)["settings"]["images"] == 5


def test_the_number_of_workers_does_not_change_the_losses(shapes: Path, tmp_path: Path) -> None:
    losses = [toy_run(shapes, tmp_path / str(workers), epochs=1, workers=workers)["epochs"][0] for workers in (0, 2)]
    assert losses[0]["classification"] == losses[1]["classification"]


def test_ignored_objects_are_not_trained_on(shapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset(shapes, "train")
    dataset._ignore[:] = True
    assert toy_run(shapes, tmp_path, train_set=dataset, epochs=1)["epochs"][0]["bbox_regression"] == 0


def test_unreadable_images_are_replaced_and_counted(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(shapes, data)
    for file in ("train/000003.jpg", "val/000001.jpg"):
        (data / file).write_bytes((data / file).read_bytes()[:-100])
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    with pytest.raises(ValueError, match=r"000003\.jpg: cannot be read"):
        toy_run(data, tmp_path / "strict", train_set=train_set, epochs=1, batch_size=10)

    train_set.strict = val_set.strict = False
    options: dict[str, Any] = {"val_set": val_set, "epochs": 1, "batch_size": 10, "workers": 1}
    record = toy_run(data, tmp_path / "run", train_set=train_set, **options)
    assert record["unreadable"] == ["train/000003.jpg", "val/000001.jpg"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == record


def test_the_first_of_several_best_epochs_is_chosen() -> None:
    scores = [None, 0.2, 0.9, 0.9, 0.8]  # None if the split has no objects
    history: list[dict[str, Any]] = [{"epoch": k, "val": {"AP50": score}} for k, score in enumerate(scores, start=1)]
    assert best_epoch(history) == 3
    assert best_epoch([{"epoch": 1}, *history[1:2], {"epoch": 3}]) == 2  # among those that were scored
    assert best_epoch([{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]) == 3  # without a validation split, the last epoch


def test_a_real_model_trains_with_its_own_recipe(tmp_path: Path) -> None:
    data = toy_data(tmp_path / "shapes", train=4)
    record = fit(ssd300_tiny(4), open_dataset(data, "train"), tmp_path / "run", steps=1, batch_size=2, quiet=True)
    assert record["settings"]["optimizer"] == "adamw" and record["settings"]["model"] == "ssd300_tiny"


def test_a_long_run_says_how_long_it_takes(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(toy_model(), open_dataset(shapes, "train"), tmp_path, CONFIG.changed(epochs=4))
    captured = capsys.readouterr()
    assert "8 steps of 4 images; at the pace of the first ones" in captured.out
    assert "data wait" in captured.err and "images/s" in captured.err
