"""One optimiser step: precision, accumulation, clipping, averages, frozen parts."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

from toy import CONFIG, toy_data, toy_model, toy_run

from ssdcore.data import open_dataset
from ssdcore.models import ssd300_vgg16
from ssdcore.train.config import TrainConfig
from ssdcore.train.distributed import Group
from ssdcore.train.ema import MovingAverage
from ssdcore.train.freeze import freeze
from ssdcore.train.optimizer import make_optimizer
from ssdcore.train.step import Stepper, fast_backends, precision_on
from ssdcore.transforms import collate, train_transform


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def batch(shapes: Path) -> Any:
    dataset = open_dataset(shapes, "train")
    dataset.transform = train_transform(32)
    torch.manual_seed(0)
    return collate([dataset[i] for i in range(8)])


def stepper(config: TrainConfig, model: Any = None) -> Stepper:
    model = model or toy_model()
    model.train()
    for layer in freeze(model, config.freeze):
        layer.eval()
    model.normalizer = config.normalizer
    return Stepper(model, make_optimizer(model, config), config, Group(0, 1))


def test_all_flags_work_together(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default backend takes a minute to compile on a CPU. What it is given is the same.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    everything: dict[str, Any] = {
        "precision": "bf16", "channels_last": True, "accumulate": 2, "clip_norm": 1.0, "ema": 0.9, "freeze": "1",
        "sync_bn": True, "compile": True, "optimizer": "adamw", "normalizer": "image", "augmentation": "nvidia",
        "limit": 9, "keep": 3, "lr_batch": 8, "warmup_steps": 2, "bias_lr": 2.0, "decay": "not-biases", "log_steps": 1,
        "validate_every": 2,
    }  # fmt: skip
    record = toy_run(shapes, tmp_path, steps=5, validate=True, workers=1, **everything)
    assert [e["step"] for e in record["epochs"]] == [2, 4, 5]
    assert all(0 < e["classification"] < 100 for e in record["epochs"])
    assert record["settings"]["precision"] == "bf16" and record["settings"]["lr"] == CONFIG.lr / 2


@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(batch: Any, normalizer: Any, accumulate: int) -> None:
    """The positives are those of the whole batch, although the parts have different numbers of them."""
    gradients, results = [], []
    for parts in (1, accumulate):
        config = CONFIG.changed(accumulate=parts, normalizer=normalizer, freeze="batchnorm", clip_norm=1e9)
        model = toy_model()
        model.backbone.second[-1].p = 0.0
        trainer = stepper(config, model)
        results.append(trainer.step(0, 0.1, *batch, stop=False))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # Sums in another order.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert results[1][:3] == pytest.approx(results[0][:3], rel=1e-5)
    # Otherwise the parts would agree by chance.
    assert len({len(target["labels"]) for target in batch[1]}) > 1


def test_clipping_limits_the_update_and_reports_the_norm_before(batch: Any) -> None:
    norms, updates = [], []
    for clip_norm in (0.0, 0.01):
        trainer = stepper(CONFIG.changed(clip_norm=clip_norm, momentum=0.0, weight_decay=0.0))
        before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
        norms.append(trainer.step(0, 1.0, *batch, stop=False).grad_norm)
        updates.append(
            float((torch.nn.utils.parameters_to_vector(trainer.model.parameters()) - before).norm().detach())
        )
    assert norms[0] == pytest.approx(norms[1]) == pytest.approx(updates[0], rel=1e-4)
    assert updates[1] == pytest.approx(0.01, rel=1e-3)


def test_fp16_scales_the_loss_and_skips_steps_that_overflow(batch: Any) -> None:
    trainer = stepper(CONFIG.changed(precision="fp16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows at first
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    assert not trainer.step(0, 0.1, *batch, stop=False).grad_norm < float("inf")
    assert torch.equal(torch.nn.utils.parameters_to_vector(trainer.model.parameters()), before)
    assert trainer.scaler.get_scale() == 2.0**39
    steps = 0
    while torch.equal(torch.nn.utils.parameters_to_vector(trainer.model.parameters()), before):
        trainer.step(steps := steps + 1, 0.1, *batch, stop=False)
    assert 0 < steps < 40


def test_chance_in_a_model_depends_on_the_seed_and_the_step_alone(batch: Any) -> None:
    losses = []
    for before, seed, number in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        trainer = stepper(CONFIG.changed(seed=seed))
        torch.manual_seed(before)
        losses.append(trainer.step(number, 0.1, *batch, stop=False).classification)
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_biases_may_learn_faster(batch: Any) -> None:
    trainer = stepper(CONFIG.changed(bias_lr=2.0))
    trainer.step(0, 0.25, *batch, stop=False)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        assert {names[id(p)].endswith("bias") for p in group["params"]} == {group["lr"] == 0.5}
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.25, 0.5}


def test_precision_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert precision_on(torch.device("cuda"), "auto") == expected
    assert precision_on(torch.device("cpu"), "auto") == "fp32"
    assert precision_on(torch.device("cuda"), "tf32") == "tf32"


def test_settings_of_the_backends_are_restored() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for enabled in (True, False):
        with fast_backends(tf32=enabled):
            assert cudnn.benchmark and cudnn.allow_tf32 == enabled
            assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
    assert (cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_a_moving_average_follows_the_weights_and_statistics() -> None:
    model = toy_model()
    average = MovingAverage(model, 0.5)
    norm, averaged = model.backbone.first[2], average.model.backbone.first[2]
    with torch.no_grad():
        norm.weight.fill_(3.0)
        norm.running_mean.fill_(10.0)
        norm.num_batches_tracked.fill_(7)
    average.update(model)  # the first update has a decay of 1 / 10
    assert averaged.weight.tolist() == pytest.approx([0.1 * 1 + 0.9 * 3] * 8)
    assert averaged.running_mean.tolist() == pytest.approx([9.0] * 8)
    assert averaged.num_batches_tracked == 7 and not averaged.training and not averaged.weight.requires_grad
    for _ in range(100):
        average.update(model)
    assert average.updates == 101 and averaged.weight.tolist() == pytest.approx([3.0] * 8)


def test_the_average_is_scored_saved_and_left_in_the_model(shapes: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = toy_model()
    toy_run(shapes, tmp_path, model=model, ema=0.9)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    saved = load_file(tmp_path / "model.safetensors")
    name = "backbone.first.1.weight"
    assert torch.equal(saved[name], state["average"]["model"][name]) and torch.equal(
        saved[name], model.state_dict()[name]
    )
    assert not torch.equal(saved[name], state["model"][name])


def test_parts_of_a_model_are_frozen_by_number_or_name(shapes: Path, tmp_path: Path) -> None:
    def frozen(what: str | None) -> set[str]:
        model = toy_model()
        freeze(model, what)
        return {
            name.removesuffix(".weight").removesuffix(".bias")
            for name, p in model.named_parameters()
            if not p.requires_grad
        }

    assert frozen(None) == frozen("0") == set()
    assert frozen("1") == {"backbone.first.1"} and frozen("2") == {"backbone.first.1", "backbone.first.2"}
    assert frozen("backbone.second, batchnorm") == {"backbone.second.1", "backbone.first.2"}
    with pytest.raises(ValueError, match="freeze must be at most 3, the layers of the backbone, got 4"):
        frozen("4")
    with pytest.raises(ValueError, match=r"freeze must name parameters, such as backbone\.first, .* got 'conv1'"):
        frozen("conv1")
    with pytest.raises(ValueError, match="freeze must leave a parameter to train"):
        toy_run(shapes, tmp_path / "all", freeze="backbone,head")

    model = toy_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    toy_run(shapes, tmp_path / "run", model=model, freeze="backbone.first")
    unchanged = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert unchanged == {name for name in before if name.startswith("backbone.first.")}  # the statistics too


def test_the_scale_of_vgg_is_no_layer_that_a_number_freezes() -> None:
    with torch.device("meta"):
        model = ssd300_vgg16(3)
    freeze(model, "2")
    frozen = [name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad]
    first, second = [name for name, layer in model.backbone.named_modules() if isinstance(layer, torch.nn.Conv2d)][:2]
    assert frozen == [f"{first}.weight", f"{first}.bias", f"{second}.weight", f"{second}.bias"]
