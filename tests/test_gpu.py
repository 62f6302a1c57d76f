"""The detector on a GPU: trained, resumed, saved, loaded, and the same answers as on the CPU."""

from pathlib import Path

import pytest
import torch

from ssdcore.data import open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.model import ssd300_tiny, ssd300_vgg16
from ssdcore.synthetic import make_synthetic
from ssdcore.train import fit
from ssdcore.weights import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_train_resume_and_detect(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=16, val=4, progress=False)
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    settings = {"batch_size": 8, "workers": 2, "device": "cuda", "quiet": True}
    record = fit(ssd300_tiny(4), train_set, tmp_path / "run", val_set=val_set, epochs=2, **settings)
    again = fit(ssd300_tiny(4), train_set, tmp_path / "run", val_set=val_set, epochs=2, resume=True, **settings)
    assert again == record
    model, _ = load_model(tmp_path / "run" / "model.safetensors", "cuda")
    assert set(detect_dataset(model, val_set, quiet=True)) == set(val_set.image_ids.tolist())


def test_vgg_takes_a_step_in_bf16(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=8, val=1, progress=False)
    record = fit(
        ssd300_vgg16(4),
        open_dataset(data, "train"),
        tmp_path / "run",
        epochs=1,
        batch_size=4,
        device="cuda",
        quiet=True,
    )
    assert torch.tensor(record["epochs"][0]["classification"]).isfinite()


def test_the_same_answers_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(4).eval()
    images = [torch.rand(3, 200, 300), torch.rand(3, 90, 80)]
    with torch.no_grad():
        expected = model.predict(model.resize(images))
        model.cuda()
        found = model.predict(model.resize([image.cuda() for image in images]))
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-2, atol=1e-2)  # convolutions in TF32


def test_targets_may_lie_on_either_device() -> None:
    model = ssd300_tiny(4).cuda().train()
    images = torch.rand(2, 3, 300, 300, device="cuda")
    targets = [
        {"boxes": torch.tensor([[20.0, 30, 200, 180]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    on_gpu = [{name: value.cuda() for name, value in target.items()} for target in targets]
    for name, loss in model(images, on_gpu).items():
        torch.testing.assert_close(loss, losses[name])
