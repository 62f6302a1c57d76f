"""An exported detector gives the model's detections, at any batch size, and says what it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssdcore.cli import export
from ssdcore.export import OPSET, OUTPUTS, export_model
from ssdcore.kernels import postprocess_detections
from ssdcore.models import SSD, ssd300_tiny
from ssdcore.weights import save_weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES = ["cat", "dog", "çà"]


@pytest.fixture(scope="module")
def model() -> SSD:
    """A model whose scores are spread out, so that no two of them are nearly equal and change places."""
    torch.manual_seed(0)
    model = ssd300_tiny(4, image_mean=(0.1, 0.2, 0.3))
    with torch.no_grad():
        for conv in model.head.classification_head.module_list:
            conv.weight.mul_(8)
    model.score_threshold = 0.3
    return model.eval()


@pytest.fixture(scope="module")
def weights(model: SSD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    save_weights(model, path, CLASSES, [7, 8, 20])
    return path


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 300, 300, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def detections(model: SSD, batch: Tensor) -> list[Tensor]:
    found = model.postprocess(*model.predict(model.resize(batch)))
    assert found.num_detections.min() > 20
    return [getattr(found, name) for name in OUTPUTS]


RUN_PT2 = """
import json, sys, torch, ssdcore.kernels
files = {"ssdcore.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
found = [program(batch) for batch in torch.load(sys.argv[2])]
assert not {"ssdcore.models", "ssdcore.weights", "torchvision"} & set(sys.modules)
torch.save((found, json.loads(files["ssdcore.json"])), sys.argv[3])
"""


def test_a_pt2_file_gives_the_model_s_detections_in_another_process(model: SSD, tmp_path: Path) -> None:
    export_model(model, tmp_path / "model.pt2", CLASSES, [7, 8, 20])
    batches = [images(count) for count in (1, 3)]
    torch.save(batches, tmp_path / "images.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "images.pt", "found.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RUN_PT2, *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found, metadata = torch.load(tmp_path / "found.pt")
    for outputs, batch in zip(found, batches, strict=True):
        assert tuple(outputs) == OUTPUTS
        for got, expected in zip(outputs.values(), detections(model, batch), strict=True):
            assert torch.equal(got, expected)
    assert metadata["classes"] == CLASSES and metadata["category_ids"] == [7, 8, 20]
    assert metadata["image_size"] == 300 and metadata["boxes"] == "xyxy in pixels of the input, 300 x 300"


def test_an_onnx_file_gives_the_model_s_detections(model: SSD, tmp_path: Path) -> None:
    ports = export_model(model, tmp_path / "model.onnx", CLASSES)
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions  # standard operators only
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    assert "NonMaxSuppression" in {node.op_type for node in proto.graph.node}

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    dtypes = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
    for given, expected_ports in ((session.get_inputs(), ports.inputs), (session.get_outputs(), ports.outputs)):
        assert tuple((port.name, dtypes[port.type], tuple(port.shape)) for port in given) == expected_ports
    assert json.loads(session.get_modelmeta().custom_metadata_map["ssdcore"])["classes"] == CLASSES
    for count in (1, 3):
        batch = images(count)
        boxes, scores, labels, num_detections = detections(model, batch)
        found = dict(zip(OUTPUTS, session.run(None, {"images": batch.numpy()}), strict=True))
        assert found["num_detections"].tolist() == num_detections.tolist()
        assert found["labels"].tolist() == labels.tolist()
        # Both sum convolutions and exponentials in another order.
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["boxes"], boxes, rtol=1e-5, atol=1e-3)


class Postprocess(nn.Module):
    """`postprocess_detections` of packed outputs, whose image sizes differ."""

    def __init__(self, anchors: Tensor, **settings: Any) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.settings = settings

    def forward(self, cls_logits: Tensor, box_deltas: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(postprocess_detections(cls_logits, box_deltas, self.anchors, image_sizes, **self.settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"score_threshold": 0.0, "iou_threshold": 0.5, "topk_candidates": 5, "max_detections": 8},
        {"score_threshold": 0.25, "iou_threshold": 0.0, "topk_candidates": 400, "max_detections": 60},
        {"score_threshold": 0.3, "iou_threshold": 1 / 3, "weights": (8.0, 4.0, 2.0, 2.0), "max_detections": 20},
        {"score_threshold": 1.0},
    ],
    ids=["ties at the limits", "thresholds that are met exactly", "weights", "nothing found"],
)
def test_onnx_decides_ties_and_equal_thresholds_as_the_op_does(settings: dict[str, Any]) -> None:
    from ssdcore.onnx_postprocess import onnx_postprocess_detections

    generator = torch.Generator().manual_seed(0)
    # Whole numbers give many equal scores, among them 0.25, and IoUs of exactly 1/3 and 1/2.
    corner = torch.randint(0, 3, (16, 2), generator=generator) * 10.0
    anchors = torch.cat([corner, corner + torch.randint(1, 3, (16, 2), generator=generator) * 20.0], dim=1)
    problems = []
    for count in (2, 5):
        logits = torch.randint(0, 2, (count, 16, 4), generator=generator) * 3.0
        deltas = torch.zeros(count, 16, 4)
        deltas[:, ::5] = torch.randn(count, 4, 4, generator=generator) * 5
        sizes = torch.randint(20, 60, (count, 2), generator=generator)
        # A width beyond the limit, in an image that does not hide it.
        logits[-1, 3, 1], deltas[-1, 3, 2], sizes[-1] = 9.0, 60.0, 5000
        problems.append((logits, deltas, sizes))
    program = torch.onnx.export(
        Postprocess(anchors, **settings).eval(),
        problems[0],
        dynamo=True,
        dynamic_shapes=({0: "batch"},) * 3,
        input_names=["cls_logits", "box_deltas", "image_sizes"],
        opset_version=OPSET,
        custom_translation_table={torch.ops.ssdcore.postprocess_detections.default: onnx_postprocess_detections},
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for problem in problems:
        expected = postprocess_detections(*problem[:2], anchors, problem[2], **settings)
        names = ("cls_logits", "box_deltas", "image_sizes")
        found = session.run(None, {name: x.numpy() for name, x in zip(names, problem, strict=True)})
        boxes, scores, labels, num_detections, anchor_idxs = (torch.from_numpy(x) for x in found)
        assert torch.equal(num_detections, expected.num_detections)
        assert torch.equal(labels, expected.labels) and torch.equal(anchor_idxs, expected.anchor_idxs)
        torch.testing.assert_close(scores, expected.scores, rtol=1e-6, atol=1e-7)  # other orders of summation
        torch.testing.assert_close(boxes, expected.boxes, rtol=1e-5, atol=1e-4)


def test_the_command_says_what_it_wrote(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(weights, format="onnx", output=tmp_path / "new folder" / "two.onnx", batch="2")
    printed = capsys.readouterr().out.splitlines()
    assert f"wrote {path}: ssd300_tiny with 3 classes" in printed[-6]
    assert [line.split(maxsplit=1) for line in printed[-5:]] == [
        ["input", "images         float32 [2, 3, 300, 300]"],
        ["output", "boxes          float32 [2, 200, 4]"],
        ["output", "scores         float32 [2, 200]"],
        ["output", "labels         int64   [2, 200]"],
        ["output", "num_detections int32   [2]"],
    ]
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == [2, 3, 300, 300]
    assert json.loads(session.get_modelmeta().custom_metadata_map["ssdcore"])["category_ids"] == [7, 8, 20]


def test_the_command_names_a_file_after_the_weights(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(weights)
    assert path == weights.with_suffix(".pt2") and "[batch, 3, 300, 300]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "format must be pt2 or onnx, got tflite"),
        ({"batch": "many"}, "batch must be a number or dynamic, got many"),
        ({"batch": "0"}, "batch_size must be 1 or more, or None for any, got 0"),
        ({"format": "onnx", "output": Path("model.pt2")}, r"output must end in \.onnx, got model\.pt2"),
    ],
)
def test_malformed_arguments_raise_an_error(weights: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export(weights, **arguments)


def test_export_model_checks_its_arguments(model: SSD, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.pt2 or \.onnx, got .*model\.bin"):
        export_model(model, tmp_path / "model.bin", CLASSES)
    with pytest.raises(ValueError, match="classes must name the 3 classes of the model, got 1"):
        export_model(model, tmp_path / "model.pt2", ["cat"])


def test_a_missing_package_is_named(model: SSD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"an .onnx file needs onnxscript: pip install 'ssdcore\[export\]'"):
        export_model(model, tmp_path / "model.onnx", CLASSES)
    assert not (tmp_path / "model.onnx").exists()
