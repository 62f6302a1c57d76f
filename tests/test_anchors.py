"""The anchors equal torchvision's to the last bit, and each clip rule moves exactly the anchors that its docs name."""

from dataclasses import replace

import pytest
import torch

from ssdcore.anchors import SSD300_COCO, SSD300_VOC, AnchorConfig, make_anchors


@pytest.mark.parametrize("config", [SSD300_COCO, SSD300_VOC], ids=["coco", "voc"])
@pytest.mark.parametrize("clip", ["none", "sizes"])
def test_anchors_are_bit_identical_to_torchvisions(config: AnchorConfig, clip: str) -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    generator = DefaultBoxGenerator(
        [list(ratios) for ratios in config.aspect_ratios],
        scales=list(config.scales),
        steps=list(config.steps),
        clip=clip == "sizes",
    )
    image = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    expected = generator(image, [torch.zeros(1, 1, size, size) for size in config.grid_sizes])[0]
    torch.testing.assert_close(make_anchors(replace(config, clip=clip)), expected, rtol=0, atol=0)


def test_anchors_are_ordered_by_map_row_column_and_anchor() -> None:
    anchors = make_anchors()
    assert anchors.shape == (8732, 4) and anchors.dtype == torch.float32
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    sizes = anchors[:, 2:] - anchors[:, :2]
    expected = torch.tensor([4.0, 4.0]).expand(4, 2)  # the first cell of the 38 x 38 map, half a step from the corner
    torch.testing.assert_close(centers[:4], expected)
    torch.testing.assert_close(centers[4:8], expected + torch.tensor([8.0, 0.0]))  # the next column
    below = slice(4 * 38, 4 * 39)  # the first cell of the next row
    torch.testing.assert_close(centers[below], expected + torch.tensor([0.0, 8.0]))
    torch.testing.assert_close(centers[5776], torch.tensor([8.0, 8.0]))  # the first cell of the 19 x 19 map
    wide, tall = sizes[2], sizes[3]
    assert (wide / tall).tolist() == pytest.approx([2.0, 0.5])


def differing_anchors(a: AnchorConfig, b: AnchorConfig) -> torch.Tensor:
    """Indices of the anchors that differ between two configs."""
    return (make_anchors(a) != make_anchors(b)).any(dim=1).nonzero().flatten()


def test_clip_rules_change_the_documented_anchors() -> None:
    unclipped, sizes, centers = (replace(SSD300_COCO, clip=clip) for clip in ("none", "sizes", "centers"))
    assert len(differing_anchors(unclipped, sizes)) == 2  # the wide and the tall anchor of the 1 x 1 map
    indices = differing_anchors(sizes, centers)
    assert len(indices) == 114  # 19 cells of the 10 x 10 map have a centre at 1.0133 of the image's side
    assert indices.min() >= 7942 and indices.max() < 8542  # the indices of the 10 x 10 map


def test_clipped_corners_stay_inside_the_image() -> None:
    unclipped, corners = (make_anchors(replace(SSD300_COCO, clip=clip)) for clip in ("none", "corners"))
    assert torch.equal(corners, torch.stack([x.clamp(0, 300) for x in unclipped.unbind(1)], dim=1))
    assert not torch.equal(corners, unclipped)


def test_malformed_configs_raise_value_error() -> None:
    with pytest.raises(ValueError, match="scales must have 7 entries for 6 feature maps, got 2"):
        AnchorConfig(scales=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"clip must be .* got 'edges'"):
        AnchorConfig(clip="edges")  # type: ignore[arg-type]
