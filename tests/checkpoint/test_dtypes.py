"""The table of dtypes agrees with torch and with the formats that the kernels know."""

import pytest
import torch
from emp_kernels.numbers import FORMATS

from emp_llm.checkpoint.dtypes import ITEM_BITS, PRUNABLE, TORCH_NAMES, item_bytes


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_a_dtype_of_torch_has_items_as_long_as_safetensors_says(dtype: str) -> None:
    if not hasattr(torch, TORCH_NAMES[dtype]):
        pytest.skip(f"torch {torch.__version__} is older than {dtype}")
    assert getattr(torch, TORCH_NAMES[dtype]).itemsize == item_bytes(dtype)


def test_torch_has_every_dtype_of_whole_bytes() -> None:
    assert {dtype for dtype, bits in ITEM_BITS.items() if bits >= 8} == TORCH_NAMES.keys()


def test_what_can_be_pruned_is_what_the_kernels_know() -> None:
    assert set(PRUNABLE) == FORMATS.keys()
