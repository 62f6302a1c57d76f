"""A configuration is checked, stored and read; recipes have the published values."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("typer")

from toy import CONFIG
from typer.testing import CliRunner

from ssdcore import cli
from ssdcore.anchors import SSD300_NVIDIA, SSD300_VOC, SSD512_VOC
from ssdcore.cli import training
from ssdcore.models import MODELS, ssd300_tiny, ssd300_vgg16
from ssdcore.synthetic import make_synthetic
from ssdcore.train import TrainConfig, load_config, own_recipe, recipe
from ssdcore.train.optimizer import make_optimizer, parameter_groups
from ssdcore.train.progress import duration
from ssdcore.train.recipes import NAMES, SMALL_STEPS, anchors_for
from ssdcore.train.schedule import lr_at, one_cycle, with_drops


def rates(config: TrainConfig, steps: int, *at: int) -> list[float]:
    return [lr_at(config, step, steps) for step in at]


def test_a_configuration_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for name in NAMES:
        config = recipe(name).changed(ema=0.99, freeze="batchnorm", limit=7)
        path.write_text(json.dumps(config.to_json()))
        assert load_config(path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a configuration"),
        ("[]", "expected names with values"),
        ('{"epochs": 1, "learning_rate": 1}', "has learning_rate, which no configuration has"),
        ('{"epochs": 1, "lr": "high"}', "lr must be float, got 'high'"),
        ('{"epochs": true}', "epochs must be int | None, got True"),
        ('{"epochs": 1, "precision": "fp8"}', "precision must be one of auto, fp32, tf32, bf16, fp16, got 'fp8'"),
        ('{"epochs": 1, "steps": 1}', "exactly one of epochs and steps must be given, got 1 and 1"),
        ('{"epochs": 1, "drops": [0.9, 0.5]}', "drops must be parts of the run between 0 and 1 in rising order"),
        ('{"epochs": 1, "ema": 1}', "ema must be in 0..1 and below 1, got 1"),
        ('{"epochs": 1, "clip_norm": -1}', "clip_norm must be at least 0, got -1"),
    ],
)
def test_a_wrong_file_raises_an_error_that_names_the_value(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError) as raised:
        load_config(path)
    assert str(path) in str(raised.value) and message in str(raised.value)


def test_a_missing_file_and_an_unknown_value_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration at"):
        load_config(tmp_path / "none.json")
    with pytest.raises(TypeError, match="TrainConfig has no learning_rate"):
        CONFIG.changed(learning_rate=1)


def test_every_model_has_a_recipe_and_other_models_need_one() -> None:
    assert all(own_recipe(name).model == name for name in MODELS)
    with pytest.raises(ValueError, match="recipe must be given for the model 'custom'"):
        own_recipe("custom")
    with pytest.raises(ValueError, match="recipe must be one of vgg-voc, vgg-coco, nvidia-r50, torchvision, small"):
        recipe("yolo")


def test_the_length_of_a_run() -> None:
    vgg, tiny = own_recipe("ssd300_vgg16"), own_recipe("ssd300_tiny")
    assert vgg.total_steps(117_266) == 120 * (117_266 // 32)
    assert 5000 <= vgg.total_steps(292) < 5000 + 292 // 32  # whole epochs
    # A small dataset has as many steps as a larger one, whatever its size.
    assert [tiny.total_steps(n) // SMALL_STEPS for n in (50, 160, 500)] == [1, 1, 1]
    assert tiny.total_steps(1600) == 40 * 100
    assert recipe("small", "ssd300_vgg16").total_steps(50) == SMALL_STEPS
    # A length that is given is exact.
    assert tiny.changed(epochs=2).total_steps(160) == 20 and tiny.changed(steps=7).total_steps(160) == 7


def test_vgg_recipes_are_those_of_the_paper() -> None:
    voc, coco = recipe("vgg-voc"), recipe("vgg-coco")
    assert (voc.model, voc.batch_size, voc.momentum, voc.weight_decay) == ("ssd300_vgg16", 32, 0.9, 5e-4)
    assert rates(voc, 120_000, 0, 79_999, 80_000, 99_999, 100_000) == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5])
    assert coco.total_steps(10) == 400_000
    assert rates(coco, 400_000, 279_999, 280_000, 360_000) == pytest.approx([1e-3, 1e-4, 1e-5])
    assert (anchors_for("voc", 300), anchors_for("voc", 512)) == (SSD300_VOC, SSD512_VOC)
    with pytest.raises(ValueError, match="anchors 'nvidia' are for images of 300 pixels, but the model's have 512"):
        anchors_for("nvidia", 512)


def test_nvidias_recipe_scales_the_rate_with_the_batch() -> None:
    config = recipe("nvidia-r50")
    assert (config.model, config.normalizer, config.augmentation) == ("ssd300_resnet50", "image", "nvidia")
    assert anchors_for(config.anchors or "", 300) == SSD300_NVIDIA
    large = config.changed(batch_size=8 * 128)
    assert large.scaled_lr == pytest.approx(2.6e-3 * 8 * 128 / 32)
    per_epoch = large.steps_per_epoch(117_266)
    steps = large.total_steps(117_266)
    assert steps == 65 * per_epoch
    at = (0, 150, 300, 43 * per_epoch - 1, 43 * per_epoch, 54 * per_epoch - 1, 54 * per_epoch)
    factors = [rate / large.scaled_lr for rate in rates(large, steps, *at)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01])
    assert large.changed(lr=0.01).scaled_lr == 0.01  # a rate that is given is used as it stands


def test_torchvisions_recipe() -> None:
    config = recipe("torchvision")
    per_epoch = config.steps_per_epoch(117_266)
    at = (0, 500, 1000, 80 * per_epoch - 1, 80 * per_epoch, 110 * per_epoch)
    expected = [2e-6, 2e-3 * (0.001 + 0.999 / 2), 2e-3, 2e-3, 2e-4, 2e-5]
    assert rates(config, 120 * per_epoch, *at) == pytest.approx(expected)
    assert len(parameter_groups(ssd300_tiny(4), config)) == 1  # everything decays


def test_schedules_have_the_documented_values() -> None:
    factors = [one_cycle(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.04) and factors[30] == max(factors) == 1 and factors[-1] < 0.001
    factors = [with_drops(step, 120_000, (2 / 3, 5 / 6), 500, 1 / 500) for step in (0, 500, 79_999, 80_000, 100_000)]
    assert factors == pytest.approx([1 / 500, 1, 1, 0.1, 0.01])
    assert with_drops(0, 1, (), 500, 0.0) == 1  # a run of one step has a learning rate above 0


def test_weight_decay_applies_only_to_weights_of_convolutions() -> None:
    with torch.device("meta"):
        model = ssd300_vgg16(4)
    groups = {group["weight_decay"]: group for group in parameter_groups(model, own_recipe("ssd300_vgg16"))}
    assert groups.keys() == {5e-4, 0.0}
    assert {p.dim() for p in groups[5e-4]["params"]} == {4} and {p.dim() for p in groups[0.0]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))

    # In the authors' code the biases learn twice as fast without decay, and the scale of conv4_3 decays.
    groups = {group["lr_factor"]: group for group in parameter_groups(model, recipe("vgg-voc"))}
    assert (groups[2.0]["weight_decay"], groups[1.0]["weight_decay"]) == (0.0, 5e-4)
    assert any(p is model.backbone.scale_weight for p in groups[1.0]["params"])


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_optimisers_of_timm_are_asked_for_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm.optim", None)
    with pytest.raises(ValueError, match=f"optimizer {name} comes from timm: pip install timm"):
        make_optimizer(ssd300_tiny(4), CONFIG.changed(optimizer=name))


def test_print_config_shows_what_would_run_and_trains_nothing(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=6, val=2, size=100, progress=False)
    run = ["train", "--data", str(data), "--output", str(tmp_path / "run"), "--device", "cpu", "--print-config"]
    result = CliRunner().invoke(cli.app, [*run, "--recipe", "nvidia-r50", "--batch-size", "64", "--ema", "0.99"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.json").write_text(result.stdout)
    config = load_config(tmp_path / "config.json")
    assert config == recipe("nvidia-r50").changed(batch_size=64, ema=0.99)
    assert "highest learning rate" in result.stderr and "65 epochs" in result.stderr

    # The file is a configuration, and flags replace its values.
    flags = ["--config", str(tmp_path / "config.json"), "--no-channels-last", "--drops", "0.5,0.75", "--steps", "9"]
    result = CliRunner().invoke(cli.app, [*run, *flags])
    expected = config.changed(channels_last=False, drops=(0.5, 0.75), steps=9)
    assert json.loads(result.stdout) == expected.to_json(), result.output
    result = CliRunner().invoke(cli.app, [*run, *flags, "--recipe", "small"])
    assert isinstance(result.exception, ValueError) and "must not be given together" in str(result.exception)


def test_every_value_has_an_option_and_help() -> None:
    import inspect

    options = inspect.signature(training.train).parameters
    assert {value.name for value in fields(TrainConfig)} <= options.keys()
    assert all(value.metadata["help"] for value in fields(TrainConfig))


def test_a_recipe_builds_its_model_with_its_default_boxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=2, val=1, size=100, progress=False)
    built: dict[str, Any] = {}

    def fit(model: Any, *_: Any, config: TrainConfig, **__: Any) -> None:
        built.update(anchors=model.anchor_config, name=model.name, config=config)
        raise KeyboardInterrupt

    monkeypatch.setattr("ssdcore.train.fit", fit)
    result = CliRunner().invoke(
        cli.app, ["train", "--data", str(data), "--model", "ssd300_tiny", "--recipe", "vgg-voc", "--device", "cpu"]
    )
    assert result.exit_code == 130 and "--weights-backbone" in result.output
    assert built["anchors"] == SSD300_VOC and built["config"].augmentation == "caffe"


def test_lamb_clips_no_gradient_of_its_own() -> None:
    pytest.importorskip("timm")
    optimizer = make_optimizer(ssd300_tiny(4), CONFIG.changed(optimizer="lamb"))
    assert {group["max_grad_norm"] for group in optimizer.param_groups} == {None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5400, "1 h 30 min"), (7199, "2 h 0 min")],
)
def test_durations_are_as_exact_as_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text
