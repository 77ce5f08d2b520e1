"""Products with packed weights, and rows looked up in them.

T tokens, C columns of a row, R rows.
"""

import threading
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from emp_kernels.held_dispatch import multiply_rows
from emp_kernels.numbers import patterns_of_tensor
from torch import Tensor

from emp_llm.resident.content import Content

__all__ = ["look_up", "multiply", "multiply_rows_by"]

FEW_TOKENS: Final = 16
"""Tokens that packed rows are multiplied by; for more, rows are decoded and torch multiplies."""

TILE_BYTES: Final = 1 << 20
"""Bytes of the rows that are decoded at a time: they stay in a core's cache."""

_LARGE_TILE_BYTES: Final = 64 << 20
"""The same where sums over tiles are rounded: most weights are one tile."""

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
    rows, columns = content.form.rows, content.form.columns
    x_TC = x.reshape(-1, columns)
    out_TR = x_TC.new_empty(len(x_TC), rows)
    if len(x_TC) <= FEW_TOKENS and content.multiplies:
        _multiply_few(x_TC.contiguous(), content, bias, out_TR)
    else:
        _multiply_tiles(x_TC, content, bias, out_TR)
    return out_TR.view(*x.shape[:-1], rows)


def _multiply_few(x_TC: Tensor, content: Content, bias: Tensor | None, out_TR: Tensor) -> None:
    """Each row is decoded once, and multiplied by all tokens on the way."""
    x, out = patterns_of_tensor(x_TC), patterns_of_tensor(out_TR)
    adds = None if bias is None else patterns_of_tensor(bias.contiguous())
    parts = content.parts
    if len(parts) == 1:
        multiply_rows(parts[0].held, x, out, adds)
        return
    for part in parts:
        here = np.empty((len(x), part.stop - part.first), x.dtype)
        some = None if adds is None else adds[part.first : part.stop]
        multiply_rows(part.held, x, here, some)
        out[:, part.first : part.stop] = here


def _multiply_tiles(x_TC: Tensor, content: Content, bias: Tensor | None, out_TR: Tensor) -> None:
    rows, columns = content.form.rows, content.form.columns
    step = max(1, TILE_BYTES // (columns * x_TC.itemsize))
    scratch = _scratch(min(step, rows), columns, x_TC.dtype)
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


def look_up(ids: Tensor, content: Content) -> Tensor:
    """The rows of some numbers, [..., C], as torch's embedding.

    Args:
        ids: Numbers of rows, of any shape.
        content: The weight: one matrix.
    """
    out = torch.empty(*ids.shape, content.form.columns, dtype=content.dtype)
    lines = out.view(-1, content.form.columns)
    for at, row in enumerate(ids.reshape(-1).tolist()):
        content.unpack(row, row + 1, lines[at : at + 1])
    return out


def _scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for rows, which this thread uses again."""
    wanted = rows * columns * dtype.itemsize
    buffer: Tensor | None = getattr(_this_thread, "scratch", None)
    if buffer is None or buffer.numel() < wanted:
        buffer = _this_thread.scratch = torch.empty(wanted, dtype=torch.uint8)
    return buffer[:wanted].view(dtype).view(rows, columns)
