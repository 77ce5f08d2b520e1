"""Products with packed weights, and rows looked up in them.

T tokens, C columns of a row, R rows.
"""

import threading
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from emp_llm.resident.content import Content
from emp_llm.resident.held_planes import gather, is_there
from emp_llm.resident.held_planes import multiply as multiply_held

__all__ = ["look_up", "multiply", "multiply_experts", "multiply_rows_by"]

FEW_TOKENS: Final = 16
"""Tokens that packed rows are multiplied by; for more, rows are decoded and torch multiplies."""

TILE_BYTES: Final = 8 << 20
"""Bytes of the rows that are decoded at a time: they stay in the cache that cores share, and are
enough for all threads to decode some and for torch to multiply well."""

_LARGE_TILE_BYTES: Final = 64 << 20
"""The same on a GPU, and where sums over tiles are rounded: most weights are one tile."""

_this_thread = threading.local()


def multiply(x: Tensor, content: Content, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight W whose rows are outputs, as torch's linear: x Wᵀ + bias.

    Args:
        x: [..., C], of the weight's dtype.
        content: The weight: one matrix of R rows.
        bias: [R].

    Returns:
        [..., R].
    """
    rows, columns = content.rows_count, content.columns
    x_TC = x.reshape(-1, columns)
    out_TR = x_TC.new_empty((len(x_TC), rows))
    if len(x_TC) > FEW_TOKENS:
        _multiply_tiles(x_TC, content, bias, out_TR)
    elif len(x_TC):
        _multiply_few(x_TC.contiguous(), content, bias, out_TR)
    return out_TR.view(*x.shape[:-1], rows)


def _multiply_few(x_TC: Tensor, content: Content, bias: Tensor | None, out_TR: Tensor) -> None:
    """Each row is decoded once, and multiplied by all tokens on the way."""
    bias = None if bias is None else bias.contiguous()
    parts = content.parts
    if len(parts) == 1:
        multiply_held(parts[0].held, x_TC, out_TR, bias)
        return
    for part in parts:
        here = x_TC.new_empty((len(x_TC), part.stop - part.first))
        multiply_held(part.held, x_TC, here, None if bias is None else bias[part.first : part.stop])
        out_TR[:, part.first : part.stop] = here


def _multiply_tiles(x_TC: Tensor, content: Content, bias: Tensor | None, out_TR: Tensor) -> None:
    rows, columns = content.rows_count, content.columns
    at_once = _LARGE_TILE_BYTES if is_there(x_TC) else TILE_BYTES
    step = max(1, at_once // (columns * x_TC.itemsize))
    scratch = _scratch(min(step, rows), columns, x_TC)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        tile = scratch[: stop - first]
        content.unpack(first, stop, tile)
        out_TR[:, first:stop] = F.linear(x_TC, tile, None if bias is None else bias[first:stop])


def multiply_rows_by(x: Tensor, content: Content) -> Tensor:
    """Multiply by a weight W whose rows are inputs: x W, the gradient of `multiply`.

    Args:
        x: [T, R], of the weight's dtype.
        content: The weight: one matrix of R rows.

    Returns:
        [T, C].
    """
    rows, columns = content.form.rows, content.form.columns
    step = max(1, _LARGE_TILE_BYTES // (columns * x.itemsize))
    if step >= rows:
        return x @ content.rows(0, rows)
    total = x.new_zeros(len(x), columns, dtype=torch.float32)
    for first in range(0, rows, step):
        stop = min(first + step, rows)
        total += x[:, first:stop] @ content.rows(first, stop)
    return total.to(x.dtype)


def multiply_experts(x: Tensor, content: Content, ends: Tensor) -> Tensor:
    """Multiply tokens, sorted by expert, by the weights of their experts; others are not decoded.

    Args:
        x: [T, inputs], of the weight's dtype.
        content: The weights, [experts, inputs, outputs].
        ends: [experts], the number of the token behind each expert's last one.

    Returns:
        [T, outputs]; 0 for tokens behind the last expert's.
    """
    out = x.new_zeros(len(x), content.form.shape[-1])
    start = 0
    for expert, stop in zip(content.matrices, ends.tolist(), strict=True):
        if stop > start:
            times = multiply if expert.form.transposed else multiply_rows_by
            out[start:stop] = times(x[start:stop], expert)
        start = stop
    return out


def look_up(ids: Tensor, content: Content) -> Tensor:
    """The rows of some numbers, [..., C], as torch's embedding.

    Args:
        ids: Numbers of rows, of any shape.
        content: The weight: one matrix.

    Raises:
        IndexError: If there is no such row, on the CPU.
    """
    columns = content.columns
    rows = ids.reshape(-1).long().contiguous()
    out = torch.empty(len(rows), columns, dtype=content.dtype, device=content.device)
    if len(content.parts) == 1:
        gather(content.parts[0].held, rows, out)
    else:
        for at, row in enumerate(rows.tolist()):
            if not 0 <= row < content.rows_count:
                raise IndexError(f"rows must be from 0 to {content.rows_count - 1}")
            content.unpack(row, row + 1, out[at : at + 1])
    return out.view(*ids.shape, columns)


def _scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for rows, which layers share: [rows, columns], as another tensor.

    This thread uses the CPU's again. A GPU's comes from torch's allocator, which gives it to the
    next layer on the same stream, but to no other stream before kernels of this one are done with
    it, and has a pool for each CUDA graph.
    """
    if is_there(like):
        return like.new_empty(rows, columns)
    wanted = rows * columns * like.itemsize
    buffers: dict[torch.device, Tensor] | None = getattr(_this_thread, "buffers", None)
    if buffers is None:
        buffers = _this_thread.buffers = {}
    buffer = buffers.get(like.device)
    if buffer is None or buffer.numel() < wanted:
        buffer = buffers[like.device] = like.new_empty(wanted, dtype=torch.uint8)
    return buffer[:wanted].view(like.dtype).view(rows, columns)
