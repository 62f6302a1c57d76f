"""A model under `torch.compile(fullgraph=True)` gives the same results, and few compilations serve all sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ssdcore.models import MODELS, SSD, ssd300_tiny
from ssdcore.objects import GroundTruth, Target

NUM_CLASSES = 4


def new_model() -> SSD:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return ssd300_tiny(NUM_CLASSES)


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> tuple[Callable[..., Any], Any]:
    """The compiled function, and the counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def targets_of(*counts: int) -> list[Target]:
    """A target for each image, with that many objects."""
    corners = [torch.rand(count, 2) * 40 for count in counts]
    sides = [20 + torch.rand(count, 2) * 60 for count in counts]
    return [
        {"boxes": torch.cat([xy, xy + wh], dim=1), "labels": torch.randint(1, NUM_CLASSES, (len(xy),))}
        for xy, wh in zip(corners, sides, strict=True)
    ]


def losses_and_gradients(model: SSD, call: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    model.zero_grad()
    losses = call(*arguments)
    (losses["classification"] + 2 * losses["bbox_regression"]).backward()
    return [losses["classification"].detach(), losses["bbox_regression"].detach()] + [
        p.grad.clone() for p in model.parameters() if p.grad is not None
    ]


def test_training_compiles_as_one_graph() -> None:
    model = new_model()
    call, counter = compiled(model)
    for counts in ((2, 3), (5, 4)):
        images, targets = torch.rand(2, 3, 300, 300), targets_of(*counts)
        expected = losses_and_gradients(model, model, images, targets)
        for given in (targets, model.ground_truth(images, targets)):
            found = losses_and_gradients(model, call, images, given)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count == 4  # two for the targets as dicts, and two for them as one `GroundTruth`


def test_training_compiles_for_images_of_any_sizes() -> None:
    model = new_model()
    call, counter = compiled(model, "eager")
    for sizes in (((200, 310), (150, 100)), ((90, 80), (120, 70)), ((201, 311), (64, 128))):
        images, targets = [torch.rand(3, *size) for size in sizes], targets_of(3, 2)
        found, expected = call(images, targets), model(images, targets)
        for name, loss in expected.items():
            # The compiler computes the interpolation in another order of operations.
            torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


@torch.no_grad()
def test_inference_compiles_as_one_graph() -> None:
    model = new_model().eval()
    call, _ = compiled(model)
    infer, _ = compiled(model.infer)
    for images in (torch.rand(2, 3, 300, 300), [torch.rand(3, 200, 310), torch.rand(3, 150, 100)]):
        expected = model(images)
        padded = infer(images)
        for b, (found, wanted) in enumerate(zip(call(images), expected, strict=True)):
            assert len(wanted["scores"]) == padded.num_detections[b] > 50
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-3)
                torch.testing.assert_close(getattr(padded, name)[b, : len(tensor)], tensor, rtol=1e-5, atol=1e-3)


def test_inductor_splits_the_detections_by_image() -> None:
    model = new_model().eval()
    cls_logits, box_deltas = model.predict(torch.rand(2, 3, 300, 300))
    maps = [x.detach() for x in cls_logits], [x.detach() for x in box_deltas]
    sizes = torch.tensor([[310.0, 200, 310, 200], [100, 150, 100, 150]])
    found = torch.compile(model.detections, fullgraph=True)(*maps, sizes)
    for got, expected in zip(found, model.detections(*maps, sizes), strict=True):
        torch.testing.assert_close(got, expected)


# Batches of (objects of each image), height and width. None has a size of 0 or 1, or the model's own size.
SIZES = [
    ((2, 3), 200, 310),
    ((3, 4, 5), 210, 120),
    ((0, 1, 0, 3), 90, 80),
    ((1, 1), 70, 77),
    ((9, 0, 8), 77, 70),
    ((2, 2, 2, 2, 2), 150, 90),
]


def test_two_compilations_serve_ground_truths_of_all_sizes() -> None:
    model = new_model()
    call, counter = compiled(model, "eager")
    for counts, height, width in SIZES:
        images = torch.rand(len(counts), 3, height, width)
        truths = model.ground_truth(images, targets_of(*counts))
        assert all(loss.isfinite() for loss in call(images, truths).values())
    assert counter.frame_count == 2


@torch.no_grad()
def test_two_compilations_serve_batches_of_all_sizes() -> None:
    model = new_model().eval()
    call, counter = compiled(model.infer, "eager")
    for counts, height, width in SIZES:
        assert call(torch.rand(len(counts), 3, height, width)).boxes.shape == (len(counts), 200, 4)
    assert counter.frame_count == 2


# The deeper ResNets only have more layers of the same kinds.
@pytest.mark.parametrize(
    "name", sorted(MODELS.keys() - {"ssd300_tiny", *(f"ssd300_resnet{n}" for n in (34, 101, 152))})
)
def test_every_model_compiles(name: str) -> None:
    with torch.device("meta"):  # computes shapes only
        model = MODELS[name](NUM_CLASSES)
        images = torch.empty(2, 3, 200, 310)
        targets = [{"boxes": torch.empty(3, 4), "labels": torch.empty(3, dtype=torch.int64)}] * 2
    torch._dynamo.reset()
    assert set(compiled(model, "eager")[0](images, targets)) == {"classification", "bbox_regression"}
    assert compiled(model.eval().infer, "eager")[0](images).boxes.shape == (2, 200, 4)


def test_a_ground_truth_gives_the_losses_of_its_targets() -> None:
    model = new_model()
    images, targets = [torch.rand(3, 200, 310), torch.rand(3, 90, 80), torch.rand(3, 50, 50)], targets_of(2, 0, 3)
    for targets_in_64_bits in (targets, [target | {"boxes": target["boxes"].double()} for target in targets]):
        truths = model.ground_truth(images, targets_in_64_bits)
        assert truths.boxes.dtype == torch.float32 and truths.offsets.tolist() == [0, 2, 2, 5]
        found, expected = model(images, truths), model(images, targets)
        assert all(torch.equal(found[name], loss) for name, loss in expected.items())


def test_a_ground_truth_of_other_images_raises_an_error() -> None:
    model = new_model()
    images = torch.rand(2, 3, 60, 60)
    truths: GroundTruth = model.ground_truth(images, targets_of(1, 2))
    with pytest.raises(ValueError, match="targets must be those of 3 images, got those of 2"):
        model(torch.rand(3, 3, 60, 60), truths)
    with pytest.raises(ValueError, match="targets must have 2 entries, one per image, got 1"):
        model.ground_truth(images, targets_of(1))
    with pytest.raises(ValueError, match=r"targets\[1\].* in 1..3 \(0 is the background\)"):
        model.ground_truth(
            images, [targets_of(1)[0], {"boxes": torch.ones(1, 4).cumsum(1), "labels": torch.tensor([0])}]
        )


@torch.no_grad()
@pytest.mark.parametrize("clip_before_nms", [True, False])
def test_the_postprocess_compiles_alone(clip_before_nms: bool) -> None:
    model = new_model().eval()
    model.clip_before_nms = clip_before_nms
    maps = model.predict(torch.rand(2, 3, 300, 300))
    for found, expected in zip(compiled(model.postprocess)[0](*maps), model.postprocess(*maps), strict=True):
        assert torch.equal(found, expected)
