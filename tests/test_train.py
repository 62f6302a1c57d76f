"""Training leaves the promised files, resumes to the last bit, and stops with a clear error."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.evaluate import evaluate_detections
from ssdcore.models import MODELS, SSD, ssd300_tiny, ssd300_vgg16
from ssdcore.synthetic import make_synthetic
from ssdcore.train import RECIPES, _best_epoch, _parameter_groups, _Stream, fit, one_cycle, two_drops
from ssdcore.transforms import train_transform
from ssdcore.weights import load_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("data") / "shapes", train=10, val=4, progress=False)


def new_model() -> SSD:
    torch.manual_seed(0)
    return ssd300_tiny(4)


def run(shapes: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Train two epochs of two batches of four; two of the ten images are left out of each epoch."""
    options: dict[str, Any] = {"epochs": 2, "batch_size": 4, "quiet": True, **changes}
    model = options.pop("model", None) or new_model()
    return fit(model, open_dataset(shapes, "train"), output, **options)


class Interrupting(DetectionDataset):
    """Raises KeyboardInterrupt, as Ctrl-C does, after `images_left` images have been read."""

    images_left = 13  # ends in the second epoch of eight images

    def __getitem__(self, index: int) -> Any:
        self.images_left -= 1
        if self.images_left < 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_run(shapes: Path, tmp_path: Path) -> None:
    val_set = open_dataset(shapes, "val")
    uninterrupted = run(shapes, tmp_path / "uninterrupted", val_set=val_set)

    train_set = open_dataset(shapes, "train")
    train_set.__class__ = Interrupting
    with pytest.raises(KeyboardInterrupt):
        fit(
            new_model(),
            train_set,
            tmp_path / "resumed",
            val_set=val_set,
            epochs=2,
            batch_size=4,
            quiet=True,
        )
    state = torch.load(tmp_path / "resumed" / "last.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert "postprocess" not in state["settings"]  # a run that began when files had none can be resumed
    # Another seed, because the initial weights of a resumed model must not matter.
    torch.manual_seed(1)
    resumed = run(shapes, tmp_path / "resumed", model=ssd300_tiny(4), val_set=val_set, resume=True)

    for record in (uninterrupted, resumed):
        for epoch_record in record["epochs"]:
            del epoch_record["seconds"]
    assert resumed == uninterrupted
    expected, got = (
        torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("uninterrupted", "resumed")
    )
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_a_run_writes_the_documented_files(shapes: Path, tmp_path: Path) -> None:
    record = run(shapes, tmp_path / "run", val_set=open_dataset(shapes, "val"))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == record
    epochs = record["epochs"]
    assert [epoch_record["epoch"] for epoch_record in epochs] == [1, 2]
    assert all(
        math.isfinite(epoch_record["classification"] + epoch_record["bbox_regression"]) for epoch_record in epochs
    )
    scores = [epoch_record["val"]["AP50"] for epoch_record in epochs]
    assert record["best"] == 1 + scores.index(max(scores))
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))

    # The saved weights are those of the best epoch.
    model, classes = load_model(tmp_path / "run" / "model.safetensors")
    val_set = open_dataset(shapes, "val")
    assert classes == val_set.classes
    again = evaluate_detections(val_set, detect_dataset(model, val_set, quiet=True), quiet=True)
    assert again["AP50"] == record["epochs"][record["best"] - 1]["val"]["AP50"]


def test_an_existing_run_is_neither_overwritten_nor_resumed_with_other_settings(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .*last\.pt does not exist"):
        run(shapes, tmp_path / "run", resume=True)
    run(shapes, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="contains a run already"):
        run(shapes, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match=r"other settings: epochs 1 \(now 2\), seed 0 \(now 5\)"):
        run(shapes, tmp_path / "run", resume=True, seed=5)


def test_a_damaged_state_raises_an_error_that_names_it(shapes: Path, tmp_path: Path) -> None:
    run(shapes, tmp_path / "run", epochs=1)
    (tmp_path / "run" / "last.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"last\.pt is not the state of a run"):
        run(shapes, tmp_path / "run", epochs=1, resume=True)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2]])
def test_a_state_of_another_program_raises_an_error_that_names_it(shapes: Path, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not the state of a run"):
        run(shapes, tmp_path, resume=True)


def test_the_transform_of_a_dataset_is_restored_after_an_interruption(shapes: Path) -> None:
    dataset = open_dataset(shapes, "train")
    dataset.transform = transform = train_transform()
    dataset.__class__ = Interrupting
    dataset.images_left = 0
    with pytest.raises(KeyboardInterrupt):
        detect_dataset(new_model(), dataset, quiet=True)
    assert dataset.transform is transform


def test_a_small_dataset_gets_more_epochs_if_the_model_needs_more_steps() -> None:
    vgg = RECIPES["ssd300_vgg16"]
    assert vgg.epochs_for(117_266, 32) == vgg.epochs
    assert vgg.epochs_for(292, 32) * (292 // 32) >= 5000
    assert RECIPES["ssd300_tiny"].epochs_for(292, 16) == 40


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr"])
def test_settings_must_be_positive(shapes: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        run(shapes, tmp_path, **{name: 0})


def test_a_loss_that_is_not_finite_raises_an_error_that_names_the_images(shapes: Path, tmp_path: Path) -> None:
    class Breaking(SSD):
        def loss(self, *arguments: Any) -> dict[str, torch.Tensor]:
            losses = super().loss(*arguments)
            return {name: value * (torch.nan if self.steps_left == 0 else 1) for name, value in losses.items()}

        def forward(self, *arguments: Any) -> Any:
            self.steps_left -= 1
            return super().forward(*arguments)

    model = new_model()
    model.__class__ = Breaking
    model.steps_left = 4  # the second batch of the second epoch
    with pytest.raises(FloatingPointError, match=r"nan.* in epoch 2, batch 2, with images \d+\.jpg(, \d+\.jpg){3};"):
        run(shapes, tmp_path, model=model)
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(torch.load(tmp_path / "last.pt", weights_only=True)["history"]) == 1


def test_every_epoch_has_every_image_in_another_order_and_with_another_augmentation(shapes: Path) -> None:
    dataset = open_dataset(shapes, "train")
    dataset.transform = train_transform()
    epochs = [[_Stream(dataset, 0)[n] for n in range(k * 10, k * 10 + 10)] for k in (0, 1)]
    ids = [[target["image_id"] for _, target in epoch] for epoch in epochs]
    assert sorted(ids[0]) == sorted(ids[1]) == sorted(dataset.image_ids.tolist())
    assert ids[0] != ids[1]
    first, second = ({target["image_id"]: image for image, target in epoch} for epoch in epochs)
    assert not any(torch.equal(first[i], second[i]) for i in first)

    # An item depends only on the seed and its number, not on the items that were read before it.
    assert torch.equal(_Stream(dataset, 0)[7][0], epochs[0][7][0])
    assert not torch.equal(_Stream(dataset, 1)[7][0], epochs[0][7][0])


def test_the_number_of_workers_does_not_change_the_losses(shapes: Path, tmp_path: Path) -> None:
    losses = [run(shapes, tmp_path / str(workers), epochs=1, workers=workers)["epochs"][0] for workers in (0, 2)]
    assert losses[0]["classification"] == losses[1]["classification"]


def test_ignored_objects_are_not_trained_on(shapes: Path, tmp_path: Path) -> None:
    dataset = open_dataset(shapes, "train")
    dataset._ignore[:] = True
    record = fit(new_model(), dataset, tmp_path, epochs=1, batch_size=4, quiet=True)
    assert record["epochs"][0]["bbox_regression"] == 0


def test_unreadable_images_are_replaced_and_counted(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(shapes, data)
    for file in ("train/000003.jpg", "val/000001.jpg"):
        (data / file).write_bytes((data / file).read_bytes()[:-100])
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    with pytest.raises(ValueError, match=r"000003\.jpg: cannot be read"):
        fit(new_model(), train_set, tmp_path / "strict", epochs=1, batch_size=10, quiet=True)

    train_set.strict = val_set.strict = False
    options: dict[str, Any] = {"val_set": val_set, "epochs": 1, "batch_size": 10, "quiet": True, "workers": 1}
    record = fit(new_model(), train_set, tmp_path / "run", **options)
    assert record["unreadable"] == ["train/000003.jpg", "val/000001.jpg"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == record


def test_schedules_have_the_documented_values() -> None:
    rates = [one_cycle(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[30] == max(rates) == 1 and rates[-1] < 0.001
    rates = [two_drops(step, 120_000) for step in (0, 499, 79_999, 80_000, 99_999, 100_000, 119_999)]
    assert rates == pytest.approx([1 / 500, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert two_drops(0, 1) > 0  # a run of one step has a learning rate above 0


def test_weight_decay_applies_only_to_weights_of_convolutions() -> None:
    model = ssd300_vgg16(4)
    decayed, undecayed = _parameter_groups(model, 5e-4)
    assert decayed["weight_decay"] == 5e-4 and undecayed["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {4} and {p.dim() for p in undecayed["params"]} == {1}
    assert len(decayed["params"]) + len(undecayed["params"]) == len(list(model.parameters()))
    assert RECIPES.keys() == MODELS.keys()


def test_the_first_of_several_best_epochs_is_chosen() -> None:
    scores = [None, 0.2, 0.9, 0.9, 0.8]  # None if the split has no objects
    assert _best_epoch([{"val": {"AP50": score}} for score in scores]) == 3
    assert _best_epoch([{}, {}, {}]) == 3  # without a validation split, the last epoch
