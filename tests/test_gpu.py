"""The detector on a GPU: training, resuming, CUDA graphs, memory, and agreement with the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssdcore.data import open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.kernels import Detections, match_anchors, multibox_loss
from ssdcore.models import ssd300_tiny, ssd300_vgg16
from ssdcore.synthetic import make_synthetic
from ssdcore.train import fit
from ssdcore.weights import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_model_trains_resumes_and_detects_on_the_gpu(tmp_path: Path) -> None:
    data = make_synthetic(tmp_path / "shapes", train=16, val=4, progress=False)
    train_set, val_set = open_dataset(data, "train"), open_dataset(data, "val")
    settings = {"batch_size": 8, "workers": 2, "device": "cuda", "quiet": True}
    record = fit(ssd300_tiny(4), train_set, tmp_path / "run", val_set=val_set, epochs=2, **settings)
    again = fit(ssd300_tiny(4), train_set, tmp_path / "run", val_set=val_set, epochs=2, resume=True, **settings)
    assert again == record
    model, _ = load_model(tmp_path / "run" / "model.safetensors", "cuda")
    assert set(detect_dataset(model, val_set, quiet=True)) == set(val_set.image_ids.tolist())
    averaged = detect_dataset([model, model], val_set, flip=True, quiet=True)
    assert set(averaged) == set(val_set.image_ids.tolist())


def test_vgg_trains_in_bf16(tmp_path: Path) -> None:
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


def test_head_outputs_agree_with_the_cpu() -> None:
    torch.manual_seed(0)
    model = ssd300_tiny(4).eval()
    images = [torch.rand(3, 200, 300), torch.rand(3, 90, 80)]
    with torch.no_grad():
        expected = model.predict(model.resize(images))
        model.cuda()
        actual = model.predict(model.resize([image.cuda() for image in images]))
    for a, b in zip(expected[0] + expected[1], actual[0] + actual[1], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-2, atol=1e-2)  # the GPU may use TF32 in convolutions


def test_targets_may_be_on_the_cpu_or_the_gpu() -> None:
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


def test_a_cuda_graph_can_capture_matching_loss_and_gradients() -> None:
    # The graph is captured with the maps of some images and replayed with those of others.
    model = ssd300_tiny(4)
    anchors = model.anchors.cuda()
    shapes = [(4, 38), (6, 19), (6, 10), (6, 5), (4, 3), (4, 1)]

    def problem(seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        maps = [
            [torch.randn(2, a * width, side, side, generator=generator).bfloat16().cuda() for a, side in shapes]
            for width in (4, 4)
        ]
        maps = [[x.contiguous(memory_format=torch.channels_last) for x in levels] for levels in maps]
        corner = torch.rand(5, 2, generator=generator) * 200
        gt_boxes = torch.cat((corner, corner + 20 + torch.rand(5, 2, generator=generator) * 80), dim=1)
        offsets = torch.tensor([0, seed, 5])
        return *maps, [x.cuda() for x in (gt_boxes, torch.tensor([1, 2, 3, 1, 2]), offsets)]

    def criterion(logits: list[Tensor], deltas: list[Tensor], ground_truth: list[Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (*logits, *deltas)]
        matched = match_anchors(ground_truth[0], ground_truth[2], anchors)
        losses = multibox_loss(logits, deltas, matched, *ground_truth, anchors)
        return [*losses, *torch.autograd.grad(losses.classification + losses.bbox_regression, leaves)]

    captured = problem(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        criterion(*captured)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(*captured)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = criterion(*captured)
    other = problem(4)
    with torch.no_grad():
        for captured_tensors, other_tensors in zip(captured, other, strict=True):
            for x, y in zip(captured_tensors, other_tensors, strict=True):
                x.copy_(y)
    graph.replay()
    for a, b in zip(results, criterion(*other), strict=True):
        assert torch.equal(a, b)
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in results[2:])


@torch.no_grad()
def test_a_cuda_graph_can_capture_the_whole_inference() -> None:
    model = ssd300_tiny(4).eval().cuda().to(memory_format=torch.channels_last)
    batch, other = (torch.rand(2, 3, 300, 300, device="cuda") for _ in range(2))

    def infer() -> Detections:
        return model.postprocess(*model.predict(batch))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        infer()  # compiles the kernels and chooses the algorithms of the convolutions
        torch.cuda.set_sync_debug_mode("error")
        try:
            infer()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = infer()
    batch.copy_(other)
    graph.replay()
    for a, b in zip(results, infer(), strict=True):
        torch.testing.assert_close(a, b)  # convolutions may differ in the last bits


@torch.no_grad()
def test_inference_compiles_with_cuda_graphs() -> None:
    model = ssd300_tiny(4).eval().cuda()

    def infer(batch: Tensor) -> Detections:
        return model.postprocess(*model.predict(batch))

    compiled = torch.compile(infer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first calls warm up and record, the later ones replay
        batch = torch.rand(2, 3, 300, 300, device="cuda")
        actual, expected = compiled(batch), infer(batch)
        assert torch.equal(actual.num_detections, expected.num_detections)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-2, atol=1e-3)  # fused convolutions in TF32


def test_the_loss_does_not_copy_the_head_outputs() -> None:
    # Besides the gradients, the loss allocates 9 bytes per anchor and the matches, not the megabytes of a packed copy.
    anchors = ssd300_tiny(4).anchors.cuda()
    shapes = [(4, 38), (6, 19), (6, 10), (6, 5), (4, 3), (4, 1)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        logits, deltas = (
            [
                torch.randn(8, a * width, side, side, device="cuda")
                .contiguous(memory_format=memory_format)
                .requires_grad_()
                for a, side in shapes
            ]
            for width in (81, 4)
        )
        gt_boxes = torch.tensor([[20.0, 30, 200, 180]] * 8, device="cuda")
        labels, offsets = torch.ones(8, dtype=torch.int64, device="cuda"), torch.arange(9, device="cuda")
        matched = match_anchors(gt_boxes, offsets, anchors)

        def step() -> tuple[Tensor, ...]:
            losses = multibox_loss(logits, deltas, matched, gt_boxes, labels, offsets, anchors)  # noqa: B023
            return torch.autograd.grad(losses.classification + losses.bbox_regression, [*logits, *deltas])  # noqa: B023

        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = step()
        grad_bytes = sum(grad.numel() * grad.element_size() for grad in grads)
        assert torch.cuda.max_memory_allocated() - before < grad_bytes + 8 * 8732 * 16 + 2**20
