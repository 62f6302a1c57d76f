"""The command line, from a dataset to pictures, on a dataset that is too small to learn from."""

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("typer")

from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_datasets import coco_content, voc_xml, write_coco, write_image, write_voc, write_yolo
from typer.testing import CliRunner

from ssdcore import cli
from ssdcore.cli import demonstrating, options, training
from ssdcore.data import DetectionDataset
from ssdcore.data.split import divide
from ssdcore.models import ssd300_tiny
from ssdcore.stopwatch import Stopwatch
from ssdcore.synthetic import SHAPES, make_synthetic
from ssdcore.weights import load_model, save_weights

REPOSITORY = Path(__file__).parent.parent


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4, progress=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved weights of an untrained model whose classes are the shapes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_weights(ssd300_tiny(4), path, SHAPES)
    return path


def test_train_and_evaluate_write_their_files(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--device", "cpu", "--workers", 0]
    result = invoke("train", "--data", shapes, "--output", run, "--epochs", 1, "--batch-size", 4, *options)
    assert result.exit_code == 0, result.output
    assert "best AP50 on val" in result.output and str(run / "model.safetensors") in result.output.replace("\n", "")

    result = invoke("evaluate", "--weights", run / "model.safetensors", "--data", shapes, "--split", "val", *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (run / "val").iterdir()} == {"metrics.json", "detections.json", "report.html"}
    assert (
        "<h2>Training</h2>" in (run / "val" / "report.html").read_text()
    )  # the record of the run lies beside the weights
    metrics = json.loads((run / "val" / "metrics.json").read_text())
    assert list(metrics["speed"]["seconds"]) == ["reading", "network", "postprocess", "scoring"]
    assert all(seconds > 0 for seconds in metrics["speed"]["seconds"].values())
    assert metrics["settings"]["models"][0]["image_size"] == 300 and metrics["environment"]["torch"]
    assert metrics["images"] == 4 and {"AP", "AP50", "AP75", "VOC07"} <= metrics.keys()
    assert set(metrics["AP50_per_class"]) == set(SHAPES)
    assert json.loads((run / "metrics.json").read_text())["best"] == 1  # evaluate did not replace the record of the run

    weights = run / "model.safetensors"
    result = invoke("evaluate", "--weights", weights, "--data", shapes, "--split", "val", "--output", run, *options)
    assert isinstance(result.exception, ValueError) and "the record of a run, would be lost" in str(result.exception)
    other = Path(shutil.copytree(run, tmp_path / "other"))  # another run
    result = invoke("evaluate", "--weights", weights, "--data", shapes, "--split", "val", "--output", other, *options)
    assert isinstance(result.exception, ValueError) and "the record of a run, would be lost" in str(result.exception)

    result = invoke("train", "--data", shapes, "--output", run, "--epochs", 1, *options)
    assert isinstance(result.exception, ValueError) and "contains a run already" in str(result.exception)


def write_layout(layout: str, root: Path) -> None:
    """Writes a split `test` of one image with a dog, in one of the layouts."""
    if layout == "coco":
        content = coco_content()
        content["categories"], content["annotations"] = content["categories"][:1], content["annotations"][:1]
        content["images"] = content["images"][:1]
        write_coco(root, content, images="test", source="annotations/instances_test.json")
    elif layout == "yolo":
        write_yolo(root, "test: test/images\nnames: [dog]", {"a": "0 0.5 0.5 0.2 0.2"}, "test/images")
    elif layout == "voc":
        write_voc(root, {"test": {"a": [("dog", (1, 2, 11, 22))]}})
    else:
        for split in ("train", "test"):
            write_image(root / split / "a.jpg")
            (root / split / "a.xml").write_text(voc_xml([("dog", (1, 2, 11, 22))]))


@pytest.mark.parametrize("layout", ["coco", "yolo", "voc", "xml"])
def test_evaluate_reads_every_layout(layout: str, tmp_path: Path) -> None:
    write_layout(layout, tmp_path / "data")
    torch.manual_seed(0)
    save_weights(ssd300_tiny(2), tmp_path / "model.safetensors", ["dog"])
    options = ["--data", tmp_path / "data", "--device", "cpu", "--workers", 0]
    result = invoke("evaluate", "--weights", tmp_path / "model.safetensors", *options)
    assert result.exit_code == 0, result.output
    output = tmp_path / "test"
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["images"] == 1 and list(metrics["AP_per_class"]) == ["dog"] and metrics["AR100"] is not None
    category = {"coco": 18, "yolo": 0}.get(layout, 1)
    assert {result["category_id"] for result in json.loads((output / "detections.json").read_text())} == {category}
    assert "ssd300_tiny on test" in (output / "report.html").read_text()


def almost_right(
    _: object, dataset: DetectionDataset, *, stopwatch: Stopwatch, **options: object
) -> dict[int, dict[str, torch.Tensor]]:
    """In place of what an untrained model detects: each object three times, moved by some pixels, with any label."""
    generator = torch.Generator().manual_seed(0)
    detections = {}
    for index in stopwatch.waits("reading", range(len(dataset))):
        target = dataset.target(index)
        boxes = target["boxes"].as_subclass(torch.Tensor).repeat(3, 1)
        boxes += 4 * torch.randn(boxes.shape, generator=generator)
        labels = torch.where(torch.rand(len(boxes), generator=generator) < 0.8, target["labels"].repeat(3), 1)
        scores = torch.rand(len(boxes), generator=generator)
        detections[target["image_id"]] = {"boxes": boxes, "labels": labels, "scores": scores}
    return detections


COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def test_metrics_equal_those_of_pycocotools_and_torchvision_on_the_written_file(
    monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path
) -> None:
    """pycocotools scores all images at once.

    The evaluator of torchvision's references scores the images batch by batch, and puts the results together.
    """
    data = make_synthetic(tmp_path / "shapes", train=1, val=30, progress=False)
    monkeypatch.setattr("ssdcore.detect.detect_dataset", almost_right)
    cli.evaluate([weights], data, split="val", output=tmp_path, device="cpu", workers=0)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    results = json.loads((tmp_path / "detections.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "instances_val.json"))
        whole = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
        whole.evaluate()
        whole.accumulate()
        whole.summarize()

        batched = COCOeval(truth, iouType="bbox")
        image_ids, parts = truth.getImgIds(), []
        for first in range(0, len(image_ids), 4):
            batch = image_ids[first : first + 4]
            batched.params.imgIds = batch
            of_batch = [result for result in results if result["image_id"] in batch]
            batched.cocoDt = truth.loadRes(of_batch) if of_batch else COCO()
            batched.evaluate()
            categories, areas = len(batched.params.catIds), len(batched.params.areaRng)
            parts.append(np.asarray(batched.evalImgs, dtype=object).reshape(categories, areas, len(batch)))
        batched.evalImgs = np.concatenate(parts, axis=2).flatten().tolist()
        batched.params.imgIds = image_ids
        batched._paramsEval = copy.deepcopy(batched.params)
        batched.accumulate()
        batched.summarize()
    assert 0.1 < metrics["AP"] < 0.9
    ours = [-1 if metrics[name] is None else metrics[name] for name in COCO_NAMES]
    assert ours == whole.stats.tolist() == batched.stats.tolist()


def test_evaluate_averages_models_and_mirror_images(weights: Path, shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_weights(ssd300_tiny(4), tmp_path / "other.safetensors", SHAPES)
    both = ["--weights", weights, "--weights", tmp_path / "other.safetensors"]
    options = ["--data", shapes, "--split", "val", "--device", "cpu", "--workers", 0]
    scores = []
    for name, arguments in {"one": both[:2], "flip": [*both[:2], "--flip"], "both": both}.items():
        result = invoke("evaluate", *arguments, *options, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        detections = json.loads((tmp_path / name / "detections.json").read_text())
        scores.append([detection["score"] for detection in detections])
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["settings"]["flip"] == (name == "flip")
        assert len(metrics["weights"]) == len(metrics["settings"]["models"]) == (2 if name == "both" else 1)
    assert scores[0] != scores[1] and scores[0] != scores[2]

    save_weights(ssd300_tiny(4), tmp_path / "swapped.safetensors", SHAPES[::-1])
    result = invoke("evaluate", *both[:2], "--weights", tmp_path / "swapped.safetensors", *options)
    assert isinstance(result.exception, ValueError) and "must be the same and in the same order" in str(
        result.exception
    )


def test_detect_draws_and_writes_coco_results(weights: Path, shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    Image.effect_noise((400, 250), 90).save(folder / "noise.png")
    Image.effect_noise((120, 500), 90).save(folder / "more" / "noise.jpg")
    (folder / "broken.jpg").write_bytes(b"not an image")
    output = tmp_path / "detections"
    result = invoke(
        "detect", folder, folder / "more" / "noise.jpg", "--weights", weights, "--output", output,
        "--score-threshold", 0.02, "--device", "cpu",
    )  # fmt: skip
    # The broken file is named and the command fails, but the other files are processed.
    assert result.exit_code == 1 and f"{folder / 'broken.jpg'}: cannot be read as an image" in result.output
    images = json.loads((output / "images.json").read_text())["images"]
    assert [image["id"] for image in images] == [1, 2]
    assert [Path(image["file_name"]).name for image in images] == ["noise.png", "noise.jpg"]
    assert [image["picture"] for image in images] == ["noise.jpg", "noise-2.jpg"]
    assert [Image.open(output / image["picture"]).size for image in images] == [(400, 250), (120, 500)]

    detections = json.loads((output / "detections.json").read_text())
    assert {result["image_id"] for result in detections} == {1, 2}
    for result in detections:
        x, y, width, height = result["bbox"]
        right, bottom = {1: (400, 250), 2: (120, 500)}[result["image_id"]]
        assert x >= 0 and y >= 0 and x + width <= right + 1e-3 and y + height <= bottom + 1e-3
        assert result["score"] > 0.02 and result["category_id"] in (1, 2, 3)


def test_evaluate_raises_value_error_if_the_model_lacks_a_class(weights: Path, shapes: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_weights(ssd300_tiny(3), other, ["cat", "dog"])
    result = invoke("evaluate", "--weights", other, "--data", shapes, "--split", "val", "--device", "cpu")
    assert isinstance(result.exception, ValueError)
    assert "got cat, dog" in str(result.exception) and "circle" in str(result.exception)


def test_training_starts_from_given_weights(shapes: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = ssd300_tiny(3)
    save_weights(start, tmp_path / "start.safetensors", ["cat", "dog"])
    cli.train(
        shapes,
        output=tmp_path / "run",
        weights=str(tmp_path / "start.safetensors"),
        val_split="none",
        epochs=1,
        batch_size=8,
        lr=1e-9,
        device="cpu",
        workers=0,
    )
    trained, classes = load_model(tmp_path / "run" / "model.safetensors")
    assert classes == SHAPES
    name = "backbone.stages.1.0.0.weight"
    torch.testing.assert_close(trained.state_dict()[name], start.state_dict()[name])


@pytest.mark.parametrize(
    ("splits", "given", "expected"),
    [
        (["test", "train", "trainval", "val"], (None, None), ("trainval", None)),
        (["train", "val"], (None, None), ("train", "val")),
        (["train"], (None, None), ("train", None)),
        (["train", "val"], (None, "none"), ("train", None)),
        (["train", "trainval", "val"], ("train", None), ("train", "val")),
    ],
)
def test_splits_default_to_trainval_alone_or_to_train_with_val(
    splits: list[str], given: tuple[Any, Any], expected: tuple[str, str | None]
) -> None:
    assert training._choose_splits(splits, *given) == expected


@pytest.mark.parametrize("val_split", ["test", "test2017", "Test"])
def test_the_test_split_cannot_choose_the_weights(val_split: str) -> None:
    with pytest.raises(ValueError, match="val-split must not be"):
        training._choose_splits(["test", "train", "trainval", "val"], "train", val_split)


def test_training_images_cannot_choose_the_weights(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share no image with train-split, but 8 images of train are also in train"):
        cli.train(shapes, output=tmp_path / "run", train_split="train", val_split="train", device="cpu")


def test_pictures_never_replace_photographs(weights: Path, tmp_path: Path) -> None:
    Image.effect_noise((60, 50), 90).save(tmp_path / "photo.jpg")
    before = (tmp_path / "photo.jpg").read_bytes()
    assert cli.detect([tmp_path], weights, tmp_path, device="cpu") == [tmp_path / "photo-2.jpg"]
    assert (tmp_path / "photo.jpg").read_bytes() == before


def test_detections_have_the_category_ids_of_the_training_dataset(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(ssd300_tiny(3), tmp_path / "model.safetensors", ["cat", "dog"], [17, 90])
    Image.effect_noise((60, 50), 90).save(tmp_path / "photo.jpg")
    output = tmp_path / "detections"
    cli.detect([tmp_path / "photo.jpg"], tmp_path / "model.safetensors", output, score_threshold=0.1, device="cpu")
    detections = json.loads((output / "detections.json").read_text())
    assert detections and {result["category_id"] for result in detections} <= {17, 90}
    categories = json.loads((output / "images.json").read_text())["categories"]
    assert categories == [{"id": 17, "name": "cat"}, {"id": 90, "name": "dog"}]


def test_a_resumed_run_does_not_need_the_initial_weights(shapes: Path, tmp_path: Path) -> None:
    save_weights(ssd300_tiny(4, image_std=(0.5, 0.5, 0.5)), tmp_path / "start.safetensors", SHAPES)
    settings: dict[str, Any] = {
        "output": tmp_path / "run", "val_split": "none", "epochs": 1, "batch_size": 8, "device": "cpu", "workers": 0
    }  # fmt: skip
    cli.train(shapes, weights=str(tmp_path / "start.safetensors"), **settings)
    (tmp_path / "start.safetensors").unlink()
    cli.train(shapes, resume=True, **settings)
    assert load_model(tmp_path / "run" / "model.safetensors")[0].image_std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_errors_from_workers_are_printed_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nTraceback ...\nValueError: a.jpg: truncated"
        )

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == "error: ValueError: a.jpg: truncated"


def test_problems_of_a_dataset_are_printed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_synthetic(tmp_path / "shapes", train=3, val=1, progress=False)
    path = data / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"][:5]:
        annotation["bbox"][2] = 0
    path.write_text(json.dumps(content))
    options.open_split(data, "train")
    printed = capsys.readouterr().out
    assert printed.startswith("5 problems in train") and printed.count("no area") == 3 and "and 2 more" in printed


def test_errors_are_printed_as_one_line(monkeypatch: pytest.MonkeyPatch, weights: Path, tmp_path: Path) -> None:
    arguments = ["ssdcore", "evaluate", "--weights", str(weights), "--data", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"^error: no dataset in"):
        cli.main()


def test_the_demo_can_be_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demonstrating, "DEMO_TRAIN", 16)
    monkeypatch.setattr(demonstrating, "DEMO_VAL", 3)
    monkeypatch.setattr(demonstrating, "DEMO_EPOCHS", 1)
    for _ in range(2):
        metrics = cli.demo(output=tmp_path / "demo", device="cpu", workers=0)
        assert 0 <= metrics["AP50"] <= 1
    assert Image.open(tmp_path / "demo" / "detections.png").width > 900  # three pictures of 300 pixels side by side


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        check=False,
    )


def test_help_names_every_command_without_importing_torch() -> None:
    result = run_python("-X", "importtime", "-m", "ssdcore", "--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("demo", "train", "evaluate", "detect"))
    assert "| torch\n" not in result.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['pycocotools'] = None; sys.argv = ['ssdcore']; import runpy; "
    result = run_python("-c", hide + "runpy.run_module('ssdcore', run_name='__main__')")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "need pycocotools: pip install 'ssdcore[train]'" in result.stderr


def test_importing_ssdcore_does_not_import_torch_numpy_or_typer() -> None:
    code = "import sys, ssdcore; print([m for m in ('torch', 'numpy', 'typer') if m in sys.modules])"
    assert run_python("-c", code).stdout.strip() == "[]"
    assert "SSD" in run_python("-c", "import ssdcore; print(ssdcore.SSD.__name__)").stdout


def test_models_lists_every_model_with_its_published_size() -> None:
    from ssdcore.models import MODELS

    result = invoke("models")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in MODELS)
    assert result.output.count("35,641,826") == 2  # counted, and published


def test_initial_weights_that_exclude_each_other_raise_an_error(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights and weights-backbone must not be given together"):
        cli.train(shapes, output=tmp_path, weights="a.safetensors", weights_backbone="DEFAULT", device="cpu")
    with pytest.raises(ValueError, match="weights-backbone must not be given for ssd300_tiny"):
        cli.train(shapes, output=tmp_path, weights_backbone="DEFAULT", device="cpu")


def test_train_divides_a_dataset_without_splits_and_evaluate_sees_the_held_out_images(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=8, val=0, progress=False)
    (data / "annotations/instances_val.json").unlink()
    run = tmp_path / "run"
    damaged = data / divide([f"train/{i:06d}.jpg" for i in range(8)], 0.75, seed=0)[0][0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    options = ["--epochs", 1, "--batch-size", 3, "--keep-empty", "--device", "cpu", "--workers", 0]
    result = invoke("train", "--data", data, "--output", run, "--split", 0.75, *options)
    assert result.exit_code == 0, result.output
    record = json.loads((run / "metrics.json").read_text())
    assert (record["settings"]["images"], record["settings"]["val_images"]) == (6, 2)
    assert record["unreadable"] == [f"train/{damaged.name}"]
    assert "images that could not be read, whose place others took: 1;" in result.output
    assert "is divided as" in result.output and str(data / "ssdcore-split.json") in result.output.replace("\n", "")

    result = invoke("evaluate", "--weights", run / "model.safetensors", "--data", data, "--split", "val", *options[-4:])
    assert result.exit_code == 0, result.output
    assert json.loads((run / "val/metrics.json").read_text())["images"] == 2

    # A file in the folder of the run is used as well, as it is written if the dataset's folder is read-only.
    (data / "ssdcore-split.json").rename(run / "ssdcore-split.json")
    result = invoke("evaluate", "--weights", run / "model.safetensors", "--data", data, "--split", "val", *options[-4:])
    assert result.exit_code == 0, result.output
    train_set, val_set = training._open_train_and_val(data, None, None, run)
    assert val_set is not None and (len(train_set), len(val_set)) == (6, 2)


def test_a_single_split_of_another_name_must_be_given_or_divided() -> None:
    with pytest.raises(ValueError, match=r"train-split must be given, because the only split is all; .*--split 0\.8"):
        training._choose_splits(["all"], None, None)
    assert training._choose_splits(["all"], "all", None) == ("all", None)


class Fitted(Exception):
    """Carries what `fit` was called with."""


def arguments_of_fit(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, Any, Any]:
    def fit(model: Any, train_set: Any, output: Path, *, val_set: Any, **_: Any) -> None:
        raise Fitted(model, train_set, val_set)

    monkeypatch.setattr("ssdcore.train.fit", fit)
    with pytest.raises(Fitted) as called:
        cli.train(device="cpu", workers=0, **settings)
    return called.value.args


def test_images_without_objects_are_left_out_unless_they_are_kept_and_mined(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_synthetic(tmp_path / "shapes", train=6, val=2, progress=False)
    path = data / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a | {"image_id": 1 + number % 4} for number, a in enumerate(content["annotations"])]
    path.write_text(json.dumps(content))

    model, train_set, val_set = arguments_of_fit(monkeypatch, data=data, output=tmp_path)
    assert (len(train_set), len(val_set), model.min_negatives) == (4, 2, 0)
    assert "2 images of train have no object to train on: left out; --keep-empty" in capsys.readouterr().out
    model, train_set, _ = arguments_of_fit(monkeypatch, data=data, output=tmp_path, keep_empty=True)
    assert (len(train_set), model.min_negatives) == (6, 3)
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="keep-empty needs normalizer batch"):
        cli.train(data=data, output=tmp_path, keep_empty=True, normalizer="image", device="cpu", workers=0)


@pytest.mark.parametrize("strict", [False, True])
def test_unreadable_images_stop_a_run_only_if_strict(
    monkeypatch: pytest.MonkeyPatch, shapes: Path, tmp_path: Path, strict: bool
) -> None:
    _, train_set, val_set = arguments_of_fit(monkeypatch, data=shapes, output=tmp_path, strict=strict)
    assert (train_set.strict, val_set.strict) == (strict, strict)
