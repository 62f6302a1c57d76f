"""The head's outputs as levels, for code that runs on the host.

A level is one feature map's share of the outputs, seen as [B, P, a, C]: P cells, a anchors per cell, C numbers per
anchor. Packed outputs [B, A, C] are one level of A cells with one anchor each. Anchors are numbered level after level,
within a level cell after cell, within a cell one after the other. Levels are views: nothing is copied.

A level lies in memory in one of two layouts:

- rows, [P, a, C] of each image: packed outputs, and maps in channels_last. The C numbers of an anchor are neighbours.
- planes, [a, C, P] of each image: contiguous maps (NCHW). The same number of neighbouring cells are neighbours.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssdcore.kernels.checks import FLOATS, check_tensor
from ssdcore.kernels.rules import widen


class LevelViews(NamedTuple):
    """The head's outputs as levels."""

    logits: list[Tensor]  # [B, P, a, C] of each level
    deltas: list[Tensor]  # [B, P, a, 4] of each level
    batch: int  # B
    num_anchors: int  # A, of all levels


def view_as_levels(cls_logits: Tensor | Sequence[Tensor], box_deltas: Tensor | Sequence[Tensor]) -> LevelViews:
    """Check the head's outputs and view them as levels.

    Args:
        cls_logits: packed, [B, A, C], or a sequence of maps [B, a * C, H, W], one per level.
        box_deltas: packed, [B, A, 4], or a sequence of maps [B, a * 4, H, W], one per level.

    Raises:
        TypeError: an argument is not a tensor, has another dtype, or only one of both is packed.
        ValueError: a shape or device does not fit.
    """
    if isinstance(cls_logits, Tensor) and isinstance(box_deltas, Tensor):
        check_tensor("cls_logits", cls_logits, ("B", "A", "C"), FLOATS)
        check_tensor("box_deltas", box_deltas, (*cls_logits.shape[:2], 4), FLOATS, like=cls_logits)
        if cls_logits.shape[2] == 0:
            raise ValueError(f"cls_logits must have at least one class, got {list(cls_logits.shape)}")
        batch, num_anchors, _ = cls_logits.shape
        return LevelViews([cls_logits.unsqueeze(2)], [box_deltas.unsqueeze(2)], batch, num_anchors)
    if isinstance(cls_logits, Tensor) or isinstance(box_deltas, Tensor):
        raise TypeError("cls_logits and box_deltas must both be tensors, or both be sequences of maps")
    if len(cls_logits) != len(box_deltas) or not cls_logits:
        raise ValueError(
            f"cls_logits and box_deltas must each have one map per level, got {len(cls_logits)} and {len(box_deltas)}"
        )
    return _view_maps_as_levels(cls_logits, box_deltas)


def _view_maps_as_levels(cls_maps: Sequence[Tensor], box_maps: Sequence[Tensor]) -> LevelViews:
    logits: list[Tensor] = []
    deltas: list[Tensor] = []
    batch: str | int = "B"
    cls_dtypes: tuple[torch.dtype, ...] = FLOATS
    box_dtypes: tuple[torch.dtype, ...] = FLOATS
    num_classes, num_anchors = 0, 0
    for level, (cls_map, box_map) in enumerate(zip(cls_maps, box_maps, strict=True)):
        # The first level sets the batch size and the dtypes that the other levels must have.
        check_tensor(f"cls_logits[{level}]", cls_map, (batch, "a * C", "H", "W"), cls_dtypes, like=cls_maps[0])
        batch, channels, height, width = cls_map.shape
        check_tensor(f"box_deltas[{level}]", box_map, (batch, "a * 4", height, width), box_dtypes, like=cls_map)
        cls_dtypes, box_dtypes = (cls_map.dtype,), (box_map.dtype,)
        per_cell = box_map.shape[1] // 4
        if per_cell == 0 or channels == 0 or box_map.shape[1] % 4 or channels % per_cell:
            raise ValueError(
                f"cls_logits[{level}] must have a * C channels and box_deltas[{level}] a * 4, "
                f"got {channels} and {box_map.shape[1]}"
            )
        num_classes = num_classes or channels // per_cell
        if channels != per_cell * num_classes:
            raise ValueError(
                f"cls_logits[{level}] must have {per_cell} * {num_classes} channels, as level 0, got {channels}"
            )
        num_anchors += height * width * per_cell
        logits.append(_view_map_as_level(cls_map, per_cell))
        deltas.append(_view_map_as_level(box_map, per_cell))
    return LevelViews(logits, deltas, cls_maps[0].shape[0], num_anchors)


def _view_map_as_level(head_map: Tensor, per_cell: int) -> Tensor:
    """[B, a * C, H, W] as [B, P, a, C]."""
    return head_map.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2)


def packed(levels: Sequence[Tensor]) -> Tensor:
    """[B, A, C] of levels [B, P, a, C]; a copy if there are several levels, or one that lies in planes."""
    level_rows = [level.flatten(1, 2) for level in levels]
    return level_rows[0] if len(level_rows) == 1 else torch.cat(level_rows, dim=1)


def in_planes(levels: Sequence[Tensor]) -> bool:
    """Whether all levels [B, P, a, C] lie as planes [B, a, C, P], and not all of them as rows as well."""
    return all(level.permute(0, 2, 3, 1).is_contiguous() for level in levels) and not all(
        level.is_contiguous() for level in levels
    )


def rows_are_dense(level: Tensor) -> bool:
    """Whether the rows of each image of a level [B, P, a, C] are neighbours in memory."""
    _, _, per_cell, width = level.shape
    # The strides answer in most cases. The view, which costs a microsecond, also knows dimensions of size 1.
    return level.stride()[1:] == (per_cell * width, width, 1) or level[:1].is_contiguous()


def empty_like_levels(levels: Sequence[Tensor], planes: bool) -> list[Tensor]:
    """A dense tensor of the same shape for each level, in planes or in rows."""
    if not planes:
        return [level.new_empty(level.shape) for level in levels]
    empty = []
    for level in levels:
        _, num_cells, per_cell, width = level.shape
        strides = (per_cell * width * num_cells, 1, width * num_cells, num_cells)
        empty.append(level.new_empty_strided(level.shape, strides))
    return empty


def empty_gradients(cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor]) -> list[Tensor]:
    """A dense tensor for each level of logits, then of deltas, of the same shape and in the common layout of all."""
    levels = [*cls_logits, *box_deltas]
    return empty_like_levels(levels, in_planes(levels))


def gather_rows(levels: Sequence[Tensor], image: Tensor, anchor: Tensor) -> Tensor:
    """The rows [S, C] of the anchors `anchor` [S] in the images `image` [S], widened."""
    if len(levels) == 1 and levels[0].shape[2] == 1:
        return widen(_take(levels[0], (image, anchor, torch.zeros_like(anchor))))
    rows = widen(levels[0].new_empty(len(anchor), levels[0].shape[3]))
    for level, on_level, index in _index_by_level(levels, image, anchor):
        rows[on_level] = widen(_take(level, index))
    return rows


def scatter_rows(levels: Sequence[Tensor], image: Tensor, anchor: Tensor, rows: Tensor) -> None:
    """Write `rows` [S, C] to the anchors `anchor` [S] in the images `image` [S]."""
    if len(levels) == 1 and levels[0].shape[2] == 1:
        _put(levels[0], (image, anchor, torch.zeros_like(anchor)), rows)
        return
    for level, on_level, index in _index_by_level(levels, image, anchor):
        _put(level, index, rows[on_level])


def _take(level: Tensor, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`level[index]`."""
    # PyTorch divides even a hundred rows among threads. NumPy, which has no bfloat16, does not.
    if not level.is_cpu or torch.compiler.is_compiling():
        return level[index]
    bits = level.view(torch.int16) if level.dtype == torch.bfloat16 else level
    return torch.from_numpy(bits.numpy()[tuple(x.numpy() for x in index)]).view(level.dtype)


def _put(level: Tensor, index: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> None:
    """`level[index] = rows`."""
    rows = rows.to(level.dtype)
    if not level.is_cpu or torch.compiler.is_compiling():
        level[index] = rows
        return
    bits, row_bits = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in (level, rows))
    bits.numpy()[tuple(x.numpy() for x in index)] = row_bits.numpy()


def _index_by_level(
    levels: Sequence[Tensor], image: Tensor, anchor: Tensor
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Each level; which of the anchors lie on it; and their index in it: image, cell, anchor within the cell."""
    first_anchor = 0
    for level in levels:
        num_cells, per_cell = level.shape[1:3]
        anchor_in_level = anchor - first_anchor
        on_level = ((anchor_in_level >= 0) & (anchor_in_level < num_cells * per_cell)).nonzero()[:, 0]
        anchor_in_level = anchor_in_level[on_level]
        yield level, on_level, (image[on_level], anchor_in_level // per_cell, anchor_in_level % per_cell)
        first_anchor += num_cells * per_cell
