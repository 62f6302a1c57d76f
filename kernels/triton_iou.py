"""IoU of every pair of boxes.

One pass: each program makes a tile of the result from two strips of boxes. Moves 4 bytes a pair and 32 bytes a row
and column of tiles; no scratch memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import iou, load_box

BLOCK_ROWS = 32  # boxes1 a program: with 128 columns, 32 pairs a thread
BLOCK_COLUMNS = 128  # boxes2 a program: one row of a tile is four 128-byte lines


@triton.jit
def _box_iou_kernel(
    boxes1_ptr,  # [N, 4] xyxy
    boxes2_ptr,  # [M, 4] xyxy
    iou_ptr,  # [N, M]
    num_boxes1,
    num_boxes2,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # One dimension of programs: the second may not pass 65,535, which is 8 million boxes.
    strips = tl.cdiv(num_boxes2, BLOCK_COLUMNS)
    row = tl.program_id(0) // strips * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % strips * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    ax1, ay1, ax2, ay2 = load_box(boxes1_ptr, row, row < num_boxes1)
    bx1, by1, bx2, by2 = load_box(boxes2_ptr, column, column < num_boxes2)
    value = iou(
        ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None],
        bx1[None, :], by1[None, :], bx2[None, :], by2[None, :],
    )  # fmt: skip
    # int64: N * M passes 2**31 from 46,341 boxes against themselves
    cell = row[:, None].to(tl.int64) * num_boxes2 + column[None, :]
    tl.store(iou_ptr + cell, value, mask=(row < num_boxes1)[:, None] & (column < num_boxes2)[None, :])


def box_iou_triton(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    out = torch.empty(len(boxes1), len(boxes2), dtype=torch.float32, device=boxes1.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(len(boxes1), BLOCK_ROWS) * triton.cdiv(len(boxes2), BLOCK_COLUMNS),)
    _box_iou_kernel[grid](
        boxes1.contiguous(),
        boxes2.contiguous(),
        out,
        len(boxes1),
        len(boxes2),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
