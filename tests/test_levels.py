"""The kernels read a head's outputs where they lie."""

import pytest
import torch

from ssdcore.kernels.levels import view_as_levels

head = pytest.importorskip("ssdcore.kernels.device.head")


def outputs(memory_format: torch.memory_format) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two levels, of 2 anchors on 3 x 4 cells and 3 anchors on one, of 5 classes."""
    logits, deltas = (
        [torch.randn(2, a * width, h, w).contiguous(memory_format=memory_format) for a, h, w in ((2, 3, 4), (3, 1, 1))]
        for width in (5, 4)
    )
    return logits, deltas


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_are_not_copied(memory_format: torch.memory_format) -> None:
    logits, deltas = outputs(memory_format)
    levels, shape = head.levels_of(*view_as_levels(logits, deltas)[:2])
    assert shape.planes == (memory_format == torch.contiguous_format)
    assert shape.classes == 5
    for view, given in zip(levels.logits + levels.deltas, logits + deltas, strict=True):
        assert view.data_ptr() == given.data_ptr()
    assert (levels.cells, levels.per_cell) == ((12, 1), (2, 3))


def test_packed_outputs_are_not_copied() -> None:
    logits, deltas = torch.randn(2, 9, 5), torch.randn(2, 9, 4)
    levels, shape = head.levels_of(*view_as_levels(logits, deltas)[:2])
    assert not shape.planes
    views = levels.logits + levels.deltas
    assert [x.data_ptr() for x in views] == [logits.data_ptr(), deltas.data_ptr()]


def test_a_slice_of_packed_outputs_is_not_copied() -> None:
    # The rows of an image are dense, the images are not.
    logits, deltas = torch.randn(2, 9, 5)[:, 2:7], torch.randn(2, 9, 4)[:, 2:7]
    levels, _ = head.levels_of(*view_as_levels(logits, deltas)[:2])
    views = levels.logits + levels.deltas
    assert [x.data_ptr() for x in views] == [logits.data_ptr(), deltas.data_ptr()]
    assert (levels.logits_strides, levels.deltas_strides) == ((45,), (36,))


def test_maps_in_neither_layout_are_copied() -> None:
    logits, _ = outputs(torch.channels_last)
    _, deltas = outputs(torch.contiguous_format)
    views = view_as_levels(logits, deltas)[:2]
    levels, shape = head.levels_of(*views)
    assert not shape.planes
    for read, given in zip(levels.logits + levels.deltas, [*views[0], *views[1]], strict=True):
        assert read[0].is_contiguous()
        assert torch.equal(read, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_read_as_words_where_images_begin_with_words(dtype: torch.dtype) -> None:
    def words(logits: torch.Tensor) -> int:
        deltas = torch.randn(*logits.shape[:2], 4)
        return head.levels_of(*view_as_levels(logits, deltas)[:2])[1].words

    memory = torch.randn(1001).to(dtype)
    assert words(memory[:900].view(2, 10, 45)) == 8
    assert words(memory[1:901].view(2, 10, 45)) == 0  # begins in the middle of a word
    assert words(memory[:990].view(2, 11, 45)) == 0  # the second image does
    assert words(memory[:900].view(2, 450, 1)) == 0
    assert words(memory[:900].view(2, 10, 45).float()) == 0


@pytest.mark.parametrize("num_classes", [2, 3, 21, 81, 91, 601, 5000])
def test_a_tile_of_words_wastes_little(num_classes: int) -> None:
    words = head.words_of(num_classes)
    assert words & (words - 1) == 0
    assert -(-(num_classes // 2) // words) * words < num_classes // 2 + words
    assert words <= max(8, num_classes / 8)


@pytest.mark.parametrize("num_classes", [1, 2, 21, 32, 33, 81, 91, 320, 1204, 5000])
def test_a_tile_holds_all_classes_and_wastes_little(num_classes: int) -> None:
    anchors, chunk = head.tile_anchors(num_classes), head.chunk_of(num_classes)
    columns = -(-num_classes // chunk) * chunk
    assert anchors >= 1 and anchors & (anchors - 1) == 0
    assert columns < num_classes + chunk
    assert columns <= max(32, 1.25 * num_classes + 32)
    assert anchors == 1 or anchors * columns <= head.TILE_LOGITS
