"""The default boxes: torchvision's to the last bit, and the clip rules told apart by what they move."""

from dataclasses import replace

import pytest
import torch

from ssdcore.anchors import SSD300_COCO, SSD300_VOC, AnchorConfig, make_anchors


@pytest.mark.parametrize("config", [SSD300_COCO, SSD300_VOC], ids=["coco", "voc"])
@pytest.mark.parametrize("clip", ["none", "sizes"])
def test_bit_for_bit_torchvision(config: AnchorConfig, clip: str) -> None:
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
    expected = generator(image, [torch.zeros(1, 1, grid, grid) for grid in config.grid_sizes])[0]
    torch.testing.assert_close(make_anchors(replace(config, clip=clip)), expected, rtol=0, atol=0)


def test_order_is_map_row_column_anchor() -> None:
    anchors = make_anchors()
    assert anchors.shape == (8732, 4) and anchors.dtype == torch.float32
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    sizes = anchors[:, 2:] - anchors[:, :2]
    expected = torch.tensor([4.0, 4.0]).expand(4, 2)  # the first cell's, half a step in
    torch.testing.assert_close(centers[:4], expected)
    torch.testing.assert_close(centers[4:8], expected + torch.tensor([8.0, 0.0]))  # then one column on
    below = slice(4 * 38, 4 * 39)  # then one row down
    torch.testing.assert_close(centers[below], expected + torch.tensor([0.0, 8.0]))
    torch.testing.assert_close(centers[5776], torch.tensor([8.0, 8.0]))  # then the next map
    wide, tall = sizes[2], sizes[3]
    assert (wide / tall).tolist() == pytest.approx([2.0, 0.5])


def differing_rows(a: AnchorConfig, b: AnchorConfig) -> torch.Tensor:
    return (make_anchors(a) != make_anchors(b)).any(dim=1).nonzero().flatten()


def test_clip_rules_differ_where_measured() -> None:
    none, sizes, centers = (replace(SSD300_COCO, clip=clip) for clip in ("none", "sizes", "centers"))
    assert len(differing_rows(none, sizes)) == 2  # the wide and the tall box of the 1 x 1 map
    rows = differing_rows(sizes, centers)
    assert len(rows) == 114  # 19 cells of the 10 x 10 map have a centre past the image: 1.0133 of its side
    assert rows.min() >= 7942 and rows.max() < 8542  # all in that map


def test_clipped_corners_stay_inside() -> None:
    none, corners = (make_anchors(replace(SSD300_COCO, clip=clip)) for clip in ("none", "corners"))
    assert torch.equal(corners, torch.stack([x.clamp(0, 300) for x in none.unbind(1)], dim=1))
    assert not torch.equal(corners, none)


def test_malformed_configs_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="scales must have 7 entries for 6 maps, got 2"):
        AnchorConfig(scales=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"clip must be .* got 'edges'"):
        AnchorConfig(clip="edges")  # type: ignore[arg-type]
