"""What is asked of tensors before a kernel takes them: kernels themselves check no bounds."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from emp_kernels.numbers import NumberFormat, torch_integers

__all__ = [
    "MOST_TOKENS",
    "as_patterns",
    "check_decoded",
    "check_product",
    "count_processors",
    "current",
    "in_whole_words",
]

MOST_TOKENS = 16
"""Tokens that packed weights are multiplied with as they are. For more, they are better unpacked to
a buffer that layers share, and multiplied by torch."""


def check_product(
    number_format: NumberFormat,
    shape: tuple[int, int],
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Check that tensors fit a product with weights of that shape, [R, C].

    Raises:
        ValueError: If a shape or dtype is wrong, a tensor lies scattered, or tokens are too many.
    """
    (rows, columns), tokens = shape, len(x)
    _check("x", x, (tokens, columns), number_format)
    _check("the result", out, (tokens, rows), number_format)
    if bias is not None:
        _check("the bias", bias, (rows,), number_format)
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"x has {tokens} tokens; it must have 1 to {MOST_TOKENS}")


def _check(
    name: str, tensor: torch.Tensor, shape: Sequence[int], number_format: NumberFormat
) -> None:
    dtype = number_format.torch_dtype
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; it "
            f"must be {dtype} {shape}, contiguous"
        )


def check_decoded(number_format: NumberFormat, shape: tuple[int, int], out: torch.Tensor) -> None:
    """Check that rows can be decoded to a tensor.

    Raises:
        ValueError: If its shape or dtype is wrong, or the columns of a row lie scattered.
    """
    dtype = number_format.torch_dtype
    if out.shape != shape or out.dtype != dtype or out.stride(1) != 1:
        raise ValueError(
            f"rows are to be decoded to {out.dtype} {tuple(out.shape)} with strides "
            f"{out.stride()}; that must be {dtype} {shape}, the columns of a row side by side"
        )


def in_whole_words(records: torch.Tensor) -> torch.Tensor:
    """Records that start and end with a word of four bytes: themselves, or else a copy."""
    if records.is_contiguous() and not (records.numel() % 4 or records.data_ptr() % 4):
        return records
    copy = records.new_zeros(-(-records.numel() // 4) * 4)
    copy[: records.numel()] = records
    return copy


def as_patterns(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bit patterns, int16 or int32, over the same memory."""
    return tensor.view(torch_integers(tensor.itemsize))


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def count_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where Triton's interpreter stands in for one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
